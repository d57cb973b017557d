"""The summary of a trial list."""

import numpy as np

from kmq_jax.metrics import calibration, detection
from kmq_jax.metrics.evaluate import evaluate


def trial_list(speakers=20, trials=2000):
    rng = np.random.default_rng(0)
    enrol = rng.integers(speakers, size=trials)
    labels = rng.random(trials) < 0.3
    test = np.where(labels, enrol, (enrol + rng.integers(1, speakers, trials)) % speakers)
    return rng.standard_normal(trials) + 3 * labels, labels, enrol, test


def test_figures_are_those_of_the_parts():
    scores, labels, enrol, test = trial_list()
    result = evaluate(scores, labels, enrol, test, p_target=0.05, replicates=100)
    rate, threshold = detection.eer(scores, labels)
    assert (result["eer"], result["threshold"]) == (100 * rate, threshold)
    assert result["min_dcf"] == detection.min_dcf(scores, labels, 0.05)
    assert result["min_cllr"] == calibration.min_cllr(scores, labels)
    assert (result["trials"], result["targets"], result["speakers"]) == (2000, labels.sum(), 20)
    for name in ("eer", "min_dcf"):
        low, high = result[f"{name}_ci95"]
        assert low < result[name] < high
    assert result["min_cllr"] < result["cllr"] < 0.5
    assert result["min_dcf"] <= result["act_dcf"] < 1
    assert "other speakers" in result["calibration"]


def test_a_calibration_can_be_given():
    scores, labels, enrol, test = trial_list()
    result = evaluate(scores, labels, enrol, test, calibration=calibration.AffineMap(3.0, -4.5), replicates=0)
    assert result["cllr"] == calibration.cllr(3 * scores - 4.5, labels)
    assert result["act_dcf"] == detection.act_dcf(3 * scores - 4.5, labels)
    assert (result["eer_ci95"], result["min_dcf_ci95"], result["intervals"]) == (None, None, "none")


def test_too_few_speakers_are_told_and_the_rest_is_given():
    result = evaluate([0.9, 0.8, 0.1, 0.2], [1, 1, 0, 0], [0, 1, 0, 1], [0, 1, 1, 0])
    assert (result["eer"], result["min_dcf"], result["min_cllr"]) == (0, 0, 0)
    assert result["eer_ci95"] is result["act_dcf"] is result["cllr"] is None
    assert "too few" in result["calibration"]
    assert "too few" in result["intervals"]
