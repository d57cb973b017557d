"""Drift, flips, margins and knees on hand-made scores with known answers."""

import numpy as np
import pytest
from scipy import stats

from kmq_jax.core.errors import UserError
from kmq_jax.diagnosis import scores
from kmq_jax.diagnosis.resample import SpeakerDraws

# Two targets and two nontargets a side of the threshold 0.5: the reference errs on the third and the sixth trial.
LABELS = np.array([1, 1, 1, 0, 0, 0], bool)
REFERENCE = np.array([0.9, 0.6, 0.4, 0.1, 0.2, 0.6])
LOW = np.array([0.8, 0.4, 0.5, 0.2, 0.6, 0.3])
SPEAKERS = np.array([0, 1, 2, 0, 1, 2]), np.array([0, 1, 2, 1, 2, 0])


def made(full=None, test_only=None, reference=REFERENCE, labels=LABELS, speakers=SPEAKERS):
    return scores.scored_trials(reference, {2: LOW} if full is None else full, test_only, labels, *speakers)


def only(rows, **wanted):
    (row,) = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return row


def test_flips_are_counted_by_hand():
    flips = scores.find_flips(made(), "0.5", 0.5)
    # Trial 2 (0.6 -> 0.4) and trial 5 (0.2 -> 0.6) become wrong, trial 3 (0.4 -> 0.5) and trial 6 (0.6 -> 0.3) right.
    np.testing.assert_array_equal(flips.harmful[0], [0, 1, 0, 0, 1, 0])
    np.testing.assert_array_equal(flips.beneficial[0], [0, 0, 1, 0, 0, 1])
    np.testing.assert_allclose(flips.margin, [0.4, 0.1, 0.1, 0.4, 0.3, 0.1])


def test_flip_rates_by_class_and_margin():
    trials = made()
    rows = scores.flip_rows(trials, scores.find_flips(trials, "0.5", 0.5), bins=2, edges=(0.2, 0.35))
    everything = only(rows, binning="none", **{"class": "all"})
    assert (everything["harmful"], everything["beneficial"], everything["trials"]) == (2, 2, 6)
    assert everything["net_rate"] == 0 and everything["mcnemar_p"] == 1
    target = only(rows, binning="none", **{"class": "target"})
    assert (target["harmful"], target["beneficial"], target["harmful_rate"]) == (1, 1, pytest.approx(1 / 3))
    fixed = [row for row in rows if row["binning"] == "fixed"]
    assert [(r["trials"], r["harmful"], r["beneficial"]) for r in fixed] == [(3, 1, 2), (1, 1, 0), (2, 0, 0)]
    assert [(r["low"], r["high"]) for r in fixed] == [(0, 0.2), (0.2, 0.35), (0.35, None)]
    halves = [row for row in rows if row["binning"] == "equal-mass"]
    assert [r["trials"] for r in halves] == [3, 3] and halves[0]["high"] == pytest.approx(0.2)


def test_an_empty_bin_has_no_rate():
    trials = made()
    rows = scores.flip_rows(trials, scores.find_flips(trials, "0.5", 0.5), edges=(5.0,))
    assert only(rows, binning="fixed", bin=1)["harmful_rate"] is None


def test_equal_mass_bins_hold_equally_many():
    margin = np.random.default_rng(0).random(999)
    place = np.searchsorted(scores.equal_mass_edges(margin, 3), margin, side="right")
    np.testing.assert_array_equal(np.bincount(place), [333, 333, 333])


@pytest.mark.parametrize(("harmful", "beneficial", "p"), [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (8, 2, 112 / 1024)])
def test_mcnemar_by_the_binomial_by_hand(harmful, beneficial, p):
    assert scores.mcnemar(harmful, beneficial) == pytest.approx(p)


def test_drift_by_hand():
    test_only = {2: REFERENCE - 0.1}
    rows = scores.drift_rows(made(test_only=test_only))
    full = only(rows, kind="full", **{"class": "all"})
    drift = np.array([-0.1, -0.2, 0.1, 0.1, 0.4, -0.3])
    assert full["mean"] == pytest.approx(0) and full["mean_abs"] == pytest.approx(0.2)
    assert full["std"] == pytest.approx(np.sqrt(0.32 / 6)) and full["q50"] == pytest.approx(0)
    assert (full["min"], full["max"]) == (pytest.approx(-0.3), pytest.approx(0.4))
    target = only(rows, kind="full", **{"class": "target"})
    assert target["mean"] == pytest.approx(-0.2 / 3) and target["trials"] == 3
    assert only(rows, kind="full", **{"class": "nontarget"})["mean"] == pytest.approx(0.2 / 3)
    side = only(rows, kind="test-only", **{"class": "all"})
    assert side["mean"] == pytest.approx(-0.1) and side["std"] == pytest.approx(0)
    assert side["pearson"] == pytest.approx(1)
    assert full["q95"] == pytest.approx(np.quantile(drift, 0.95))


def test_correlations_are_scipys_with_ties_and_by_class():
    rng = np.random.default_rng(5)
    base = np.round(rng.standard_normal(400), 1)
    low = np.round(base + 0.4 * rng.standard_normal(400), 1)
    labels = rng.random(400) < 0.3
    trials = scores.scored_trials(base, {3: low, 2: base[::-1]}, None, labels, np.zeros(400, int), np.zeros(400, int))
    rows = scores.drift_rows(trials)
    for bits, other in ((3, low), (2, base[::-1])):
        for name, mask in (("all", slice(None)), ("target", labels), ("nontarget", ~labels)):
            row = only(rows, bits=bits, **{"class": name})
            assert row["pearson"] == pytest.approx(stats.pearsonr(base[mask], other[mask])[0])
            assert row["spearman"] == pytest.approx(stats.spearmanr(base[mask], other[mask])[0])


