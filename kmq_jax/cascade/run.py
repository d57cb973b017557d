"""Runs the cascade over a whole trial list: maps, gates, decisions and costs in one compiled program.

`run_grid` runs many policies at once, such as a whole Pareto front.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from kmq_jax.cascade.policy import CascadePolicy
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json
from kmq_jax.core.tree import Array
from kmq_jax.metrics.calibration import AffineMap, IsotonicMap

_FLOATING = 16  # bits from here on are floating point, not a codebook
_GRID = 8  # policies of a grid that run at a time
_CHUNK = 1 << 16  # trials that are decided at a time


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("x", "y", "scale", "offset", "low", "high", "threshold"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Tables:
    """A policy as float32 arrays.

    Attributes:
        x: `[levels, knots]`, scores, ascending; filled up with infinity.
        y: `[levels, knots]`, what they are mapped to; filled up with the last value.
        scale: `[levels]`, of an affine map; NaN says that the map is isotonic.
        offset: `[levels]`, of an affine map.
        low: `[levels]`; in the last level `low` and `high` are the threshold, so that every trial stops there.
        high: `[levels]`.
        threshold: scalar.
    """

    x: Array
    y: Array
    scale: Array
    offset: Array
    low: Array
    high: Array
    threshold: Array


Counts = dict[str, jax.Array]
"""The counts that a run's costs are made of, as `costs_of` takes them; for a grid, with a leading axis of policies."""


