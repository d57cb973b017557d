"""Makes a cascade's policy from calibration trials: maps and threshold, then gates by one of two rules."""

import dataclasses
from dataclasses import dataclass

import numpy as np
from scipy import stats

from kmq_jax.cascade import gates, risk
from kmq_jax.cascade.options import APPROXIMATE, BOUNDS, CalibrationOptions
from kmq_jax.cascade.policy import CascadePolicy, fit_map
from kmq_jax.cascade.run import map_scores, prices, run_grid
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json
from kmq_jax.metrics.calibration import AffineMap, fit_logistic
from kmq_jax.metrics.detection import Array, eer
from kmq_jax.metrics.operating import OperatingPoint, parse_point, threshold_at

# How far `risk_path` widens the dearest gates of the front, widest first.
_FACTORS = (8.0, 6.0, 5.0, 4.0, 3.5, 3.0, 2.75, 2.5, 2.25, 2.0, 1.85, 1.7, 1.55, 1.4, 1.3, 1.2, 1.1, 1.05)


@dataclass(frozen=True, eq=False)
class Calibration:
    """Trials to calibrate on.

    Attributes:
        bits: bits of each level, ascending.
        scores: `[levels, trials]` float32.
        reference: `[trials]` float32.
        labels: `[trials]` bool.
        enrol_speaker: `[trials]`, nonnegative integers.
        test_speaker: `[trials]`, nonnegative integers.
        reference_level: whether the last level is the reference itself; its map is then left alone.
        enrol: `[trials]`, numbers of the enrolled utterances or models; only costs by utterance need them.
        test: `[trials]`, numbers of the tested utterances; likewise.
        one_table: both sides number the same utterances.
    """

    bits: tuple[int, ...]
    scores: Array
    reference: Array
    labels: Array
    enrol_speaker: Array
    test_speaker: Array
    reference_level: bool = False
    enrol: Array | None = None
    test: Array | None = None
    one_table: bool = True

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: Array) -> "Calibration":
        """A part of the trials: those where `chosen` `[trials]` is true, or those whose rows it holds."""
        names = ("reference", "labels", "enrol_speaker", "test_speaker", "enrol", "test")
        parts = {name: getattr(self, name)[chosen] for name in names if getattr(self, name) is not None}
        return dataclasses.replace(self, scores=self.scores[:, chosen], **parts)


def fit(data: Calibration, kind: str = "isotonic", point: OperatingPoint | None = None) -> CascadePolicy:
    """Fits maps and threshold of a policy. Its gates are placeholders: every one stops every trial.

    Args:
        data: the trials.
        kind: of the maps, see `fit_map`.
        point: the operating point that the threshold is for; the reference's EER where left out.

    Returns:
        The policy; its maps to log likelihood ratios are None where a class of trials is missing.

    Raises:
        UserError: a class of trials that map or threshold need is missing.
    """
    # A float32 number: scores are compared in float32, here and in the compiled cascade.
    threshold = float(np.float32(threshold_at(data.reference, data.labels, point or OperatingPoint("eer"))))
    levels = len(data.bits)
    maps = [fit_map(kind, data.scores[i], data.reference, data.labels) for i in range(levels - data.reference_level)]
    if data.reference_level:
        maps.append(AffineMap(1.0, 0.0))
    policy = CascadePolicy(data.bits, tuple(maps), ((threshold, threshold),) * (levels - 1), threshold)
    if data.labels.all() or not data.labels.any():
        return policy
    llrs = (fit_logistic(row, data.labels) for row in map_scores(policy, data.scores))
    # A level that scores targets below nontargets is taken to tell nothing: a log ratio of zero, whatever the score.
    rising = tuple(found if found.scale >= 0 else AffineMap(0.0, 0.0) for found in llrs)
    return dataclasses.replace(policy, llr_maps=rising)


