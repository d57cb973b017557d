"""The search of all gates against running each combination, and fronts against their definition."""

import itertools
import math

import numpy as np
import pytest

from kmq_jax.cascade import gates
from kmq_jax.cascade.fit import Calibration, pareto
from kmq_jax.cascade.options import CalibrationOptions
from kmq_jax.cascade.policy import CascadePolicy
from kmq_jax.core.errors import UserError
from kmq_jax.metrics.calibration import AffineMap
from kmq_jax.metrics.detection import eer

THRESHOLD = float(np.float32(0.3))


def trials(n=300, levels=3, seed=0):
    """Mapped scores `[levels, n]`, reference scores and labels; rounded, so that many are tied."""
    rng = np.random.default_rng(seed)
    labels = rng.random(n) < 0.4
    reference = np.round(0.3 + 0.25 * (labels - 0.5) + 0.15 * rng.standard_normal(n), 2).astype(np.float32)
    noise = np.array([0.12, 0.07, 0.03, 0.02])[:levels, None]
    mapped = np.round(reference + noise * rng.standard_normal((levels, n)), 2).astype(np.float32)
    return mapped, reference, labels


def decide(mapped, combination):
    """Stage of each trial, by the definition of a gate."""
    level = np.full(mapped.shape[1], len(mapped) - 1)
    for i in reversed(range(len(combination))):
        low, high = combination[i]
        level = np.where((low < mapped[i]) & (mapped[i] < high), level, i)
    return level


def test_harmful_flips_by_hand():
    reference = np.array([0.5, 0.5, 0.1, 0.1, 0.3])
    labels = np.array([True, False, False, True, True])
    mapped = np.array([[0.1, 0.1, 0.5, 0.5, 0.2]])
    found = gates.harmful_flips(mapped, 0.3, reference, labels)
    assert found.tolist() == [[True, False, True, False, True]]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("levels", [2, 3])
def test_totals_equal_a_run_of_every_combination(levels, symmetric):
    mapped, reference, labels = trials(levels=levels)
    flips = gates.harmful_flips(mapped, THRESHOLD, reference, labels)
    count, gated = 4, levels - 1
    tried = [gates.candidates(mapped[i], THRESHOLD, flips[i], count, symmetric) for i in range(gated)]
    cells = [gates._cells(mapped[i], THRESHOLD, *tried[i]) for i in range(gated)]
    found = gates.totals(cells, flips, count, symmetric)
    reach = gates.totals(cells, np.arange(levels)[:, None], count, symmetric)
    free = gated if symmetric else 2 * gated
    assert found.shape == (count,) * free
    for places in itertools.product(range(count), repeat=free):
        wide = np.repeat(places, 2) if symmetric else places
        combination = [(tried[i][0][wide[2 * i]], tried[i][1][wide[2 * i + 1]]) for i in range(gated)]
        level = decide(mapped, combination)
        assert found[places] == flips[level, np.arange(len(labels))].sum()
        assert reach[places] == level.sum()


def test_candidates_begin_with_stopping_all_and_end_with_stopping_none():
    mapped, reference, labels = trials(levels=1)
    flips = gates.harmful_flips(mapped, THRESHOLD, reference, labels)
    lows, highs = gates.candidates(mapped[0], THRESHOLD, flips[0], 40)
    assert (highs[0], lows[-1], highs[-1]) == (np.float32(0.3), -math.inf, math.inf)
    assert np.nextafter(lows[0], np.float32(1)) == np.float32(0.3)  # whoever is on the threshold is on the other side
    assert (lows[1:] <= lows[:-1]).all()
    assert (highs[1:] >= highs[:-1]).all()
    # Each flip lies just inside some gate: no other trial lies between it and the gate.
    for score in mapped[0][flips[0]]:
        side, sign = (highs, 1) if score >= THRESHOLD else (lows, -1)
        assert np.nextafter(score, np.float32(sign * np.inf)) in side


