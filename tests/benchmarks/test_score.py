"""The scoring benchmark at a small size."""

import json

import numpy as np
import pytest

from kmq_jax.benchmarks import score
from kmq_jax.benchmarks.options import ScoreBench
from kmq_jax.cli import bench
from kmq_jax.core.errors import UserError


def run(*words):
    bench.run("score", words)


def test_small(tmp_path, capsys):
    sizes = ("--trials=4000", "--utterances=500", "--speakers=30", "--dim=32", "--spread=1.5")
    run(*sizes, "--replicates=30", "--repeats=1", f"--json={tmp_path / 'b.json'}")
    figures = json.loads((tmp_path / "b.json").read_text())
    assert figures["eer_difference"] < 1e-6
    assert figures["min_dcf_difference"] < 1e-6
    low, high = figures["eer_ci95"]
    assert 0 < low < figures["eer"] < high < 50
    assert "scikit-learn" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--trials=0", "--speakers=200000"])
def test_mistakes_are_named(flag):
    with pytest.raises(UserError, match=flag.split("=")[0]):
        run(flag)


def test_targets_are_seldom_a_recording_beside_itself():
    """With fewer than two utterances a speaker most would be, and the EER too low."""
    with pytest.raises(UserError, match="must be at least twice `speakers`"):
        ScoreBench(utterances=199, speakers=100)
    sizes = ScoreBench(utterances=200, speakers=100)
    _, _, listed = score.make(1000, sizes.utterances, sizes.speakers, 2, 1.0)
    assert 0.4 < np.mean(listed.enrol[listed.label] == listed.test[listed.label]) < 0.6
