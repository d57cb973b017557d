"""What quantization does to scores and decisions: drift, flips, margins, and the bits at which damage sets in.

Arrays are `[models, trials]`, and each statistic is computed for all models at once; nothing steps through trials.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json
from kmq_jax.diagnosis.correlation import known, pearson, ranks
from kmq_jax.diagnosis.resample import SpeakerDraws, in_threads, interval_of_ratio
from kmq_jax.metrics.bootstrap import Bootstrap, enough, percentile_interval, speaker_bootstrap
from kmq_jax.metrics.detection import Array, check_trials, eer, min_dcf

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
CLASSES = ("all", "target", "nontarget")
FIXED_EDGES = (0.05, 0.1, 0.2)
EQUAL_MASS_BINS = 3
KNEE_RULE = (
    "Kneedle (Satopaa et al. 2011): both axes are scaled to 0..1; the knee is where damage lies farthest below the "
    "straight line from the most to the fewest bits, if by at least 0.1; it needs models at three numbers of bits and "
    "damage that is greatest at the fewest; and in 95 of 100 draws of speakers damage must be greater at the fewest "
    "bits than at the most, and lie below the line there"
)


@dataclass(frozen=True, eq=False)
class ScoredTrials:
    """One trial list scored by a reference and by quantized models; make one by `scored_trials`.

    Attributes:
        bits: of each quantized model.
        reference: `[trials]` float64, scores of the reference.
        full: `[models, trials]`, both sides embedded by the quantized model.
        test_only: `[models, trials]`, enrolment by the reference, test by the quantized model; None if unknown.
        labels: `[trials]`, true for target trials.
        enrol_speaker: `[trials]`, nonnegative integers.
        test_speaker: `[trials]`, nonnegative integers.
    """

    bits: tuple[int, ...]
    reference: Array
    full: Array
    test_only: Array | None
    labels: Array
    enrol_speaker: Array
    test_speaker: Array

    def kinds(self) -> dict[str, Array]:
        """Scores of the models `[models, trials]` by kind of drift: "full", and "test-only" where known."""
        return {"full": self.full} if self.test_only is None else {"full": self.full, "test-only": self.test_only}


def scored_trials(
    reference: ArrayLike,
    full: Mapping[int, ArrayLike],
    test_only: Mapping[int, ArrayLike] | None,
    labels: ArrayLike,
    enrol_speaker: ArrayLike,
    test_speaker: ArrayLike,
) -> ScoredTrials:
    """Checks and stacks the scores of one trial list, the model of the most bits first.

    Args:
        reference: `[trials]`.
        full: by bits, `[trials]`.
        test_only: by bits, `[trials]`, or None.
        labels: `[trials]`.
        enrol_speaker: `[trials]`.
        test_speaker: `[trials]`.

    Raises:
        UserError: the lists differ in length, a score is not finite, there is one class only, there is no quantized
            model, or one mapping has bits that the other lacks.
    """
    try:
        base, target = check_trials(reference, labels)
    except UserError as error:
        raise UserError(f"reference: {error}") from error
    if not full:
        raise UserError("there is no quantized model to compare with the reference")
    if test_only is not None and set(test_only) != set(full):
        missing = sorted(set(full) ^ set(test_only))
        raise UserError(f"{missing} bits: there are scores of one kind of drift only")
    all_bits = tuple(sorted(full, reverse=True))

    def stack(scores: Mapping[int, ArrayLike]) -> Array:
        rows = []
        for bits in all_bits:
            row = np.asarray(scores[bits], np.float64)
            if row.shape != base.shape:
                raise UserError(f"{bits} bits: {row.size} scores for {len(base)} trials: not the same trial list")
            if not np.isfinite(row).all():
                bad = ~np.isfinite(row)
                raise UserError(
                    f"{bits} bits: {bad.sum()} of {len(row)} scores are not finite, the first is trial "
                    f"{int(np.argmax(bad)) + 1}"
                )
            rows.append(row)
        return np.stack(rows)

    speakers = [np.asarray(side) for side in (enrol_speaker, test_speaker)]
    if any(side.shape != base.shape for side in speakers):
        raise UserError(f"{speakers[0].size} and {speakers[1].size} speakers for {len(base)} trials")
    return ScoredTrials(all_bits, base, stack(full), None if test_only is None else stack(test_only), target, *speakers)


def system_draws(trials: ScoredTrials, replicates: int = 1000, seed: int = 0) -> list[Bootstrap]:
    """Draws of EER and minDCF of the reference and each model, on the same speakers.

    Returns:
        The reference's draws, then each model's; none where more than one draw in ten lacks a class of trials.
    """
    if not replicates:
        return []
    speakers = trials.enrol_speaker, trials.test_speaker
    systems = (trials.reference, *trials.full)
    found = [speaker_bootstrap(row, trials.labels, *speakers, replicates, seed) for row in systems]
    return found if enough(len(found[0].eer), replicates) else []


def system_rows(trials: ScoredTrials, found: Sequence[Bootstrap] = ()) -> list[Json]:
    """EER and minDCF of the reference (bits 32) and each model, with intervals, paired where differences.

    Args:
        trials: the scores.
        found: their `system_draws`, for intervals.

    Returns:
        `bits, eer, eer_ci95, eer_change, eer_change_ci95, min_dcf, min_dcf_ci95, min_dcf_change, min_dcf_change_ci95,
        threshold`; rates in percent, the threshold that of the model's own EER.
    """
    rows: list[Json] = []
    for m, (bits, scores) in enumerate(zip((32, *trials.bits), (trials.reference, *trials.full))):
        rate, threshold = eer(scores, trials.labels)
        row: Json = {"bits": bits, "eer": 100 * rate, "eer_ci95": None}
        row |= {"eer_change": 100 * rate - (rows[0]["eer"] if rows else 100 * rate), "eer_change_ci95": None}
        cost = min_dcf(scores, trials.labels)
        row |= {"min_dcf": cost, "min_dcf_ci95": None, "min_dcf_change": cost - (rows[0]["min_dcf"] if rows else cost)}
        row |= {"min_dcf_change_ci95": None, "threshold": threshold}
        if found:
            # One seed draws the same speakers for every model, so differences of draws are paired.
            draws, base = found[m], found[0]
            row["eer_ci95"] = [100 * x for x in percentile_interval(draws.eer)]
            row["eer_change_ci95"] = [100 * x for x in percentile_interval(draws.eer - base.eer)]
            row["min_dcf_ci95"] = list(percentile_interval(draws.min_dcf))
            row["min_dcf_change_ci95"] = list(percentile_interval(draws.min_dcf - base.min_dcf))
        rows.append(row)
    return rows


def drift_rows(trials: ScoredTrials, draws: SpeakerDraws | None = None) -> list[Json]:
    """Score drift by model, kind and class.

    Drift is the quantized score minus the reference's; "full" quantizes both sides, "test-only" the test side.

    Args:
        trials: the scores.
        draws: of the trials' speakers, for intervals.

    Returns:
        `bits, kind, class, trials, mean` (of a class: the shift of its mean), `mean_ci95, mean_abs, mean_abs_ci95, std,
        min, max`, quantiles `q01` to `q99`, and `pearson, spearman` with the reference's scores.
    """
    labels, base = trials.labels, trials.reference
    masks = {"all": np.ones(len(labels), bool), "target": labels, "nontarget": ~labels}
    # The reference's ranks are the same for every model and kind.
    own = {name: ranks(base[mask]) for name, mask in masks.items()}

    def by_class(values: Array) -> dict[str, Array]:
        assert draws is not None
        # Sums are linear, so two of them give all three classes.
        target, nontarget = draws.sums(np.where(labels, values, 0)), draws.sums(np.where(labels, 0, values))
        return {"all": target + nontarget, "target": target, "nontarget": nontarget}

    weights = by_class(np.ones(len(labels))) if draws else {}

    def of_model(job: tuple[str, int]) -> list[Json]:
        kind, m = job
        scores = trials.kinds()[kind][m]
        drift = scores - base
        size = np.abs(drift)
        sums = {"mean": by_class(drift), "mean_abs": by_class(size)} if draws else {}
        rows = []
        for name, mask in masks.items():
            part = drift[mask]
            row: Json = {"bits": trials.bits[m], "kind": kind, "class": name, "trials": len(part)}
            for key, value in (("mean", part.mean()), ("mean_abs", size[mask].mean())):
                row[key] = float(value)
                row[f"{key}_ci95"] = interval_of_ratio(sums[key][name], weights[name]) if draws else None
            row |= {"std": float(part.std()), "min": float(part.min()), "max": float(part.max())}
            row |= {f"q{round(100 * q):02d}": float(x) for q, x in zip(QUANTILES, np.quantile(part, QUANTILES))}
            row["pearson"] = known(pearson(base[mask], scores[mask]))
            row["spearman"] = known(pearson(own[name], ranks(scores[mask])))
            rows.append(row)
        return rows

    jobs = [(kind, m) for m in range(len(trials.bits)) for kind in trials.kinds()]
    return [row for rows in in_threads(of_model, jobs) for row in rows]


@dataclass(frozen=True, eq=False)
class Flips:
    """Decisions that quantization changed, at one threshold.

    Attributes:
        name: what the threshold is.
        threshold: of the reference.
        model_thresholds: `[models]`, of the quantized models.
        harmful: `[models, trials]`, the reference right and the model wrong.
        beneficial: `[models, trials]`, the reverse.
        margin: `[trials]`, distance of the reference's score from the threshold.
    """

    name: str
    threshold: float
    model_thresholds: Array
    harmful: Array
    beneficial: Array
    margin: Array


def find_flips(trials: ScoredTrials, name: str, threshold: float, model_thresholds: ArrayLike | None = None) -> Flips:
    """Compares decisions `score >= threshold`.

    Args:
        trials: the scores.
        name: of the threshold, for tables.
        threshold: the reference's.
        model_thresholds: `[models]`, their own; the reference's where left out.

    >>> trials = scored_trials([0.9, 0.2], {2: [0.4, 0.2]}, None, [True, False], [0, 0], [0, 1])
    >>> find_flips(trials, "fixed", 0.5).harmful.tolist()
    [[True, False]]
    """
    own = np.full(len(trials.bits), threshold) if model_thresholds is None else np.asarray(model_thresholds, float)
    right = (trials.reference >= threshold) == trials.labels
    now = (trials.full >= own[:, None]) == trials.labels
    return Flips(name, threshold, own, right & ~now, ~right & now, np.abs(trials.reference - threshold))


def all_flips(trials: ScoredTrials, thresholds: Sequence[float] = ()) -> list[Flips]:
    """Flips at the reference's EER threshold, with each model at its own EER threshold, and at given thresholds."""
    base = eer(trials.reference, trials.labels)[1]
    own = [eer(row, trials.labels)[1] for row in trials.full]
    return [
        find_flips(trials, "reference EER", base),
        find_flips(trials, "own EER", base, own),
        *(find_flips(trials, f"{value:g}", value) for value in thresholds),
    ]


