"""Integer activations: ranges, the emulation in JAX, and what ONNX Runtime makes of the exported file."""

import collections
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest

from kmq_jax import quant
from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import named_leaves
from kmq_jax.models import onnx_export, registry
from kmq_jax.models.protocol import Part, SpeakerNetwork
from kmq_jax.models.speaker_model import SpeakerModel, at_bits, embed_all, load_model, save_model
from kmq_jax.nn import integers
from kmq_jax.nn.layers import Conv
from kmq_jax.ptq import activations, quantize

DATA = "synthetic:train?speakers=4&utterances=4"
SETTINGS = {"width": 8, "blocks": [1, 1, 1, 1], "embedding_size": 16}
CONVOLUTIONS = 1 + 2 * 4 + 3  # stem, four blocks of two, three shortcuts


def reference_of(norm):
    network = registry.build("wespeaker_resnet34", **SETTINGS, norm=norm)
    return SpeakerModel(
        "wespeaker_resnet34", {**SETTINGS, "norm": norm}, "wespeaker", registry.initialize(network, jax.random.key(1))
    )


def quantized_of(reference, bits):
    """Not fitted, which takes long: the steps alone."""
    spec = quant.QuantSpec(bits, only_smaller=False)
    params = quant.quantize_params(reference.variables["params"], {"/kernel$": spec})
    packed = dataclasses.replace(reference, variables={**reference.variables, "params": params})
    return activations.with_ranges(packed, activations.measure(reference, features_of(reference.network())))


@pytest.fixture(scope="module")
def reference():
    """A network in full precision."""
    return reference_of("bias")


FITTED = 2  # convolutions of one shape: each shape takes seconds to compile


@pytest.fixture(scope="module")
def four(reference):
    """Its first stage fitted at 4 bits, which can be read at 2, with 8-bit activations."""
    rules = [quant.QuantRule("stage1/.*/kernel$", quant.QuantSpec(4, coarse=(2,), only_smaller=False))]
    return quantize.quantize_model(reference, rules, DATA, crops=4, activations=8)


def session_of(model, tmp_path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx")
    return session, collections.Counter(node.op_type for node in optimized.graph.node)


def cosine(a, b):
    return float(np.mean(np.sum(a * b, 1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)))


def features_of(network):
    return np.random.default_rng(2).normal(size=(3, 90, network.features)).astype(np.float32)


def test_ranges_hold_zero_and_all_that_was_seen(reference):
    features = features_of(reference.network())
    seen = {}

    def watch(place, x):
        seen[place] = np.asarray(x)
        return x

    with integers.watching(watch):
        reference.network().apply(reference.variables, features)
    found = activations.measure(reference, features)
    assert found.keys() == seen.keys()
    for place, (step, zero) in found.items():
        low, high = min(seen[place].min(), 0), max(seen[place].max(), 0)
        assert step * 255 == pytest.approx(high - low, rel=1e-5)
        assert zero == round(-low / step)


@pytest.fixture(scope="module")
def two(reference):
    """The whole network at 2 bits."""
    return quantized_of(reference, 2)


class Twice(SpeakerNetwork):
    """A convolution that runs twice, the second time on larger values."""

    features: int = 1
    embedding_size: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, features, lengths=None, train=False):
        conv = Conv(1, 1, kernel_init=nn.initializers.constant(10.0), name="conv")
        return conv(conv(-features) / -20)[:, 0]

    @nn.nowrap
    def parts(self):
        return (Part("conv", "conv"),)


def test_parameters_without_axes_are_passed_over(reference):
    params = quant.quantize_params(reference.variables["params"], {"^stem/conv/kernel$": 2, "": None})
    variables = {**reference.variables, "params": {**params, "temperature": jnp.float32(2)}}
    ranges = {"stem/conv/input": (0.1, 5.0)}
    found = activations.with_ranges(dataclasses.replace(reference, variables=variables), ranges)
    assert set(found.variables[integers.COLLECTION]["stem"]["conv"]) == {"input", "kernel"}


def test_a_range_holds_what_all_runs_of_a_module_see():
    registry.register("integers_twice", Twice)
    variables = Twice().init(jax.random.key(0), np.ones((1, 3, 1)))
    reference = SpeakerModel("integers_twice", {}, "kiwano", jax.device_get(variables))
    # First -3 to -1, then half of 3 to 1.
    found = activations.measure(reference, jnp.array([[[1.0], [2.0], [3.0]]]))
    assert found == {"conv/input": integers.grid_of(-3.0, 1.5)}
    with pytest.raises(UserError, match="conv/input are not finite"):
        activations.measure(reference, jnp.array([[[jnp.nan]]]))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_onnx_runtime_computes_with_integers_what_jax_emulates(bits, reference, two, tmp_path):
    model = two if bits == 2 else quantized_of(reference, bits)
    network = model.network()
    session, operators = session_of(onnx_export.build(network, model.variables), tmp_path)
    assert operators["QLinearConv"] == CONVOLUTIONS
    assert operators["Conv"] == 0
    assert operators["QLinearAdd"] == 3  # all blocks but the last, whose sum is pooled
    features = features_of(network)
    ours = np.asarray(network.apply(quant.dequantize_params(model.variables), features))
    assert cosine(session.run(None, {"feats": features})[0], ours) > 0.998
    without = {key: tree for key, tree in model.variables.items() if key != integers.COLLECTION}
    floating = np.asarray(network.apply(quant.dequantize_params(without), features))
    assert 1e-6 < 1 - cosine(floating, ours) < 0.05  # it does round, and not far


