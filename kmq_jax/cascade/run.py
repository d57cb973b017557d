"""The cascade over a whole trial list: maps, gates, decisions and costs in one compiled program.

The same program runs many policies at once (`run_grid`), for instance a whole Pareto front.
"""

import dataclasses
from collections.abc import Sequence
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


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        *("x", "y", "scale", "offset", "low", "high", "threshold"),
        *("bits", "sequential", "incremental", "seconds"),
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Tables:
    """A policy as arrays.

    Attributes:
        x: `[levels, knots]`, ascending, filled up with infinity.
        y: `[levels, knots]`, filled up with the last value.
        scale: `[levels]`; of an affine map, and NaN for an isotonic one.
        offset: `[levels]`.
        low: `[levels]`; in the last level `low` and `high` are the threshold, so that every trial stops there.
        high: `[levels]`.
        threshold: scalar.
        bits: `[levels]`.
        sequential: `[levels]`, bits read by a trial that stops there, if each level runs its own model.
        incremental: `[levels]`, the same with nested codebooks.
        seconds: `[levels]`, what a recording takes at each level; zeros where that is not known.
    """

    x: Array
    y: Array
    scale: Array
    offset: Array
    low: Array
    high: Array
    threshold: Array
    bits: Array
    sequential: Array
    incremental: Array
    seconds: Array


Figures = dict[str, jax.Array]
"""What a run costs, by name; of a grid of policies, with an axis for them in front."""


