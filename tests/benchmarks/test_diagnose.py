"""The benchmark of diagnosis at a small size."""

import json

import pytest

from kmq_jax.cli import bench
from kmq_jax.core.errors import UserError


def run(*words):
    bench.run("diagnose", words)


def test_small(tmp_path, capsys):
    sizes = ("--trials=4000", "--utterances=500", "--speakers=30", "--models=2")
    run(*sizes, "--replicates=40", "--repeats=1", f"--json={tmp_path / 'b.json'}")
    figures = json.loads((tmp_path / "b.json").read_text())
    few, many = figures["harmful_rates"]
    assert 0 < few < many < 0.5  # the second model is the noisier
    assert figures["per_trial_seconds"] > 0
    assert "4,000 trials, 2 models" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--trials=0", "--models=0", "--speakers=200000"])
def test_mistakes_are_named(flag):
    with pytest.raises(UserError, match=flag.split("=")[0]):
        run(flag)