@pytest.mark.parametrize("seed", range(3))
def test_the_front_beats_every_symmetric_gate(seed):
    mapped, reference, labels = trials(seed=seed)
    prices = np.array([2, 5, 9])
    front = gates.search(mapped, reference, labels, THRESHOLD, prices)
    flips = gates.harmful_flips(mapped, THRESHOLD, reference, labels)
    assert (np.diff(front.bits) > 0).all()
    assert (np.diff(front.objective) < 0).all()
    for i in range(len(front)):  # the figures are those of the gates
        level = decide(mapped, front.point(i))
        assert front.objective[i] == pytest.approx(flips[level, np.arange(300)].mean())
        assert front.bits[i] == pytest.approx(prices[level].mean())
    assert front.bits[0] == 2
    for one, two in itertools.product(np.linspace(0, 0.3, 7), repeat=2):
        combination = [(THRESHOLD - t - 1e-3, THRESHOLD + t + 1e-3) for t in (one, two)]
        level = decide(mapped, combination)
        cost, bits = flips[level, np.arange(300)].mean(), prices[level].mean()
        within = front.bits <= bits + 1e-9
        assert front.objective[within].min() <= cost + 1 / 300 + 1e-9


def test_eer_front_follows_the_exact_eer():
    mapped, reference, labels = trials(2000, levels=2, seed=3)
    front = gates.search(mapped, reference, labels, THRESHOLD, np.array([2, 5]), "eer")
    for i in (0, len(front) // 2, len(front) - 1):
        level = decide(mapped, front.point(i))
        exact = eer(mapped[level, np.arange(2000)], labels)[0]
        assert front.objective[i] == pytest.approx(exact, abs=0.012)
        assert front.objective[i] >= exact - 1e-9  # one of the thresholds tried: never better than the best


def test_balanced_weighs_the_classes_alike():
    labels = np.array([True, False, False, False])
    assert gates.class_weights(labels, "balanced").tolist() == [1 / 2, 1 / 6, 1 / 6, 1 / 6]
    assert gates.class_weights(labels, "flips").tolist() == [1 / 4] * 4
    assert gates.class_weights(labels[1:], "balanced").tolist() == [1 / 3] * 3


def test_flips_of_the_last_level_can_be_left_out():
    mapped, reference, labels = trials()
    front = gates.search(mapped, reference, labels, THRESHOLD, np.array([2, 5, 9]), last_counts=False)
    assert front.objective[-1] == 0  # whoever stops at no gate loses nothing


def test_degenerate_scores():
    labels = np.arange(10) % 2 == 0
    same = np.full((3, 10), np.float32(0.3))
    front = gates.search(same, same[0], labels, THRESHOLD, np.array([2, 5, 9]))
    assert len(front) == 1
    assert front.bits[0] == 2
    one = gates.search(same[:1], same[0], labels, THRESHOLD, np.array([4]))
    assert (len(one), one.bits[0], one.point(0)) == (1, 4, ())
    none = gates.search(same, same[0], np.zeros(10, bool), THRESHOLD, np.array([2, 5, 9]))
    assert none.objective[0] == 0
    with pytest.raises(UserError, match="target and nontarget"):
        gates.search(same, same[0], np.zeros(10, bool), THRESHOLD, np.array([2, 5, 9]), "eer")
    with pytest.raises(UserError, match="objective 'luck'"):
        gates.search(same, same[0], labels, THRESHOLD, np.array([2, 5, 9]), "luck")


def test_choice():
    front = gates.Front(np.zeros((3, 1, 2)), np.array([0.3, 0.2, 0.1]), np.array([2.0, 2.5, 3.0]))
    assert [gates.choose(front, most) for most in (0.5, 0.2, 0.15, 0.05)] == [0, 1, 2, 2]


@pytest.mark.parametrize("trials", [6, 7, 15])
def test_gates_that_flip_as_much_as_the_last_level_are_within_its_limit(trials):
    """The first level decides as the last does, so that all may stop there; the second would spare the one flip.

    A front's rates have twelve digits: 1/6 becomes 0.166666666667, which is above it.
    """
    labels = np.arange(trials) % 2 == 0
    reference = np.where(labels, 0.9, 0.1).astype(np.float32)
    wrong, right = reference.copy(), reference.copy()
    wrong[0], right[0] = 0.4, 0.6
    scores, line, speaker = np.stack([wrong, right, wrong]), AffineMap(1.0, 0.0), np.arange(trials)
    policy = CascadePolicy((2, 3, 4), (line,) * 3, ((0.5, 0.5),) * 2, 0.5)
    data = Calibration(
        policy.bits, scores, reference, labels, speaker, np.where(labels, speaker, (speaker + 1) % trials)
    )
    found, front, notes = pareto(data, policy, CalibrationOptions(alpha=1e-6))
    assert notes["at_most"] == 1 / trials and front.objective.tolist()[-1] == 0
    assert (notes["chosen"], front.bits[0]) == (0, 2)
    assert found.gates == front.point(0)
