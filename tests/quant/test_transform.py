import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from kmq_jax import quant
from kmq_jax.core import mesh
from kmq_jax.core.errors import UserError
from kmq_jax.quant import QuantRule, QuantSpec
from kmq_jax.quant.codes import to_groups
from kmq_jax.quant.transform import encode_tensor

RNG = np.random.default_rng(0)


def tree():
    return {
        "conv": {"kernel": RNG.standard_normal((3, 3, 4, 8)).astype(np.float32), "bias": np.ones(8, np.float32)},
        "dense": {"kernel": RNG.standard_normal((24, 16)).astype(np.float32)},
        "steps": np.arange(3),
    }


@pytest.mark.parametrize("bits, granularity", [(1, "channel"), (3, "channel"), (4, "tensor"), (8, "channel")])
def test_each_value_is_its_nearest_stored_centroid(bits, granularity):
    params = tree()
    result = quant.quantize_params(params, QuantSpec(bits, granularity, only_smaller=False))
    tensor, kernel = result["conv"]["kernel"], params["conv"]["kernel"]
    tensor.validate()
    groups = 8 if granularity == "channel" else 1
    assert tensor.packed.shape == (groups, -(-(kernel.size // groups) * bits // 8))
    assert tensor.codebook.shape == (groups, 2**bits) and tensor.codebook.dtype == jnp.float16
    values = np.asarray(quant.dequantize_params(result)["conv"]["kernel"])
    assert values.shape == kernel.shape and values.dtype == np.float32
    for channel in range(8):
        book = np.asarray(tensor.codebook, np.float32)[channel if groups == 8 else 0]
        nearest = np.min(np.abs(kernel[..., channel, None] - book), axis=-1)
        np.testing.assert_allclose(np.abs(values[..., channel] - kernel[..., channel]), nearest, atol=1e-6)
        assert set(np.unique(values[..., channel])) <= set(book)
    assert result["conv"]["bias"] is params["conv"]["bias"] and result["steps"] is params["steps"]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=4),
    st.integers(1, 8),
    st.one_of(st.none(), st.integers(0, 1)),
    st.integers(0, 2**32 - 1),
)
def test_encoding_is_exact_for_any_shape_width_and_axis(shape, bits, axis, seed):
    rng = np.random.default_rng(seed)
    groups = 1 if axis is None else shape[axis]
    codebook = np.sort(rng.permuted(np.tile(np.arange(-300, 300), (groups, 1)), axis=1)[:, : 1 << bits], axis=1)
    indices = rng.integers(0, 1 << bits, shape)
    group = 0 if axis is None else np.indices(shape)[axis]
    values = codebook[group, indices].astype(np.float32)
    tensor = encode_tensor(to_groups(values, axis), (codebook.astype(np.float16),), tuple(shape), axis)
    tensor.validate()
    np.testing.assert_array_equal(quant.indices_of(tensor), indices)
    np.testing.assert_array_equal(quant.dequantize_params([tensor])[0], values)


def test_rules():
    params = tree()
    rules = [
        QuantRule("conv/kernel", QuantSpec(3)),
        QuantRule("dense", None),
        QuantRule("bias", QuantSpec(16)),
    ]
    result = quant.quantize_params(params, rules)
    assert result["conv"]["kernel"].bits == 3
    assert result["dense"]["kernel"] is params["dense"]["kernel"]
    assert result["conv"]["bias"].dtype == np.float16
    assert quant.dequantize_params(result)["conv"]["bias"].dtype == np.float32
    size = quant.size_bytes(result)
    assert (size.indices, size.codebooks) == (8 * 14, 8 * 8 * 2)  # ceil(36 * 3 / 8) = 14
    assert size.other == 24 * 16 * 4 + 8 * 2 + params["steps"].nbytes
    assert size.total == sum(size)


def test_a_tree_without_leaves():
    with pytest.raises(UserError, match="nothing to quantize: the tree has no leaf"):
        quant.quantize_params({}, bits=4)


def test_what_is_left_alone():
    params = tree()
    specs = quant.decide(params, QuantSpec(4, minimum_size=300))
    assert list(specs) == ["dense/kernel"]
    with pytest.raises(UserError, match="unused"):
        quant.quantize_params(params, [QuantRule("unused", QuantSpec(2))])
    with pytest.raises(UserError, match="conv/kernel.*axis"):
        quant.quantize_params(params, [QuantRule("conv/kernel", QuantSpec(2, axis=4))])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite_names_the_tensor(bad):
    params = tree()
    params["dense"]["kernel"][3, 3] = bad
    with pytest.raises(UserError, match="dense/kernel"):
        quant.quantize_params(params, QuantSpec(2))


def test_too_large_for_half_precision_names_the_tensor():
    params = {"w": np.float32([[1e6, 2e6]])}
    with pytest.raises(UserError, match="w: .*float16"):
        quant.quantize_params(params, QuantSpec(1, only_smaller=False))
    single = QuantSpec(1, granularity="tensor", codebook_dtype="float32", only_smaller=False)
    kept = quant.quantize_params(params, single)
    np.testing.assert_array_equal(quant.dequantize_params(kept)["w"], params["w"])


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 0},
        {"bits": 9},
        {"bits": 2.0},
        {"bits": True},
        {"granularity": "row"},
        {"codebook_dtype": "int8"},
        {"coarse": (4,)},
        {"coarse": (2.5,)},
        {"coarse": 2},
        {"axis": "out"},
        {"axis": None},
        {"axis": 0.5},
        {"init": "random"},
        {"retention": 0.0},
        {"retention": "most"},
        {"iterations": -1},
        {"minimum_size": -1},
    ],
)
def test_bad_specs(fields):
    with pytest.raises(UserError, match=next(iter(fields))):
        QuantSpec(**{"bits": 4, **fields})