def prices(bits: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Bits read by a trial that climbs to each level: sequential (`2, 2+3, 2+3+4`) and incremental (`2, 3, 4`).

    Incremental prices are for nested codebooks, where the next level reads only the bits that it adds. Floating point
    (16 bits or more) is no codebook: it is read whole.

    Returns:
        Both prices, each `[levels]` float32.

    >>> sequential, incremental = prices((2, 3, 4, 32))
    >>> sequential.tolist(), incremental.tolist()
    ([2.0, 5.0, 9.0, 41.0], [2.0, 3.0, 4.0, 36.0])
    """
    incremental: list[int] = []
    for own in bits:
        before = incremental[-1] if incremental and own >= _FLOATING else 0
        incremental.append(own + before)
    return np.cumsum(bits).astype(np.float32), np.array(incremental, np.float32)


def tables(policies: Sequence[CascadePolicy]) -> Tables:
    """Lays out policies of the same bits for the device; every array gets the leading axis `[policies]`.

    Maps that several policies share are laid out once. The number of knots is rounded up to a power of two, so that
    policies of like size share a compilation.
    """
    longest = max([1, *(len(m.x) for p in policies for m in p.maps if isinstance(m, IsotonicMap))])
    knots = 1 << (longest - 1).bit_length()
    made = {id(p.maps): _map_tables(p, knots) for p in policies}
    x, y, scale, offset = (np.stack(parts) for parts in zip(*(made[id(p.maps)] for p in policies)))
    gates = np.array([[*p.gates, (p.threshold, p.threshold)] for p in policies], np.float32)
    threshold = np.array([p.threshold for p in policies], np.float32)
    return Tables(x, y, scale, offset, gates[..., 0], gates[..., 1], threshold)


def _table(policy: CascadePolicy) -> Tables:
    """One policy as `tables` lays it out, without the axis of policies."""
    return jax.tree.map(lambda leaf: leaf[0], tables([policy]))


def _map_tables(policy: CascadePolicy, knots: int) -> tuple[np.ndarray, ...]:
    levels = len(policy.bits)
    x, y = np.full((levels, knots), np.inf, np.float32), np.zeros((levels, knots), np.float32)
    scale, offset = np.full(levels, np.nan, np.float32), np.zeros(levels, np.float32)
    for i, fitted in enumerate(policy.maps):
        if isinstance(fitted, AffineMap):
            scale[i], offset[i] = fitted.scale, fitted.offset
        else:
            size = len(fitted.x)
            x[i, :size], y[i, :size], y[i, size:] = fitted.x, fitted.y, fitted.y[-1]
    return x, y, scale, offset


def _map(scores: jax.Array, x: jax.Array, y: jax.Array, scale: jax.Array, offset: jax.Array) -> jax.Array:
    """One level's map of scores `[trials]`."""
    # The two knots around a score; a score beyond the ends takes the two outermost ones. Where there is one knot alone,
    # both are that knot, and `share` is NaN or infinite.
    right = jnp.clip(jnp.searchsorted(x, scores, side="right"), 1, max(x.shape[0] - 1, 1)).astype(jnp.int32)
    last = min(1, x.shape[0] - 1)
    left = right - 1
    x0, y0, x1, y1 = x[left], y[left], x[left + last], y[left + last]
    share = jnp.clip((scores - x0) / (x1 - x0), 0, 1)  # 0 towards a filled-up knot at infinity
    # Where the share is 0, or NaN (0 / 0 between equal knots), y0 is taken as it is, and y1 where it is 1, for
    # y0 + (y1 - y0) may be rounded. Beyond the ends maps are constant.
    lookup = jnp.where(share > 0, jnp.where(share >= 1, y1, y0 + share * (y1 - y0)), y0)
    return jnp.where(jnp.isnan(scale), lookup, scale * scores + offset)


def _map_all(table: Tables, scores: jax.Array) -> jax.Array:
    """Every level's map of its scores `[levels, trials]`."""
    return jax.lax.map(lambda row: _map(*row), (scores, table.x, table.y, table.scale, table.offset))


def _choose(table: Tables, mapped: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The deciding level of each trial, and its score there."""
    levels = mapped.shape[0]
    level = jnp.full(mapped.shape[1:], levels - 1, jnp.int8)
    score = mapped[-1]
    # From the last gate to the first: the first level that stops a trial writes last, and so decides.
    for i in reversed(range(levels - 1)):
        stops = (mapped[i] <= table.low[i]) | (mapped[i] >= table.high[i])
        level, score = jnp.where(stops, jnp.int8(i), level), jnp.where(stops, mapped[i], score)
    return level, score


def _reach(level: jax.Array, rows: jax.Array, size: int) -> jax.Array:
    """The highest level that any trial took each row of a table to, `[size]`; -1 for rows that no trial uses."""
    return jnp.full(size, -1, jnp.int8).at[rows].max(level)


def _counts(table: Tables, level: jax.Array, enrol: jax.Array, test: jax.Array, sizes: tuple[int, int, bool]) -> Counts:
    enrol_size, test_size, top = sizes  # as `_sizes` gives them: no enrolment size where both sides share a table
    reach = _reach(level, test, test_size)
    enrolled = both = jnp.full(1, -1, jnp.int8)  # -1 is counted nowhere
    if enrol_size:
        # With "top" an enrolment does not climb: it is counted at level 0, and `costs_of` prices it at the last.
        enrolled = _reach(jnp.full_like(level, 0) if top else level, enrol, enrol_size)
    elif top:  # of one table: an utterance on both sides is embedded at the last level, and at those it climbs through
        kept = _reach(jnp.full_like(level, 0), enrol, test_size) >= 0
        enrolled = jnp.where(kept & (reach < 0), jnp.int8(0), jnp.int8(-1))
        reach, both = jnp.where(kept, jnp.int8(-1), reach), jnp.where(kept, reach, jnp.int8(-1))
    else:
        reach = jnp.maximum(reach, _reach(level, enrol, test_size))

    def by_level(values: jax.Array) -> jax.Array:
        # In whole numbers: a sum of ones in float32 stops growing at 2^24.
        return jnp.stack([jnp.sum(values == i, dtype=jnp.int32) for i in range(table.low.shape[0])])

    counted = {"reached": reach, "enrolled": enrolled, "both": both}
    return {"decided": by_level(level)} | {name: by_level(values) for name, values in counted.items()}


def costs_of(
    bits: Sequence[int],
    top: bool,
    decided: np.ndarray,
    reached: np.ndarray,
    enrolled: np.ndarray,
    both: np.ndarray | None = None,
    seconds: Sequence[float] | None = None,
) -> dict[str, np.ndarray]:
    """The costs of a cascade, from counts.

    Args:
        bits: `[levels]`.
        top: whether the enrolled side is always embedded at the last level.
        decided: `[..., levels]`, how many trials each level decides.
        reached: `[..., levels]`, how many utterances have each level as the highest that a trial took them to.
        enrolled: `[..., levels]`, the same for utterances of the enrolled side, where these are counted apart.
        both: `[..., levels]`, the same for utterances that are tested, and also enrolled at the last level. They are
            not in the two others.
        seconds: `[levels]`, what a recording takes at each level, where it is known.

    Returns:
        `resolved` `[..., levels]`, shares of trials; and the costs of `Outcome`, `[...]` float64, in bits, and in
        seconds where these are known.

    >>> found = costs_of((2, 4), False, np.array([3, 1]), np.array([1, 2]), np.array([0, 0]))
    >>> found["resolved"].tolist(), float(found["sequential_bits"]), round(float(found["utterance_bits"]), 3)
    ([0.75, 0.25], 3.0, 4.667)
    """
    sequential, incremental = (price.astype(np.float64) for price in prices(bits))
    resolved = decided / np.sum(decided, axis=-1, keepdims=True)
    both = np.zeros_like(reached) if both is None else both
    utterances = sum(np.sum(counts, axis=-1) for counts in (reached, enrolled, both))

    def mean_cost(price: np.ndarray, last: float, shared: bool = False) -> np.ndarray:
        # With `top` the enrolled side costs the last level alone, wherever its counts lie.
        of_enrolled = np.full_like(price, last) if top else price
        # The last level for being enrolled, and those climbed through for being tested.
        of_both = np.full_like(price, last) + (0 if shared else price)
        of_both[-1] = price[-1]  # one that has climbed to the last level is embedded there only once
        cost: np.ndarray = (reached @ price + enrolled @ of_enrolled + both @ of_both) / utterances
        return cost

    costs = {
        "resolved": resolved,
        "sequential_bits": resolved @ sequential,
        "incremental_bits": resolved @ incremental,
        "utterance_bits": mean_cost(sequential, bits[-1]),
        # Where codebooks nest, the last level's bits contain those of the levels below it.
        "utterance_incremental_bits": mean_cost(incremental, bits[-1], shared=bits[-1] < _FLOATING),
    }
    if seconds is not None:
        climbed = np.cumsum(np.asarray(seconds, np.float64))
        costs |= {
            "sequential_seconds": resolved @ climbed,
            "utterance_seconds": mean_cost(climbed, seconds[-1]),
        }
    return costs


@partial(jax.jit, static_argnames=("sizes",))
def _run(
    table: Tables, scores: Array, enrol: Array, test: Array, sizes: tuple[int, int, bool]
) -> tuple[jax.Array, jax.Array, jax.Array, Counts]:
    level, score = _choose(table, _map_all(table, scores))
    return level, score, score >= table.threshold, _counts(table, level, enrol, test, sizes)


@jax.jit
def _decide(table: Tables, scores: Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    mapped = _map_all(table, scores)
    level, score = _choose(table, mapped)
    return level, score, score >= table.threshold, mapped


@partial(jax.jit, static_argnames=("sizes", "shared_maps"))
def _run_grid(
    grid: Tables,
    scores: Array,
    enrol: Array,
    test: Array,
    right: Array,
    sizes: tuple[int, int, bool],
    shared_maps: bool,
) -> Counts:
    # Maps that all policies share are applied once, outside the loop over policies.
    mapped = _map_all(jax.tree.map(lambda leaf: leaf[0], grid), scores) if shared_maps else None

    def one(table: Tables) -> Counts:
        level, score = _choose(table, _map_all(table, scores) if mapped is None else mapped)
        accept = score >= table.threshold
        # `right` is +1 for a target trial that the reference accepts, -1 for a nontarget that it rejects, else 0.
        harmful = ((right > 0) & ~accept) | ((right < 0) & accept)
        return _counts(table, level, enrol, test, sizes) | {"harmful": jnp.sum(harmful, dtype=jnp.int32)}

    # A few at a time, so that memory is bounded however many policies there are.
    return jax.lax.map(one, grid, batch_size=_GRID)


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """What a cascade did with a trial list.

    Attributes:
        score: `[trials]` float32, on the reference's scale.
        accept: `[trials]` bool.
        level: `[trials]` int8, the deciding level, from 0.
        bits: `[trials]` int16, of that level.
        resolved: share of the trials that each level decided, by its bits.
        sequential_bits: mean bits of a trial if each level runs its own model, as in the paper: 2, 2+3, 2+3+4.
        incremental_bits: the same with nested codebooks, where climbing from 2 to 3 bits reads one bit more: 2, 3, 4.
        utterance_bits: mean sequential bits of an utterance, each embedded once at every level that some trial needs.
        utterance_incremental_bits: the same with nested codebooks.
        sequential_seconds: mean seconds for the tested recording of a trial; None where the policy has no seconds.
        utterance_seconds: mean seconds of an utterance, each embedded once at every level that some trial needs.
    """

    score: np.ndarray
    accept: np.ndarray
    level: np.ndarray
    bits: np.ndarray
    resolved: dict[int, float]
    sequential_bits: float
    incremental_bits: float
    utterance_bits: float
    utterance_incremental_bits: float
    sequential_seconds: float | None = None
    utterance_seconds: float | None = None

    def costs(self) -> Json:
        """`resolved` (keys are strings), the four costs in bits and, where they are known, those in seconds."""
        names = ["sequential_bits", "incremental_bits", "utterance_bits", "utterance_incremental_bits"]
        names += [] if self.sequential_seconds is None else ["sequential_seconds", "utterance_seconds"]
        resolved = {str(bits): share for bits, share in self.resolved.items()}
        return {"resolved": resolved} | {name: getattr(self, name) for name in names}


def _checked(
    policy: CascadePolicy, scores: ArrayLike, enrol: ArrayLike, test: ArrayLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    values = np.asarray(scores, np.float32)
    enrol_rows, test_rows = np.asarray(enrol, np.int32), np.asarray(test, np.int32)
    if values.ndim != 2 or len(values) != len(policy.bits) or not values.shape[1]:
        raise UserError(f"a cascade of {len(policy.bits)} bits needs as many rows of scores, got {values.shape}")
    if enrol_rows.shape != values.shape[1:] or test_rows.shape != values.shape[1:]:
        raise UserError(f"{values.shape[1]} trials do not fit rows of shapes {enrol_rows.shape}, {test_rows.shape}")
    if not np.isfinite(values).all():
        raise UserError("scores of a cascade must be finite")
    return values, enrol_rows, test_rows


def _sizes(policy: CascadePolicy, enrol: np.ndarray, test: np.ndarray, one_table: bool) -> tuple[int, int, bool]:
    # Above the highest row, and rounded up, so that lists of like size share a compilation.
    def up(size: int) -> int:
        return 1 << int(size).bit_length()

    top = policy.enrolment == "top"
    if one_table:
        return 0, up(max(enrol.max(), test.max())), top
    return up(enrol.max()), up(test.max()), top


def run(policy: CascadePolicy, scores: ArrayLike, enrol: ArrayLike, test: ArrayLike, one_table: bool = True) -> Outcome:
    """Runs the cascade over a trial list.

    Args:
        policy: maps, gates and threshold.
        scores: `[levels, trials]`, each level's own scores. Those of levels that a trial does not reach have no effect,
            but must be finite.
        enrol: `[trials]`, number of the enrolment utterance or model, for the costs by utterance.
        test: `[trials]`, number of the test utterance.
        one_table: whether both sides number the same utterances, so that one on both sides counts once.

    Raises:
        UserError: shapes do not fit the policy, there is no trial, or a score is not finite.

    >>> line = AffineMap(1.0, 0.0)
    >>> policy = CascadePolicy((2, 4), (line, line), ((0.25, 0.75),), 0.5)
    >>> outcome = run(policy, [[0.9, 0.6], [0.8, 0.3]], enrol=[0, 1], test=[2, 3])
    >>> outcome.bits.tolist(), outcome.accept.tolist(), outcome.sequential_bits  # 2 bits, and 2 + 4
    ([2, 4], [True, False], 4.0)
    """
    values, enrol_rows, test_rows = _checked(policy, scores, enrol, test)
    sizes = _sizes(policy, enrol_rows, test_rows, one_table)
    level, score, accept, counts = jax.device_get(_run(_table(policy), values, enrol_rows, test_rows, sizes))
    costs = costs_of(policy.bits, sizes[2], **counts, seconds=policy.seconds)
    return Outcome(
        score,
        accept,
        level,
        np.array(policy.bits, np.int16)[level],
        dict(zip(policy.bits, costs.pop("resolved").tolist())),
        **{name: float(value) for name, value in costs.items()},
    )


def run_grid(
    policies: Sequence[CascadePolicy],
    scores: ArrayLike,
    enrol: ArrayLike,
    test: ArrayLike,
    reference_accept: ArrayLike,
    labels: ArrayLike,
    one_table: bool = True,
) -> dict[str, np.ndarray]:
    """Runs many policies of the same bits over one trial list.

    Args:
        policies: of the same bits, enrolment and seconds. Where their maps are the same object, scores are mapped once.
        scores: `[levels, trials]`.
        enrol: as in `run`.
        test: as in `run`.
        reference_accept: `[trials]` bool, the reference's decisions.
        labels: `[trials]` bool.
        one_table: as in `run`.

    Returns:
        `resolved` `[policies, levels]`, the costs of `Outcome` and `harmful_flip_rate`, each `[policies]`.

    Raises:
        UserError: as `run`; or there is no policy, or they differ in bits, enrolment or seconds.
    """
    if not policies or len({(p.bits, p.enrolment, p.seconds) for p in policies}) > 1:
        raise UserError("a grid needs one or more policies of the same bits, enrolment and seconds")
    values, enrol_rows, test_rows = _checked(policies[0], scores, enrol, test)
    sizes = _sizes(policies[0], enrol_rows, test_rows, one_table)
    # Copies of the last policy fill the grid up to a multiple, so that grids of like size share a compilation.
    grid = tables([*policies, *[policies[-1]] * (-len(policies) % _GRID)])
    shared = all(policy.maps is policies[0].maps for policy in policies)
    accepted, target = np.asarray(reference_accept, bool), np.asarray(labels, bool)
    right = np.where(accepted == target, np.where(target, 1, -1), 0).astype(np.int8)
    counts = jax.device_get(_run_grid(grid, values, enrol_rows, test_rows, right, sizes, shared))
    counts = {name: value[: len(policies)] for name, value in counts.items()}
    harmful = counts.pop("harmful") / values.shape[1]
    costs = costs_of(policies[0].bits, sizes[2], **counts, seconds=policies[0].seconds)
    return costs | {"harmful_flip_rate": harmful}


@dataclasses.dataclass(frozen=True, eq=False)
class Decisions:
    """What a cascade decides of trials.

    Attributes:
        level: `[trials]` int8, the deciding level, from 0.
        score: `[trials]` float32, on the reference's scale.
        accept: `[trials]` bool.
        mapped: `[levels, trials]` float32, each level's score on the reference's scale.
    """

    level: np.ndarray
    score: np.ndarray
    accept: np.ndarray
    mapped: np.ndarray


def decider(policy: CascadePolicy) -> Callable[[np.ndarray], Decisions]:
    """Makes a function that decides a list part by part, as `run` does, by one program for parts of any length.

    It takes scores `[levels, trials]` float32, and raises `UserError` where one is not finite.

    >>> from kmq_jax.metrics.calibration import AffineMap
    >>> line = AffineMap(1.0, 0.0)
    >>> decide = decider(CascadePolicy((2, 4), (line, line), ((0.25, 0.75),), 0.5))
    >>> found = decide(np.float32([[0.9, 0.6], [0.8, 0.3]]))
    >>> found.level.tolist(), found.accept.tolist()
    ([0, 1], [True, False])
    """
    table = _table(policy)

    def decide(scores: np.ndarray) -> Decisions:
        if not np.isfinite(scores).all():
            raise UserError("scores of a cascade must be finite")
        trials = scores.shape[1]
        # One static shape for all chunks of a long list, and a few for short ones.
        chunk = min(_CHUNK, 1 << max(trials - 1, 0).bit_length())
        padded = np.pad(scores, ((0, 0), (0, -trials % chunk)))
        parts = [_decide(table, padded[:, start : start + chunk]) for start in range(0, max(trials, 1), chunk)]
        return Decisions(*(np.concatenate(column, axis=-1)[..., :trials] for column in zip(*parts)))

    return decide


def map_scores(policy: CascadePolicy, scores: ArrayLike) -> np.ndarray:
    """Each level's scores `[levels, trials]` on the reference's scale, float32, exactly as `run` compares them.

    >>> policy = CascadePolicy((2,), (AffineMap(2.0, -1.0),), (), threshold=0.5)
    >>> map_scores(policy, [[0.5, 1.0]]).tolist()
    [[0.0, 1.0]]
    """
    values = np.asarray(scores, np.float32)
    trials = values.shape[1]
    # Filled up to a power of two, so that lists of like length share a compilation.
    values = np.pad(values, ((0, 0), (0, (1 << max(trials - 1, 0).bit_length()) - trials)))
    return np.asarray(_mapped(_table(policy), values))[:, :trials]


_mapped = jax.jit(_map_all)
