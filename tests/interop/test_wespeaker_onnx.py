"""WeSpeaker's ONNX files: made-up ones in PyTorch's form of the graph, what is refused, and the real one."""

import commands
import jax
import numpy as np
import originals
import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import named_leaves
from kmq_jax.interop import onnx_network, pretrained
from kmq_jax.models import registry, speaker_model

onnx = pytest.importorskip("onnx", reason="ONNX files need onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402


class Network:
    """A tiny WeSpeaker ResNet as torch.onnx exports it: names of nodes and tensors, order, and pooling subgraph.

    The form is that of the published voxceleb_resnet34.onnx (operator set 14); batch normalisation is folded.
    """

    def __init__(self, blocks=(1, 2, 1, 1), width=4, bottleneck=False, features=16, embedding=6):
        self.nodes, self.tensors = [], {}
        self.features, self.embedding = features, embedding
        x = self.node("Transpose", "feats", perm=[0, 2, 1])
        x = self.node("Unsqueeze", x, self.constant(np.array([1])))
        x = self.node("Relu", self.conv(x, 1, width, 3))
        before = width
        for stage, count in enumerate(blocks):
            inner = width << stage
            outer = 4 * inner if bottleneck else inner
            for n in range(count):
                stride = 2 if stage and n == 0 else 1
                y, given = x, before
                layers = [(inner, 3, stride), (inner, 3, 1)]
                if bottleneck:
                    layers = [(inner, 1, 1), (inner, 3, stride), (outer, 1, 1)]
                for i, (channels, taps, step) in enumerate(layers):
                    y = self.conv(y, given, channels, taps, step)
                    given = channels
                    y = self.node("Relu", y) if i < len(layers) - 1 else y
                if stride != 1 or before != outer:
                    x = self.conv(x, before, outer, 1, stride)
                x = self.node("Relu", self.node("Add", y, x))
                before = outer
        self.pooled_size = 2 * before * (features // 8)
        self.pool(x)

    def pool(self, x, eps=1e-7, unbiased=1.0):
        mean = self.node("Flatten", self.node("ReduceMean", x, axes=[-1], keepdims=0), axis=1)
        centred = self.node("Sub", x, self.node("ReduceMean", x, axes=[-1], keepdims=1))
        size = self.node("Gather", self.node("Shape", x), self.constant(np.array([-1])), axis=0)
        count = self.node("Cast", self.node("ReduceProd", size, keepdims=0), to=TensorProto.FLOAT)
        squares = self.node("ReduceMean", self.node("Mul", centred, centred), axes=[-1], keepdims=0)
        rest = self.node("Sub", count, self.constant(np.array(unbiased, np.float32)))
        variance = self.node("Div", self.node("Mul", squares, count), rest)
        variance = self.node("Add", variance, self.constant(np.array(eps, np.float32)))
        deviation = self.node("Flatten", self.node("Sqrt", variance), axis=1)
        pooled = self.node("Concat", mean, deviation, axis=1)
        weight = self.tensor("model.seg_1.weight", (self.embedding, self.pooled_size))
        bias = self.tensor("model.seg_1.bias", (self.embedding,))
        y = self.node("Gemm", pooled, weight, bias, alpha=1.0, beta=1.0, transB=1)
        self.node("Sub", y, self.tensor("mean_vec", (self.embedding,)), output="embs")

    def node(self, operator, *inputs, output=None, **attributes):
        output = output or f"onnx::{operator}_{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(operator, inputs, [output], name=f"{operator}_{len(self.nodes)}", **attributes)
        )
        return output

    def constant(self, value):
        return self.node("Constant", value=numpy_helper.from_array(value))

    def tensor(self, name, shape):
        scale = np.sqrt(6 / np.prod(shape[1:])) if len(shape) > 1 else 0.3
        self.tensors[name] = ((2 * originals.uniform(name, shape) - 1) * scale).astype(np.float32)
        return name

    def conv(self, x, inputs, outputs, taps, stride=1):
        number = len(self.nodes)
        weight = self.tensor(f"onnx::Conv_{number}w", (outputs, inputs, taps, taps))
        bias = self.tensor(f"onnx::Conv_{number}b", (outputs,))
        geometry = {"kernel_shape": [taps] * 2, "pads": [taps // 2] * 4, "strides": [stride] * 2}
        return self.node("Conv", x, weight, bias, dilations=[1, 1], group=1, **geometry)

    def find(self, operator, which=0):
        return [node for node in self.nodes if node.op_type == operator][which]

    def model(self, opset=14):
        feats = helper.make_tensor_value_info("feats", TensorProto.FLOAT, ["B", "T", self.features])
        embs = helper.make_tensor_value_info("embs", TensorProto.FLOAT, ["B", self.embedding])
        tensors = [numpy_helper.from_array(value, name) for name, value in self.tensors.items()]
        graph = helper.make_graph(self.nodes, "torch_jit", [feats], [embs], tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7)

    def save(self, path):
        path.write_bytes(self.model().SerializeToString())
        return path


@pytest.mark.parametrize(
    ("settings", "architecture"),
    [
        ({"blocks": (2, 2, 2, 2), "width": 2}, "wespeaker_resnet18"),
        ({"blocks": (3, 4, 6, 3), "bottleneck": True, "width": 2}, "wespeaker_resnet50"),
    ],
)
def test_made_up_networks_give_what_onnx_runtime_gives(settings, architecture, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    network = Network(**settings)
    imported = pretrained.read(network.save(tmp_path / "m.onnx"))
    assert imported.architecture == architecture and imported.frontend == "wespeaker"
    assert imported.settings["blocks"] == list(settings["blocks"])
    assert imported.settings["features"] == network.features
    ours = registry.build(imported.architecture, **imported.settings)
    features = originals.features(2, 19, network.features)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    theirs = session.run(None, {"feats": features})[0]
    assert np.abs(theirs).max() > 0.1
    got = np.asarray(jax.jit(ours.apply)(imported.variables, features))
    np.testing.assert_allclose(got, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_folded_normalisation_is_put_back_by_the_command(tmp_path, monkeypatch, capsys):
    file, data = Network(features=80).save(tmp_path / "m.onnx"), "synthetic:dev?speakers=2&utterances=2"
    flags = (f"--source={file}", f"--out={tmp_path / 'out'}")
    assert commands.run(monkeypatch, "import_model", *flags, "--unfold=nowhere") == 2
    assert "nowhere" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert commands.run(monkeypatch, "import_model", *flags, f"--unfold={data}") == 0
    assert "norm batch" in capsys.readouterr().out
    model, folded = speaker_model.load_model(tmp_path / "out"), pretrained.read(file)
    assert "stem/bn/var" in dict(named_leaves(model.variables["batch_stats"]))
    assert model.about["unfolded_on"] == f"100 crops of {data}"
    features = originals.features(2, 40, 80)
    expected = registry.build(folded.architecture, **folded.settings).apply(folded.variables, features)
    found = model.network().apply(model.variables, features)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def tamper(change):
    network = Network((1, 1, 1, 1))
    change(network)
    return network


def set_attribute(node, name, value):
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def insert(network, operator, before, value):
    """Puts a node of one input between `value` and the node `before`."""
    place = network.nodes.index(before)
    network.nodes.insert(place, helper.make_node(operator, [value], ["between"], name="odd_one"))
    before.input[list(before.input).index(value)] = "between"


def biased(network):
    del network.nodes[network.nodes.index(network.find("ReduceMean")) :]
    network.pool(network.find("Relu", -1).output[0], unbiased=0.0)


def large_floor(network):
    del network.nodes[network.nodes.index(network.find("ReduceMean")) :]
    network.pool(network.find("Relu", -1).output[0], eps=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n: n.tensors.update({"spare": np.zeros(3, np.float32)}), "tensor spare is not part of the network"),
        (lambda n: n.tensors.pop("mean_vec"), "node Sub .* must subtract a constant"),
        (lambda n: n.tensors.pop("model.seg_1.weight"), "tensor model.seg_1.weight is missing"),
        (lambda n: n.tensors.pop(n.find("Conv", 3).input[1]), "tensor onnx::Conv_.*w is missing"),
        (lambda n: n.find("Conv", 2).input.pop(), "has no bias"),
        (lambda n: insert(n, "Sigmoid", n.find("Gemm"), n.find("Concat").output[0]), "Sigmoid odd_one is not part"),
        (lambda n: insert(n, "Neg", n.find("Conv", 2), n.find("Conv", 2).input[0]), "Neg odd_one is unknown"),
        (lambda n: set_attribute(n.find("Conv", 3), "strides", [1, 1]), r"Conv_\d+ has strides \[1, 1\]; \[2, 2\]"),
        (lambda n: set_attribute(n.find("Conv", 1), "group", 2), r"Conv_\d+ has group 2; 1 is expected"),
        (lambda n: set_attribute(n.find("Conv", 1), "pads", [0, 0, 0, 0]), r"has pads \[0, 0, 0, 0\]"),
        (lambda n: set_attribute(n.find("Gemm"), "alpha", 2.0), "is not a plain linear layer"),
        (lambda n: set_attribute(n.find("Transpose"), "perm", [0, 1, 2]), r"has perm \[0, 1, 2\]"),
        (biased, "do not compute mean and unbiased deviation"),
        (large_floor, "do not compute mean and unbiased deviation"),
        (lambda n: n.nodes.remove(n.find("Sqrt")), "cannot be computed|is read by"),
        (lambda n: n.find("Relu", 2).output.__setitem__(0, n.find("Relu").output[0]), "values of the same name"),
        (lambda n: n.tensors["model.seg_1.bias"].fill(np.inf), "holds values that are not finite"),
    ],
)
def test_what_does_not_fit_is_named(change, message, tmp_path):
    network = tamper(change)
    with pytest.raises(UserError, match=message):
        pretrained.read(network.save(tmp_path / "m.onnx"), "wespeaker-onnx")


def test_another_network_is_read_as_a_graph(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tamper(biased).save(tmp_path / "m.onnx")
    imported = pretrained.read(path, asked=onnx_network.Asked("wespeaker"))
    assert imported.architecture == "graph"
    features = originals.features(2, 40, 16)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    ours = jax.jit(registry.build("graph", **imported.settings).apply)(imported.variables, features)
    np.testing.assert_allclose(ours, session.run(None, {"feats": features})[0], rtol=0, atol=1e-4)


def test_the_mean_embedding_is_folded_into_the_bias(tmp_path):
    network = Network((1, 1, 1, 1))
    bias = dict(named_leaves(pretrained.read(network.save(tmp_path / "m.onnx")).variables))["params/head/linear/bias"]
    np.testing.assert_allclose(bias, network.tensors["model.seg_1.bias"] - network.tensors["mean_vec"], atol=1e-7)


def test_hostile_files(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"not an onnx file at all")
    with pytest.raises(UserError, match="m.onnx"):
        pretrained.read(path)
    whole = Network((1, 1, 1, 1)).model()
    path.write_bytes(whole.SerializeToString()[:-100])
    with pytest.raises(UserError, match="is not an ONNX file, or it was cut short"):
        pretrained.read(path)
    tensor = whole.graph.initializer[0]
    tensor.dims[0] = 1 << 50
    path.write_bytes(whole.SerializeToString())
    with pytest.raises(UserError, match=f"tensor {tensor.name} of shape .* claims more data than the file holds"):
        pretrained.read(path)
    tensor.dims[0] = 3
    path.write_bytes(whole.SerializeToString())
    with pytest.raises(UserError, match=f"tensor {tensor.name} is damaged"):
        pretrained.read(path)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="secret")
    path.write_bytes(whole.SerializeToString())
    with pytest.raises(UserError, match="lies outside the file"):
        pretrained.read(path)


def test_other_sampling_rates_are_refused(tmp_path):
    model = Network((1, 1, 1, 1)).model()
    helper.set_model_props(model, {"sample_rate": "8000"})
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="8000 Hz"):
        pretrained.read(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"framework": "3d-speaker"}, "names the front end '3dspeaker', not WeSpeaker's"),
        ({"feature_normalize_type": "per_feature"}, "normalised by 'per_feature'"),
        ({"framework": "wespeaker", "feature_normalize_type": "global-mean"}, None),
    ],
)
def test_features_of_another_kind_are_refused(about, message, tmp_path):
    model = Network((1, 1, 1, 1)).model()
    helper.set_model_props(model, about)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    if message is None:
        assert pretrained.read(tmp_path / "m.onnx", "wespeaker-onnx").frontend == "wespeaker"
        return
    with pytest.raises(UserError, match=message):
        pretrained.read(tmp_path / "m.onnx", "wespeaker-onnx")


def test_what_is_asked_of_graphs_is_not_ignored(tmp_path):
    path = Network((1, 1, 1, 1)).save(tmp_path / "m.onnx")
    with pytest.raises(UserError, match="--frontend.*do not go with --format=wespeaker-onnx"):
        pretrained.read(path, "wespeaker-onnx", asked=onnx_network.Asked(frontend="3dspeaker"))


def test_the_published_file(shared):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = shared / "models" / "wespeaker-voxceleb-resnet34.onnx"
    imported = pretrained.read(path)
    assert imported.architecture == "wespeaker_resnet34"
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in onnx.load(path).graph.initializer}
    assert sum(leaf.size for _, leaf in named_leaves(imported.variables)) == sum(sizes.values()) - sizes["mean_vec"]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    features = originals.features(1, 60, 80)
    network = registry.build(imported.architecture, **imported.settings)
    ours = np.asarray(jax.jit(network.apply)(imported.variables, features))
    np.testing.assert_allclose(ours, session.run(None, {"feats": features})[0], rtol=0, atol=1e-5)
