"""diagnose as a command: a tiny network and its quantized versions, a perfect copy, embeddings, and mistakes."""

import csv
import dataclasses
import html.parser
import json
import re

import commands
import jax
import numpy as np
import pytest

from kmq_jax import quant
from kmq_jax.data.source import open_source
from kmq_jax.models import registry
from kmq_jax.models.speaker_model import SpeakerModel, embed_all, load_model, save_model

SETTINGS = {"width": 4, "blocks": [1, 1, 1, 1], "embedding_size": 8}
DATA = "synthetic:dev?speakers=6&utterances=4"
TABLES = {
    "systems", "drift", "flips", "speakers", "utterances", "groups", "drift_causes", "worst_trials",
    "retention", "layers", "blocks", "correlations",
}  # fmt: skip


def run(monkeypatch, *flags):
    return commands.run(monkeypatch, "diagnose", *flags)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A directory of one network: `full.kmq`, `2.kmq`, `3.kmq`, and `nested.kmq` with 2 and 4 bits."""
    place = tmp_path_factory.mktemp("models")
    variables = jax.device_get(registry.initialize(registry.build("wespeaker_resnet34", **SETTINGS), jax.random.key(0)))
    full = SpeakerModel("wespeaker_resnet34", SETTINGS, "wespeaker", variables)
    save_model(place / "full.kmq", full)
    specs = {
        "2": quant.QuantSpec(2),
        "3": quant.QuantSpec(3),
        "nested": quant.QuantSpec(4, coarse=(2,), only_smaller=False),
    }
    for name, spec in specs.items():
        params = quant.quantize_params(variables["params"], [quant.QuantRule("/kernel$", spec)])
        save_model(place / f"{name}.kmq", dataclasses.replace(full, variables={**variables, "params": params}))
    return place


def flags(models, *quantized, **more):
    given = [f"--reference={models / 'full.kmq'}", *(f"--quantized={b}:{models / f'{n}.kmq'}" for b, n in quantized)]
    options = {"data": DATA, "trials": DATA, "retention_utterances": 16, "layer_utterances": 16, "hessian_draws": 2,
               "hessian_utterances": 2, "hessian_seconds": 1.0, "replicates": 40, "max_seconds": 2} | more  # fmt: skip
    return [*given, *(f"--{name}={value}" for name, value in options.items() if value is not None)]


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Page(html.parser.HTMLParser):
    """Collects what a page would load from elsewhere, and whether its tags are balanced."""

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.images = [], [], 0

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href") and not value.startswith(("#", "data:")):
                self.loads.append(value)
        self.images += tag == "img"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def result(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    patch = pytest.MonkeyPatch()
    assert run(patch, *flags(models, (2, "2"), (3, "3"), (4, "nested")), "--threshold=0.5", f"--out={out}") == 0
    patch.undo()
    return out


def test_every_file_is_there_and_the_report_needs_nothing_else(result):
    assert {path.stem for path in result.glob("*.csv")} == TABLES
    assert len(list(result.glob("figure-*.png"))) == 8
    page = Page()
    page.feed((result / "report.html").read_text())
    assert page.open == [] and page.loads == [] and page.images == 8
    text = (result / "report.html").read_text()
    assert "url(" not in text and "@import" not in text and "<script" not in text
    assert not re.search(r"\b(nan|None)\b", re.sub(r'"data:[^"]*"', "", text))


def test_tables_and_json_agree(result):
    found = json.loads((result / "diagnosis.json").read_text())
    assert set(found) == {"notes", *TABLES} and found["notes"]["bits"] == [4, 3, 2]
    for name in TABLES:
        rows = read(result / f"{name}.csv")
        assert len(rows) == len(found[name])
        numbers = [key for key, value in found[name][0].items() if isinstance(value, float)]
        for row, other in zip(rows, found[name]):
            for key in numbers:
                if other[key] is not None:
                    assert float(row[key]) == other[key]


def test_what_the_models_must_show(result):
    found = json.loads((result / "diagnosis.json").read_text())
    by_bits = {b: [row for row in found["layers"] if row["bits"] == b] for b in (4, 3, 2)}
    layers = [row["layer"] for row in by_bits[2]]
    assert layers[0] == "stem/conv" and layers[-1] == "head/linear" and len(layers) == 13
    # A shortcut of few weights would not shrink at every number of bits, and then stays as it is.
    odd = {row["layer"] for b, rows in by_bits.items() for row in rows if row["tensor_bits"] != b}
    assert odd <= {layer for layer in layers if "shortcut" in layer}
    for two, three in zip(by_bits[2], by_bits[3]):
        assert two["relative_error"] >= three["relative_error"]  # the shortcuts have too few weights to err
    # Single layers of a tiny network are a matter of rounding; all of them together are not.
    assert sum(row["damage"] for row in by_bits[2]) > sum(row["damage"] for row in by_bits[3]) > 0
    assert sum(row["hessian_trace"] > 0 for row in by_bits[2]) > len(layers) / 2
    retention = found["retention"]
    assert {row["component"] for row in retention} == {"", "stem", "stage1", "stage2", "stage3", "stage4", "embedding"}
    assert [row["experiment"] for row in retention][:2] == ["reference", "low"] and retention[0]["mean_abs_drift"] == 0
    drift = {(r["bits"], r["kind"]): r["mean_abs"] for r in found["drift"] if r["class"] == "all"}
    assert drift[2, "full"] > drift[3, "full"] > 0 and (4, "test-only") in drift
    assert {row["threshold_name"] for row in found["flips"]} == {"reference EER", "own EER", "0.5"}
    assert {row["by"] for row in found["groups"]} == {"gender", "duration", "SNR estimate"}
    assert all(row["enrol_path"].startswith("syn-dev-") for row in found["worst_trials"])


def test_a_perfect_copy(models, tmp_path, monkeypatch):
    assert run(monkeypatch, *flags(models, (8, "full")), f"--out={tmp_path}") == 0
    found = json.loads((tmp_path / "diagnosis.json").read_text())
    assert all(row["mean_abs"] == 0 for row in found["drift"])
    assert all(row["harmful"] == row["beneficial"] == 0 for row in found["flips"])
    assert all(row["damage"] == 0 and row["relative_error"] == 0 for row in found["layers"])
    assert all(row["mean_abs_drift"] == 0 and row["recovery"] is None for row in found["retention"])
    assert all(row["sqnr_db"] is None for row in found["blocks"])  # infinite
    assert "No decision changes" in (tmp_path / "report.html").read_text()


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory):
    """Embeddings of 6 speakers x 4 utterances: `full.npz`, and noisy `2.npz`, `3.npz`."""
    place = tmp_path_factory.mktemp("embeddings")
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(6), 4)
    rows = rng.standard_normal((6, 16))[owner] + 0.7 * rng.standard_normal((24, 16))
    ids = np.array([f"syn-dev-{s:04d}-{i % 4:02d}" for i, s in enumerate(owner)])
    for name, noise in {"full": 0.0, "3": 0.2, "2": 0.6}.items():
        noisy = (rows + noise * rng.standard_normal(rows.shape)).astype(np.float32)
        np.savez(place / f"{name}.npz", ids=ids, embeddings=noisy, speakers=np.array([i[:12] for i in ids]))
    return place


def of_embeddings(place, **more):
    given = [f"--reference={place / 'full.npz'}", *(f"--quantized={b}:{place / f'{b}.npz'}" for b in (2, 3))]
    return [*given, *(f"--{name}={value}" for name, value in ({"trials": DATA, "replicates": 40} | more).items())]


@pytest.mark.parametrize("data", [None, DATA])
def test_embeddings_give_what_scores_alone_tell(embeddings, tmp_path, monkeypatch, data):
    given = {} if data is None else {"data": data}
    assert run(monkeypatch, *of_embeddings(embeddings, **given), f"--out={tmp_path}") == 0
    found = json.loads((tmp_path / "diagnosis.json").read_text())
    drift = {(r["bits"], r["kind"]): r["mean_abs"] for r in found["drift"] if r["class"] == "all"}
    assert drift[2, "full"] > drift[2, "test-only"] > drift[3, "test-only"] > 0
    assert "layers" not in found and not (tmp_path / "layers.csv").exists()
    assert {row["by"] for row in found["groups"]} == (set() if data is None else {"gender", "duration"})
    page = Page()
    page.feed((tmp_path / "report.html").read_text())
    assert page.images == 4


def test_what_an_earlier_diagnosis_left_is_removed(embeddings, tmp_path, monkeypatch):
    old = ("layers.csv", "figure-layers.png", "rules-2.json")
    for name in (*old, "notes.csv"):
        (tmp_path / name).write_text("")
    assert run(monkeypatch, *of_embeddings(embeddings), f"--out={tmp_path}") == 0
    assert all((tmp_path / name).exists() for name in old)  # no diagnosis was there: they are somebody's
    assert run(monkeypatch, *of_embeddings(embeddings), f"--out={tmp_path}") == 0
    assert not any((tmp_path / name).exists() for name in old)
    assert (tmp_path / "notes.csv").exists() and (tmp_path / "systems.csv").exists()


def test_options_of_networks_need_networks(embeddings, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, *of_embeddings(embeddings, max_seconds=3), f"--out={tmp_path}") == 2
    assert "--max_seconds needs models" in capsys.readouterr().err


def test_data_of_other_recordings_than_the_embeddings_are_refused(embeddings, tmp_path, monkeypatch, capsys):
    other = "synthetic:test?speakers=2&utterances=2"
    assert run(monkeypatch, *of_embeddings(embeddings, data=other), f"--out={tmp_path / 'out'}") == 2
    assert f"--data (={other}) has none of the utterances of {embeddings / '2.npz'}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--quantized=FULL"], "--quantized=FULL must be BITS:MODEL"),
        (["--quantized=0:FULL"], "with 1 to 16 bits"),
        (["--quantized=2:M2", "--quantized=2:M2"], "2 bits are given twice"),
        (["--quantized=3:M2"], r"--quantized=3:M2 holds 2 bits, not 3"),
        (["--quantized=2:missing.kmq"], "missing.kmq is no model"),
        (["--quantized=2:E.npz"], "all models or all embeddings"),
        (["--quantized=2:M2", "--retention_bits=4"], "retention at 4 bits: there is no quantized model at these bits"),
        (["--quantized=2:M2", "--retention_bits=two"], r"--retention_bits \(=two\) must be"),
        (["--quantized=2:M2", "--margin_edges=0.2,0.1"], r"--margin_edges \(=0.2,0.1\) must ascend"),
        (["--quantized=2:M2", "--worst=-1"], r"--worst \(=-1\) must be at least 0"),
        (["--quantized=2:M2", "--threshold=nan"], r"--threshold \(=nan\) must be a finite number"),
        (["--quantized=2:M2", "--data="], "--data is needed"),
        (["--quantized=2:M2", "--trials=ONE"], "no nontarget trials"),
        (["--quantized=2:OTHER"], "2 bits: .* has shape .* in the reference"),
        ([], "--quantized"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(models, tmp_path, monkeypatch, capsys, given, message):
    ids = [f"syn-dev-0000-{i:02d}" for i in range(4)]
    (tmp_path / "one.txt").write_text(f"1 {ids[0]} {ids[1]}\n1 {ids[2]} {ids[3]}\n")
    settings = SETTINGS | {"width": 6}
    variables = registry.initialize(registry.build("wespeaker_resnet34", **settings), jax.random.key(0))
    if any("OTHER" in flag for flag in given):
        other = SpeakerModel("wespeaker_resnet34", settings, "wespeaker", jax.device_get(variables))
        save_model(tmp_path / "other.kmq", other)
    places = {"M2": models / "2.kmq", "FULL": models / "full.kmq"}
    places |= {"ONE": tmp_path / "one.txt", "OTHER": tmp_path / "other.kmq"}

    def filled(text):
        for name, place in places.items():
            text = text.replace(name, str(place))
        return text

    out = tmp_path / "out"
    usual = [f"--reference={models / 'full.kmq'}", f"--data={DATA}", f"--trials={DATA}"]
    words = commands.replaced(usual, list(map(filled, given)))
    assert run(monkeypatch, *words, f"--out={out}") == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert re.search(filled(message), shown[-1]) and "Traceback" not in "".join(shown)
    assert not out.exists()


def test_embeddings_of_another_list_are_named(embeddings, tmp_path, monkeypatch, capsys):
    archive = commands.arrays_of(embeddings / "2.npz")
    np.savez(tmp_path / "less.npz", **{name: values[:-1] for name, values in archive.items()})
    words = [f"--reference={embeddings / 'full.npz'}", f"--quantized=2:{tmp_path / 'less.npz'}", f"--trials={DATA}"]
    assert run(monkeypatch, *words, f"--out={tmp_path / 'out'}") == 2
    assert "syn-dev-0005-03" in capsys.readouterr().err


def test_enrolment_models_are_averaged(models, tmp_path, monkeypatch):
    """A list of models of one utterance each gives what the plain list gives; of several, the mean of unit vectors."""
    table = open_source(DATA)
    ids, speakers = table.ids, table.speakers
    lines = [f"{int(speakers[a] == speakers[b])} {ids[a]} {ids[b]}\n" for a in range(0, 24, 4) for b in range(1, 24, 3)]
    (tmp_path / "list").write_text("".join(lines))
    for name, width in (("one", 1), ("three", 3)):
        rows = [f"{ids[a]} {' '.join(ids[a : a + width])}\n" for a in range(0, 24, 4)]
        (tmp_path / name).write_text("".join(rows))
    quick = {"retention_utterances": 8, "layer_utterances": 0, "hessian_draws": 0, "replicates": 20, "max_seconds": 1}
    given = flags(models, (2, "2"), trials=tmp_path / "list", **quick)
    found = {}
    for name in ("", "one", "three"):
        more = [f"--enrol_models={tmp_path / name}"] if name else []
        run(monkeypatch, *given, *more, f"--out={tmp_path / 'out'}")
        found[name] = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    plain, one, three = (np.array([row["mean_abs"] for row in found[name]["drift"]]) for name in ("", "one", "three"))
    np.testing.assert_allclose(one, plain, atol=1e-6)  # but for the rounding of unit vectors
    assert np.abs(three - plain).max() > 1e-3
    full, low = load_model(models / "full.kmq"), load_model(models / "2.kmq")
    unit = [
        e / np.linalg.norm(e, axis=1, keepdims=True) for e in (embed_all(m, table, max_seconds=1) for m in (full, low))
    ]
    drifts = []
    for one, two in ((unit[0], unit[0]), (unit[1], unit[1]), (unit[0], unit[1])):
        enrolled = np.stack([one[a : a + 3].mean(0) for a in range(0, 24, 4)])
        enrolled /= np.linalg.norm(enrolled, axis=1, keepdims=True)
        drifts.append((enrolled @ two[1::3].T).ravel())
    rows = {row["kind"]: row["mean_abs"] for row in found["three"]["drift"] if row["class"] == "all"}
    assert rows["full"] == pytest.approx(np.abs(drifts[1] - drifts[0]).mean(), abs=2e-4)
    assert rows["test-only"] == pytest.approx(np.abs(drifts[2] - drifts[0]).mean(), abs=2e-4)
