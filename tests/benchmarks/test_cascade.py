"""The cascade benchmark at a small size."""

import json

import numpy as np
import pytest

from kmq_jax.benchmarks import cascade
from kmq_jax.benchmarks.options import CascadeBench
from kmq_jax.cascade import fit as fitting
from kmq_jax.cascade.policy import CascadePolicy
from kmq_jax.cli import bench
from kmq_jax.core.errors import UserError
from kmq_jax.metrics.calibration import AffineMap


def run(*words):
    bench.run("cascade", words)


def test_speed(tmp_path, capsys):
    run("--trials=3000", "--utterances=200", "--policies=3", "--repeats=1", f"--json={tmp_path / 'b.json'}")
    figures = json.loads((tmp_path / "b.json").read_text())
    assert figures["trials_decided_unlike_numpy"] <= 3  # rounding at a gate's edge
    assert figures["seconds"]["one"] > 0
    assert "numpy" in capsys.readouterr().out


def test_splits(tmp_path):
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(24), 5)
    rows = rng.standard_normal((24, 16))[owner] + 0.7 * rng.standard_normal((120, 16))
    ids = np.array([f"s{s}-{i}" for i, s in enumerate(owner)])
    for name, noise in (("low", 0.4), ("high", 0.0)):
        embeddings = (rows + noise * rng.standard_normal(rows.shape)).astype(np.float32)
        np.savez(tmp_path / f"{name}.npz", ids=ids, embeddings=embeddings, speakers=np.array([f"s{s}" for s in owner]))
    one, two = np.triu_indices(120, 1)
    lines = [f"{int(owner[a] == owner[b])} {ids[a]} {ids[b]}\n" for a, b in zip(one, two)]
    (tmp_path / "trials").write_text("".join(lines))
    low, high = (tmp_path / f"{name}.npz" for name in ("low", "high"))
    words = [f"--stage=2:{low}", f"--stage=32:{high}", f"--trials={tmp_path / 'trials'}", "--splits=2"]
    with pytest.raises(UserError, match="needs --reference"):
        run(*words)
    words += [f"--reference={high}", f"--json={tmp_path / 'b.json'}"]
    for rule in ("pareto", "risk"):
        run(*words, f"--rule={rule}", "--alpha=0.2")
        means = json.loads((tmp_path / "b.json").read_text())["means"]
        assert means["last_level_flip_rate"] == 0
        assert 2 <= means["sequential_bits"] <= 34
        assert means["harmful_flip_rate"] == means["early_flip_rate"]


@pytest.mark.parametrize("flag", ["--trials=0", "--trials=many", "--policies=0"])
def test_mistakes_are_named(flag):
    with pytest.raises(UserError, match=flag.split("=")[0]):
        run(flag)


def test_a_reference_without_errors_has_no_ratio():
    """It used to divide by the reference's rate of zero."""
    sides = np.tril_indices(6)  # every speaker beside itself and each other
    label = sides[0] == sides[1]
    scores = np.where(label, 0.9, 0.1).astype(np.float32)[None]
    new = fitting.Calibration((32,), scores, scores[0], label, *sides, True)
    policy = CascadePolicy((32,), (AffineMap(1.0, 0.0),), (), 0.5)
    row = cascade.on_new_speakers(policy, new, 1.0)
    assert (row["eer"], row["reference_eer"], row["eer_ratio"]) == (0, 0, None)
    means, spread = cascade.summary([row, row | {"eer_ratio": 2.0}])
    assert means["eer_ratio"] == 2 and spread["eer"] == [0, 0]
    assert "eer_ratio" not in cascade.summary([row])[0]


def test_a_half_without_targets_is_named(monkeypatch):
    label, sides = np.array([True, False, False]), np.array([0, 1, 2])
    scores = np.float32([[0.9, 0.1, 0.2]])
    data = fitting.Calibration((32,), scores, scores[0], label, sides, np.array([0, 2, 3]), True)
    monkeypatch.setattr(cascade, "calibration_data", lambda options: data)
    with pytest.raises(UserError, match=r"`trials` \(=t\): half of the speakers have no target or no nontarget trials"):
        cascade.splits(CascadeBench(trials="t", levels=("32:a",), reference="a"))