@pytest.mark.parametrize("indices, opset", [("uint4", None), ("smallest", 18)])
def test_forms_for_other_runtimes_give_the_same(indices, opset, two, tmp_path):
    network = two.network()
    features = features_of(network)
    built = onnx_export.build(network, two.variables, opset=opset, indices=indices)
    assert built.opset_import[0].version == (opset or 21)
    session, operators = session_of(built, tmp_path)
    assert operators["QLinearConv"] == CONVOLUTIONS
    expected, _ = session_of(onnx_export.build(network, two.variables), tmp_path)
    np.testing.assert_array_equal(*(s.run(None, {"feats": features})[0] for s in (session, expected)))


def test_centroids_are_whole_steps_and_the_file_keeps_everything(four, tmp_path):
    params = dict(named_leaves(four.variables["params"], quant.is_codebook_tensor))
    steps = dict(named_leaves(four.variables[integers.COLLECTION]))
    kernels = [name for name in steps if name.endswith("/kernel")]
    assert len(kernels) == FITTED
    for name in kernels:
        whole = np.asarray(params[name].codebook, np.float32) / np.asarray(steps[name])[:, None]
        assert np.abs(whole - np.round(whole)).max() < 0.2  # what half precision leaves of it
        assert np.abs(whole).max() < 127.2
    save_model(tmp_path / "a.kmq", four)
    again = load_model(tmp_path / "a.kmq")
    assert all(map(np.array_equal, jax.tree.leaves(again.variables), jax.tree.leaves(four.variables)))


def test_folded_normalisation(tmp_path):
    model = quantized_of(reference_of("batch"), 4)
    network = model.network()
    session, operators = session_of(onnx_export.build(network, model.variables), tmp_path)
    assert operators["QLinearConv"] == CONVOLUTIONS
    features = features_of(network)
    ours = np.asarray(network.apply(quant.dequantize_params(model.variables), features))
    assert cosine(session.run(None, {"feats": features})[0], ours) > 0.998


def test_nested_codebooks_have_steps_of_their_own(four, tmp_path):
    two, most = at_bits(four, 2), at_bits(four, None)
    name = f"{integers.COLLECTION}/stage1/block0/conv1/kernel"
    assert not np.array_equal(*(dict(named_leaves(m.variables))[name] for m in (two, most)))
    network, features = two.network(), features_of(two.network())
    session, operators = session_of(onnx_export.build(network, two.variables, bits=2), tmp_path)
    assert operators["QLinearConv"] == FITTED + 3  # ONNX Runtime makes integers of the shortcuts, too
    ours = np.asarray(network.apply(quant.dequantize_params(two.variables, 2), features))
    assert cosine(session.run(None, {"feats": features})[0], ours) > 0.998


def test_emulation_leaves_padding_alone(two):
    from kmq_jax.data import source

    table = source.open_source("synthetic:dev?speakers=2&utterances=2")
    together, alone = embed_all(two, table), np.concatenate([embed_all(two, table.select([i])) for i in range(4)])
    assert cosine(together, alone) > 0.998


def test_gradients_pass_straight_through_inside_the_range():
    grid = jnp.array([0.1, 5.0])
    slopes = jax.vmap(jax.grad(lambda x: integers.round_activations(x, grid)))(jnp.array([-9.0, 0.33, 24.0, 99.0]))
    assert slopes.tolist() == [0, 1, 1, 0]
    slope = jax.grad(lambda w: integers.round_kernel(w, jnp.array([0.1])).sum())(jnp.array([[0.33]]))
    assert slope.tolist() == [[1]]


def test_mistakes():
    reference = reference_of("bias")
    rules = [quant.QuantRule("/kernel$", quant.QuantSpec(4))]
    with pytest.raises(UserError, match="needs `data`"):
        quantize.quantize_model(reference, rules, activations=8)
    kept = [quant.QuantRule("conv[12]?/kernel$", None), *rules]
    with pytest.raises(UserError, match="none is"):
        quantize.quantize_model(reference, kept, DATA, crops=2, activations=8)