def front_of(
    policy: CascadePolicy, data: Calibration, options: CalibrationOptions, objective: str, last_counts: bool = True
) -> gates.Front:
    """The Pareto front of gates for a policy's maps and threshold.

    The search needs costs that are sums over trials: bits, or seconds where `options` has them. So with costs by
    utterance, the front is found by the costs by trial, then priced by utterance, and points that another one then
    beats are left out.

    Args:
        policy: maps and threshold; its gates do not count.
        data: the trials.
        options: `cost`, `seconds`, `nested`, `symmetric` and `enrolment` count here.
        objective: what is kept low beside the cost, one of `OBJECTIVES`.
        last_counts: whether harmful flips of the last level count as well.

    Raises:
        UserError: costs by utterance are asked for, and the utterances of the trials are not known.
    """
    mapped = map_scores(policy, data.scores)
    sequential, incremental = prices(policy.bits)
    price = incremental if options.nests else sequential
    # A trial that reaches a level has also run those below it.
    price = np.cumsum(options.seconds) if options.seconds else price
    front = gates.search(
        mapped, data.reference, data.labels, policy.threshold, price, objective, options.symmetric, last_counts
    )
    if options.cost != "utterance" or not policy.gates:
        return front
    if data.enrol is None or data.test is None:
        raise UserError("`cost` (=utterance) needs the utterances that trials compare")
    policies = [
        dataclasses.replace(policy, gates=front.point(i), enrolment=options.enrolment, seconds=options.seconds or None)
        for i in range(len(front))
    ]
    accepted = data.reference >= policy.threshold
    found = run_grid(policies, data.scores, data.enrol, data.test, accepted, data.labels, data.one_table)
    unit = "seconds" if options.seconds else "incremental_bits" if options.nests else "bits"
    costs = found[f"utterance_{unit}"].astype(np.float64)
    keep = gates.pareto(front.objective, costs)
    return gates.Front(front.gates[keep], front.objective[keep], costs[keep])


def pareto(
    data: Calibration, policy: CascadePolicy, options: CalibrationOptions
) -> tuple[CascadePolicy, gates.Front, Json]:
    """Takes the cheapest gates whose harmful flips keep to a limit: the last level's own, or `alpha` if that is more.

    The front is judged on the trials that it was searched on, so its best points owe part of their success to chance.
    A point is therefore taken only if it keeps to the limit with a margin for the spread over speakers (`delta`).

    With the objective "eer" the limit is the last level's EER plus `alpha`, and there is no margin.

    Args:
        data: the trials.
        policy: maps and threshold, by `fit`.
        options: `alpha`, `delta`, `objective` and what `front_of` looks at.

    Returns:
        The policy with gates; the whole front; notes on what was chosen (`chosen`, its place on the front) and by which
        limit (`at_most`).
    """
    front = front_of(policy, data, options, options.objective)
    mapped = map_scores(policy, data.scores)
    if options.objective == "eer":
        most = eer(mapped[-1], data.labels)[0] + options.alpha
        chosen = gates.choose(front, most)
    else:
        chosen, most = _cheapest_with_margin(front, data, policy, mapped, options)
    notes = {"rule": "pareto", "objective": options.objective, "cost": options.cost, "delta": options.delta}
    notes["nested"] = options.nests
    return dataclasses.replace(policy, gates=front.point(chosen)), front, notes | {"at_most": most, "chosen": chosen}


def _cheapest_with_margin(
    front: gates.Front, data: Calibration, policy: CascadePolicy, mapped: Array, options: CalibrationOptions
) -> tuple[int, float]:
    """The cheapest point whose flips keep to the limit with the margin, or else the dearest one; and the limit."""
    flips = gates.harmful_flips(mapped, policy.threshold, data.reference, data.labels)
    # Times the number of trials, so that a plain mean over trials is the weighted one.
    weights = gates.class_weights(data.labels, options.objective) * len(data)
    own = float(np.mean(flips[-1] * weights))
    most = max(options.alpha, own)
    # In standard errors.
    margin = float(stats.norm.ppf(1 - options.delta))
    for i in range(len(front)):
        if front.objective[i] > most + gates.SLACK:
            continue
        lost = flips_of(dataclasses.replace(policy, gates=front.point(i)), mapped, flips).astype(float)
        # Where the last level sets the limit, the difference from it varies less over speakers than the rate itself.
        excess = weights * (lost - flips[-1]) if own >= options.alpha else weights * lost - options.alpha
        error = risk.speaker_error(excess, data.enrol_speaker, data.test_speaker)
        if excess.mean() + margin * error <= gates.SLACK:
            return i, most
    return len(front) - 1, most


