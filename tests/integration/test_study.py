"""The study command on a tiny network and synthetic voices."""

import functools
import json
import re
from pathlib import Path

import commands
import jax
import numpy as np
import own_network  # which registers the network
import pytest
import recordings
from own_config import plain

import kmq_jax
from kmq_jax.core.errors import UserError
from kmq_jax.data.source import open_source
from kmq_jax.models import registry
from kmq_jax.models.speaker_model import SpeakerModel, save_model
from kmq_jax.scoring.run import score
from kmq_jax.study import cascades, pipeline, plan, study_tables
from kmq_jax.study.config import paper_study, smoke_study, study_config
from kmq_jax.study.networks import Network
from kmq_jax.study.options import EvaluationSet
from kmq_jax.study.steps import Steps
from kmq_jax.training.config import default_config

ROOT = Path(__file__).parents[2]
SETTINGS = {"features": 81, "embedding_size": 8, "width": 8}


def test_a_study_without_evaluation_sets_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="`evaluate` names no evaluation set"):
        pipeline.study(study_config(default_config("resnet18")), tmp_path)


@pytest.mark.parametrize(
    "key", ["data.train", "data.noise", "study.evaluate.voices.data", "study.evaluate.voices.trials"]
)
def test_what_is_read_hours_later_is_found_missing_before_the_work(tmp_path, key):
    config = smoke_study(study_config(default_config("own_tdnn")))
    config.update_from_flattened_dict({key: str(tmp_path / "absent")})
    with pytest.raises(UserError, match=r"^no (data|list of trials or models) at .*absent: no such file"):
        pipeline.study(config, tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_every_model_is_measured_and_nothing_is_done_twice(tmp_path, capfd):
    config = plain(smoke_study(study_config(default_config("own_tdnn"))))
    config.validation.data = ""
    config.average_last = 0
    config.study.update(bits=(2,), nested=False, cascades=(("distilled", (2, 32)),), groups={"all": ("voices",)})
    config.study.published = {"all": {"2": 1.5, "cascade": 1.25}}
    config.study.diagnosis.update(retention_utterances=8, layer_utterances=0, hessian_draws=0)
    summary = pipeline.study(config, tmp_path)
    assert json.loads((tmp_path / "study.json").read_text()) == summary
    rows = {(row["method"], row["bits"]): row for row in summary["rows"]}
    assert set(rows) == {("full precision", 32), ("without training", 2), ("trained", 2)}
    assert all(0 <= row["sets"]["voices"]["eer"] <= 100 for row in rows.values())
    full, low = rows["full precision", 32]["sets"]["voices"], rows["trained", 2]["sets"]["voices"]
    assert low["eer_change"] == pytest.approx(low["eer"] - full["eer"]) and "eer_change" not in full
    assert len(low["eer_change_ci95"]) == len(low["min_dcf_change_ci95"]) == 2 and low["utterances"] > 0
    assert rows["trained", 2]["bytes"] < rows["full precision", 32]["bytes"]
    check_report(tmp_path, summary)
    lines = study_tables.study_table(summary).splitlines()
    assert len(lines) == 2 + len(rows) + 2 and lines[0].startswith("| bits | weights | KiB | voices")
    assert re.fullmatch(r"voices: [\d,]+ trials, [\d,]+ of them targets, \d+ speakers, [\d,]+ utterances\.", lines[-1])

    works = plan.planned(pipeline.options_of(config), config.epochs)
    planned = [work.kind for work in works]
    known = json.loads((tmp_path / "steps.json").read_text())
    assert all(work.name in ("", name) for work, name in zip(works, known)) and works[-1].name == ""
    assert [work.name for work in works if work.kind == "embed"] == [name for name in known if name[:5] == "embed"]
    assert [name.partition("-")[0] for name in known] == planned and all(
        step["seconds"] >= 0 for step in known.values()
    )
    told = capfd.readouterr().err
    assert f"[1/{len(planned)}] fp32: begins\n" in told and re.search(rf"\[{len(planned)}/.* about .* left\n", told)
    (start,) = json.loads((tmp_path / "starts.json").read_text())
    assert start["jax"] == jax.__version__ and "python" in start["command"]

    assert pipeline.study(config, tmp_path) == summary
    assert "begins" not in capfd.readouterr().err and len(json.loads((tmp_path / "starts.json").read_text())) == 1
    config.study.epochs["2"] = 0.5

    def begun(only=()):
        pipeline.study(config, tmp_path, only)
        return set(re.findall(r"^\[\d+/\d+\] (\S+): begins", capfd.readouterr().err, re.M))

    with pytest.raises(UserError, match=r"--only \(=kmqat-2\) must be of fp32, distilled-2$"):
        begun(("kmqat-2",))
    # One network alone, as a process of several makes it; then what is left.
    of_one = ("embed-distilled-2-2-voices", "score-distilled-2-2-voices", "compare-distilled-2-2-voices")
    assert begun(("distilled-2",)) == {"distilled-2", *of_one}
    calibrated = {f"calibrate-distilled-2-32{half}" for half in ("", "-a", "-b")}
    calibrated |= {f"cascade-distilled-2-32-voices-{half}" for half in "ab"}
    assert begun() == {"det-voices", "diagnose-voices"} | calibrated


def check_report(workdir, summary):
    """The page is self-contained, and holds what was measured and what was published."""
    page = (workdir / "report.html").read_text()
    loads = re.findall(r'(?:src|href)="([^"]*)"', page)
    outside = [place for place in loads if not place.startswith(("data:image/png", "#"))]
    models = {"fp32", "ptq-2.kmq", "distilled-2/model.kmq"}
    told = {"study.json", "steps.json", "starts.json"}
    assert set(outside) == models | told | {"diagnosis/voices/report.html", "cascades/distilled-2-32"}
    assert all((workdir / place).exists() for place in outside)
    assert {'alt="Misses against', 'alt="Loss over'} <= set(re.findall(r'alt="\w+ \w+', page))
    of = summary["rows"][0]["sets"]["voices"]
    counted = f"{of['trials']:,} trials of {of['speakers']} speakers, {of['utterances']:,} utterances"
    assert f"<figcaption>Scores by class, on voices: {counted}. Filled" in page and f"voices ({counted})" in page
    for row in summary["rows"]:
        assert f"{row['sets']['voices']['eer']:.2f}" in page
    (cascade,) = summary["cascades"]
    halves = [json.loads(path.read_text()) for path in sorted(workdir.glob("cascades/distilled-2-32-?/cascade-*.json"))]
    assert len(halves) == 2
    for key in ("eer", "sequential_bits", "harmful_flip_rate"):
        assert cascade["sets"]["voices"][key] == pytest.approx(sum(half[key] for half in halves) / 2)
    compared = re.findall(r'="published">([\d.]+)</td>\s*<td data-column="measured here">([\d.]+)<', page)
    assert compared == [
        ("1.500", f"{summary['rows'][-1]['groups']['all']:.3f}"),
        ("1.250", f"{cascade['groups']['all']:.3f}"),
    ]
    verifier = kmq_jax.load_cascade(workdir / cascade["directory"])
    wave = (np.random.default_rng(0).standard_normal(16000).astype(np.float32), 16000)
    assert verifier.verify(wave, wave).decision


def test_halves_share_no_speaker_and_keep_every_trial_within(tmp_path):
    data = "synthetic:dev?speakers=9&utterances=3"
    halves = cascades.halve(Steps(tmp_path), EvaluationSet(name="voices", data=data, trials=data))
    table = open_source(data)
    owner = dict(zip(table.ids, table.speakers))
    seen = []
    for name in cascades.HALVES:
        lines = [line.split() for line in (halves / f"{name}.txt").read_text().splitlines()]
        assert {int(label) == (owner[a] == owner[b]) for label, a, b in lines} == {True}
        seen.append({owner[name] for _, *pair in lines for name in pair})
    assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == 9


def test_cnceleb_is_embedded_and_scored_by_its_enrolment_models(tmp_path):
    """As released, at the places of the paper's studies."""
    config = paper_study(default_config("own_tdnn"))
    config.study.root = str(tmp_path)
    recordings.cnceleb(tmp_path / "cnceleb")
    options, directory = pipeline.options_of(config), Steps(tmp_path / "study")
    made = SpeakerModel(
        "own_tdnn", SETTINGS, "kiwano", registry.initialize(own_network.Tdnn(**SETTINGS), jax.random.key(0))
    )
    path = directory.run("fp32", 0, (), "fp32.kmq", functools.partial(save_model, model=made))
    network, evaluated = Network("fp32", "full precision", 32, path), options.sets["cnceleb"]
    embedded = dict(np.load(pipeline.embed(directory, network, evaluated, options)))
    assert pipeline.measure_on(directory, network, evaluated)["trials"] == 2
    unit = {name: one / np.linalg.norm(one) for name, one in zip(embedded["ids"].tolist(), embedded["embeddings"])}
    model = unit["id00800/singing-01-001.wav"] + unit["id00800/interview-01-002.wav"]
    tests = unit["test/id00800-singing-01-005.wav"], unit["test/id00801-movie-01-001.wav"]
    expected = [float(model @ test / np.linalg.norm(model)) for test in tests]
    file = pipeline.place_of(directory, network, evaluated)
    scores = score(file, evaluated.trials, enrol_models=evaluated.models).scores
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert abs(expected[0] - float(unit["enroll/id00800-enroll.wav"] @ tests[0])) > 1e-3  # which is another model


def test_a_study_of_a_set_that_is_not_there(tmp_path):
    config = smoke_study(study_config(default_config("resnet18")))
    config.study.calibrate = "elsewhere"
    with pytest.raises(UserError, match="'elsewhere' is none of the evaluation sets voices"):
        pipeline.study(config, tmp_path)


def test_a_configuration_that_is_not_there(monkeypatch, capsys):
    assert commands.run(monkeypatch, "study", "--config=configs/nowhere.py", "--workdir=x") == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "nowhere" in told
