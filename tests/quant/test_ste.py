import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kmq_jax import quant
from kmq_jax.core.errors import UserError
from kmq_jax.quant import QuantRule, QuantSpec, ste

RNG = np.random.default_rng(0)
PARAMS = {"w": RNG.standard_normal((40, 3)).astype(np.float32), "bias": np.ones(3, np.float32)}
PULL = jnp.asarray(RNG.standard_normal((40, 3)).astype(np.float32))  # an arbitrary gradient on the weights


def pulled(latents, books, **settings):
    return jnp.sum(PULL * quant.fake_quantize(latents, books, **settings)["w"])


@pytest.mark.parametrize("recipe", ["normalized", "weights"])
@pytest.mark.parametrize("spec", [QuantSpec(1), QuantSpec(2), QuantSpec(4), QuantSpec(6, "tensor")])
def test_forward_is_exactly_the_centroids(recipe, spec):
    latents, books = quant.init_codebooks(PARAMS, spec, recipe=recipe)
    weights = np.asarray(jax.jit(quant.fake_quantize)(latents, books)["w"])
    values = np.asarray(books["w"].values())
    if spec.granularity == "tensor":
        assert len(np.unique(weights)) <= 2**spec.bits and set(np.unique(weights)) <= set(values[0])
    else:
        for channel in range(3):
            assert 2 <= len(np.unique(weights[:, channel])) <= 2**spec.bits
            assert set(np.unique(weights[:, channel])) <= set(values[channel])
    stored = quant.dequantize_params(quant.pack(latents, books))
    np.testing.assert_array_equal(stored["w"], weights)
    np.testing.assert_array_equal(stored["bias"], PARAMS["bias"])


