"""What users of jax and Flax do with trees of parameters: right results or an error, never wrong numbers in silence."""

from functools import partial

import flax.jax_utils
import flax.linen as nn
import flax.serialization
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from kmq_jax import quant
from kmq_jax.core import mesh
from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import named_leaves
from kmq_jax.quant import QuantRule, QuantSpec

RNG = np.random.default_rng(3)
KERNEL = RNG.standard_normal((40, 8)).astype(np.float32)
TREE = {"kernel": KERNEL, "bias": np.ones(8, np.float32)}
SPECS = [QuantSpec(3), QuantSpec(4, coarse=(2,)), QuantSpec(2, granularity="tensor")]


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("spec", SPECS)
def test_a_batch_of_trees_dequantizes_to_a_batch(spec):
    packed = quant.quantize_params(TREE, spec)
    plain = quant.dequantize_params(packed)
    batch = jax.tree.map(lambda x: jnp.stack([x, x]), packed)
    for found in (
        quant.dequantize_params(flax.jax_utils.replicate(packed, jax.local_devices()[:1])),
        jax.tree.map(lambda x: x[None], plain),
        jax.vmap(quant.dequantize_params)(jax.tree.map(lambda x: x[None], packed)),
        jax.vmap(lambda p: quant.dequantize_params(quant.quantize_params(p, spec)))(
            jax.tree.map(lambda x: jnp.asarray(x)[None], TREE)
        ),
    ):
        assert found["kernel"].shape == (1, 40, 8)
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), jax.tree.map(lambda x: x[0], found), plain
        )
    for i in range(2):
        equal(jax.tree.map(lambda x, i=i: x[i], quant.dequantize_params(batch)), plain)
    equal(quant.indices_of(batch["kernel"])[1], quant.indices_of(packed["kernel"]))


def test_known_weights_are_quantized_while_a_function_is_traced():
    def packed():
        return quant.quantize_params(TREE, bits=3), quant.init_codebooks(TREE, bits=2)

    equal(jax.jit(packed)(), packed())
    weights = jax.tree.map(jnp.asarray, TREE)  # of jax they are known as well
    equal(jax.jit(lambda: quant.quantize_params(weights, bits=3))(), packed()[0])


def test_arrays_that_do_not_fit_are_refused():
    packed = quant.quantize_params(TREE, QuantSpec(3))["kernel"]
    for arrays in (
        {"packed": packed.packed[None]},
        {"packed": packed.packed[:2], "codebook": packed.codebook[:2]},
        {"packed": packed.packed[:, :3]},
        {"codebook": packed.codebook[:, :4]},
    ):
        with pytest.raises(ValueError, match=r"shape|columns"):
            quant.dequantize_params([jax.tree.map(lambda x: x, _replaced(packed, **arrays))])


def _replaced(tensor, **arrays):
    import dataclasses

    return dataclasses.replace(tensor, **arrays)


def test_many_devices():
    packed = quant.quantize_params(TREE, QuantSpec(3))
    plain, devices = quant.dequantize_params(packed), mesh.make_mesh()
    whole = jax.shard_map(quant.dequantize_params, mesh=devices, in_specs=P(), out_specs=P())
    equal(whole(packed), plain)
    with pytest.raises(ValueError, match="shape"):  # a piece of the channels
        jax.shard_map(quant.dequantize_params, mesh=devices, in_specs=P("data"), out_specs=P("data"))(packed)
    one = mesh.make_mesh(jax.devices()[:1])
    equal(jax.shard_map(quant.dequantize_params, mesh=one, in_specs=P("data"), out_specs=P("data"))(packed), plain)
    copies = flax.jax_utils.replicate(packed)
    equal(jax.tree.map(lambda x: x[3], jax.pmap(quant.dequantize_params)(copies)), plain)
    equal(jax.tree.map(lambda x: x[3], quant.dequantize_params(copies)), plain)


def test_the_tensor_itself():
    tensor = quant.quantize_params(TREE, QuantSpec(4, coarse=(2, 3)))["kernel"]
    assert repr(tensor) == "CodebookTensor(shape=(40, 8), bits=4, coarse=(2, 3), axis=1, float32)"
    assert tensor.dtype == np.float32 and tensor.nbytes == quant.size_bytes([tensor]).total
    np.testing.assert_array_equal(np.asarray(tensor), tensor.dequantize())
    assert np.asarray(tensor, np.float16).dtype == np.float16
    assert tensor.dequantize(2, jnp.float16).dtype == np.float16
    assert len(np.unique(np.asarray(tensor.dequantize(2))[:, 0])) == 4
    with pytest.raises(UserError, match="5 bits"):
        tensor.dequantize(5)


