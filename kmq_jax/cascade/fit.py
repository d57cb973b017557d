"""Makes a cascade's policy from calibration trials: maps and threshold, then gates by one of two rules."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from kmq_jax.cascade import gates, risk
from kmq_jax.cascade.policy import CascadePolicy, fit_map
from kmq_jax.cascade.run import map_scores, prices
from kmq_jax.core.errors import UserError
from kmq_jax.metrics.calibration import AffineMap, fit_logistic
from kmq_jax.metrics.detection import Array, eer
from kmq_jax.metrics.operating import OperatingPoint, threshold_at

_WIDER = (8.0, 6.0, 5.0, 4.0, 3.5, 3.0, 2.75, 2.5, 2.25, 2.0, 1.85, 1.7, 1.55, 1.4, 1.3, 1.2, 1.1, 1.05)


@dataclass(frozen=True, eq=False)
class Calibration:
    """Trials to calibrate on.

    Attributes:
        bits: bits of each stage, ascending.
        scores: `[stages, trials]` float32.
        reference: `[trials]` float32.
        labels: `[trials]` bool.
        enrol_speaker: `[trials]`, nonnegative integers.
        test_speaker: `[trials]`, nonnegative integers.
        reference_stage: whether the last stage is the reference itself; its map is then left alone.
    """

    bits: tuple[int, ...]
    scores: Array
    reference: Array
    labels: Array
    enrol_speaker: Array
    test_speaker: Array
    reference_stage: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: Array) -> "Calibration":
        """The trials at `chosen` `[trials]` bool, or rows of trials."""
        names = ("reference", "labels", "enrol_speaker", "test_speaker")
        parts = {name: getattr(self, name)[chosen] for name in names}
        return dataclasses.replace(self, scores=self.scores[:, chosen], **parts)


def fit(data: Calibration, kind: str = "isotonic", point: OperatingPoint | None = None) -> CascadePolicy:
    """Fits maps and threshold; every gate stops every trial.

    Args:
        data: the trials.
        kind: of the maps, see `fit_map`.
        point: what the threshold is for; the reference's EER where left out.

    Raises:
        UserError: a class of trials that map or threshold need is missing.
    """
    threshold = float(np.float32(threshold_at(data.reference, data.labels, point or OperatingPoint("eer"))))
    stages = len(data.bits)
    maps = [fit_map(kind, data.scores[i], data.reference, data.labels) for i in range(stages - data.reference_stage)]
    if data.reference_stage:
        maps.append(AffineMap(1.0, 0.0))
    policy = CascadePolicy(data.bits, tuple(maps), ((threshold, threshold),) * (stages - 1), threshold)
    if data.labels.all() or not data.labels.any():
        return policy
    llrs = tuple(fit_logistic(row, data.labels) for row in map_scores(policy, data.scores))
    return dataclasses.replace(policy, llr_maps=llrs)


def _front(policy: CascadePolicy, data: Calibration, cost: str, last_counts: bool = True, **how: Any) -> gates.Front:
    mapped = map_scores(policy, data.scores)
    price = dict(zip(gates.COSTS, prices(policy.bits)))[cost]
    return gates.search(mapped, data.reference, data.labels, policy.threshold, price, last_counts=last_counts, **how)


def pareto(
    data: Calibration,
    policy: CascadePolicy,
    alpha: float = 0.001,
    delta: float = 0.05,
    objective: str = "flips",
    cost: str = "sequential",
    symmetric: bool = False,
) -> tuple[CascadePolicy, gates.Front, dict[str, Any]]:
    """Picks the cheapest gates that flip no more decisions than the last stage alone, or than `alpha` if that is more.

    The front was searched on the very trials that it is judged by, and its best points are partly luck. So a point is
    taken only if its excess over the limit, plus the margin that its spread over speakers asks for, is not above zero.

    Args:
        data: the trials.
        policy: maps and threshold, by `fit`.
        alpha: harmful flips a trial that are allowed in any case; for the objective "eer", EER above the last stage's.
        delta: one minus the confidence of the margin; 0.5 is no margin. The objective "eer" has none.
        objective: "flips", "balanced" or "eer", see `gates.search`.
        cost: "sequential" or "incremental" bits.
        symmetric: gates of equal width on both sides.

    Returns:
        The policy with gates, the whole front, and what was chosen why.
    """
    front = _front(policy, data, cost, objective=objective, symmetric=symmetric)
    mapped = map_scores(policy, data.scores)
    notes: dict[str, Any] = {"rule": "pareto", "objective": objective, "cost": cost, "delta": delta}
    if objective == "eer":
        most = eer(mapped[-1], data.labels)[0] + alpha
        chosen = gates.choose(front, most)
    else:
        flips = gates.harmful_flips(mapped, policy.threshold, data.reference, data.labels)
        weights = gates.class_weights(data.labels, objective) * len(data)
        own = float(np.mean(flips[-1] * weights))
        most = max(alpha, own)
        margin = float(stats.norm.ppf(1 - delta))
        chosen = len(front) - 1
        for i in range(len(front)):
            if front.objective[i] > most:
                continue
            lost = flips_of(dataclasses.replace(policy, gates=front.point(i)), mapped, flips).astype(float)
            excess = weights * (lost - flips[-1]) if own >= alpha else weights * lost - alpha
            if excess.mean() + margin * risk.speaker_error(excess, data.enrol_speaker, data.test_speaker) <= 1e-12:
                chosen = i
                break
    return dataclasses.replace(policy, gates=front.point(chosen)), front, notes | {"at_most": most, "chosen": chosen}


def split_speakers(data: Calibration, share: float, seed: int) -> tuple[Calibration, Calibration]:
    """Deals speakers into two groups; trials across the groups are in neither result.

    Args:
        data: the trials.
        share: of the speakers that go to the second group.
        seed: of the deal.
    """
    speakers = np.union1d(data.enrol_speaker, data.test_speaker)
    order = np.random.default_rng(seed).permutation(speakers)
    second = order[: round(share * len(speakers))]
    one, two = np.isin(data.enrol_speaker, second), np.isin(data.test_speaker, second)
    return data.take(~one & ~two), data.take(one & two)


def risk_path(policy: CascadePolicy, data: Calibration, cost: str, symmetric: bool) -> list[tuple[Any, ...]]:
    """Gates to test, from the widest finite ones to the cheapest.

    It is the front of flips made by stopping early against bits. Ahead of it stand its dearest gates, widened.
    """
    front = _front(policy, data, cost, objective="flips", symmetric=symmetric, last_counts=False)
    points = [front.point(i) for i in reversed(range(len(front)))]
    centre = policy.threshold
    wider = [
        tuple((centre + factor * (low - centre), centre + factor * (high - centre)) for low, high in points[0])
        for factor in _WIDER
    ]
    return [*wider, *points]


def stages_of(policy: CascadePolicy, mapped: Array) -> Array:
    """The deciding stage of each trial `[trials]`.

    Args:
        policy: for the gates.
        mapped: `[stages, trials]` float32, on the reference's scale.
    """
    stage = np.full(mapped.shape[1], len(mapped) - 1)
    for i in reversed(range(len(mapped) - 1)):
        low, high = np.array(policy.gates[i], np.float32)
        stage[(mapped[i] <= low) | (mapped[i] >= high)] = i
    return stage


def flips_of(policy: CascadePolicy, mapped: Array, flips: Array, last_counts: bool = True) -> Array:
    """Which trials `[trials]` a cascade decides with a harmful flip.

    Args:
        policy: for the gates.
        mapped: `[stages, trials]` float32, on the reference's scale.
        flips: `[stages, trials]` bool, see `gates.harmful_flips`.
        last_counts: whether those of the last stage count, or only those made by stopping early.
    """
    stage = stages_of(policy, mapped)
    return flips[stage, np.arange(len(stage))] & (last_counts | (stage < len(mapped) - 1))


def control_risk(
    data: Calibration,
    kind: str = "isotonic",
    point: OperatingPoint | None = None,
    alpha: float = 0.001,
    delta: float = 0.05,
    bound: str = "survey",
    cost: str = "sequential",
    symmetric: bool = False,
    certify_share: float = 0.5,
    seed: int = 0,
) -> tuple[CascadePolicy, dict[str, Any]]:
    """Finds the cheapest gates that keep a promise on harmful flips made by stopping early (see `scoring.risk`).

    Args:
        data: the trials.
        kind: of the maps.
        point: what the threshold is for.
        alpha: the risk that is allowed.
        delta: one minus the confidence; "conformal" does not use it.
        bound: "survey", "hoeffding-bentkus" or "conformal".
        cost: "sequential" or "incremental" bits.
        symmetric: gates of equal width on both sides.
        certify_share: share of the speakers who only test the gates.
        seed: of the deal of speakers.

    Returns:
        The policy, and what is promised.

    Raises:
        UserError: a group of speakers has too few trials.
    """
    design, certify = split_speakers(data, certify_share, seed)
    if not len(design):
        raise UserError("the risk rule has no trials within one of its two groups of speakers")
    policy = fit(design, kind, point)
    pairs = risk.pair_up(certify.enrol_speaker, certify.test_speaker, certify.labels)
    path = risk_path(policy, design, cost, symmetric) if len(policy.bits) > 1 else []
    mapped = map_scores(policy, certify.scores)
    flips = gates.harmful_flips(mapped, policy.threshold, certify.reference, certify.labels)
    policies = [dataclasses.replace(policy, gates=point) for point in path]
    steps = risk.walk((flips_of(step, mapped, flips, False) for step in policies), flips[0], pairs, alpha, delta, bound)
    never = ((-np.inf, np.inf),) * (len(policy.bits) - 1)
    found = policies[steps - 1] if steps else dataclasses.replace(policy, gates=never)
    lost = pairs.losses(flips_of(found, mapped, flips, False))
    # Nobody stops early behind infinite gates: there is nothing to bound then.
    upper = risk.bounds(lost, pairs.losses(flips[0]), pairs, delta) if steps else dict.fromkeys(risk.BOUNDS, 0.0)
    notes = {
        "rule": "risk",
        "promise": "mean over new speakers of harmful flips made by stopping early is at most alpha",
        "alpha": alpha,
        "delta": None if bound == "conformal" else delta,
        "bound": bound,
        "rate": float(lost.mean()),
        "upper_bounds": upper,
        "certifying_speakers": pairs.speakers,
        "certifying_trials": pairs.trials,
        "independent_pairs": pairs.units,
        "last_stage_flip_rate": float(pairs.losses(flips[-1]).mean()),
        "tested": len(path),
        "kept": steps,
        "cost": cost,
    }
    return found, notes