def split_speakers(data: Calibration, share: float, seed: int) -> tuple[Calibration, Calibration]:
    """Deals speakers into two groups at random. Trials between the groups are in neither result.

    Args:
        data: the trials.
        share: of the speakers, who go to the second group.
        seed: of the deal.

    Returns:
        The trials within the first group, and those within the second.

    >>> speaker, scores = np.arange(4), np.zeros(4, np.float32)
    >>> data = Calibration((2,), scores[None], scores, speaker >= 0, speaker, speaker)
    >>> [len(group) for group in split_speakers(data, share=0.5, seed=0)]
    [2, 2]
    """
    speakers = np.union1d(data.enrol_speaker, data.test_speaker)
    order = np.random.default_rng(seed).permutation(speakers)
    second = order[: round(share * len(speakers))]
    one, two = np.isin(data.enrol_speaker, second), np.isin(data.test_speaker, second)
    return data.take(~one & ~two), data.take(one & two)


def risk_path(policy: CascadePolicy, data: Calibration, options: CalibrationOptions) -> list[tuple[gates.Gate, ...]]:
    """Gates to test, from safe to cheap.

    First come the dearest gates of the front (bits against flips made by stopping early), widened by ever smaller
    factors. Then comes the front itself, from its dearest point to its cheapest.
    """
    front = front_of(policy, data, options, "flips", last_counts=False)
    points = [front.point(i) for i in reversed(range(len(front)))]
    centre = policy.threshold
    widened = [
        tuple((centre + factor * (low - centre), centre + factor * (high - centre)) for low, high in points[0])
        for factor in _FACTORS
    ]
    return [*widened, *points]


def levels_of(policy: CascadePolicy, mapped: Array) -> Array:
    """The deciding level of each trial `[trials]`.

    Args:
        policy: for the gates.
        mapped: `[levels, trials]` float32, on the reference's scale.

    >>> from kmq_jax.cascade.policy import symmetric_gates
    >>> same = AffineMap(1.0, 0.0)
    >>> policy = CascadePolicy((2, 4), (same, same), symmetric_gates(0.5, [0.1]), 0.5)
    >>> levels_of(policy, np.float32([[0.9, 0.55], [0.9, 0.4]])).tolist()
    [0, 1]
    """
    level = np.full(mapped.shape[1], len(mapped) - 1)
    # As in `run`: the first level that stops a trial writes last.
    for i in reversed(range(len(mapped) - 1)):
        low, high = np.array(policy.gates[i], np.float32)
        level[(mapped[i] <= low) | (mapped[i] >= high)] = i
    return level


def flips_of(policy: CascadePolicy, mapped: Array, flips: Array, last_counts: bool = True) -> Array:
    """Which trials `[trials]` a cascade decides with a harmful flip.

    Args:
        policy: for the gates.
        mapped: `[levels, trials]` float32, on the reference's scale.
        flips: `[levels, trials]` bool, see `gates.harmful_flips`.
        last_counts: whether flips of the last level count, or only those made by stopping early.

    >>> from kmq_jax.cascade.policy import symmetric_gates
    >>> same = AffineMap(1.0, 0.0)
    >>> policy = CascadePolicy((2, 4), (same, same), symmetric_gates(0.5, [0.1]), 0.5)
    >>> flips = np.array([[True, True], [False, False]])
    >>> flips_of(policy, np.float32([[0.9, 0.55], [0.9, 0.4]]), flips).tolist()  # the second trial climbs to level 2
    [True, False]
    """
    level = levels_of(policy, mapped)
    return flips[level, np.arange(len(level))] & (last_counts | (level < len(mapped) - 1))