@pytest.mark.parametrize("recipe", ["normalized", "weights"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradients(recipe, reduction):
    latents, books = quant.init_codebooks(PARAMS, QuantSpec(2, codebook_dtype="float32"), recipe=recipe)
    book = books["w"]
    indices = quant.indices_of(quant.pack(latents, books)["w"])
    members = jax.nn.one_hot(indices, 4)  # [40, 3, 4]

    def dense(raw_scale, centroids):
        weights = jnp.einsum("nck,ck->nc", members, jax.nn.softplus(raw_scale)[:, None] * centroids)
        return jnp.sum(PULL * weights)

    found, of_book = jax.grad(lambda p, b: pulled(p, b, reduction=reduction), (0, 1))(latents, books)
    slope = np.asarray(book.scale)[None, :] if recipe == "normalized" else 1
    np.testing.assert_allclose(found["w"], PULL * slope, rtol=1e-6)
    of_scale, of_centroids = jax.grad(dense, (0, 1))(book.raw_scale, book.centroids)
    if reduction == "sum":
        np.testing.assert_allclose(of_book["w"].raw_scale, of_scale, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(of_book["w"].centroids, of_centroids, rtol=1e-4, atol=1e-5)
    else:
        count = np.maximum(np.sum(members, axis=0), 1)
        np.testing.assert_allclose(of_book["w"].centroids, of_centroids / count, rtol=1e-4, atol=1e-5)


def test_clip_stops_the_gradient_outside():
    latents, books = quant.init_codebooks(PARAMS, QuantSpec(1))
    passed = np.asarray(jax.grad(lambda p: pulled(p, books, clip=1.0))(latents)["w"]) != 0
    edge = np.max(np.abs(books["w"].centroids), axis=1)
    np.testing.assert_array_equal(passed, np.abs(latents["w"]) <= edge[None, :])
    assert 0 < passed.sum() < passed.size


def test_cached_indices_hold_until_reassigned():
    latents, books = quant.init_codebooks(PARAMS, QuantSpec(2), cached=True)
    before = quant.fake_quantize(latents, books)["w"]
    turned = {**latents, "w": -latents["w"]}
    np.testing.assert_array_equal(quant.fake_quantize(turned, books)["w"], before)
    fresh = quant.fake_quantize(turned, quant.reassign(turned, books))["w"]
    without = {"w": dataclasses.replace(books["w"], indices=None)}
    np.testing.assert_array_equal(fresh, quant.fake_quantize(turned, without)["w"])
    assert np.mean(fresh == before) < 0.5
    floating, rest = quant.partition(books)
    gradient = jax.grad(lambda f: pulled(latents, quant.combine(f, rest)))(floating)
    assert np.any(np.asarray(gradient["w"].centroids) != 0)


def test_kmqat_start_step_by_step():
    weights = RNG.standard_t(3, 200).astype(np.float32)
    low, high = np.quantile(weights, [0.05, 0.95])
    clamped = np.sort(np.clip(weights, low, high).astype(np.float64))
    c = clamped.reshape(4, 50).mean(axis=1)
    c /= np.abs(c).max()
    unit = np.clip(weights / max(abs(low), abs(high)), -1, 1)
    q = c[np.argmin(np.abs(unit[:, None] - c), axis=1)]
    centroids, scale = quant.kmqat_codebook(weights[None, :], 2, 0.9)
    np.testing.assert_allclose(centroids[0], c, rtol=1e-5)
    np.testing.assert_allclose(scale[0], weights @ q / (q @ q), rtol=1e-5)


def test_lloyd_update_by_hand():
    latents = {"w": jnp.array([[-3.0], [-1.0], [1.0], [5.0]])}
    book = quant.Codebook(jnp.zeros(1), jnp.array([[-2.5, 2.0]]), axis=1, normalized=True)
    moved = quant.lloyd_update(latents, {"w": book}, rate=0.1)["w"]
    np.testing.assert_allclose(moved.centroids, [[-2.5 + 0.05, 2.0 + 0.1]], rtol=1e-6)
    idle = dataclasses.replace(book, centroids=jnp.array([[-2.0, 2.0, 50.0, 60.0]]))
    moved = quant.lloyd_update(latents, {"w": idle}, rate=0.1, unused_rate=0.2)["w"]
    np.testing.assert_allclose(moved.centroids, [[-2.0, 2.0 + 0.2, 50, 60]], rtol=1e-6)


def test_members_beyond_one_pull_centroids_no_farther():
    latents = {"w": jnp.array([[-3.0], [-0.5], [0.5], [1.5]])}
    book = quant.Codebook(jnp.zeros(1), jnp.array([[-1.0, 0.8]]), axis=1, normalized=True)
    moved = quant.lloyd_update(latents, {"w": book}, rate=0.1, unused_rate=0.2, clip=1.0)["w"]
    # Members count as -1, -0.5 and 0.5, 1: means -0.75 and 0.75.
    np.testing.assert_allclose(moved.centroids, [[-1.0 + 0.025, 0.8 - 0.005]], rtol=1e-6)


def test_static_binary_quantizer_stays_at_the_mean_magnitude():
    latents, books = quant.init_codebooks(PARAMS, QuantSpec(1, symmetric=True, codebook_dtype="float32"))
    latents = {**latents, "w": latents["w"] * 1.7 + 0.1}
    books = quant.lloyd_update(latents, books, rate=1.0)
    weights = np.asarray(quant.fake_quantize(latents, books)["w"])
    raw = np.asarray(latents["w"]) * np.asarray(books["w"].scale)[None, :]
    np.testing.assert_allclose(weights, np.abs(raw).mean(axis=0) * np.sign(raw), rtol=1e-5)


@pytest.mark.parametrize("spec", [QuantSpec(2, symmetric=True), QuantSpec(2, pinned_zero=True)])
def test_constraints_survive_gradient_steps(spec):
    latents, books = quant.init_codebooks(PARAMS, spec)
    for _ in range(3):
        gradient = jax.grad(pulled, 1)(latents, books)
        books = jax.tree.map(lambda b, g: b - 0.3 * g, books, gradient)
    values = np.asarray(books["w"].values())
    if spec.symmetric:
        np.testing.assert_array_equal(values, -values[:, ::-1])
    else:
        assert np.all(np.sum(values == 0, axis=1) >= 1)


def test_one_centroid_is_pinned_where_two_are_as_near_to_zero():
    book = quant.Codebook(jnp.ones(1), jnp.array([[-1.0, 1.0]]), pinned_zero=True)
    assert book.constrained()[0].tolist() == [[0.0, 1.0]]
    both = dataclasses.replace(book, centroids=jnp.array([[-1.0, -1.0, 1.0, 1.0]]), symmetric=True)
    assert both.constrained()[0].tolist() == [[-1.0, 0.0, 0.0, 1.0]]


@pytest.mark.parametrize("scale", [1e-5, 0.03, 1.0, 40.0])
def test_scale_survives_softplus(scale):
    book = quant.Codebook(jnp.zeros(1), jnp.zeros((1, 2))).with_scale(jnp.array([scale]))
    np.testing.assert_allclose(book.scale, [scale], rtol=3e-6)


@pytest.mark.parametrize("recipe", ["normalized", "weights"])
def test_training_fits_better_than_rounding(recipe):
    # Least squares with two-bit weights: rounding each weight by itself is not the best choice.
    x = RNG.standard_normal((60, 40)).astype(np.float32) @ RNG.standard_normal((40, 40)).astype(np.float32) / 6
    target = x @ PARAMS["w"]

    @jax.jit
    def loss(state):
        return jnp.mean((x @ quant.fake_quantize(*state)["w"] - target) ** 2)

    state = quant.init_codebooks(PARAMS, QuantSpec(2), recipe=recipe)
    plain = jnp.mean((x @ quant.dequantize_params(quant.quantize_params(PARAMS, QuantSpec(2)))["w"] - target) ** 2)
    gradient = jax.jit(jax.grad(loss))
    best = float(loss(state))
    for _ in range(300):
        state = jax.tree.map(lambda s, g: s - 0.02 * g, state, gradient(state))
        best = min(best, float(loss(state)))
    assert best < 0.7 * plain


def test_mistakes():
    latents, books = quant.init_codebooks(PARAMS, QuantSpec(2))
    with pytest.raises(UserError, match="recipe"):
        quant.init_codebooks(PARAMS, QuantSpec(2), recipe="other")
    with pytest.raises(UserError, match="absent"):
        quant.fake_quantize(latents, {"absent": books["w"]})
    with pytest.raises(UserError, match="3 bits"):
        quant.fake_quantize(latents, books, bits=3)
    with pytest.raises(UserError, match="reduction"):
        quant.fake_quantize(latents, books, reduction="max")
    with pytest.raises(UserError, match="w: .*NaN"):
        quant.init_codebooks({"w": np.full((4, 4), np.nan, np.float32)}, [QuantRule("w", QuantSpec(2))])


def test_dead_and_constant_channels():
    weights = np.stack([np.zeros(20), np.full(20, 0.3), np.linspace(-1, 1, 20)], axis=1).astype(np.float32)
    for recipe in ("normalized", "weights"):
        latents, books = quant.init_codebooks({"w": weights}, QuantSpec(2), recipe=recipe)
        found = np.asarray(quant.fake_quantize(latents, books)["w"])
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found[:, :2], weights[:, :2], atol=2e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_one_program_serves_every_width(bits):
    latents, books = quant.init_codebooks(PARAMS, QuantSpec(4, coarse=(2, 3)))

    def slopes(books, bits):
        return jax.value_and_grad(lambda b: pulled(latents, b, bits=bits))(books)

    fixed, traced = slopes(books, bits), jax.jit(slopes)(books, jnp.array(bits))
    assert fixed[0] == pytest.approx(float(traced[0]), rel=1e-6)
    for here, there in zip(jax.tree.leaves(fixed[1]), jax.tree.leaves(traced[1]), strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize(("shape", "axis"), [((3, 3, 4, 8), 3), ((5, 7), None), ((6, 5), 0)])
def test_sums_of_cells_on_every_backend(backend, shape, axis, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)  # the formulation, on this machine
    tensor, indices = RNG.standard_normal(shape).astype(np.float32), RNG.integers(0, 4, shape).astype(np.uint8)
    count, total = ste.cell_sums(jnp.asarray(tensor), jnp.asarray(indices), 4, axis)
    groups = [slice(None)] if axis is None else [(slice(None),) * axis + (g,) for g in range(shape[axis])]
    for g, group in enumerate(groups):
        for k in range(4):
            members = tensor[group][indices[group] == k]
            assert count[g, k] == members.size
            assert total[g, k] == pytest.approx(members.sum(), abs=1e-5)


# --- starting from a packed network --------------------------------------------------------------------------------


def scrambled(bits):
    """A packed tensor whose indices are anything but the nearest."""
    packed = quant.quantize_params(PARAMS, QuantSpec(bits))
    tensor = packed["w"]
    indices = np.random.default_rng(1).integers(0, 1 << bits, (tensor.groups, tensor.group_size)).astype(np.uint8)
    return {**packed, "w": dataclasses.replace(tensor, packed=quant.pack_bits(indices, bits))}


@pytest.mark.parametrize("bits", [1, 2, 4, 6])
def test_what_is_adopted_is_the_packed_network(bits):
    packed = scrambled(bits)
    latents, books = quant.adopt_codebooks(PARAMS, packed, QuantSpec(bits))
    stored = quant.pack(latents, books)
    np.testing.assert_array_equal(stored["w"].codebook, packed["w"].codebook)
    if bits < 6:  # with more centroids than weights some are equal, and any index of theirs will do
        np.testing.assert_array_equal(stored["w"].packed, packed["w"].packed)
    np.testing.assert_array_equal(*(quant.dequantize_params(tree)["w"] for tree in (stored, packed)))


@pytest.mark.parametrize("unit", [1.0, 2.0**70, 2.0**-80])  # squares of the last two do not fit float32
def test_latents_stay_where_the_index_is_the_nearest_and_else_go_just_over_the_border(unit):
    # Values twice the weights; -3 belongs to -4 (index 0) but holds index 1, whose cell is (-3, 0) in these units.
    weights = {"w": np.array([[-3.0], [-1.0], [1.0], [3.0]], np.float32)}
    book = jnp.array([[-4.0, -2.0, 2.0, 4.0]], jnp.float16)
    packed = quant.quantize_params(weights, QuantSpec(2))
    weights = {"w": unit * weights["w"]}
    indices = np.array([[1, 1, 2, 3]], np.uint8)
    tensor = dataclasses.replace(packed["w"], codebook=book, packed=quant.pack_bits(indices, 2))
    latents, books = quant.adopt_codebooks(weights, {"w": tensor}, QuantSpec(2), margin=0.1)
    ratio = (-3 * -2 + 2 + 2 + 12) / (9 + 1 + 1 + 9)
    found = np.asarray(latents["w"])[:, 0] * float(books["w"].scale[0])
    np.testing.assert_allclose(found, [-2.9, -ratio, ratio, 3 * ratio], rtol=1e-5)


def test_what_is_not_quantized_is_taken_from_the_packed_network():
    packed = {**scrambled(2), "bias": np.full(3, 7.0, np.float32)}
    latents, books = quant.adopt_codebooks(PARAMS, packed, QuantSpec(2))
    assert list(books) == ["w"]
    np.testing.assert_array_equal(latents["bias"], packed["bias"])


def test_only_a_network_quantized_alike_is_adopted():
    packed = quant.quantize_params(PARAMS, QuantSpec(3))
    for bad in (
        packed,
        PARAMS,
        {**packed, "w": packed["bias"]},
        quant.quantize_params(PARAMS, QuantSpec(2, coarse=(1,))),
    ):
        with pytest.raises(UserError, match="w: the packed network must hold it at 2 bits"):
            quant.adopt_codebooks(PARAMS, bad, QuantSpec(2))
    with pytest.raises(UserError, match="w must be in full precision in the packed network"):
        quant.adopt_codebooks(PARAMS, packed, {"w": None, "bias": 16})
    with pytest.raises(UserError, match="bias is missing in the packed network"):
        quant.adopt_codebooks(PARAMS, {"w": quant.quantize_params(PARAMS, QuantSpec(2))["w"]}, QuantSpec(2))


def test_what_is_stored_in_half_precision_trains_in_its_own():
    rules = {"w": 2, "bias": 16}
    packed = quant.quantize_params(PARAMS, rules)
    latents, _ = quant.adopt_codebooks(PARAMS, packed, rules)
    assert packed["bias"].dtype == jnp.float16 and latents["bias"].dtype == jnp.float32