def prices(bits: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Bits read by a trial that climbs to each level: sequential (`2, 2+3, 2+3+4`) and incremental (`2, 3, 4`).

    Codebooks nest, so the next level reads only the bits that it adds. Floating point (16 bits or more) is no codebook:
    it is read whole.

    Returns:
        Two arrays `[levels]` float32.

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
    """Lays policies of the same bits out for the device; every array gets the leading axis `[policies]`.

    Maps that several policies share are laid out once. The number of knots is filled up to a power of two, so that
    policies of like size share a compilation.
    """
    longest = max([1, *(len(m.x) for p in policies for m in p.maps if isinstance(m, IsotonicMap))])
    knots = 1 << (longest - 1).bit_length()
    made = {id(p.maps): _map_tables(p, knots) for p in policies}
    x, y, scale, offset = (np.stack(parts) for parts in zip(*(made[id(p.maps)] for p in policies)))
    gates = np.array([[*p.gates, (p.threshold, p.threshold)] for p in policies], np.float32)
    threshold = np.array([p.threshold for p in policies], np.float32)
    costs = [np.array([p.bits for p in policies], np.float32)]
    costs += [np.stack(parts) for parts in zip(*(prices(p.bits) for p in policies))]
    costs.append(np.array([p.seconds or (0.0,) * len(p.bits) for p in policies], np.float32))
    return Tables(x, y, scale, offset, gates[..., 0], gates[..., 1], threshold, *costs)


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
    # The knots around a score; scores beyond the ends take the two outermost.
    right = jnp.clip(jnp.searchsorted(x, scores, side="right"), 1, max(x.shape[0] - 1, 1)).astype(jnp.int32)
    last = min(1, x.shape[0] - 1)
    left = right - 1
    x0, y0, x1, y1 = x[left], y[left], x[left + last], y[left + last]
    share = jnp.clip((scores - x0) / (x1 - x0), 0, 1)  # 0 towards a filled-up knot at infinity
    # A knot is hit exactly, and beyond the ends the map is constant.
    lookup = jnp.where(share > 0, y0 + share * (y1 - y0), y0)
    return jnp.where(jnp.isnan(scale), lookup, scale * scores + offset)


def _map_all(table: Tables, scores: jax.Array) -> jax.Array:
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
    """The highest level any trial took each row of a table `[size]` to; -1 for rows that no trial uses."""
    return jnp.full(size, -1, jnp.int8).at[rows].max(level)


def _costs(table: Tables, level: jax.Array, enrol: jax.Array, test: jax.Array, sizes: tuple[int, int, bool]) -> Figures:
    enrol_size, test_size, top = sizes
    levels = table.bits.shape[0]
    resolved = jnp.stack([jnp.mean(level == i, dtype=jnp.float32) for i in range(levels)])
    reach = _reach(level, test, test_size)
    if enrol_size == 0:  # both sides are rows of one table: an utterance on both sides is embedded once
        if top:  # it is kept at the top level if it is enrolled, and climbs if it is tested
            enrolled = _reach(jnp.full_like(level, 0), enrol, test_size)
        else:
            reach = jnp.maximum(reach, _reach(level, enrol, test_size))
            enrolled = jnp.full(1, -1, jnp.int8)
    else:
        enrolled = _reach(jnp.full_like(level, 0) if top else level, enrol, enrol_size)

    def mean_cost(price: jax.Array, enrol_price: jax.Array) -> jax.Array:
        parts = ((reach, price), (enrolled, enrol_price))
        total = [jnp.sum(jnp.where(r >= 0, p[jnp.maximum(r, 0)], 0.0)) for r, p in parts]
        return (total[0] + total[1]) / (jnp.sum(reach >= 0) + jnp.sum(enrolled >= 0))

    fixed, last = (jnp.full_like(own, own[-1]) for own in (table.bits, table.seconds))
    climbed = jnp.cumsum(table.seconds)
    return {
        "resolved": resolved,
        "sequential_bits": resolved @ table.sequential,
        "incremental_bits": resolved @ table.incremental,
        "utterance_bits": mean_cost(table.sequential, fixed if top else table.sequential),
        "utterance_incremental_bits": mean_cost(table.incremental, fixed if top else table.incremental),
        "sequential_seconds": resolved @ climbed,
        "utterance_seconds": mean_cost(climbed, last if top else climbed),
    }


@partial(jax.jit, static_argnames=("sizes",))
def _run(
    table: Tables, scores: Array, enrol: Array, test: Array, sizes: tuple[int, int, bool]
) -> tuple[jax.Array, jax.Array, jax.Array, Figures]:
    level, score = _choose(table, _map_all(table, scores))
    return level, score, score >= table.threshold, _costs(table, level, enrol, test, sizes)


@partial(jax.jit, static_argnames=("sizes", "shared_maps"))
def _run_grid(
    grid: Tables,
    scores: Array,
    enrol: Array,
    test: Array,
    right: Array,
    sizes: tuple[int, int, bool],
    shared_maps: bool,
) -> Figures:
    mapped = _map_all(jax.tree.map(lambda leaf: leaf[0], grid), scores) if shared_maps else None

    def one(table: Tables) -> Figures:
        level, score = _choose(table, _map_all(table, scores) if mapped is None else mapped)
        accept = score >= table.threshold
        # `right` is +1 for a target trial that the reference accepts, -1 for a nontarget that it rejects, else 0.
        harmful = ((right > 0) & ~accept) | ((right < 0) & accept)
        return _costs(table, level, enrol, test, sizes) | {"harmful_flip_rate": jnp.mean(harmful, dtype=jnp.float32)}

    # A handful at a time keeps memory bounded however many policies there are.
    return jax.lax.map(one, grid, batch_size=_GRID)


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """What a cascade did with a trial list.

    Attributes:
        score: `[trials]` float32, on the reference's scale.
        accept: `[trials]` bool.
        level: `[trials]` int8, the place in `bits` of the one that decided.
        bits: `[trials]` int16, of that level.
        resolved: share of the trials that each level decided, by its bits.
        sequential_bits: mean bits a trial if each level runs its own model (the paper's): 2, 2+3, 2+3+4.
        incremental_bits: the same with nested codebooks, where climbing from 2 to 3 bits reads one bit more: 2, 3, 4.
        utterance_bits: mean sequential bits an utterance, each embedded once at every level that some trial needs.
        utterance_incremental_bits: the same with nested codebooks.
        sequential_seconds: mean seconds for the tested recording of a trial; None where the policy has no seconds.
        utterance_seconds: mean seconds an utterance, each embedded once at every level that some trial needs.
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
    # Rounded up, so that lists of like size share a compilation.
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
        scores: `[levels, trials]`, each level's own scores; only those a trial climbs to matter.
        enrol: `[trials]`, number of the enrolment utterance or model, for the costs by utterance.
        test: `[trials]`, number of the test utterance.
        one_table: both sides number the same utterances, so one on both sides counts once.

    Raises:
        UserError: shapes do not fit the policy, or a score is not finite.
    """
    values, enrol_rows, test_rows = _checked(policy, scores, enrol, test)
    sizes = _sizes(policy, enrol_rows, test_rows, one_table)
    table = jax.tree.map(lambda leaf: leaf[0], tables([policy]))
    level, score, accept, costs = jax.device_get(_run(table, values, enrol_rows, test_rows, sizes))
    if policy.seconds is None:
        del costs["sequential_seconds"], costs["utterance_seconds"]
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
        policies: they share bits and enrolment; where they share maps too, scores are mapped once.
        scores: `[levels, trials]`.
        enrol: as in `run`.
        test: as in `run`.
        reference_accept: `[trials]` bool, the reference's decisions.
        labels: `[trials]` bool.
        one_table: as in `run`.

    Returns:
        `resolved` `[policies, levels]`, the costs of `Outcome` and `harmful_flip_rate`, each `[policies]`.
    """
    if not policies or len({(p.bits, p.enrolment) for p in policies}) > 1:
        raise UserError("a grid needs one or more policies of the same bits and enrolment")
    values, enrol_rows, test_rows = _checked(policies[0], scores, enrol, test)
    sizes = _sizes(policies[0], enrol_rows, test_rows, one_table)
    # Filled up to a multiple, so that grids of like size share a compilation.
    grid = tables([*policies, *[policies[-1]] * (-len(policies) % _GRID)])
    shared = all(policy.maps is policies[0].maps for policy in policies)
    accepted, target = np.asarray(reference_accept, bool), np.asarray(labels, bool)
    right = np.where(accepted == target, np.where(target, 1, -1), 0).astype(np.int8)
    result = jax.device_get(_run_grid(grid, values, enrol_rows, test_rows, right, sizes, shared))
    return {name: value[: len(policies)] for name, value in result.items()}


def map_scores(policy: CascadePolicy, scores: ArrayLike) -> np.ndarray:
    """Each level's scores `[levels, trials]` on the reference's scale, float32, exactly as `run` compares them."""
    table = jax.tree.map(lambda leaf: leaf[0], tables([policy]))
    values = np.asarray(scores, np.float32)
    trials = values.shape[1]
    # Filled up, so that lists of like length share a compilation.
    values = np.pad(values, ((0, 0), (0, (1 << max(trials - 1, 0).bit_length()) - trials)))
    return np.asarray(_mapped(table, values))[:, :trials]


_mapped = jax.jit(_map_all)