def mcnemar(harmful: int, beneficial: int) -> float:
    """The exact two-sided p-value that harmful and beneficial flips are equally likely (McNemar 1947).

    It assumes independent trials, but trials that share speakers are not. The interval of the net rate, over draws of
    speakers, does not assume it.

    >>> round(mcnemar(5, 0), 4)
    0.0625
    """
    both = harmful + beneficial
    return float(binomtest(harmful, both).pvalue) if both else 1.0


def equal_mass_edges(margin: Array, bins: int = EQUAL_MASS_BINS) -> Array:
    """The inner edges `[bins - 1]` between bins of equally many trials.

    >>> equal_mass_edges(np.array([0.0, 1.0, 2.0, 3.0, 4.0]), bins=2).tolist()
    [2.0]
    """
    return np.quantile(margin, np.arange(1, bins) / bins)


def _parts_by_margin(labels: Array, margin: Array, bins: int, edges: Sequence[float]) -> list[tuple[Json, Array]]:
    """The trials that `flip_rows` counts together: what each part is, and its mask `[trials]`."""
    fixed = np.asarray(edges, float)
    if bins < 1 or (np.diff(fixed, prepend=0.0) <= 0).any() or not np.isfinite(fixed).all():
        raise UserError(f"margin bins (={bins}) must be at least 1, edges (={list(edges)}) must ascend from above zero")
    parts: list[tuple[Json, Array]] = []
    everything = np.ones(len(margin), bool)
    for name, mask in (("all", everything), ("target", labels), ("nontarget", ~labels)):
        parts.append(({"binning": "none", "bin": 0, "low": 0.0, "high": None, "class": name}, mask))
    for binning, inner in (("equal-mass", equal_mass_edges(margin, bins)), ("fixed", fixed)):
        # A margin on an edge belongs to the bin above it.
        place = np.searchsorted(inner, margin, side="right")
        for i, (low, high) in enumerate(zip([0.0, *inner.tolist()], [*inner.tolist(), None])):
            parts.append(({"binning": binning, "bin": i, "low": low, "high": high, "class": "all"}, place == i))
    return parts


