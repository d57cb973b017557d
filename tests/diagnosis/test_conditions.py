"""Losses by condition: by hand, and a network that suffers from noise where another does not."""

import json
import sys

import jax
import numpy as np
import pytest

from kmq_jax.cli import conditions as command
from kmq_jax.core.errors import UserError
from kmq_jax.diagnosis import conditions, scores
from kmq_jax.metrics.detection import eer
from kmq_jax.models import registry
from kmq_jax.models.speaker_model import SpeakerModel, save_model
from kmq_jax.ptq.quantize import quantize_model
from kmq_jax.quant import QuantRule, QuantSpec

DATA = "synthetic:dev?speakers=4&utterances=4"


def trials(worse=0.0, seed=0, speakers=16, each=4):
    """Scores of a reference, and of a network that differs by noise of which `worse` more."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(speakers), each)
    one, two = np.triu_indices(len(owner), 1)
    labels = owner[one] == owner[two]
    base = labels + 0.4 * rng.standard_normal(len(one))
    low = base + (0.1 + worse) * rng.standard_normal(len(one))
    return scores.scored_trials(base, {2: low}, {2: low}, labels, owner[one], owner[two])


def rows_of(worse):
    whole = {}
    first = conditions.condition_rows(trials(), {"condition": "whole"}, whole, 200, 0)
    return first, conditions.condition_rows(trials(worse), {"condition": "bad"}, whole, 200, 0)


def test_losses_by_hand():
    (full, low), _ = rows_of(0.0)
    scored = trials()
    rate, threshold = eer(scored.reference, scored.labels)
    assert (full["bits"], low["bits"], full["eer"]) == (32, 2, 100 * rate) and "eer_loss" not in full
    right = (scored.reference >= threshold) == scored.labels
    wrong = (scored.full[0] >= threshold) != scored.labels
    assert low["harmful_flip_rate_loss"] == pytest.approx(100 * np.mean(right & wrong))
    assert low["mean_abs_drift_loss"] == pytest.approx(np.abs(scored.full[0] - scored.reference).mean())
    assert low["eer_loss"] == pytest.approx(low["eer"] - full["eer"])
    low_end, high_end = low["mean_abs_drift_loss_ci95"]
    assert low_end < low["mean_abs_drift_loss"] < high_end and "eer_growth" not in low


def test_growth_holds_zero_where_nothing_grows_and_not_where_it_does():
    first, (_, same) = rows_of(0.0)
    for name in conditions.LOSSES:
        assert same[f"{name}_growth"] == 0 and same[f"{name}_growth_ci95"] == [0, 0]
    _, (_, bad) = rows_of(0.5)
    for name in ("eer", "harmful_flip_rate", "mean_abs_drift"):
        low, high = bad[f"{name}_growth_ci95"]
        assert 0 < low < bad[f"{name}_growth"] < high
        assert bad[f"{name}_growth"] == pytest.approx(bad[f"{name}_loss"] - first[1][f"{name}_loss"])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    settings = {"width": 4, "blocks": [1, 1, 1, 1], "embedding_size": 8}
    variables = registry.initialize(registry.build("resnet18", **settings), jax.random.key(0))
    full = SpeakerModel("resnet18", settings, "kiwano", jax.device_get(variables))
    save_model(place / "full.kmq", full)
    save_model(place / "2.kmq", quantize_model(full, [QuantRule("kernel", QuantSpec(2))], None, 0))
    return place


def run(models, tmp_path, monkeypatch, *words):
    given = [f"--reference={models / 'full.kmq'}", f"--quantized=2:{models / '2.kmq'}", f"--json={tmp_path / 'c.json'}"]
    monkeypatch.setattr(sys, "argv", ["conditions", *given, f"--data={DATA}", f"--trials={DATA}", *words])
    command.main()
    return json.loads((tmp_path / "c.json").read_text())


def test_the_command(models, tmp_path, monkeypatch, capsys):
    words = ["--condition=first=0.5", "--condition=noise=0", "--replicates=20", "--noise=synthetic:train?speakers=2"]
    found = run(models, tmp_path, monkeypatch, *words)
    assert [(row["condition"], row["bits"]) for row in found["rows"]] == [
        (name, bits) for name in ("whole", "first=0.5", "noise=0") for bits in (32, 2)
    ]
    assert found["notes"]["utterances"] == 16 and found["rows"][2]["seconds"] == pytest.approx(0.5, abs=0.01)
    assert found["rows"][3]["mean_abs_drift_loss"] > 0 and "noise at 0 dB" in capsys.readouterr().out
    # Without clips, noise is left out; what is no condition is refused before any work.
    found = run(models, tmp_path, monkeypatch, "--condition=noise=0", "--replicates=0")
    assert {row["condition"] for row in found["rows"]} == {"whole"} and found["rows"][1]["eer_loss_ci95"] is None
    assert "left out for want of clips of noise (--noise): noise=0" in capsys.readouterr().err
    with pytest.raises(UserError, match="condition 'loud' must be"):
        run(models, tmp_path, monkeypatch, "--condition=loud")
