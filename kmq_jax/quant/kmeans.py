"""k-means in one dimension: one sort, then Lloyd iterations that are a few binary searches on prefix sums.

In one dimension every cell of a codebook is a run of the sorted values. A Lloyd iteration needs only the K - 1 places
where the midpoints fall, and K differences of prefix sums. It never passes over the values again.

Lloyd iterations end in local optima. Exchanges lead out of them: one cell is split, and two neighbours are merged,
where the split gains more inertia than the merge loses. Prefix sums give both exactly. An empty cell costs nothing to
merge, so empty cells and repeated values need no care of their own.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import Array

INITS = ("optimal", "companding", "equal-mass", "quantile", "kmeans++")
_BLOCK = 128  # numbers in a block of prefix sums
_GRID = 64  # places that dynamic programming first chooses borders from
_PLACES = 32  # places tried for each border after that
_CHUNK_VALUES = 1 << 18  # padded values of a chunk, 1 MB, which fits the cache
_CHUNK_ROWS = 32  # groups of a chunk, at most
_SMALLEST = 64  # values of a group as it is compiled for, at least


class _Prefix(NamedTuple):
    """Sums of the first i numbers: the offset of a block (high and low word) plus a sum within the block.

    A plain float32 running sum of 1e6 numbers is wrong by more than the sum of a small cell. This one is not.
    """

    high: jax.Array  # [blocks]
    low: jax.Array  # [blocks]
    inner: jax.Array  # [blocks * _BLOCK]

    def between(self, start: jax.Array, stop: jax.Array) -> jax.Array:
        """The sum of the numbers start <= i < stop."""
        a, b = start // _BLOCK, stop // _BLOCK
        coarse = (_take(self.high, b) - _take(self.high, a)) + (_take(self.low, b) - _take(self.low, a))
        return coarse + (_take(self.inner, stop) - _take(self.inner, start))


def _take(values: jax.Array, index: jax.Array) -> jax.Array:
    """Gathers without a check of bounds: every index here is kept inside by its caller."""
    return values.at[index].get(mode="promise_in_bounds")


def _prefix(numbers: jax.Array) -> _Prefix:
    """Prefix sums of N numbers, for every i from 0 to N."""
    blocks = numbers.shape[0] // _BLOCK + 1  # one more than full blocks, so that i = N has a place
    padded = jnp.pad(numbers, (0, blocks * _BLOCK - numbers.shape[0])).reshape(blocks, _BLOCK)
    inner = jnp.cumsum(padded, axis=1)
    exclusive = jnp.pad(inner[:, :-1], ((0, 0), (1, 0)))  # sums before each number

    def add(
        total: tuple[jax.Array, jax.Array], block: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
        high, low = total
        fresh = high + block
        part = fresh - high
        error = (high - (fresh - part)) + (block - part)  # Knuth's two-sum: exact
        return (fresh, low + error), total

    _, (high, low) = jax.lax.scan(add, (jnp.array(0.0), jnp.array(0.0)), inner[:, -1])
    return _Prefix(high, low, exclusive.reshape(-1))


def count_at_most(ordered: jax.Array, n: jax.Array | int, limits: jax.Array) -> jax.Array:
    """How many of the first n ordered values [padded] are <= each limit [k]: a branch-free binary search.

    >>> count_at_most(jnp.array([1.0, 2.0, 3.0, 3.0]), 3, jnp.array([0.0, 2.0, 5.0])).tolist()
    [0, 2, 3]
    """
    # The count is found bit by bit, the highest first.
    bits = ordered.shape[0].bit_length()

    def halve(i: jax.Array, count: jax.Array) -> jax.Array:
        more = count + (1 << (bits - 1 - i))
        inside = (more <= n) & (_take(ordered, jnp.minimum(more, n) - 1) <= limits)
        return jnp.where(inside, more, count)

    # A loop and not its unrolled body: there are many searches, and they are most of the time to compile.
    return jax.lax.fori_loop(0, bits, halve, jnp.zeros(limits.shape, jnp.int32))


class Group(NamedTuple):
    """One group: n ordered values, padded by repeats of the last, and prefix sums of their mass and moment.

    The moment of a value is its mass times its distance from `centre`. Without weights every value has mass 1, and
    `mass` is None.
    """

    values: jax.Array
    n: jax.Array | int
    centre: jax.Array
    mass: _Prefix | None
    moment: _Prefix

    def sums(self, start: jax.Array, stop: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mass of the values start <= i < stop, and their moment about the centre; zeros where there are none."""
        mass = (stop - start).astype(jnp.float32) if self.mass is None else self.mass.between(start, stop)
        some = (stop > start) & (mass > 0)
        return jnp.where(some, mass, 0), jnp.where(some, self.moment.between(start, stop), 0)

    def weigh(self, start: jax.Array, stop: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mass and mean of the values start <= i < stop; the mean of none is 0."""
        mass, moment = self.sums(start, stop)
        mean = self.centre + moment / jnp.where(mass > 0, mass, 1)
        last = self.n - 1
        # A mean lies between its members. This also makes the mean of equal values exactly that value.
        low, high = _take(self.values, jnp.minimum(start, last)), _take(self.values, jnp.maximum(stop - 1, 0))
        # In an empty run `high` lies below `low`.
        return mass, jnp.where(mass > 0, jnp.clip(mean, low, jnp.maximum(low, high)), 0)


def make_group(values: jax.Array, n: jax.Array | int, weights: jax.Array | None) -> Group:
    """Prepares the first n ordered values, and their weights, for the sums over runs of them."""
    centre = values[n // 2]  # any value does; unlike a mean, this one is exact however it is sharded
    if weights is None:
        return Group(values, n, centre, None, _prefix(values - centre))
    return Group(values, n, centre, _prefix(weights), _prefix(weights * (values - centre)))


def midpoints(centroids: jax.Array) -> jax.Array:
    """The K-1 thresholds `[..., K-1]` between ordered centroids `[..., K]`; a value on one belongs below it.

    >>> midpoints(jnp.array([0.0, 1.0, 4.0])).tolist()
    [0.5, 2.5]
    """
    return 0.5 * (centroids[..., 1:] + centroids[..., :-1])


def _edges(group: Group, centroids: jax.Array) -> jax.Array:
    """Where the cells begin and end: `[K+1]` places in the ordered values."""
    inner = count_at_most(group.values, group.n, midpoints(centroids))
    return jnp.concatenate([jnp.zeros(1, jnp.int32), inner, jnp.full(1, group.n, jnp.int32)])


# --- inits ----------------------------------------------------------------------------------------------------


def _equal_mass(
    values: jax.Array, n: jax.Array | int, weights: jax.Array | None, k: int, retention: float
) -> jax.Array:
    """Means of K bins of equal mass, after values are clamped to their central `retention` quantiles (KMQAT)."""
    low, high = (_quantile(values, n, weights, q) for q in ((1 - retention) / 2, (1 + retention) / 2))
    group = make_group(jnp.clip(values, low, high), n, weights)
    if weights is None:
        edges = jnp.minimum(jnp.round(jnp.arange(k + 1, dtype=jnp.float32) * (n / k)).astype(jnp.int32), n)
    else:
        # A value belongs to the bin that the middle of its mass lies in.
        middle = (jnp.cumsum(weights) - 0.5 * weights) / jnp.sum(weights)
        edges = jnp.searchsorted(middle, jnp.arange(k + 1) / k).astype(jnp.int32)
        edges = jnp.minimum(edges.at[-1].set(n), n)
    mass, mean = group.weigh(edges[:-1], edges[1:])
    # Where values repeat, a bin may be empty: its centroid is the value at which it begins.
    return jnp.where(mass > 0, mean, _take(group.values, jnp.minimum(edges[:-1], n - 1)))


def _quantile(values: jax.Array, n: jax.Array | int, weights: jax.Array | None, q: jax.Array | float) -> jax.Array:
    """Quantiles of n ordered values: by linear interpolation, or with weights the first value where mass reaches q."""
    if weights is None:
        place = jnp.asarray(q, jnp.float32) * (n - 1)
        below = jnp.clip(place.astype(jnp.int32), 0, jnp.maximum(n - 2, 0))
        a, b = _take(values, below), _take(values, jnp.minimum(below + 1, n - 1))
        return a + (place - below.astype(jnp.float32)) * (b - a)
    cumulative = jnp.cumsum(weights)
    return _take(values, jnp.minimum(jnp.searchsorted(cumulative, jnp.asarray(q) * cumulative[-1]), n - 1))


def _shares(
    values: jax.Array, n: jax.Array | int, weights: jax.Array | None, slices: int
) -> tuple[jax.Array, jax.Array]:
    """Quantiles of the values, and the integral of the cube root of their density up to each (up to a factor)."""
    bounds = _quantile(values, n, weights, jnp.arange(slices + 1) / slices)
    share = jnp.cumsum(jnp.cbrt(jnp.square(bounds[1:] - bounds[:-1])))  # span * (mass / span)^(1/3), equal masses
    return bounds, jnp.pad(share, (1, 0))


def _companding(values: jax.Array, n: jax.Array | int, weights: jax.Array | None, k: int) -> jax.Array:
    """Places centroids with the density that is asymptotically optimal, the cube root of the values' density.

    Reference: Panter and Dite, Quantization distortion in pulse-count modulation, 1951.
    """
    bounds, share = _shares(values, n, weights, 4 * k)
    # Equal steps of the integral, mapped back to values.
    return jnp.interp((jnp.arange(k, dtype=jnp.float32) + 0.5) / k * share[-1], share, bounds)


def split_cells(
    values: jax.Array, n: jax.Array | int, weights: jax.Array | None, centroids: jax.Array, parts: int
) -> jax.Array:
    """Splits each cell of a codebook [k] into `parts`; gives all inner borders [k * parts - 1], old ones among them."""
    bounds, share = _shares(values, n, weights, 4 * centroids.shape[0] * parts)
    borders = jnp.concatenate([values[:1], midpoints(centroids), values[-1:]])
    at = jnp.interp(borders, bounds, share)
    steps = jnp.arange(parts) / parts
    inside = at[:-1, None] + steps[None, :] * (at[1:] - at[:-1])[:, None]
    places = jnp.interp(inside, share, bounds)
    # Interpolation there and back may miss the old borders, so they are set. The first is the least value: left out.
    return jnp.sort(places.at[:, 0].set(borders[:-1]).reshape(-1))[1:]


def _best_borders(group: Group, borders: jax.Array) -> jax.Array:
    """Chooses one of several places for every border so that the inertia is least: exact dynamic programming.

    Reference: Wang and Song, Ckmeans.1d.dp, 2011. There every place is tried, here a choice of them.

    Args:
        group: the values.
        borders: places `[K+1, choices]` of each border, the first all 0 and the last all n.

    Returns:
        The means of the K cells.
    """
    mass, moment = group.sums(jnp.zeros_like(borders), borders)

    def worth(start: tuple[jax.Array, ...], stop: tuple[jax.Array, ...]) -> jax.Array:
        """The inertia that a cell's mean saves against the centre, for any start (last axis) and stop."""
        count, total = stop[0] - start[0], stop[1] - start[1]
        # A cell cannot end before it begins.
        return jnp.where(stop[2] >= start[2], jnp.square(total) / jnp.maximum(count, 1e-30), -jnp.inf)

    # best[i]: the most that the cells so far can save where the last of them ends at place i.
    def add_cell(best: jax.Array, cell: Array) -> tuple[jax.Array, jax.Array]:
        start, stop = cell
        saved = worth(tuple(x[None, :] for x in start), tuple(x[:, None] for x in stop))
        return jnp.max(best[None, :] + saved, axis=1), best

    # Backwards from the end of each cell: the beginning that gave the best sum.
    def last_cell(end: jax.Array, step: Array) -> tuple[jax.Array, jax.Array]:
        best, start, stop = step
        begin = jnp.argmax(best + worth(start, tuple(x[end] for x in stop)))
        return begin, stop[2][end]

    table = (mass, moment, borders)
    starts, stops = tuple(x[:-1] for x in table), tuple(x[1:] for x in table)
    _, history = jax.lax.scan(add_cell, jnp.zeros(borders.shape[1]), (starts, stops))
    _, ends = jax.lax.scan(last_cell, jnp.array(0), (history, starts, stops), reverse=True)
    edges = jnp.concatenate([jnp.zeros(1, ends.dtype), ends])
    mass, mean = group.weigh(edges[:-1], edges[1:])
    return jnp.where(mass > 0, mean, _take(group.values, jnp.minimum(edges[:-1], group.n - 1)))


def _framed(inner: jax.Array, n: jax.Array | int) -> jax.Array:
    """Adds the first and the last border to the inner ones `[K-1, choices]`."""
    return jnp.concatenate([jnp.zeros_like(inner[:1]), inner, jnp.full_like(inner[:1], n)])


def _optimal(group: Group, weights: jax.Array | None, k: int) -> jax.Array:
    """The optimum over borders on one coarse grid, then over many places near each of these borders.

    Beyond `_GRID / 4` centroids the grid is too coarse, and the companding init takes its place.
    """
    values, n = group.values, group.n
    few = values.shape[0] <= _GRID  # then the grid is every place there is
    if few or k <= _GRID // 4:
        every = jnp.minimum(jnp.arange(values.shape[0] + 1), n)
        places = every if few else count_at_most(values, n, _companding(values, n, weights, _GRID))
        centroids = _best_borders(group, _framed(jnp.broadcast_to(places, (k - 1, *places.shape)), n))
    else:
        centroids = _companding(values, n, weights, k)

    def refine(_: object, centroids: jax.Array) -> jax.Array:
        centroids = jax.lax.fori_loop(0, 4, lambda _, c: _lloyd(group, c, None), centroids)
        borders, at = _edges(group, centroids)[1:-1, None], count_at_most(values, n, centroids)[:, None]
        # From centroid to centroid, and past them where they are only a few values apart.
        low = jnp.maximum(jnp.minimum(at[:-1], borders - _PLACES // 2), 0)
        high = jnp.minimum(jnp.maximum(at[1:], borders + _PLACES // 2), n)
        share = jnp.arange(_PLACES)[None, :] / (_PLACES - 1)
        places = low + jnp.round(share * (high - low).astype(jnp.float32)).astype(jnp.int32)
        places = jnp.concatenate([borders, places], axis=1)  # the present border first: it wins ties
        return _best_borders(group, _framed(places, n))

    return centroids if few else jax.lax.fori_loop(0, 2, refine, centroids)


def _plus_plus(values: jax.Array, n: jax.Array | int, weights: jax.Array | None, k: int, key: jax.Array) -> jax.Array:
    """Draws each centroid with probability proportional to the squared distance to those drawn before.

    Reference: Arthur and Vassilvitskii, k-means++: the advantages of careful seeding, 2007.
    """
    mass = (jnp.arange(values.shape[0]) < n).astype(jnp.float32) if weights is None else weights

    def draw(carry: tuple[jax.Array, jax.Array], key: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        distance, probability = carry
        cumulative = jnp.cumsum(probability)
        point = jax.random.uniform(key) * cumulative[-1]
        # side="right" never takes a value of probability 0.
        chosen = _take(values, jnp.minimum(jnp.searchsorted(cumulative, point, side="right"), n - 1))
        distance = jnp.minimum(distance, jnp.square(values - chosen))
        return (distance, mass * distance), chosen

    # The first draw is by mass alone.
    infinite = jnp.full_like(values, jnp.inf)
    _, chosen = jax.lax.scan(draw, (infinite, mass), jax.random.split(key, k))
    return jnp.sort(chosen)


# --- iterations -----------------------------------------------------------------------------------------------


def nearest_to_zero(centroids: jax.Array) -> jax.Array:
    """The place of the centroid nearest to 0; of equal ones below 0 the last, so that a 0 there keeps the order.

    >>> int(nearest_to_zero(jnp.array([-3.0, -1.0, -1.0, 2.0])))
    2
    """
    below = jnp.sum(centroids < 0)
    last, first = _take(centroids, jnp.maximum(below - 1, 0)), _take(centroids, jnp.minimum(below, len(centroids) - 1))
    return jnp.where((below > 0) & (-last <= jnp.abs(first)), below - 1, below)


def _pin(centroids: jax.Array, pin: jax.Array | None) -> jax.Array:
    return centroids if pin is None else jnp.where(jnp.arange(centroids.shape[0]) == pin, 0.0, centroids)


def _lloyd(group: Group, centroids: jax.Array, pin: jax.Array | None) -> jax.Array:
    """One Lloyd iteration. Centroids of empty cells stay, and the one at the place `pin` becomes 0."""
    edges = _edges(group, centroids)
    mass, mean = group.weigh(edges[:-1], edges[1:])
    return _pin(jnp.where(mass > 0, mean, centroids), pin)


def _exchange(group: Group, centroids: jax.Array, pin: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Splits one cell at its mean and merges two others where that lowers the inertia; also tells whether it did."""
    k = centroids.shape[0]
    edges = _edges(group, centroids)
    mass, mean = group.weigh(edges[:-1], edges[1:])
    middle = jnp.clip(count_at_most(group.values, group.n, mean), edges[:-1], edges[1:])
    left, left_mean = group.weigh(edges[:-1], middle)
    right, right_mean = group.weigh(middle, edges[1:])
    # Two parts at distance d have m1 m2 / (m1 + m2) d^2 more inertia together than apart.
    gain = left * right / jnp.where(mass > 0, mass, 1) * jnp.square(left_mean - right_mean)
    pair = mass[1:] + mass[:-1]
    loss = mass[1:] * mass[:-1] / jnp.where(pair > 0, pair, 1) * jnp.square(mean[1:] - mean[:-1])
    if pin is not None:  # the pinned centroid neither moves nor merges
        place = jnp.arange(k)
        gain = jnp.where(place == pin, 0.0, gain)
        loss = jnp.where((place[1:] == pin) | (place[:-1] == pin), jnp.inf, loss)
    split = jnp.argmax(gain)
    place = jnp.arange(k - 1)
    loss = jnp.where((place == split) | (place + 1 == split), jnp.inf, loss)
    merge = jnp.argmin(loss)
    # The margin keeps rounding from exchanging the same cells for ever.
    better = gain[split] > loss[merge] * 1.001
    merged = (mass[merge] * mean[merge] + mass[merge + 1] * mean[merge + 1]) / jnp.maximum(pair[merge], 1e-30)
    merged = jnp.where(pair[merge] > 0, merged, centroids[merge])
    fresh = jnp.where(mass > 0, mean, centroids)
    # The merge leaves place merge + 1 free for the right part; the cell that is split is neither of the two.
    fresh = fresh.at[merge].set(merged).at[merge + 1].set(right_mean[split]).at[split].set(left_mean[split])
    return jnp.where(better, jnp.sort(fresh), centroids), better


def _solve(group: Group, centroids: jax.Array, iterations: int, pinned: bool, exchange: bool) -> jax.Array:
    """Lloyd iterations until nothing moves, with an exchange after every fourth while exchanges help."""

    def pin_of(centroids: jax.Array) -> jax.Array | None:
        return nearest_to_zero(centroids) if pinned else None

    def going(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return (state[2] < iterations) & state[1]

    def step(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        before, _, count = state
        after = _lloyd(group, before, pin_of(before))
        moved = jnp.any(after != before)
        if exchange:
            # Both branches are computed under vmap; an exchange costs about two iterations.
            swapped, better = _exchange(group, after, pin_of(after))
            swap = better & (count % 4 == 3)
            after, moved = jnp.where(swap, swapped, after), moved | better  # go on while an exchange is still to come
        return after, moved, count + 1

    pinned_init = _pin(centroids, pin_of(centroids))
    found = jax.lax.while_loop(going, step, (pinned_init, jnp.array(True), jnp.array(0)))[0]
    # An exchange moves the pinned centroid to the mean of its cell, and may have been the last step.
    return _pin(found, pin_of(found))


def _best_pair(group: Group) -> jax.Array:
    """The exact optimum of two centroids: one pass tries every cut."""
    n = group.n
    cut = jnp.arange(1, max(group.values.shape[0], 2))
    left, left_mean = group.weigh(jnp.zeros_like(cut), jnp.minimum(cut, n))
    right, right_mean = group.weigh(jnp.minimum(cut, n), jnp.full_like(cut, n))
    best = jnp.argmax(left * right * jnp.square(left_mean - right_mean))  # between-cell inertia, up to a factor
    # Where one value has all the mass, one of the sides has none, and no mean.
    low = jnp.where(left[best] > 0, left_mean[best], right_mean[best])
    return jnp.stack([low, jnp.where(right[best] > 0, right_mean[best], low)])


def one_group(
    values: jax.Array,
    weights: jax.Array | None,
    key: jax.Array | None,
    n: jax.Array | int,
    *,
    k: int,
    init: str,
    retention: float,
    iterations: int,
    pinned_zero: bool,
) -> jax.Array:
    """The codebook [k] of one group of n ordered values [padded], the last repeated (weight 0); see `kmeans`."""

    def pin(centroids: jax.Array) -> jax.Array:
        return _pin(centroids, nearest_to_zero(centroids) if pinned_zero else None)

    group = make_group(values, n, weights)
    if k == 1:
        return pin(group.weigh(jnp.zeros(1, jnp.int32), jnp.full(1, n, jnp.int32))[1])
    if k == 2 and init == "optimal" and not pinned_zero:
        return _best_pair(group)
    if init == "equal-mass":
        centroids = _equal_mass(values, n, weights, k, retention)
    elif init == "quantile":
        centroids = _quantile(values, n, weights, (jnp.arange(k, dtype=jnp.float32) + 0.5) / k)
    elif init == "kmeans++":
        assert key is not None
        centroids = _plus_plus(values, n, weights, k, key)
    elif init == "optimal":
        centroids = _optimal(group, weights, k)
    else:
        centroids = _companding(values, n, weights, k)
    if iterations == 0:
        return pin(centroids)
    # Dynamic programming leaves little for exchanges to find.
    return _solve(
        group, centroids, iterations, pinned_zero, exchange=k > 2 and not (init == "optimal" and k <= _GRID // 4)
    )


def check_shapes(values: Array, weights: Array | None) -> None:
    """Refuses values `[..., n]` that are none, and weights of another shape.

    Raises:
        UserError: see above.
    """
    if values.ndim == 0 or values.size == 0:
        raise UserError(f"no values to cluster along a last axis: shape {tuple(values.shape)}")
    if weights is not None and weights.shape != values.shape:
        raise UserError(f"weights have shape {tuple(weights.shape)}, values {tuple(values.shape)}")


def order(values: Array, weights: Array | None) -> tuple[Array, Array | None]:
    """Sorts `[groups, n]` values, and their weights with them, along the last axis.

    Values that already lie on the host are sorted by numpy: XLA's sort on a CPU takes tens of times as long.

    Raises:
        UserError: a value or weight is not finite, or a weight negative (not seen inside jit).
    """
    traced = isinstance(values, jax.core.Tracer) or isinstance(weights, jax.core.Tracer)
    weights = None if weights is None else in_range(weights)
    ordered: Array
    mass: Array | None
    if not traced and (isinstance(values, np.ndarray) or jax.default_backend() == "cpu"):
        values = np.asarray(values, np.float32)
        if weights is None:
            ordered, mass = np.sort(values, axis=-1), None
        else:
            place = np.argsort(values, axis=-1)
            ordered, mass = np.take_along_axis(values, place, -1), np.take_along_axis(weights, place, -1)
    elif weights is None:
        ordered, mass = jnp.sort(values.astype(jnp.float32), axis=-1), None
    else:
        ordered, mass = jax.lax.sort((values.astype(jnp.float32), jnp.asarray(weights, jnp.float32)), num_keys=1)
    if not traced and not np.isfinite(ordered[:, np.array([0, -1])]).all():  # NaN and infinity are sorted to the ends
        raise UserError("some values are NaN or infinite")
    return ordered, mass


def in_range(weights: Array) -> Array:
    """Weights `[groups, n]` as float32, each group times the power of two that brings its largest to 1 to 2.

    Only their shares count, but products of their sums must fit float32: squared gradients are often below 1e-20.

    >>> in_range(np.array([[2.0**-140, 2.0**-141], [4.0, 1.0]])).tolist()
    [[1.0, 0.5], [1.0, 0.25]]

    Raises:
        UserError: one is not finite or is negative, or all of a group are zero (not seen inside jit).
    """
    xp = jnp if isinstance(weights, jax.core.Tracer) else np
    # Double precision, where it is given, holds what float32 does not.
    exact = xp.asarray(weights).astype(xp.promote_types(weights.dtype, np.float32))
    if xp is np and not (np.isfinite(exact).all() and (exact >= 0).all() and exact.any(-1).all()):
        raise UserError("weights of the error must be finite, zero or more, and not all zero in a group")
    _, exponent = xp.frexp(xp.max(exact, axis=-1, keepdims=True))  # its mantissas are 0.5 to 1, hence 1 - exponent
    return xp.ldexp(exact, 1 - exponent).astype(np.float32)


def scaled(ordered: Array) -> tuple[Array, np.ndarray | None]:
    """Brings groups whose squares would not fit float32 near magnitude 1; the others keep their values.

    Args:
        ordered: `[groups, n]`, each row ascending. Traced values stay as they are.

    Returns:
        The values times `scale`, which is exact, and `scale` `[groups, 1]`, powers of two; None where all are 1.

    >>> values, scale = scaled(np.float32([[2.0**70, 2.0**71], [1.0, 2.0]]))
    >>> values.tolist()
    [[0.25, 0.5], [1.0, 2.0]]
    """
    if isinstance(ordered, jax.core.Tracer):
        return ordered, None
    largest = np.max(np.abs(np.asarray(ordered[:, np.array([0, -1])])), axis=1, keepdims=True)
    # Squares of sums are compared, so that large values must leave room for how many they are.
    far = (largest > 0) & ((largest < 1e-15) | (largest > 1e9))
    if not far.any():
        return ordered, None
    # Clipped so that neither the factor nor its inverse leaves float32.
    scale = np.where(far, np.ldexp(np.float32(1), np.clip(-np.frexp(largest)[1], -126, 126)), np.float32(1))
    return ordered * scale, scale


@partial(jax.jit, static_argnames=("function", "settings"))
def _mapped(
    function: Callable[..., Array],
    values: Array,
    weights: Array | None,
    keys: Array | None,
    n: int,
    settings: tuple[tuple[str, object], ...],
) -> Array:
    return jax.vmap(partial(function, **dict(settings)), in_axes=(0, 0, 0, None))(values, weights, keys, n)


def over_groups(
    function: Callable[..., Array],
    values: Array,
    weights: Array | None,
    keys: Array | None,
    **settings: object,
) -> Array:
    """Runs `function(values [n], weights, key, n, **settings)` on every group of what `order` gave.

    Host arrays are taken in chunks that fit the cache, one chunk on each core at a time. Values are padded to a power
    of 64, so that the tensors of a network share a few compilations: each takes seconds.
    """
    run = partial(_mapped, function, settings=tuple(settings.items()))
    groups, n = values.shape
    if not isinstance(values, np.ndarray):
        return run(values, weights, keys, n)
    padded = _SMALLEST
    while padded < n:
        padded *= _SMALLEST
    rows = max(1, min(_CHUNK_ROWS, _CHUNK_VALUES // padded))

    def chunk(begin: int) -> Array:
        # The last chunk repeats the last group, so that all chunks have one shape.
        some = np.minimum(np.arange(begin, begin + rows), groups - 1)
        part = np.pad(values[some], ((0, 0), (0, padded - n)), mode="edge")
        mass = None if weights is None else np.pad(weights[some], ((0, 0), (0, padded - n)))
        result = run(part, mass, None if keys is None else keys[some], n)
        return jax.tree.map(lambda x: np.asarray(x)[: groups - begin], result)

    first = chunk(0)  # compiles, once; the threads then share it
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = [first, *pool.map(chunk, range(rows, groups, rows))]
    return jax.tree.map(lambda *parts: jnp.asarray(np.concatenate(parts)), *results)


def kmeans(
    values: Array,
    k: int,
    weights: Array | None = None,
    *,
    init: str = "optimal",
    retention: float = 0.9,
    iterations: int = 60,
    symmetric: bool = False,
    pinned_zero: bool = False,
    key: jax.Array | None = None,
) -> jax.Array:
    """Clusters numbers into K cells of least (weighted) squared error, each group on its own.

    May be called inside jit. Outside it, on a CPU, numpy sorts, and groups are taken in chunks that fit the cache.
    Outside jit values may have any magnitude; inside it their squares must fit float32.

    >>> kmeans(np.float32([[0, 1, 10, 11, 12]]), 2).tolist()
    [[0.5, 11.0]]

    Args:
        values: numbers `[..., n]`; every leading index is a group of its own.
        k: number of centroids.
        weights: importance of each value `[..., n]`, zero or more, such as the diagonal of a Hessian or Fisher matrix.
            Only their shares within a group count.
        init: "optimal" (dynamic programming over a choice of borders),
            "companding" (density of centroids as the cube root of the values' density), "equal-mass" (means of
            equal-mass bins of the values clamped to their central `retention`, the init of KMQAT), "quantile", or
            "kmeans++".
        retention: share of the values that "equal-mass" does not clamp.
        iterations: most Lloyd iterations; it stops as soon as nothing moves. 0 returns the init itself.
        symmetric: for each centroid the codebook also holds its negative; `k` must be even.
        pinned_zero: one centroid is exactly 0 (with `symmetric`, both middle ones are).
        key: random key of "kmeans++"; a fixed one where left out.

    Returns:
        The codebook `[..., k]`, float32, ascending. With fewer distinct values than centroids, every value is a
        centroid, and some centroids are repeated or unused.

    Raises:
        UserError: a setting is outside its range, or a value or weight is not finite (seen only outside jit).
    """
    if init not in INITS:
        raise UserError(f"init (={init!r}) must be one of {', '.join(INITS)}")
    if k < 1 or (symmetric and k % 2):
        raise UserError(f"k (={k}) must be at least 1, and even for a symmetric codebook")
    if not 0 < retention <= 1:
        raise UserError(f"retention (={retention}) must be above 0 and at most 1")
    check_shapes(values, weights)
    lead, n = values.shape[:-1], values.shape[-1]
    # Half of a symmetric codebook, fitted to the magnitudes, gives the other half.
    ordered, mass = order(
        abs(values).reshape(-1, n) if symmetric else values.reshape(-1, n),
        None if weights is None else weights.reshape(-1, n),
    )
    keys = None
    if init == "kmeans++":
        keys = jax.random.split(jax.random.key(0) if key is None else key, ordered.shape[0])
    ordered, scale = scaled(ordered)
    codebook = over_groups(
        one_group,
        ordered,
        mass,
        keys,
        k=k // 2 if symmetric else k,
        init=init,
        retention=retention,
        iterations=iterations,
        pinned_zero=pinned_zero,
    )
    if scale is not None:
        codebook = codebook / scale
    if symmetric:
        codebook = jnp.concatenate([-jnp.flip(codebook, -1), codebook], axis=-1)
    return codebook.reshape(*lead, k)


def inertia(values: Array, codebook: Array, weights: Array | None = None) -> jax.Array:
    """The (weighted) sum of squared distances of `values [..., n]` to the nearest centroid of `[..., k]`: `[...]`.

    >>> float(inertia(jnp.array([0.0, 1.0, 10.0]), jnp.array([0.5, 10.0])))
    0.5
    """
    error = jnp.square(values - jnp.take_along_axis(codebook, nearest(values, codebook).astype(jnp.int32), axis=-1))
    return jnp.sum(error if weights is None else error * weights, axis=-1)


def nearest(values: Array, codebook: Array) -> jax.Array:
    """Index `[..., n]` of the centroid nearest to each value `[..., n]` in an ascending codebook `[..., k]`.

    It is uint8, or int32 where there are more than 256 centroids.

    >>> nearest(jnp.array([0.2, 0.8, 4.0]), jnp.array([0.0, 1.0])).tolist()
    [0, 1, 1]
    """
    # "compare_all": the default binary search is a scan of gathers, tens of times slower for so few centroids.
    search = partial(jnp.searchsorted, side="left", method="compare_all")
    for _ in range(values.ndim - 1):
        search = jax.vmap(search)
    return search(midpoints(codebook), values).astype(jnp.uint8 if codebook.shape[-1] <= 256 else jnp.int32)
