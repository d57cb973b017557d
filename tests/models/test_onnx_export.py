"""Exported files run by ONNX Runtime against our own networks, float and quantized, and what the files weigh."""

import dataclasses

import jax
import numpy as np
import originals
import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import map_named
from kmq_jax.models import registry
from kmq_jax.quant.transform import size_bytes
from kmq_jax.quant.types import CodebookTensor, is_codebook_tensor

onnx = pytest.importorskip("onnx", reason="the exporter needs onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="exported files are run by ONNX Runtime")

from kmq_jax.models import onnx_export  # noqa: E402

SMALL = {"blocks": [1, 1, 1, 1], "width": 4, "embedding_size": 6}
NETWORKS = {
    "resnet36": SMALL,
    "resnet200": {**SMALL, "activation": "silu", "last_taps": 1},
    "resnet50": {**SMALL, "activation": "relu", "last_taps": 3, "blocks": [1, 2, 1, 1]},
    "wespeaker_resnet34": {**SMALL, "features": 21},
    "wespeaker_resnet50": {**SMALL, "features": 16},
}


def variables_of(network):
    """Made-up weights and statistics; nothing is left at 0 or 1."""

    def draw(name, leaf):
        u = originals.uniform(name, leaf.shape).astype(np.float32)
        if leaf.ndim > 1:
            return (u - 0.5) * np.float32(np.sqrt(12 / np.prod(leaf.shape[:-1])))
        return 0.5 + u if name.endswith(("scale", "var")) else u - 0.5

    return map_named(draw, registry.shapes(network))


def quantized(network, bits, axis=-1, dtype=np.float16, coarse=()):
    """Kernels of random indices and centroids, and the same network with the plain arrays that they stand for.

    Returns:
        Variables, and a dict from each width to the plain variables.
    """
    variables = variables_of(network)
    rng = np.random.default_rng(bits)
    plain = {width: {} for width in (*coarse, bits)}

    def draw(name, leaf):
        if not name.endswith("kernel"):
            for tensors in plain.values():
                tensors[name] = leaf
            return leaf
        place = None if axis is None else axis % leaf.ndim
        groups = 1 if place is None else leaf.shape[place]
        rows = rng.integers(0, 1 << bits, (groups, leaf.size // groups))
        stream = ((rows[..., None] >> np.arange(bits)) & 1).reshape(groups, -1).astype(np.uint8)
        scale = 1 / np.sqrt(leaf.size / leaf.shape[-1])
        codebooks = []
        for width in (*coarse, bits):
            codebook = np.sort(rng.normal(scale=scale, size=(groups, 1 << width))).astype(dtype)
            values = np.take_along_axis(codebook.astype(np.float32), rows >> (bits - width), axis=1)
            if place is None:
                plain[width][name] = values.reshape(leaf.shape)
            else:
                moved = np.moveaxis(np.empty(leaf.shape), place, 0).shape
                plain[width][name] = np.moveaxis(values.reshape(moved), 0, place)
            codebooks.append(codebook)
        packed = np.packbits(stream, axis=1, bitorder="little")
        tensor = CodebookTensor(codebooks[-1], packed, tuple(codebooks[:-1]), tuple(leaf.shape), bits, place)
        tensor.validate()
        return tensor

    params = map_named(draw, variables["params"])
    whole = {
        width: {**variables, "params": map_named(lambda name, _, t=tensors: t[name], variables["params"])}
        for width, tensors in plain.items()
    }
    return {**variables, "params": params}, whole


def run(model, features):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(["embs"], {"feats": features})[0]


def check_quantized(network, model, plain):
    """The plain network's export, which other tests compare with ours, must give the same."""
    features = originals.features(2, 17, network.features)
    want = run(onnx_export.build(network, plain), features)
    assert np.abs(want).max() > 0.05
    np.testing.assert_allclose(run(model, features), want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("norm", ["batch", "bias"])
@pytest.mark.parametrize("name", NETWORKS)
def test_float_networks(name, norm):
    network = registry.build(name, **NETWORKS[name], norm=norm)
    variables = variables_of(network)
    model = onnx_export.build(network, variables)
    assert model.opset_import[0].version == 18
    features = originals.features(3, 30, network.features)
    ours = np.asarray(jax.jit(network.apply)(variables, features))
    assert np.abs(ours).max() > 0.05
    np.testing.assert_allclose(run(model, features), ours, rtol=0, atol=2e-5)
    # Frames and batch are free: one utterance alone, and a shorter one.
    np.testing.assert_allclose(run(model, features[1:2]), ours[1:2], rtol=0, atol=2e-5)
    assert run(model, features[:2, :9]).shape == (2, network.embedding_size)


def test_normalisation_after_a_layer_is_folded():
    network = registry.build("wespeaker_resnet34", **SMALL, features=16)
    model = onnx_export.build(network, variables_of(network))
    operators = [node.op_type for node in model.graph.node]
    assert "BatchNormalization" not in operators and "Mul" in operators  # one Mul: the square in the pooling
    assert operators.count("Mul") == 1
    assert operators.count("Conv") == 1 + 2 * 4 + 3


@pytest.mark.parametrize(
    ("bits", "opset", "kind"),
    [
        (4, 21, "UINT4"),
        (2, 25, "UINT2"),
        (8, 18, "UINT8"),
        (3, 18, "UINT8"),
        (1, 18, "UINT8"),
        (5, 18, "UINT8"),
        (6, 18, "UINT8"),
        (7, 18, "UINT8"),
    ],
)
def test_quantized_weights_stay_packed(bits, opset, kind):
    network = registry.build("resnet200", **NETWORKS["resnet200"])
    variables, plain = quantized(network, bits)
    model = onnx_export.build(network, variables)
    assert model.opset_import[0].version == opset
    indices = [tensor for tensor in model.graph.initializer if tensor.name.endswith(".indices")]
    assert len(indices) == sum(is_codebook_tensor(x) for x in jax.tree.leaves(variables, is_leaf=is_codebook_tensor))
    assert {tensor.data_type for tensor in indices} == {getattr(onnx.TensorProto, kind)}
    check_quantized(network, model, plain[bits])


@pytest.mark.parametrize("bits", range(2, 7))
def test_an_older_operator_set_keeps_the_size(bits):
    network = registry.build("wespeaker_resnet34", **SMALL, features=16)
    variables, plain = quantized(network, bits)
    model = onnx_export.build(network, variables, opset=18)
    check_quantized(network, model, plain[bits])

    def size(model):
        return sum(len(t.raw_data) for t in model.graph.initializer if t.name.endswith(".indices"))

    assert size(model) < 1.05 * size(onnx_export.build(network, variables))


@pytest.mark.parametrize("bits", range(2, 7))
def test_indices_are_unpacked_in_numbers_of_16_bits(bits):
    """OpenVINO computes int64 in 32 bits: eight indices of 4 bits in one integer gave other weights there."""
    network = registry.build("wespeaker_resnet34", **SMALL, features=16)
    model = onnx_export.build(network, quantized(network, bits)[0], opset=18)
    made = {node.output[0]: node for node in model.graph.node}
    last = [node for node in model.graph.node if node.op_type == "Mod"]
    assert last
    waiting, steps = [name for node in last for name in node.input], set()
    while waiting:
        name = waiting.pop()
        if name in made and name not in steps:
            steps.add(name)
            waiting += made[name].input
    for name in steps:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    values = session.run(sorted(steps), {"feats": np.zeros((1, 32, 16), np.float32)})
    assert all(value.min() >= 0 and value.max() < 1 << 16 for value in values)


@pytest.mark.parametrize(("axis", "bits"), [(None, 3), (None, 4), (-2, 2), (0, 3)])
def test_other_groupings(axis, bits):
    network = registry.build("resnet36", **SMALL)
    variables, plain = quantized(network, bits, axis, np.float32)
    check_quantized(network, onnx_export.build(network, variables), plain[bits])


def test_mixed_widths_and_half_precision():
    network = registry.build("resnet36", **SMALL)
    (two, plain_two), (three, plain_three) = (quantized(network, bits) for bits in (2, 3))

    def mix(name, two, three, plain=None):
        if name.startswith("stage1"):
            return two
        return np.float16(plain) if plain is not None and name.startswith("head/linear/kernel") else three

    dense = plain_three[3]["params"]
    params = map_named(mix, two["params"], three["params"], dense, is_leaf=is_codebook_tensor)
    model = onnx_export.build(network, {**two, "params": params})
    want = map_named(mix, plain_two[2]["params"], dense)
    check_quantized(network, model, {**two, "params": want})
    halves = [t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16]
    assert "head/linear/kernel" in halves


def test_nested_codebooks_at_each_width():
    network = registry.build("wespeaker_resnet34", **SMALL, features=16)
    variables, plain = quantized(network, 4, coarse=(2, 3))
    for bits in (2, 3, 4):
        check_quantized(network, onnx_export.build(network, variables, bits=bits), plain[bits])
    with pytest.raises(UserError, match="no codebook of 1 bits"):
        onnx_export.build(network, variables, bits=1)


def test_the_file_is_as_small_as_the_packed_model(tmp_path):
    """Beyond indices, codebooks and biases a file holds names and the graph: some hundred bytes a tensor."""
    network = registry.build("wespeaker_resnet34", width=32, norm="bias")
    variables, _ = quantized(network, 2)
    onnx_export.export(tmp_path / "model.onnx", network, variables)
    size = size_bytes(variables["params"])
    assert size.total < (tmp_path / "model.onnx").stat().st_size < 1.05 * size.total


def test_batches_of_any_shape_and_properties():
    network = registry.build("wespeaker_resnet34", **SMALL, features=16)
    model = onnx_export.build(network, variables_of(network), {"sample_rate": "16000"})
    assert {p.key: p.value for p in model.metadata_props} == {"sample_rate": "16000"}
    feats, embs = model.graph.input[0], model.graph.output[0]
    assert [d.dim_param or d.dim_value for d in feats.type.tensor_type.shape.dim] == ["B", "T", 16]
    assert [d.dim_param or d.dim_value for d in embs.type.tensor_type.shape.dim] == ["B", 6]


def test_mistakes(monkeypatch, tmp_path):
    network = registry.build("wespeaker_resnet34", **SMALL, features=16)
    with pytest.raises(UserError, match=r"opset \(=9\) must be 18 to"):
        onnx_export.build(network, variables_of(network), opset=9)
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(UserError, match="pip install onnx"):
        onnx_export.export(tmp_path / "m.onnx", network, variables_of(network))
    assert not (tmp_path / "m.onnx").exists()


def test_unknown_activations_are_refused():
    network = registry.build("resnet50", **SMALL)
    odd = dataclasses.replace(network, block_options=(("activation", np.tanh), ("last_taps", 1)))
    with pytest.raises(UserError, match="has no ONNX form"):
        onnx_export.build(odd, variables_of(network))
