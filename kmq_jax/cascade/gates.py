"""Choice of gates: every combination of candidate gates is tried, and the Pareto front of them is kept.

The search is exact, not sampled, and its cost hardly depends on the number of trials (see `totals`).
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kmq_jax.cascade.options import OBJECTIVES
from kmq_jax.cascade.policy import Gate
from kmq_jax.core.errors import UserError
from kmq_jax.metrics.detection import Array

# How many combinations of gates are tried. The EER counts them at 64 thresholds, so it gets fewer.
_COMBINATIONS = {"flips": 1 << 20, "balanced": 1 << 20, "eer": 1 << 16}
_MOST_CANDIDATES = 256  # for each side of a gate
SLACK = 1e-12
"""How far above a limit a rate may lie, for rounding: those of a front have twelve digits."""
_THRESHOLDS = 64  # that the EER is looked for at


@dataclass(frozen=True, eq=False)
class Front:
    """A Pareto front of gates, from cheapest to dearest: no point is both as cheap as another and better.

    Attributes:
        gates: `[points, gated levels, 2]`, low and high.
        objective: `[points]`, as a fraction, descending.
        bits: `[points]`, ascending: the mean cost of a trial or an utterance, in bits, or in seconds where these count.
    """

    gates: Array
    objective: Array
    bits: Array

    def __len__(self) -> int:
        return len(self.bits)

    def point(self, index: int) -> tuple[Gate, ...]:
        """The gates of one point."""
        return tuple((float(low), float(high)) for low, high in self.gates[index])


def harmful_flips(mapped: Array, threshold: float, reference: Array, labels: Array) -> Array:
    """Where the reference decides right and a level decides wrong.

    Args:
        mapped: `[levels, trials]`, on the reference's scale.
        threshold: of all of them.
        reference: `[trials]`, the reference's scores.
        labels: `[trials]` bool.

    Returns:
        `[levels, trials]` bool.

    >>> mapped, reference = np.array([[0.2, 0.9, 0.7], [0.6, 0.9, 0.4]]), np.array([0.8, 0.9, 0.1])
    >>> harmful_flips(mapped, 0.5, reference, np.array([True, True, False])).tolist()
    [[True, False, True], [False, False, False]]
    """
    return ((reference >= threshold) == labels) & ((mapped >= threshold) != labels)


def class_weights(labels: Array, objective: str) -> Array:
    """The weight of a flip of each trial `[trials]`: all alike, or with "balanced" half the total for each class.

    >>> class_weights(np.array([True, False, False, False, False]), "balanced").tolist()
    [0.5, 0.125, 0.125, 0.125, 0.125]
    """
    if objective == "balanced" and labels.any() and not labels.all():
        return np.where(labels, 0.5 / labels.sum(), 0.5 / (~labels).sum())
    return np.full(len(labels), 1 / len(labels))


def candidates(mapped: Array, threshold: float, flips: Array, count: int, symmetric: bool = False) -> Array:
    """Gates of one level that are worth trying.

    Widening a gate helps only if a flipped trial then lies inside. So the candidates lie just beyond flipped trials,
    thinned evenly if there are more than `count`. If there are fewer, the rest lie at quantiles of the half of the
    trials that is nearest the threshold. The first candidate stops every trial, and the last stops none.

    Args:
        mapped: `[trials]` float32.
        threshold: a float32 value.
        flips: `[trials]` bool.
        count: how many for each side, at least 3.
        symmetric: both sides at the same distance.

    Returns:
        `[2, count]` float32: lows, descending, and highs, ascending.

    >>> candidates(np.float32([0.25, 0.75]), 0.5, np.array([False, True]), count=3).round(2).tolist()
    [[0.5, 0.25, -inf], [0.5, 0.75, inf]]
    """
    accepted = mapped >= np.float32(threshold)
    chosen = []
    for accept, sign in ((False, -1.0), (True, 1.0)):
        within = np.full(mapped.shape, True) if symmetric else accepted == accept
        distance = np.abs(mapped.astype(np.float64) - threshold)
        # Two of the places are for the first and the last candidate, added below.
        flipped = _thin(np.unique(distance[within & flips]), count - 2)
        near = np.sort(distance[within])
        others = _thin(np.unique(near[: (len(near) + 1) // 2]), count - 2 - len(flipped))
        found = np.unique(np.concatenate([flipped, others]))
        found = np.concatenate([found, np.full(count - 2 - len(found), np.inf)])
        # The next float32 farther out than the trial, so that the trial lies inside the gate.
        beyond = np.nextafter((threshold + sign * found).astype(np.float32), np.float32(sign * np.inf))
        # A score equal to the threshold is accepted. So the first low gate lies just below the threshold: it must
        # leave that score to the accepting side.
        first = np.float32(threshold) if accept else np.nextafter(np.float32(threshold), np.float32(-np.inf))
        chosen.append(np.concatenate([[first], beyond, [sign * np.inf]]).astype(np.float32))
    return np.stack(chosen)


def _thin(values: Array, count: int) -> Array:
    """At most `count` of sorted values, evenly by rank, with the last."""
    if count <= 0:
        return values[:0]
    return values[np.unique(np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(int))]


def _cells(mapped: Array, threshold: float, lows: Array, highs: Array) -> tuple[Array, Array]:
    """For each trial of one level its side, 0 reject or 1 accept, and how many of that side's gates stop it."""
    # Candidates widen with their number, so the gates that stop a trial are the first ones. Lows descend: negated, they
    # can be searched.
    accepted = mapped >= np.float32(threshold)
    stops = np.where(
        accepted, np.searchsorted(highs, mapped, side="right"), np.searchsorted(-lows, -mapped, side="right")
    )
    return accepted.astype(np.int64), stops


