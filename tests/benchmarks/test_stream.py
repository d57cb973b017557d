"""The benchmark of streamed lists at a small size."""

import json

import numpy as np
import pytest

from kmq_jax.benchmarks import stream
from kmq_jax.benchmarks.options import StreamBench
from kmq_jax.cli import bench
from kmq_jax.core.errors import UserError
from kmq_jax.data.trials import read_trials
from kmq_jax.study.bench_tables import stream_table


def test_small(tmp_path, capsys, monkeypatch):
    """One process of each command; several are run by the commands' own tests."""
    sizes = ("--trials=3000", "--utterances=300", "--speakers=20", "--dim=16", "--spread=1", "--processes=1")
    sizes = (*sizes, "--cohort=50")
    bench.run("stream", (*sizes, f"--json={tmp_path / 'b.json'}", f"--directory={tmp_path / 'here'}"))
    found = json.loads((tmp_path / "b.json").read_text())
    assert [(row["command"], row["processes"], row["trials"]) for row in found["rows"]] == [
        ("score", 1, 3000),
        ("snorm", 1, 3000),
        ("cascade", 1, 3000),
    ]
    assert all(row["seconds"] > 0 and row["peak_memory_mb"] > 50 and 0 < row["eer"] < 50 for row in found["rows"])
    assert not list((tmp_path / "here").iterdir())
    assert found["rows"][0]["eer"] != found["rows"][1]["eer"]
    assert "| cascade | 3,000 | 1 |" in stream_table(found) and "a cohort of 50, a list of" in stream_table(found)
    assert "EER" in capsys.readouterr().out


def test_the_list_is_what_it_says(tmp_path):
    ids = np.array([f"id{u % 3}-{u:02d}" for u in range(30)], "S").view(np.uint8).reshape(30, -1)
    stream.make_list(tmp_path / "t.txt", 500, ids, 3)
    names = [bytes(row).decode() for row in ids]
    trials = read_trials(tmp_path / "t.txt", names)
    assert len(trials) == 500 and 0.6 < trials.label.mean() < 0.75  # half, and a third of the rest
    assert (trials.label == (trials.enrol % 3 == trials.test % 3)).all()


def test_differences_and_mistakes():
    one = {"eer": 1.0, "cllr": 0.5, "eer_bounds": [0.9, 1.1]}
    assert stream.differences(one, one | {"cllr": 0.6}) == []
    assert stream.differences(one, one | {"eer": 2.0}) == ["eer"]
    with pytest.raises(UserError, match="must be at least twice"):
        StreamBench(utterances=100, speakers=90)