@pytest.mark.parametrize("scale", [1e-8, 1e-7])
def test_centroids_too_small_for_half_precision_are_refused(scale):
    params = {"kernel": KERNEL * np.float32(scale)}
    for run in (quant.quantize_params, quant.init_codebooks):
        with pytest.raises(UserError, match="kernel: .*too small for float16"):
            run(params, QuantSpec(8, only_smaller=False))
    with pytest.raises(UserError, match="bias: .*too small"):
        quant.quantize_params({"bias": params["kernel"][0]}, {"bias": 16})


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-80, 1.0, 2.0**80, 2.0**100])
def test_any_magnitude_in_single_precision(scale):
    for spec in (QuantSpec(3, codebook_dtype="float32"), QuantSpec(3, coarse=(2,), codebook_dtype="float32")):
        found = quant.dequantize_params(quant.quantize_params({"w": KERNEL * np.float32(scale)}, spec))["w"]
        plain = quant.dequantize_params(quant.quantize_params({"w": KERNEL}, spec))["w"]
        np.testing.assert_allclose(np.float64(found) / scale, plain, rtol=2e-2, atol=1e-2)
        begun = quant.pack(*quant.init_codebooks({"w": KERNEL * np.float32(scale)}, spec))
        np.testing.assert_allclose(np.float64(quant.dequantize_params(begun)["w"]) / scale, plain, rtol=2e-2, atol=1e-2)


def test_tensors_that_would_not_shrink_are_kept_unless_the_rule_says_otherwise():
    params = {"small": {"kernel": RNG.standard_normal((9, 32)).astype(np.float32)}, "kernel": np.ones((600, 8), "f4")}
    grown = quant.quantize_params(params, QuantSpec(8, only_smaller=False))
    assert quant.size_bytes(grown["small"]).total > quant.size_bytes(params["small"]).total
    for rules in ({"bits": 8}, {"rules": QuantSpec(8)}, {"rules": {"kernel$": 8}}):
        kept = quant.quantize_params(params, **rules)
        assert kept["small"]["kernel"] is params["small"]["kernel"] and quant.is_codebook_tensor(kept["kernel"])


def test_what_would_not_shrink_costs_a_budget_its_own_bytes_and_no_error():
    # 12 weights a channel shrink at 2 bits (8 + 3 bytes of 48) and not at 5 (64 + 8); 2 weights never do.
    params = {"a": {"kernel": np.ones((12, 4), "f4")}, "b": {"kernel": np.ones((2, 4), "f4")}}
    errors, sizes = quant.distortions(params, QuantSpec(8), all_bits=(2, 5))
    assert sizes == {"a/kernel": {2: 4 * 11, 5: 4 * 48}} and errors["a/kernel"][5] == 0
    kept = quant.quantize_params(params, quant.rules_of({"a/kernel": 5}, QuantSpec(8)))
    assert kept["a"]["kernel"] is params["a"]["kernel"]


def test_nested_codebooks_grow_wherever_the_coarse_network_holds_a_tensor():
    # 11 weights a channel shrink at 2 bits, not at 2 and 4: what is packed goes on, what is not stays.
    params = {"a": {"kernel": RNG.standard_normal((11, 4)).astype("f4")}, "b": {"kernel": np.ones((2, 4), "f4")}}
    coarse = quant.quantize_params(params, bits=2)
    latents, books = quant.grow_codebooks(params, coarse, QuantSpec(4, coarse=(2,)))
    assert set(books) == {"a/kernel"} and latents["b"]["kernel"] is params["b"]["kernel"]


