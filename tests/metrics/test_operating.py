"""Thresholds for people, against every threshold tried by hand."""

import numpy as np
import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.metrics.detection import eer
from kmq_jax.metrics.operating import OperatingPoint, error_rates, parse_point, threshold_at, threshold_interval


def trials(n=400, seed=0, digits=2):
    rng = np.random.default_rng(seed)
    labels = rng.random(n) < 0.3
    return np.round(labels + 0.6 * rng.standard_normal(n), digits), labels


@pytest.mark.parametrize("text", ["eer", "far=0.01", "frr=0.2", "dcf=0.05"])
def test_parsing_round_trip(text):
    assert str(parse_point(text)) == text


@pytest.mark.parametrize("text", ["", "far", "far=", "far=0", "frr=1", "dcf=-1", "cost=0.1", "eer=0.1", "far=nan"])
def test_other_texts_are_refused(text):
    with pytest.raises(UserError, match="must be eer, far=RATE"):
        parse_point(text)


@pytest.mark.parametrize("wanted", [0.001, 0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("digits", [1, 6])
def test_rates_are_kept_as_closely_as_any_score_allows(wanted, digits):
    scores, labels = trials(digits=digits)
    rates = {t: error_rates(scores, labels, t) for t in np.unique(scores)}
    low = threshold_at(scores, labels, OperatingPoint("far", wanted))
    assert low == min(t for t, (far, _) in rates.items() if far <= wanted)
    high = threshold_at(scores, labels, OperatingPoint("frr", wanted))
    assert high == max(t for t, (_, frr) in rates.items() if frr <= wanted)


def test_cost_and_eer():
    scores, labels = trials()
    costs = {}
    for t in np.unique(scores):
        far, frr = error_rates(scores, labels, t)
        costs[t] = 0.1 * frr + 0.9 * far
    assert costs[threshold_at(scores, labels, OperatingPoint("dcf", 0.1))] == pytest.approx(min(costs.values()))
    assert threshold_at(scores, labels, OperatingPoint("eer")) == eer(scores, labels)[1]


def test_one_class_is_enough_for_its_own_rate():
    scores, labels = trials()
    alone = scores[~labels]
    none = np.zeros(len(alone), bool)
    threshold = threshold_at(alone, none, OperatingPoint("far", 0.1))
    assert error_rates(alone, none, threshold) == (pytest.approx(0.1, abs=0.02), None)
    with pytest.raises(UserError, match="no target trials to find frr=0.1"):
        threshold_at(alone, none, OperatingPoint("frr", 0.1))
    with pytest.raises(UserError, match="no target trials"):
        threshold_at(alone, none, OperatingPoint("eer"))
    with pytest.raises(UserError, match="no score that occurs"):
        threshold_at(np.ones(5), np.zeros(5, bool), OperatingPoint("far", 0.1))


@pytest.mark.parametrize("point", ["eer", "far=0.05", "frr=0.1", "dcf=0.2"])
def test_interval_holds_the_threshold_and_shrinks_with_speakers(point):
    spans = []
    for speakers in (10, 160):
        scores, labels = trials(20 * speakers, seed=1, digits=6)
        rng = np.random.default_rng(2)
        enrol = rng.integers(speakers, size=len(scores))
        test = np.where(labels, enrol, (enrol + rng.integers(1, speakers, size=len(scores))) % speakers)
        wanted = parse_point(point)
        low, high = threshold_interval(scores, labels, enrol, test, wanted, replicates=100)
        assert low <= threshold_at(scores, labels, wanted) <= high
        spans.append(high - low)
    assert spans[1] < spans[0]


@pytest.mark.parametrize(("kind", "value"), [("bogus", 0.1), ("far", 1.0), ("frr", -0.1), ("dcf", float("nan"))])
def test_points_that_are_none_are_refused(kind, value):
    with pytest.raises(UserError, match=f"operating point '{kind}=.*' must be eer, far=RATE"):
        OperatingPoint(kind, value)


def test_a_rate_next_to_one_still_has_a_threshold():
    scores, labels = [0.1, 0.3, 0.2, 0.4], [0, 0, 1, 1]
    assert threshold_at(scores, labels, parse_point("frr=0.9999999999999")) == 0.4
    assert threshold_at(scores, labels, parse_point("far=0.9999999999999")) == 0.2


def test_labels_of_other_kinds_are_refused():
    with pytest.raises(UserError, match="labels must be 0 or 1, got 2"):
        threshold_at([0.1, 0.2], [0, 2], OperatingPoint("far", 0.1))