def flip_rows(
    trials: ScoredTrials,
    flips: Flips,
    draws: SpeakerDraws | None = None,
    bins: int = EQUAL_MASS_BINS,
    edges: Sequence[float] = FIXED_EDGES,
) -> list[Json]:
    """Flip rates by model, of each class and of each bin of the reference's margin.

    Args:
        trials: the scores.
        flips: at one threshold.
        draws: of the trials' speakers, for intervals.
        bins: number of bins of equally many trials.
        edges: inner edges of the fixed bins, ascending, above zero.

    Returns:
        `threshold_name, threshold, bits, model_threshold, binning` ("none", "equal-mass" or "fixed"), `bin, low, high`
        (margins from `low` on, below `high`; None where open), `class, trials, harmful, beneficial`, rates of them as
        fractions of these trials with intervals, and without binning `net_rate` (harmful less beneficial),
        `net_rate_ci95, mcnemar_p`.

    Raises:
        UserError: the edges do not ascend from above zero.
    """
    parts = _parts_by_margin(trials.labels, flips.margin, bins, edges)
    kinds = {"harmful": flips.harmful, "beneficial": flips.beneficial}
    # Flips are few: as lists of trials, every bin sums over these alone.
    found = [{name: np.flatnonzero(which[m]) for name, which in kinds.items()} for m in range(len(trials.bits))]

    def of_part(part: tuple[Json, Array]) -> list[Json]:
        about, mask = part
        count = int(mask.sum())
        weights = draws.sums(mask) if draws else None
        rows = []
        for m, bits in enumerate(trials.bits):
            row: Json = {"threshold_name": flips.name, "threshold": flips.threshold, "bits": bits}
            row |= {"model_threshold": float(flips.model_thresholds[m]), **about, "trials": count}
            here = {name: at[mask[at]] for name, at in found[m].items()}
            row |= {name: len(at) for name, at in here.items()}
            sums = {name: draws.sums(np.ones(len(at)), at) for name, at in here.items()} if draws else {}
            for name in kinds:
                row[f"{name}_rate"] = row[name] / count if count else None
                row[f"{name}_rate_ci95"] = None if weights is None else interval_of_ratio(sums[name], weights)
            row |= {"net_rate": None, "net_rate_ci95": None, "mcnemar_p": None}
            if about["binning"] == "none":
                row["net_rate"] = (row["harmful"] - row["beneficial"]) / count
                if weights is not None:
                    row["net_rate_ci95"] = interval_of_ratio(sums["harmful"] - sums["beneficial"], weights)
                row["mcnemar_p"] = mcnemar(row["harmful"], row["beneficial"])
            rows.append(row)
        return rows

    return [row for rows in in_threads(of_part, parts) for row in rows]