@pytest.mark.parametrize(
    ("shape", "dtype", "bits", "shrinks"),
    [  # a channel's bytes as they are, and packed: a float16 codebook and the indices, up to whole bytes
        ((9, 4), "float32", 4, False),  # 36; 32 + 5
        ((10, 4), "float32", 4, True),  # 40; 32 + 5
        ((9, 4), "float16", 2, True),  # 18; 8 + 3
        ((5, 4), "float16", 2, False),  # 10; 8 + 2: no smaller
        ((6, 4), "float16", 2, True),  # 12; 8 + 2
        ((2, 4), "float32", 2, False),  # 8; 8 + 1
    ],
)
def test_a_tensor_is_packed_only_if_that_is_smaller(shape, dtype, bits, shrinks):
    params = {"kernel": RNG.standard_normal(shape).astype(dtype)}
    packed = quant.quantize_params(params, QuantSpec(bits, only_smaller=True))
    assert quant.is_codebook_tensor(packed["kernel"]) == shrinks
    assert quant.size_bytes(packed).total <= quant.size_bytes(params).total


def test_a_tensor_whose_centroids_need_single_precision_is_packed_only_if_that_is_smaller():
    kernel = RNG.standard_normal((14, 4)).astype(np.float32) * np.float32([1, 1, 1, 1e-8])  # 56 bytes a channel
    for bits, shrinks in ((3, True), (4, False)):  # 32 + 6; 64 + 7, where float16 would have taken 32 + 7
        packed = quant.quantize_params({"kernel": kernel}, QuantSpec(bits, only_smaller=True))
        assert quant.is_codebook_tensor(packed["kernel"]) == shrinks
        assert quant.size_bytes(packed).total <= kernel.nbytes


def test_stacks_of_layers_keep_biases_and_scales():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.LayerNorm()(nn.Dense(8)(x)), None

    stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    params = stack.init(jax.random.key(0), jnp.ones((2, 8)), None)
    names = set(quant.decide(params, bits=4))
    assert len(names) == 1 and names.pop().endswith("/kernel")
    assert quant.dequantize_params(quant.quantize_params(params, bits=4))["params"]["Dense_0"]["kernel"].shape == (
        3,
        8,
        8,
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_types_stay(dtype):
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), TREE) | {"head": jnp.ones((4, 4), dtype), "step": 3}
    packed = quant.quantize_params(params, {"kernel": 4, "head": None})
    found = quant.dequantize_params(packed)
    assert [found[k].dtype for k in ("kernel", "bias", "head")] == [jnp.dtype(dtype)] * 3 and found["step"] == 3
    assert quant.dequantize_params(packed, dtype=jnp.float32)["bias"].dtype == np.float32
    latents, books = quant.init_codebooks(params, {"kernel": 4})
    assert quant.pack(latents, books)["kernel"].dtype == jnp.dtype(dtype)


def test_half_precision_is_undone():
    params = TREE | {"other": KERNEL}
    packed = quant.quantize_params(params, {"other": 4, "bias|kernel": 16})
    assert packed["kernel"].dtype == np.float16
    assert quant.dequantize_params(packed)["kernel"].dtype == np.float32
    low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    assert quant.quantize_params(low, {"other": 4, "bias|kernel": 16})["kernel"].dtype == jnp.bfloat16
    least = {"kernel": jnp.asarray(KERNEL, jnp.float8_e4m3fn)}
    assert quant.quantize_params(least, bits=16)["kernel"].dtype == jnp.float8_e4m3fn  # float16 would be twice as large


@pytest.mark.parametrize("spec", SPECS)
def test_flax_bytes(spec):
    packed = quant.quantize_params(TREE, spec)
    empty = jax.tree.map(jnp.zeros_like, packed)
    equal(flax.serialization.from_bytes(empty, flax.serialization.to_bytes(packed)), packed)
    trained = quant.init_codebooks(TREE, spec, cached=True)
    equal(
        flax.serialization.from_bytes(jax.tree.map(jnp.zeros_like, trained), flax.serialization.to_bytes(trained)),
        trained,
    )


def test_export():
    packed = quant.quantize_params(TREE, QuantSpec(4, coarse=(2,)))
    exported = jax.export.export(jax.jit(lambda tree: quant.dequantize_params(tree, 2)))(packed)
    equal(jax.export.deserialize(exported.serialize()).call(packed), quant.dequantize_params(packed, 2))
    latents, books = quant.init_codebooks(TREE, bits=2)
    exported = jax.export.export(jax.jit(quant.pack))(latents, books)
    found = jax.export.deserialize(exported.serialize()).call(latents, books)
    assert repr(found["kernel"]) == "CodebookTensor(shape=(40, 8), bits=2, axis=1, float32)"
    equal(found, quant.pack(latents, books))