def totals(cells: list[tuple[Array, Array]], values: Array, count: int, symmetric: bool = False) -> Array:
    """Sums a quantity over all trials, for every combination of gates.

    A trial that stops at level b counts q_b: 1 or 0 for whether b's decision is a harmful flip, or the bits read so
    far. This is a telescoping sum over the levels climbed through,

        q = q_1 + [climbs from 1] (q_2 - q_1) + [climbs from 1 and 2] (q_3 - q_2) + ...

    Each bracket depends on one gate of each level: that of the side (reject or accept) on which the trial lies there.
    So the sums for all combinations come from a few small cumulative histograms.

    Args:
        cells: for each gated level, sides and numbers of gates that stop the trial, each `[trials]`.
        values: `[levels, trials]` or `[levels, 1]`: what a trial counts if it stops at that level.
        count: candidates a side.
        symmetric: the two sides of a level share their gate's place.

    Returns:
        `[count] * 2 * gated` in the order low, high of each level, float64; with `symmetric`, `[count] * gated`.
    """
    trials = len(cells[0][0]) if cells else values.shape[1]
    values = np.broadcast_to(np.asarray(values, np.float64), (len(values), trials))
    gated = len(cells)
    axes = gated if symmetric else 2 * gated
    result = np.full((count,) * axes, values[0].sum())
    for depth in range(1, gated + 1):
        change = values[depth] - values[depth - 1]
        # Most trials cost the same at both levels: they add nothing to this bracket.
        used = np.flatnonzero(change)
        index = np.zeros(len(used), np.int64)
        # Side and number of stops at each level, as the digits of one number.
        for side, stops in cells[:depth]:
            index = (index * 2 + side[used]) * (count + 1) + stops[used]
        size = (2 * (count + 1)) ** depth
        table = np.bincount(index, change[used], size).reshape((2, count + 1) * depth)
        # A trial that is stopped by the first k gates climbs at gate k and all wider ones: hence cumulative sums.
        for level in range(depth):
            table = np.cumsum(table, axis=2 * level + 1)
        table = table[(slice(None), slice(count)) * depth]  # the entry behind: trials that every gate stops
        for sides in itertools.product((0, 1), repeat=depth):
            # One axis of `part` for each level's gate on the given side; the axes of other gates are of length one.
            part = table[tuple(x for side in sides for x in (side, slice(None)))]
            places = list(range(depth)) if symmetric else [2 * level + side for level, side in enumerate(sides)]
            result += np.expand_dims(part, tuple(axis for axis in range(axes) if axis not in places))
    return result


