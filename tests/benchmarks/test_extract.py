"""The benchmark of extraction: what does not go together is told before any work; sides in turns."""

import json

import jax
import pytest

from kmq_jax.benchmarks.extract import dealt, file_bytes
from kmq_jax.benchmarks.options import ExtractBench
from kmq_jax.cli import bench
from kmq_jax.core.errors import UserError
from kmq_jax.data.source import open_source
from kmq_jax.models import registry
from kmq_jax.models.speaker_model import SpeakerModel, save_model
from kmq_jax.study.bench_tables import extraction_table

NETWORK = {"width": 4, "blocks": [1, 1, 1, 1], "embedding_size": 8, "norm": "bias"}

ONE = {"model": "m.kmq", "data": "d", "onnx": "m.onnx"}
BESIDE = {"model": "m.kmq", "data": "d", "peers": "onnxruntime", "reference": "r"}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (BESIDE | {"onnx": "m.onnx"}, "`onnx` does not go with `peers`"),
        (BESIDE | {"features": "ours"}, "`features` does not go with `peers`"),
        (BESIDE | {"compute": "bfloat16"}, "`compute` does not go with `peers`"),
        (BESIDE | {"threads": 3}, "`threads` does not go with `peers`"),
        (BESIDE | {"peers": ","}, r"`peers` \(=,\) must name one of onnxruntime"),
        (BESIDE | {"model": "a/m.kmq,b/m.kmq"}, r"`model` \(=a/m.kmq,b/m.kmq\) must name files of different names"),
        (ONE | {"reference": "r"}, "`reference` needs `peers`"),
        (ONE | {"calibration": "c"}, "`calibration` needs `peers`"),
    ],
)
def test_what_would_do_nothing_is_refused(given, told):
    with pytest.raises(UserError, match=told):
        ExtractBench(**given)


def test_each_way_has_its_own():
    assert ExtractBench(**ONE, features="ours", compute="bfloat16", threads=3).threads == 3
    more = BESIDE | {"model": "a/m.kmq,b/n.kmq", "calibration": "c"}
    assert ExtractBench(**more).named_models == {"ours, m": "a/m.kmq", "ours, n": "b/n.kmq"}


def save(path):
    variables = registry.initialize(registry.build("wespeaker_resnet34", **NETWORK), jax.random.key(0))
    save_model(path, SpeakerModel("wespeaker_resnet34", NETWORK, "wespeaker", variables))


def test_sides_are_timed_in_turns_beside_the_first(tmp_path, capsys):
    """The reference through ONNX Runtime and as a model of ours: the same file twice, so the same embeddings."""
    save(tmp_path / "full.kmq")
    full = str(tmp_path / "full.kmq")
    flags = ["--peers=onnxruntime", f"--model={full}", f"--reference={full}", "--data=synthetic:dev?speakers=2"]
    bench.run("extract", [*flags, "--utterances=4", "--repeats=2", f"--json={tmp_path}/e.json"])
    found = json.loads((tmp_path / "e.json").read_text())
    first, ours = found["sides"]
    assert [first["side"], ours["side"]] == ["onnxruntime", "ours, full"] and found["rounds"] == 2
    assert ours["bytes"] == (tmp_path / "full.kmq").stat().st_size
    assert first["speedup"] == 1 and first["speedup_range"] == [1, 1]
    least, most = ours["speedup_range"]
    assert least <= ours["speedup"] <= most and ours["speedup_again"] > 0
    assert first["mean_cosine"] == pytest.approx(1, abs=1e-4) and ours["min_cosine"] == pytest.approx(1, abs=1e-4)
    assert found["utterances"] == 4 and f"{least:.2f} to {most:.2f}" in extraction_table(found)
    assert f"({least:.2f} to {most:.2f})" in capsys.readouterr().out


def test_the_packed_file_of_a_directory_is_what_counts(tmp_path):
    save(tmp_path / "model.kmq")
    assert (
        file_bytes(str(tmp_path)) == file_bytes(str(tmp_path / "model.kmq")) == (tmp_path / "model.kmq").stat().st_size
    )


def test_no_round_repeats_a_recording():
    table = open_source("synthetic:dev?speakers=3&utterances=5")
    parts = dealt(table, 4, 3)
    assert [len(part) for part in parts] == [4, 4, 4]
    assert len({name for part in parts for name in part.ids}) == 12
    assert sum(len(part) for part in dealt(table, 0, 4)) == 15
    assert sum(len(part) for part in dealt(table, 100, 4)) == 15
    with pytest.raises(UserError, match="15 recordings are too few for 16 rounds"):
        dealt(table, 1, 16)