def control_risk(data: Calibration, options: CalibrationOptions) -> tuple[CascadePolicy, Json]:
    """Finds the cheapest gates that keep a promise on harmful flips made by stopping early (see `cascade.risk`).

    Speakers are dealt into two groups. Trials within the first make maps, threshold and a path of gates; trials within
    the second test the path. Where no gates keep the promise, every trial climbs to the last level.

    Args:
        data: the trials.
        options: all but `objective` count here; `delta` does not for the bound "conformal".

    Returns:
        The policy, and notes on what is promised. Among them are: `bound`, and whether it is `approximate`;
        `upper_bounds` of the chosen gates, as if these had been fixed in advance; `proven_upper_bound`, by Hoeffding
        and Bentkus, over all gates tried at once; `kept_by`, how many of the `tested` gates each bound would keep;
        `speakers_needed` for a proof of alpha; `with_last_level`, the same bounds for all harmful flips, with those of
        the last level.

    Raises:
        UserError: a group of speakers has too few trials.
    """
    design, certify = split_speakers(data, options.certify_share, options.seed)
    if not len(design):
        raise UserError("the risk rule has no trials within one of its two groups of speakers")
    policy = fit(design, options.map, parse_point(options.operating_point))
    # Dealing speakers drops nontarget trials only, those between the groups: so the share of targets is taken before.
    share = float(np.mean(data.labels))
    pairs = risk.pair_up(certify.enrol_speaker, certify.test_speaker, certify.labels, share)
    path = risk_path(policy, design, options) if len(policy.bits) > 1 else []
    mapped = map_scores(policy, certify.scores)
    flips = gates.harmful_flips(mapped, policy.threshold, certify.reference, certify.labels)
    policies = [dataclasses.replace(policy, gates=point) for point in path]

    def steps(bound: str) -> int:
        early = (flips_of(one, mapped, flips, last_counts=False) for one in policies)
        return risk.walk(early, flips[0], pairs, options.alpha, options.delta, bound)

    kept_by = {bound: steps(bound) for bound in BOUNDS}
    kept = kept_by[options.bound]
    never = ((-np.inf, np.inf),) * (len(policy.bits) - 1)
    found = policies[kept - 1] if kept else dataclasses.replace(policy, gates=never)
    lost = pairs.losses(flips_of(found, mapped, flips, last_counts=False))
    # The cheapest gates, by which every trial stops at the first level: they flip the most.
    much = pairs.losses(flips[0])

    def bounded(losses: Array) -> Json:
        # The gates were chosen on these very trials. Delta divided by the number of gates tried covers the choice (a
        # union bound).
        rate, each = float(losses.mean()), options.delta / max(len(path), 1)
        upper = risk.bounds(losses, much, pairs, options.delta)
        return {
            "rate": rate,
            "upper_bounds": upper,
            "proven_upper_bound": risk.hoeffding_bentkus(rate, pairs.units, each),
        }

    # Where none are kept, no trial stops early: then there is nothing to bound.
    nothing = {"rate": 0.0, "upper_bounds": dict.fromkeys(BOUNDS, 0.0), "proven_upper_bound": 0.0}
    notes = {
        "rule": "risk",
        "promise": "mean over new speakers of harmful flips made by stopping early is at most alpha",
        "alpha": options.alpha,
        "delta": None if options.bound == "conformal" else options.delta,
        "bound": options.bound,
        "approximate": options.bound in APPROXIMATE,
        **(bounded(lost) if kept else nothing),
        "kept_by": kept_by,
        "speakers_needed": risk.speakers_needed(options.alpha, options.delta),
        "target_share": share,
        "certifying_speakers": pairs.speakers,
        "certifying_trials": pairs.trials,
        "independent_pairs": pairs.units,
        "last_level_flip_rate": float(pairs.losses(flips[-1]).mean()),
        "with_last_level": bounded(pairs.losses(flips_of(found, mapped, flips))),
        "tested": len(path),
        "kept": kept,
        "cost": options.cost,
        "nested": options.nests,
    }
    return found, notes