def test_bits_may_be_numpys_and_arrays_may_not():
    assert quant.as_rules({"": np.int64(4)}) == quant.as_rules(bits=4)
    for wrong in (4.0, True, np.float32(4), "4"):
        with pytest.raises(UserError, match="must be a number of bits"):
            quant.as_rules({"": wrong})


def test_frozen_dict_and_lists():
    params = flax.core.freeze({"a": [RNG.standard_normal((4, 4)).astype(np.float32)]})
    result = quant.quantize_params(params, QuantSpec(2))
    assert isinstance(result, flax.core.FrozenDict)
    assert quant.dequantize_params(result)["a"][0].shape == (4, 4)


def test_nnx_state():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            return self.b(nnx.relu(self.a(x)))

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    result = quant.quantize_params(state, [QuantRule("kernel", QuantSpec(8))])
    back = quant.dequantize_params(result)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    x = jnp.ones((1, 6))
    np.testing.assert_allclose(nnx.merge(graph, back)(x), nnx.merge(graph, state)(x), atol=1e-2)
    latents, books = quant.init_codebooks(state, QuantSpec(2))
    assert nnx.merge(graph, quant.fake_quantize(latents, books))(x).shape == (1, 2)


def test_one_and_four_devices_agree():
    params = {"w": RNG.standard_normal((64, 16)).astype(np.float32)}
    devices = mesh.make_mesh()
    assert devices.size == 4
    sharded = mesh.shard_batch(params, devices)
    spec = QuantSpec(3)
    one, four = quant.quantize_params(params, spec), quant.quantize_params(sharded, spec)
    jax.tree.map(np.testing.assert_array_equal, one, four)
    inside = jax.jit(lambda p: quant.quantize_params(p, spec))
    one_jit, four_jit = inside(params), inside(sharded)
    jax.tree.map(np.testing.assert_array_equal, quant.dequantize_params(one_jit), quant.dequantize_params(four_jit))
    spread = jax.device_put(one, mesh.replicated(devices))
    jax.tree.map(np.testing.assert_array_equal, quant.dequantize_params(spread), quant.dequantize_params(one))
    latents, books = quant.init_codebooks(params, spec)
    fake = jax.jit(quant.fake_quantize)
    np.testing.assert_array_equal(fake(latents, books)["w"], fake(mesh.shard_batch(latents, devices), books)["w"])


def test_shapes_alone():
    params = jax.tree.map(jnp.asarray, tree())
    shapes = jax.eval_shape(lambda: params)
    spec = QuantSpec(4, coarse=(2,))
    assert quant.size_bytes(quant.quantize_params(shapes, spec)) == quant.size_bytes(
        quant.quantize_params(params, spec)
    )


def test_importance_moves_the_centroids():
    values = RNG.standard_normal((200, 2)).astype(np.float32)
    importance = np.where(values > 1, 100, 1).astype(np.float32)
    plain = quant.dequantize_params(quant.quantize_params({"w": values}, QuantSpec(2)))["w"]
    found = quant.dequantize_params(quant.quantize_params({"w": values}, QuantSpec(2), importance={"w": importance}))[
        "w"
    ]
    assert np.sum(importance * (found - values) ** 2) < 0.8 * np.sum(importance * (plain - values) ** 2)
    with pytest.raises(UserError, match="elsewhere"):
        quant.quantize_params({"w": values}, QuantSpec(2), importance={"elsewhere": importance})
    for levels in ("kmeans", "uniform"):
        with pytest.raises(UserError, match="w: weights of the error"):
            quant.quantize_params({"w": values}, QuantSpec(2, levels=levels), importance={"w": -importance})


def test_partition_lets_a_packed_model_be_differentiated():
    result = quant.quantize_params(tree(), QuantSpec(2))
    floating, rest = quant.partition(result)
    assert all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(floating))
    assert jax.tree.structure(quant.combine(floating, rest)) == jax.tree.structure(result)

    def loss(floating):
        return jnp.sum(quant.dequantize_params(quant.combine(floating, rest))["dense"]["kernel"])

    gradient = jax.grad(loss)(floating)["dense"]["kernel"].codebook
    indices = np.asarray(quant.indices_of(result["dense"]["kernel"]))
    counts = [[np.sum(indices[:, channel] == i) for i in range(4)] for channel in range(16)]
    np.testing.assert_array_equal(gradient, counts)


def test_validate_refuses_what_does_not_fit():
    import dataclasses

    tensor = quant.quantize_params(tree(), QuantSpec(3))["dense"]["kernel"]
    for change in ({"bits": 4}, {"shape": (24, 15)}, {"axis": 0}, {"packed": tensor.packed[:, 1:]}, {"axis": 7}):
        with pytest.raises(ValueError):
            dataclasses.replace(tensor, **change).validate()
