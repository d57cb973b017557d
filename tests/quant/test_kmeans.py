import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quant_references import brute_inertia, optimal_inertia, real_kernels
from sklearn.cluster import KMeans

from kmq_jax.core.errors import UserError
from kmq_jax.quant import inertia, kmeans
from kmq_jax.quant.kmeans import INITS, make_group, nearest

RNG = np.random.default_rng(0)
HEAVY = {
    "normal": RNG.standard_normal(600),
    "laplace": RNG.laplace(size=600),
    "student": RNG.standard_t(2, 600),
    "cubed": RNG.standard_normal(600) ** 3,
    "skewed": RNG.exponential(size=600),
}


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_near_the_optimum_and_no_worse_than_sklearn_on_heavy_tails(bits):
    rows = np.stack(list(HEAVY.values())).astype(np.float32)
    codebooks = np.asarray(kmeans(rows, 1 << bits))
    for values, centroids in zip(rows, codebooks):
        found = brute_inertia(values, centroids)
        assert found <= optimal_inertia(values, 1 << bits) * 1.01
        theirs = KMeans(1 << bits, n_init=10, random_state=0).fit(values[:, None].astype(np.float64)).inertia_
        assert found <= theirs * 1.001


@pytest.mark.slow
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_near_the_optimum_and_no_worse_than_sklearn_on_real_layers(shared, bits):
    kernels = list(real_kernels(shared).values())
    for kernel in (kernels[0], kernels[1], kernels[8], kernels[20], kernels[-1]):
        rows = kernel[:: max(1, len(kernel) // 6)].astype(np.float32)
        codebooks = np.asarray(kmeans(rows, 1 << bits))
        found = sum(brute_inertia(v, c) for v, c in zip(rows, codebooks))
        assert found <= sum(optimal_inertia(v, 1 << bits) for v in rows) * 1.01
        if rows.shape[1] < 1 << bits:  # the first layer's nine weights: scikit-learn refuses, the optimum is zero
            continue
        fits = [KMeans(1 << bits, n_init=10, random_state=0).fit(v[:, None].astype(np.float64)) for v in rows]
        assert found <= sum(fit.inertia_ for fit in fits) * 1.001


@pytest.mark.parametrize("start", INITS)
@pytest.mark.parametrize("k", [3, 8])
def test_every_start_ends_in_a_fixed_point(start, k):
    values = HEAVY["laplace"].astype(np.float32)
    centroids = np.asarray(kmeans(values, k, init=start, iterations=400), np.float64)
    assert np.all(np.diff(centroids) > 0)
    cell = np.argmin(np.abs(values[:, None] - centroids), axis=1)
    means = [values[cell == i].mean(dtype=np.float64) for i in range(k)]
    np.testing.assert_allclose(centroids, means, atol=2e-3)
    assert brute_inertia(values, centroids) <= optimal_inertia(values, k) * 1.5


def test_equal_mass_start_by_hand():
    # 20 values; the central 0.8 runs from 2.9 to 18.1 by numpy's linear quantiles 0.1 and 0.9, bins of 5.
    values = np.arange(1.0, 21.0)
    low, high = np.quantile(values, [0.1, 0.9])
    expected = np.clip(values, low, high).reshape(4, 5).mean(axis=1)
    found = kmeans(RNG.permutation(values).astype(np.float32), 4, init="equal-mass", retention=0.8, iterations=0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_equal_mass_start_counts_weights_like_repetition():
    values = np.array([[0.0, 1, 10, 11]], np.float32)
    settings = {"init": "equal-mass", "iterations": 0, "retention": 1.0}
    assert kmeans(values, 2, **settings).tolist() == [[0.5, 10.5]]
    assert kmeans(values, 2, np.ones_like(values), **settings).tolist() == [[0.5, 10.5]]
    # The cut at half the mass lies behind the first value: 3 of 6.
    assert kmeans(values, 2, np.array([[3, 1, 1, 1]]), **settings).tolist() == [[0.0, pytest.approx(22 / 3)]]


@pytest.mark.parametrize("k", [2, 4])
def test_many_large_values(k):
    values = np.random.default_rng(0).uniform(-1, 1, 200_000).astype(np.float32)
    unit = np.float32(2.0**49)  # 6e14
    np.testing.assert_allclose(kmeans(values * unit, k) / unit, kmeans(values, k), rtol=1e-5)


def test_fewer_distinct_values_than_centroids_are_met_exactly():
    values = np.array([0.1] * 500 + [0.3, 0.7, -5.0], np.float32)
    for start in INITS:
        centroids = np.asarray(kmeans(values, 16, init=start))
        assert np.isfinite(centroids).all() and np.all(np.diff(centroids) >= 0)
        assert set(values.tolist()) <= set(centroids.tolist()), start


@pytest.mark.parametrize("value", [0.0, 0.3, -1e-20, 1e20])
@pytest.mark.parametrize("k", [1, 2, 4, 32])
def test_constant(value, k):
    values = np.full(777, value, np.float32)
    assert brute_inertia(values, np.asarray(kmeans(values, k))) == 0


@pytest.mark.parametrize("n", [1, 2, 3])
def test_tiny_groups(n):
    values = np.arange(n, dtype=np.float32)
    assert brute_inertia(values, np.asarray(kmeans(values, 8))) == 0


@pytest.mark.parametrize("bits", [5, 8])
def test_wide_codebooks(bits):
    values = HEAVY["normal"].astype(np.float32)
    assert brute_inertia(values, kmeans(values, 1 << bits)) <= optimal_inertia(values, 1 << bits) * 1.25


def test_weights_count_like_repetition():
    values = RNG.standard_normal(300).astype(np.float32)
    times = RNG.integers(0, 5, 300)
    repeated = np.repeat(values, times)
    centroids = kmeans(values, 4, times.astype(np.float32))
    best = optimal_inertia(repeated, 4)
    assert brute_inertia(values, centroids, times) <= best * 1.01
    np.testing.assert_allclose(inertia(values, centroids, times), brute_inertia(values, centroids, times), rtol=1e-4)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])  # which round no weight: where cells tie, that would count
def test_only_the_shares_of_weights_count(scale):
    values, weights = RNG.standard_normal((2, 1, 60)).astype(np.float32)
    weights = weights**2 + 1e-3
    for k in (2, 4):
        plain = kmeans(values, k, weights)
        np.testing.assert_array_equal(kmeans(values, k, weights * np.float32(scale)), plain)
        inside = jax.jit(lambda v, w, k=k: kmeans(v, k, w))(values, weights * np.float32(scale))
        np.testing.assert_allclose(inside, plain, rtol=1e-3)
    # Below what float32 holds.
    double = weights.astype(np.float64) * 2.0**-200
    np.testing.assert_allclose(kmeans(values, 2, double), kmeans(values, 2, weights), rtol=1e-5)


def test_one_value_with_all_the_weight():
    values = np.array([-7, -5, -3], np.float32)
    for weights in ([1, 0, 0], [0, 1, 0], [0, 0, 1]):
        only = values[np.argmax(weights)]
        np.testing.assert_array_equal(kmeans(values, 2, np.array(weights)), [only, only])
        found = np.asarray(kmeans(values, 4, np.array(weights)))
        assert only in found and np.all(np.diff(found) >= 0)


def test_pinned_zero_and_symmetric():
    values = (RNG.standard_normal(900) + 0.3).astype(np.float32)
    pinned = np.asarray(kmeans(values, 8, pinned_zero=True))
    assert np.sum(pinned == 0) == 1 and np.all(np.diff(pinned) > 0)
    assert brute_inertia(values, pinned) < 1.2 * optimal_inertia(values, 8)
    for sign in (-1, 1):  # many equal values, all on one side of zero
        equal = sign * np.array([2, 2, 2, 2, 1], np.float32)
        for start in ("quantile", "equal-mass", "kmeans++", "optimal"):
            found = np.asarray(kmeans(equal, 4, init=start, pinned_zero=True))
            assert np.all(np.diff(found) >= 0) and found[0 if sign > 0 else -1] == 0
            assert brute_inertia(equal, found) <= 1
    symmetric = np.asarray(kmeans(values, 8, symmetric=True))
    np.testing.assert_array_equal(symmetric, -symmetric[::-1])
    both = np.asarray(kmeans(values, 8, symmetric=True, pinned_zero=True))
    np.testing.assert_array_equal(both, -both[::-1])
    assert np.sum(both == 0) == 2


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_zero_stays_where_an_exchange_is_the_last_iteration(symmetric):
    rows = np.random.default_rng(0).laplace(size=(16, 500)).astype(np.float32)
    for iterations in (4, 60):
        found = kmeans(rows, 8, init="quantile", iterations=iterations, pinned_zero=True, symmetric=symmetric)
        np.testing.assert_array_equal(np.sum(np.asarray(found) == 0, axis=1), 2 if symmetric else 1)


def test_one_bit_static_and_adaptive():
    values = (RNG.standard_normal(500) + 0.2).astype(np.float32)
    scale = np.abs(values).mean()
    np.testing.assert_allclose(kmeans(values, 2, symmetric=True), [-scale, scale], rtol=1e-5)
    assert brute_inertia(values, kmeans(values, 2)) <= optimal_inertia(values, 2) * (1 + 1e-6)


def test_groups_are_independent_and_jit_agrees():
    rows = RNG.standard_normal((3, 2, 200)).astype(np.float32)
    together = kmeans(rows, 8)
    assert together.shape == (3, 2, 8)
    np.testing.assert_array_equal(together[1, 1], kmeans(rows[1, 1], 8))
    inside = jax.jit(lambda x: kmeans(x, 8))(rows)
    np.testing.assert_allclose(inside, together, rtol=1e-5, atol=1e-6)


def test_sums_of_a_million_values_are_accurate():
    values = np.sort(RNG.standard_normal(1_000_000).astype(np.float32) + 100)
    start = np.array([0, 10, 999_000, 500_000], np.int32)
    stop = np.array([1_000_000, 20, 999_003, 500_001], np.int32)
    _, means = jax.jit(lambda v, a, b: make_group(v, len(values), None).weigh(a, b))(jnp.asarray(values), start, stop)
    exact = [values[a:b].mean(dtype=np.float64) for a, b in zip(start, stop)]
    np.testing.assert_allclose(means, exact, rtol=2e-7)


def test_nearest_by_hand():
    found = nearest(jnp.array([[-1.0, 0.5, 0.51, 9.0]]), jnp.array([[0.0, 1.0, 2.0, 3.0]]))
    np.testing.assert_array_equal(found, [[0, 0, 1, 3]])


def test_nearest_of_more_centroids_than_a_byte_holds():
    codebook = np.arange(300, dtype=np.float32)
    np.testing.assert_array_equal(nearest(jnp.array([256.0, 299.4]), jnp.asarray(codebook)), [256, 299])
    assert float(inertia(codebook, codebook)) == 0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"init": "random"}, "init"),
        ({"k": 0}, "k "),
        ({"k": 3, "symmetric": True}, "even"),
        ({"retention": 0.0}, "retention"),
        ({"weights": np.ones(3, np.float32)}, "weights"),
        ({"weights": np.full(10, -1, np.float32)}, "weights"),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises(UserError, match=message):
        kmeans(np.arange(10, dtype=np.float32), **{"k": 4, **settings})
    for shape in ((0, 3), (3, 0), ()):
        with pytest.raises(UserError, match="no values"):
            kmeans(np.zeros(shape, np.float32), 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite(bad):
    with pytest.raises(UserError, match="weights of the error"):
        kmeans(np.array([0.0, 1.0, 2.0], np.float32), 2, np.array([1.0, bad, 1.0]))
    with pytest.raises(UserError, match="NaN or infinite"):
        kmeans(np.array([0.0, 1.0, bad], np.float32), 2)