def test_orbax_with_and_without_a_target(tmp_path):
    packed = quant.quantize_params(TREE, QuantSpec(4, coarse=(2,)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "tree", packed)
        checkpointer.wait_until_finished()
        equal(checkpointer.restore(tmp_path / "tree", jax.eval_shape(lambda: packed)), packed)
        plain = checkpointer.restore(tmp_path / "tree")
    np.testing.assert_array_equal(plain["kernel"]["packed"], packed["kernel"].packed)
    assert set(plain["kernel"]) == {"packed", "codebook", "coarse"}
    with pytest.raises(UserError, match="kernel holds .* restore the checkpoint with a target"):
        quant.dequantize_params(plain)


def test_rules_for_linen_fit_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)

    state = nnx.state(Net(nnx.Rngs(0)))
    assert [name for name, _ in named_leaves(state)] == ["a/bias", "a/kernel", "b/bias", "b/kernel"]
    packed = quant.quantize_params(state, {"^a/kernel$": 2, "kernel$": 3})
    found = dict(named_leaves(packed, quant.is_codebook_tensor))
    assert (found["a/kernel"].bits, found["b/kernel"].bits) == (2, 3)
    assert jax.tree.structure(quant.dequantize_params(packed)) == jax.tree.structure(state)


def test_strict_types():
    def all_of_it(tree, spec):
        packed = [quant.quantize_params(tree, spec, importance=w) for w in (None, {"kernel": jnp.ones_like(KERNEL)})]
        restored = [quant.dequantize_params(one) for one in packed]
        latents, books = quant.init_codebooks(tree, spec)
        books = quant.lloyd_update(latents, books, unused_rate=0.2)
        slopes = jax.grad(lambda p, b=books: jnp.sum(quant.fake_quantize(p, b, clip=1.5)["kernel"]))(latents)
        return restored, slopes, quant.pack(latents, quant.reassign(latents, books))

    with jax.numpy_dtype_promotion("strict"):
        for spec in (*SPECS, QuantSpec(3, init="equal-mass"), QuantSpec(3, init="kmeans++"), QuantSpec(5)):
            jax.eval_shape(partial(all_of_it, spec=spec), TREE)  # types are checked in tracing
        all_of_it(TREE, SPECS[0])  # what is known lies on the host, and is sorted there
        quant.kmqat_codebook(KERNEL.T, 2)
        quant.grow_codebooks(TREE, quant.quantize_params(TREE, bits=2), {"kernel": QuantSpec(4, coarse=(2, 3))})


def test_forms_of_rules():
    spec, pattern = QuantSpec(4), "kernel$"
    forms = (spec, {pattern: 4}, {pattern: spec}, [QuantRule(pattern, spec)])
    first, *others = (quant.quantize_params(TREE, rules) for rules in forms)
    for other in (*others, quant.quantize_params(TREE, bits=4)):
        equal(first, other)
    assert quant.quantize_params(TREE, {"kernel": None})["kernel"] is KERNEL
    for bad in ({"kernel": "4"}, {"kernel": True}, ["kernel"], "kernel"):
        with pytest.raises(UserError, match="must be"):
            quant.quantize_params(TREE, bad)
    for both in ({}, {"rules": spec, "bits": 4}):
        with pytest.raises(UserError, match="either rules"):
            quant.quantize_params(TREE, **both)


@pytest.mark.parametrize(
    "spec", [QuantSpec(8, only_smaller=False), QuantSpec(4, coarse=(2, 3)), QuantSpec(2, levels="uniform")]
)
def test_one_channel_too_small_for_half_precision_is_kept(spec):
    params = {"kernel": KERNEL.copy(), "other": KERNEL}
    params["kernel"][:, 3] *= np.float32(1e-8)
    packed = quant.quantize_params(params, spec)
    latents, books = quant.init_codebooks(params, spec)
    for tree in (packed, quant.pack(latents, books)):
        assert tree["kernel"].codebook.dtype == np.float32 and tree["other"].codebook.dtype == np.float16
        small, alone = (quant.dequantize_params(tree)[name][:, 3] for name in ("kernel", "other"))
        np.testing.assert_allclose(small, np.float32(1e-8) * alone, rtol=2e-3, atol=1e-13)