def knee(all_bits: Sequence[int], damage: Sequence[float], drawn: Array | None = None) -> int | None:
    """The bits below which damage rises steeply, by `KNEE_RULE`; None where there is no such place.

    Args:
        all_bits: `[models]`.
        damage: `[models]`.
        drawn: `[models, replicates]`, the damage in draws of speakers; without them chance is not looked at.

    >>> knee([8, 4, 3, 2], [0.0, 0.1, 0.2, 1.0])
    3
    """
    # From the most bits to the fewest, so that damage grows along the curve.
    order = np.argsort(all_bits)[::-1]
    x, y = np.asarray(all_bits, float)[order], np.asarray(damage, float)[order]
    if len(x) < 3 or len(np.unique(x)) < len(x) or not y[-1] > y[0] or y.max() > y[-1]:
        return None
    along = (x[0] - x) / (x[0] - x[-1])  # 0 at the most bits, 1 at the fewest; damage is scaled likewise
    below = along - (y - y[0]) / (y[-1] - y[0])
    best = int(np.argmax(below))
    if below[best] < 0.1:
        return None
    if drawn is not None:
        draws = np.asarray(drawn, np.float64)[order]
        risen = draws[-1] - draws[0]
        steep = (risen > 0) & (draws[best] - draws[0] < along[best] * risen)
        if not len(steep) or steep.mean() < 0.95:
            return None
    return int(x[best])


def knees(
    trials: ScoredTrials, flips: Flips, systems: Sequence[Bootstrap] = (), draws: SpeakerDraws | None = None
) -> Json:
    """The knee of EER, mean |drift| and harmful flips, and the rule.

    Args:
        trials: the scores.
        flips: at the reference's EER threshold.
        systems: `system_draws`; without them, chance is not looked at.
        draws: of the trials' speakers; likewise.
    """
    size, harmful = np.abs(trials.full - trials.reference), flips.harmful.astype(np.float64)

    def drawn(values: Array) -> Array | None:
        # The weights are the same for every model: sums are as good as means.
        return np.stack([draws.sums(row) for row in values]) if draws is not None else None

    rates = [eer(row, trials.labels)[0] for row in trials.full]
    return {
        "rule": KNEE_RULE,
        "eer": knee(trials.bits, rates, np.stack([one.eer for one in systems[1:]]) if systems else None),
        "mean_abs_drift": knee(trials.bits, size.mean(axis=1).tolist(), drawn(size)),
        "harmful_flips": knee(trials.bits, harmful.mean(axis=1).tolist(), drawn(harmful)),
    }
