"""A cascade with its models: two recordings, a lazy run over a list, and what its directory refuses."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import soundfile
from commands import arrays_of, run

import kmq_jax
from kmq_jax import quant
from kmq_jax.cascade.policy import read_policy
from kmq_jax.core.errors import UserError
from kmq_jax.data import source, trials
from kmq_jax.models import registry
from kmq_jax.models.speaker_model import SpeakerModel, load_model, save_model

SETTINGS = {"width": 4, "blocks": [1, 1, 1, 1], "embedding_size": 8}
DATA = "synthetic:dev?speakers=6&utterances=4"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """`full.kmq`, `nested.kmq` (2, 3, 4 bits), embeddings of 2 and 3 bits and full precision, and a cascade of them."""
    directory = tmp_path_factory.mktemp("cascade")
    variables = jax.device_get(registry.initialize(registry.build("wespeaker_resnet34", **SETTINGS), jax.random.key(0)))
    full = SpeakerModel("wespeaker_resnet34", SETTINGS, "wespeaker", variables)
    save_model(directory / "full.kmq", full)
    rules = [quant.QuantRule("/kernel$", quant.QuantSpec(4, coarse=(2, 3), only_smaller=False))]
    packed = {**variables, "params": quant.quantize_params(variables["params"], rules)}
    save_model(directory / "nested.kmq", dataclasses.replace(full, variables=packed))
    with pytest.MonkeyPatch.context() as patch:
        for name, bits in (("nested", 2), ("nested", 3), ("full", None)):
            flags = [f"--model={directory / name}.kmq", f"--data={DATA}", f"--out={directory / f'{bits or 32}.npz'}"]
            assert run(patch, "extract", *flags, *([f"--bits={bits}"] if bits else [])) == 0
        given = [f"--stage={bits}:{directory / f'{bits}.npz'}" for bits in (2, 3, 32)]
        given += [f"--model={b}:{directory / n}.kmq" for b, n in ((2, "nested"), (3, "nested"), (32, "full"))]
        given += [f"--reference={directory / '32.npz'}", f"--trials={DATA}", "--replicates=0"]
        given += [f"--out={directory / 'policy.json'}", f"--cascade={directory / 'cascade'}"]
        assert run(patch, "calibrate", *given) == 0
    return directory


def test_widths_of_one_nested_model_share_its_file(place):
    assert sorted(path.name for path in (place / "cascade").iterdir()) == [
        "2.kmq", "32.kmq", "cascade.json", "policy.json",
    ]  # fmt: skip
    assert read_policy(place / "policy.json").vad is False
    costs = kmq_jax.load_cascade(place / "cascade").costs()
    whole = [quant.size_bytes(load_model(place / name).variables).total for name in ("nested.kmq", "full.kmq")]
    assert costs["resident_bytes"] == sum(whole)
    assert set(costs["macs"].values()) == {registry.macs(load_model(place / "full.kmq").network(), 300)}


@pytest.mark.parametrize("enrolment", ["each", "top"])
def test_a_lazy_run_decides_as_embeddings_of_every_width_do(place, tmp_path, monkeypatch, enrolment):
    policy = dataclasses.replace(read_policy(place / "cascade" / "policy.json"), enrolment=enrolment)
    directory = tmp_path / "cascade"
    directory.mkdir()
    for file in (place / "cascade").iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    policy.save(directory / "policy.json")
    common = [f"--trials={DATA}", f"--reference={place / '32.npz'}", "--replicates=0"]
    outs = {name: [f"--out={tmp_path / name}.csv", f"--json={tmp_path / name}.json"] for name in ("lazy", "all")}
    assert run(monkeypatch, "cascade", f"--cascade={directory}", f"--data={DATA}", *common, *outs["lazy"]) == 0
    stages = [f"--stage={bits}:{place / f'{bits}.npz'}" for bits in (2, 3, 32)]
    assert run(monkeypatch, "cascade", f"--policy={directory / 'policy.json'}", *stages, *common, *outs["all"]) == 0
    lazy, whole = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("lazy", "all"))
    assert 0.1 < whole["resolved"]["2"] < 0.9 and whole["resolved"]["32"] > 0.05
    for key in ("resolved", "utterance_bits", "sequential_bits", "harmful_flip_rate"):
        assert lazy[key] == pytest.approx(whole[key])
    rows = [np.genfromtxt(tmp_path / f"{name}.csv", delimiter=",", skip_header=1) for name in ("lazy", "all")]
    np.testing.assert_allclose(rows[0][:, 2:], rows[1][:, 2:], atol=1e-5)
    assert 0 < lazy["embedded"]["2"] <= 24 and lazy["seconds"] > 0


def test_a_recording_nobody_doubts_is_not_embedded_again(place):
    cascade = kmq_jax.load_cascade(place / "cascade")
    stop = (cascade.policy.threshold, cascade.policy.threshold)
    cascade.policy = dataclasses.replace(cascade.policy, gates=(stop, stop))
    utterances = source.open_source(DATA)
    pairs = trials.open_trials(DATA, utterances)
    found = cascade.score(utterances, pairs)
    used = len(np.union1d(pairs.enrol, pairs.test))
    assert found.embedded == {2: used, 3: 0, 32: 0}
    assert not found.scores[1:].any()


def test_stages_may_be_different_networks(place, tmp_path, monkeypatch):
    settings = {**SETTINGS, "embedding_size": 6}
    variables = registry.initialize(registry.build("resnet18", **settings), jax.random.key(1))
    packed = {**variables, "params": quant.quantize_params(variables["params"], quant.QuantSpec(2))}
    save_model(tmp_path / "small.kmq", SpeakerModel("resnet18", settings, "kiwano", jax.device_get(packed)))
    small = [f"--model={tmp_path / 'small.kmq'}", f"--data={DATA}", f"--out={tmp_path / '2.npz'}"]
    assert run(monkeypatch, "extract", *small) == 0
    stages = [f"--stage=2:{tmp_path / '2.npz'}", f"--stage=32:{place / '32.npz'}"]
    common = [f"--reference={place / '32.npz'}", f"--trials={DATA}", "--replicates=0"]
    models = [f"--model=2:{tmp_path / 'small.kmq'}", f"--model=32:{place / 'full.kmq'}"]
    out = [f"--out={tmp_path / 'policy.json'}", f"--cascade={tmp_path / 'cascade'}"]
    assert run(monkeypatch, "calibrate", *stages, *models, *common, *out) == 0
    whole, lazy = tmp_path / "whole.json", tmp_path / "lazy.json"
    assert run(monkeypatch, "cascade", f"--policy={tmp_path / 'policy.json'}", *stages, *common, f"--json={whole}") == 0
    place_of = [f"--cascade={tmp_path / 'cascade'}", f"--data={DATA}"]
    assert run(monkeypatch, "cascade", *place_of, *common, f"--json={lazy}") == 0
    whole, lazy = (json.loads(path.read_text()) for path in (whole, lazy))
    assert lazy["resolved"] == pytest.approx(whole["resolved"]) and lazy["eer"] == pytest.approx(whole["eer"])
    small, full = (lazy["macs"][bits] for bits in ("2", "32"))
    assert small != full
    assert lazy["sequential_macs"] == pytest.approx(small + lazy["resolved"]["32"] * full)
    wave = source.open_source(DATA).load(0)
    assert kmq_jax.load_cascade(tmp_path / "cascade").verify((wave, 16000), (wave, 16000)).decision


def test_two_recordings(place, tmp_path, monkeypatch, capsys):
    utterances = source.open_source(DATA)
    rows = [0, 1, len(utterances) - 1]
    for row in rows:
        soundfile.write(tmp_path / f"{row}.wav", utterances.load(row), source.SAMPLE_RATE, subtype="FLOAT")
    cascade = kmq_jax.load_cascade(place / "cascade")
    by_file = cascade.verify(tmp_path / "0.wav", tmp_path / f"{rows[-1]}.wav")
    by_wave = cascade.verify(*((utterances.load(row), source.SAMPLE_RATE) for row in (0, rows[-1])))
    assert by_file.score == pytest.approx(by_wave.score, abs=1e-6)
    assert by_file.decision == (by_file.score >= cascade.policy.threshold)
    same = cascade.verify(tmp_path / "0.wav", tmp_path / "0.wav")
    assert same.decision and same.score == pytest.approx(max(cascade.policy.maps[0].y), abs=1e-6) and same.bits == 2
    out = tmp_path / "v.json"
    flags = [f"--cascade={place / 'cascade'}", f"--enrol={tmp_path}/0.wav", f"--test={tmp_path}/{rows[-1]}.wav"]
    assert run(monkeypatch, "verify", *flags, f"--json={out}") == 0
    found = json.loads(out.read_text())
    assert set(found) == {"decision", "score", "llr", "bits", "seconds"}
    assert (found["decision"], found["bits"]) == (by_file.decision, by_file.bits)
    line = capsys.readouterr().out.strip()
    assert "\n" not in line and line.startswith("same speaker" if found["decision"] else "different speakers")


def test_several_recordings_of_the_claimed_speaker_are_averaged(place, tmp_path, monkeypatch):
    utterances, cascade = source.open_source(DATA), kmq_jax.load_cascade(place / "cascade")
    policy = cascade.policy
    cascade.policy = dataclasses.replace(policy, gates=((-9.0, 9.0),) * (len(policy.bits) - 1))  # to the last level
    waves = [(utterances.load(row), source.SAMPLE_RATE) for row in (0, 1, 5)]
    table = arrays_of(place / "32.npz")["embeddings"][[0, 1, 5]].astype(np.float64)
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    mean = unit[:2].mean(axis=0)
    found = cascade.verify(waves[:2], waves[2])
    assert found.score == pytest.approx(mean @ unit[2] / np.linalg.norm(mean), abs=1e-4) and found.bits == 32
    for row, (wave, _) in enumerate(waves):
        soundfile.write(tmp_path / f"{row}.wav", wave, source.SAMPLE_RATE, subtype="FLOAT")
    scores = {}
    for rows in ((0,), (1,), (0, 1), (1, 0)):
        flags = [f"--cascade={place / 'cascade'}", f"--test={tmp_path}/2.wav", f"--json={tmp_path}/v.json"]
        assert run(monkeypatch, "verify", *flags, *(f"--enrol={tmp_path}/{row}.wav" for row in rows)) == 0
        scores[rows] = json.loads((tmp_path / "v.json").read_text())["score"]
    assert scores[0, 1] == pytest.approx(scores[1, 0]) and scores[0, 1] not in (scores[0,], scores[1,])
    with pytest.raises(UserError, match="no recording of the claimed speaker"):
        cascade.verify([], waves[0])


def test_a_cascade_beside_single_models_in_one_table(place, tmp_path, monkeypatch, capsys):
    from kmq_jax.cli import bench
    from kmq_jax.metrics.detection import eer
    from kmq_jax.scoring.cosine import cosine_scores
    from kmq_jax.study.bench_tables import lazy_table

    nested, lists = str(place / "nested.kmq"), [f"--data={DATA}", f"--trials={DATA}"]
    flags = [f"--cascade={place / 'cascade'}", *lists, *lists, f"--beside={nested}", "--uses=0", "--repeats=1"]
    bench.run("lazy", [*flags, "--engine=onnxruntime", "--compute=float32", f"--json={tmp_path / 'l.json'}"])
    out, found = capsys.readouterr().out, json.loads((tmp_path / "l.json").read_text())
    assert len(found["sets"]) == 2 and out.count("microseconds a trial") == 2
    one, cascade = found["sets"][0], kmq_jax.load_cascade(place / "cascade")
    rows = {row["system"]: row for row in one["rows"]}
    assert list(rows) == ["cascade", "full precision", nested]
    pairs = trials.open_trials(DATA, source.open_source(DATA))
    full = arrays_of(place / "32.npz")["embeddings"]
    scores = cosine_scores(full, full, pairs.enrol, pairs.test)
    assert rows["full precision"]["eer"] == pytest.approx(100 * eer(scores, pairs.label)[0], abs=0.3)
    assert rows["full precision"]["harmful_flips"] == 0 and rows["full precision"]["ratio"] == 1
    own = rows["cascade"]
    assert own["embedded"]["2"] == one["recordings"] == 24 and one["trials"] == len(pairs)
    assert rows["cascade"]["bytes"] == cascade.costs()["resident_bytes"] > rows[nested]["bytes"]
    each = rows["full precision"]["macs_a_recording"]
    assert rows[nested]["macs_a_recording"] == each
    assert rows["cascade"]["macs_a_recording"] == pytest.approx(each * sum(own["embedded"].values()) / 24)
    assert rows["cascade"]["seconds_a_trial"] == pytest.approx(rows["cascade"]["seconds"] / len(pairs))
    assert 0 <= own["escalated"] <= 1 and own["detector_microseconds_a_trial"] > 0
    as_good = [row for row in (rows[nested], rows["full precision"]) if row["seconds"] <= own["seconds"]]
    assert set(own["beaten_by"]) == {r["system"] for r in as_good if r["harmful_flips"] <= own["harmful_flips"]}
    table = lazy_table(found)
    losing = [row.rsplit("|", 2)[1].strip() for row in table.splitlines() if "| cascade |" in row]
    assert losing == [", ".join(one["rows"][0]["beaten_by"]) or "none" for one in found["sets"]]
    assert table.count("| cascade |") == 2 and f"{rows['cascade']['eer']:.2f}" in table
    with pytest.raises(UserError, match="trials"):
        bench.run("lazy", [*flags, f"--data={DATA}"])


def test_models_are_loaded_once_and_only_when_needed(place, monkeypatch):
    loaded = []
    load = load_model
    monkeypatch.setattr("kmq_jax.cascade.verifier.load_model", lambda path: loaded.append(path.name) or load(path))
    cascade = kmq_jax.load_cascade(place / "cascade")
    assert not loaded
    wave = (source.open_source(DATA).load(0), source.SAMPLE_RATE)
    for _ in range(2):
        assert cascade.verify(wave, wave).bits == 2
    assert loaded == ["2.kmq"]


def test_what_a_cascade_refuses(place, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="is no cascade"):
        kmq_jax.load_cascade(tmp_path)
    directory = tmp_path / "cascade"
    directory.mkdir()
    for file in (place / "cascade").iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    wave = (source.open_source(DATA).load(0), source.SAMPLE_RATE)
    (directory / "2.kmq").write_bytes((place / "full.kmq").read_bytes())
    with pytest.raises(UserError, match="2.kmq is not the model"):
        kmq_jax.load_cascade(directory).verify(wave, wave)
    with pytest.raises(UserError, match="too short"):
        kmq_jax.load_cascade(place / "cascade").verify(wave, (wave[0][:100], source.SAMPLE_RATE))
    index = json.loads((directory / "cascade.json").read_text())
    for name in ("../full.kmq", "/etc/passwd", "absent.kmq", 3):
        (directory / "cascade.json").write_text(json.dumps(index | {"models": index["models"] | {"3": name}}))
        with pytest.raises(UserError, match="no file beside it"):
            kmq_jax.load_cascade(directory)
    (directory / "cascade.json").write_text("[]")
    with pytest.raises(UserError, match="does not name a model"):
        kmq_jax.load_cascade(directory)
    assert run(monkeypatch, "cascade", f"--cascade={place / 'cascade'}", f"--trials={DATA}") == 2
    assert "--data" in capsys.readouterr().err
    given = [f"--stage={b}:{place / f'{b}.npz'}" for b in (2, 32)] + [f"--model=2:{place / 'nested.kmq'}"]
    given += [f"--reference={place / '32.npz'}", f"--trials={DATA}", f"--out={tmp_path}/p.json"]
    assert run(monkeypatch, "calibrate", *given, f"--cascade={tmp_path}/c") == 2
    assert "one --model=BITS:MODEL for each --stage" in capsys.readouterr().err