def search(
    mapped: Array,
    reference: Array,
    labels: Array,
    threshold: float,
    prices: Array,
    objective: str = "flips",
    symmetric: bool = False,
    last_counts: bool = True,
) -> Front:
    """Finds the Pareto front of gates: the objective against the mean cost of a trial.

    Args:
        mapped: `[levels, trials]` float32, each level's scores on the reference's scale.
        reference: `[trials]`, the reference's scores.
        labels: `[trials]` bool.
        threshold: on the reference's scale.
        prices: `[levels]`, bits (or seconds) of a trial that stops at each level.
        objective: "flips": the rate of harmful flips against the reference; "balanced": the mean of their rates among
            targets and among nontargets; "eer": the cascade's EER, found among 64 thresholds.
        symmetric: gates as the paper has them, equally wide on both sides.
        last_counts: whether harmful flips of the last level count; else only those that early stopping makes.

    Raises:
        UserError: the objective is unknown, there are too many levels, or "eer" lacks a class of trials.

    >>> mapped = np.float32([[0.1, 0.55, 0.9], [0.1, 0.4, 0.9]])  # the first level accepts the second trial by mistake
    >>> front = search(mapped, mapped[1], np.array([False, False, True]), 0.5, prices=np.array([2.0, 6.0]))
    >>> front.bits.round(3).tolist(), front.objective.round(3).tolist()
    ([2.0, 3.333], [0.333, 0.0])
    """
    gated = len(mapped) - 1
    if objective not in OBJECTIVES:
        raise UserError(f"objective {objective!r} must be one of {', '.join(OBJECTIVES)}")
    flips = harmful_flips(mapped, threshold, reference, labels)
    trials = mapped.shape[1]
    free = gated if symmetric else 2 * gated
    # As many as the combinations allow. The 1e-9 is for roots that come out just below a whole number.
    count = min(_MOST_CANDIDATES, int(_COMBINATIONS[objective] ** (1 / free) + 1e-9)) if gated else 1
    if gated and count < 3:
        raise UserError(f"{gated + 1} levels are too many for a search of all gates")
    tried = [candidates(mapped[i], threshold, flips[i], count, symmetric) for i in range(gated)]
    cells = [_cells(mapped[i], threshold, *tried[i]) for i in range(gated)]

    def sums(values: Array) -> Array:
        return totals(cells, values, count, symmetric)

    bits = sums(np.broadcast_to(np.asarray(prices, np.float64)[:, None], (gated + 1, trials))) / trials
    if objective != "eer":
        counted = flips * class_weights(labels, objective)
        counted[-1] *= last_counts
        cost = sums(counted)
    else:
        cost = _grid_eer(sums, mapped, labels, bits.shape)
    cost, bits = np.round(cost, 12), np.round(bits, 9)  # sums in different orders are equal again
    keep = pareto(cost.ravel(), bits.ravel())
    places = np.stack(np.unravel_index(keep, bits.shape), axis=-1) if gated else np.zeros((1, 0), int)
    if symmetric:
        places = np.repeat(places, 2, axis=1)
    # Axis a is of level a // 2: its low where a is even, its high where a is odd.
    gates = np.stack([tried[a // 2][a % 2][places[:, a]] for a in range(2 * gated)], axis=-1) if gated else places
    return Front(gates.reshape(len(keep), gated, 2), cost.ravel()[keep], bits.ravel()[keep])


def _grid_eer(sums: Callable[[Array], Array], mapped: Array, labels: Array, shape: tuple[int, ...]) -> Array:
    """The EER of every combination, as the least over thresholds of the larger error rate."""
    targets, nontargets = mapped[:, labels], mapped[:, ~labels]
    if not targets.size or not nontargets.size:
        raise UserError("the EER needs target and nontarget trials")
    # The error rates of a cascade cross about where those of its levels do. The quantiles leave room on both sides.
    low = min(np.quantile(row, 0.002) for row in targets)
    high = max(np.quantile(row, 0.998) for row in nontargets)
    pooled = mapped[(mapped >= min(low, high)) & (mapped <= max(low, high))]
    best = np.ones(shape)
    for cut in np.quantile(pooled, np.linspace(0, 1, _THRESHOLDS)) if pooled.size else [low]:
        miss = sums((mapped < cut) & labels) / targets.shape[1]
        fa = sums((mapped >= cut) & ~labels) / nontargets.shape[1]
        np.minimum(best, np.maximum(miss, fa), out=best)
    return best


def pareto(cost: Array, bits: Array) -> Array:
    """Indices of the points that no other beats, from cheapest to dearest.

    Args:
        cost: `[points]`, the objective.
        bits: `[points]`, the price.

    >>> pareto(np.array([0.3, 0.1, 0.2]), np.array([1.0, 2.0, 3.0])).tolist()  # the third is dearer and worse
    [0, 1]
    """
    # By bits, ties by cost: along this order a point counts only if it lowers the least cost so far.
    order = np.lexsort((cost, bits))
    least = np.minimum.accumulate(cost[order])
    return order[np.concatenate([[True], least[1:] < least[:-1]])]


def choose(front: Front, most: float) -> int:
    """The index of the cheapest point whose objective is at most `most`; where there is none, of the best point.

    Args:
        front: from cheapest to dearest, as `search` gives it.
        most: limit of the objective, a fraction.

    >>> front = Front(np.zeros((3, 1, 2)), objective=np.array([0.2, 0.1, 0.0]), bits=np.array([2.0, 3.0, 5.0]))
    >>> choose(front, most=0.1)
    1
    """
    fine = np.flatnonzero(front.objective <= most + SLACK)
    return int(fine[0]) if fine.size else len(front) - 1