def test_a_perfect_copy_neither_drifts_nor_flips():
    trials = made({4: REFERENCE, 2: REFERENCE.copy()}, {4: REFERENCE, 2: REFERENCE})
    draws = SpeakerDraws(*SPEAKERS, 50)
    for row in scores.drift_rows(trials, draws):
        assert row["mean"] == row["mean_abs"] == row["std"] == row["min"] == row["max"] == 0
        assert row["pearson"] == pytest.approx(1) and row["spearman"] == pytest.approx(1)
    for flips in scores.all_flips(trials, (0.3,)):
        for row in scores.flip_rows(trials, flips, draws):
            assert row["harmful"] == row["beneficial"] == 0
            assert row["mcnemar_p"] in (None, 1.0)
    assert [row["eer_change"] for row in scores.system_rows(trials)] == [0, 0, 0]


def test_the_most_bits_come_first_whatever_their_order():
    trials = made({2: LOW, 4: REFERENCE, 3: LOW + 1})
    assert trials.bits == (4, 3, 2)
    np.testing.assert_array_equal(trials.full, [REFERENCE, LOW + 1, LOW])


def test_a_shift_flips_at_the_references_threshold_but_not_at_its_own():
    trials = made({2: REFERENCE + 0.45})
    reference, own = scores.all_flips(trials)
    assert reference.harmful.sum() > 0
    assert own.harmful.sum() == own.beneficial.sum() == 0
    assert own.model_thresholds[0] == pytest.approx(reference.threshold + 0.45)


def test_intervals_hold_the_value_and_pair_the_differences():
    rng = np.random.default_rng(1)
    owner = np.repeat(np.arange(12), 4)
    one, two = np.triu_indices(48, 1)
    labels = owner[one] == owner[two]
    base = labels + 0.5 * rng.standard_normal(len(one))
    low = base + 0.2 * rng.standard_normal(len(one))
    trials = scores.scored_trials(base, {2: low}, None, labels, owner[one], owner[two])
    draws = SpeakerDraws(owner[one], owner[two], 200)
    for row in scores.drift_rows(trials, draws):
        assert row["mean_abs_ci95"][0] < row["mean_abs"] < row["mean_abs_ci95"][1]
    row = scores.flip_rows(trials, scores.all_flips(trials)[0], draws)[0]
    assert row["harmful_rate_ci95"][0] <= row["harmful_rate"] <= row["harmful_rate_ci95"][1]
    reference, system = scores.system_rows(trials, scores.system_draws(trials, 100))
    assert reference["eer_change_ci95"] == [0, 0]
    low_end, high_end = system["eer_change_ci95"]
    assert low_end < high_end < system["eer_ci95"][1]


@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        ((0.0147, 0.0175, 0.0301), 3),  # the paper's ResNet-36, mean |drift| at 4, 3, 2 bits
        ((0.0198, 0.0214, 0.0257), 3),  # and its ResNet-200
        ((1.0, 2.0, 3.0), None),  # a straight line
        ((1.0, 2.9, 3.0), None),  # rises at once and then no more
        ((3.0, 2.0, 1.0), None),
        ((0.0, 0.0, 0.0), None),
    ],
)
def test_knee(damage, wanted):
    assert scores.knee((4, 3, 2), damage) == wanted
    assert scores.knee((2, 3, 4), damage[::-1]) == wanted


def test_a_knee_needs_three_numbers_of_bits_and_finds_the_sharpest():
    assert scores.knee((4, 2), (0.0, 1.0)) is None
    assert scores.knee((8, 6, 4, 3, 2), (0.0, 0.01, 0.02, 0.1, 1.0)) == 3


def test_a_knee_is_named_only_beyond_chance():
    """In each draw damage has the knee, or in half of the draws it has none: then it may be luck."""
    damage = (0.0, 0.1, 1.0)
    sure = np.tile(np.array(damage)[:, None], 100)
    assert scores.knee((4, 3, 2), damage, sure) == 3
    for spoilt in (1, 2):  # nothing is gained below the line, or nothing lost at all
        drawn = sure.copy()
        drawn[spoilt, :10] = {1: 0.9, 2: -0.1}[spoilt]
        assert scores.knee((4, 3, 2), damage, drawn) is None
        drawn[spoilt, :6] = damage[spoilt]
        assert scores.knee((4, 3, 2), damage, drawn) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"full": {2: LOW[:-1]}}, "2 bits: 5 scores for 6 trials: not the same trial list"),
        ({"full": {2: np.where(np.arange(6) == 3, np.nan, LOW)}}, "2 bits: 1 of 6 scores are not finite.*trial 4"),
        ({"reference": np.full(6, np.nan)}, "reference: 6 of 6 scores are not finite"),
        ({"labels": np.ones(6, bool)}, "reference: no nontarget trials"),
        ({"full": {}}, "no quantized model"),
        ({"full": {2: LOW, 3: LOW}, "test_only": {2: LOW}}, r"\[3\] bits: there are scores of one kind"),
        ({"speakers": (SPEAKERS[0][:-1], SPEAKERS[1])}, "5 and 6 speakers for 6 trials"),
    ],
)
def test_mistakes_are_one_clear_line(change, message):
    with pytest.raises(UserError, match=message):
        made(**change)


@pytest.mark.parametrize("edges", [(0.2, 0.1), (0.0,), (0.1, 0.1), (np.inf,)])
def test_edges_must_ascend(edges):
    trials = made()
    with pytest.raises(UserError, match="ascend"):
        scores.flip_rows(trials, scores.find_flips(trials, "x", 0.5), edges=edges)
