"""Any ONNX network: torch exports against their originals, files that are refused, and a graph all the way."""

import base64
import collections
import dataclasses
import json

import commands
import jax
import numpy as np
import pytest
import soundfile

import kmq_jax
from kmq_jax import frontend, quant
from kmq_jax.cascade.policy import read_policy
from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import named_leaves
from kmq_jax.data import source
from kmq_jax.diagnosis.options import DiagnosisOptions
from kmq_jax.diagnosis.run import diagnose_models
from kmq_jax.interop import onnx_network, pretrained
from kmq_jax.interop.import_model import import_model
from kmq_jax.models import graph as graphs
from kmq_jax.models import onnx_export, registry, walk
from kmq_jax.models.speaker_model import SpeakerModel, embed_all, frontend_of, load_model, save_model
from kmq_jax.nn import integers, operators
from kmq_jax.ptq import activations, fit, moments, quantize
from kmq_jax.training import loop
from kmq_jax.training.config import default_config, distilled, smoke

onnx = pytest.importorskip("onnx", reason="ONNX files need onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="imported graphs are compared with ONNX Runtime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

DATA = "synthetic:dev?speakers=6&utterances=4"
SECONDS = 0.6  # of each recording: one length is one compilation


def features(batch, frames, size=80):
    return np.random.default_rng(frames).normal(0, 1, (batch, frames, size)).astype(np.float32)


def network_of(imported):
    return registry.build(imported.architecture, **imported.settings)


def cosines(a, b):
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def furthest(ours, theirs):
    """The largest difference, in parts of the largest value."""
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@pytest.fixture
def torch_networks():
    pytest.importorskip("torch", reason="the originals are PyTorch networks")
    import torch_networks

    return torch_networks


@pytest.mark.parametrize(
    "family", ["xvector", "ecapa", "campplus", "redimnet", "resnet", "eres2net", "titanet", "redimnet of set 20"]
)
def test_torch_exports_give_their_originals_embeddings(family, torch_networks, tmp_path):
    original = torch_networks.export(family, tmp_path / "m.onnx")
    imported = pretrained.read(tmp_path / "m.onnx")
    network = network_of(imported)
    x = features(2, 237)
    theirs = torch_networks.embed(original, x)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    given = zip(session.get_inputs(), torch_networks.inputs(original, x))
    embeddings = session.run(["embs"], {value.name: tensor.numpy() for value, tensor in given})[0]
    run = jax.jit(network.apply)
    ours = run(imported.variables, x)
    assert furthest(ours, theirs) < 1e-4 and furthest(ours, embeddings.reshape(theirs.shape)) < 1e-4
    # What is learnt has its place: every weight of the original but those that were folded into others.
    convolutions = [layer for layer in walk.layers(network, 237) if layer.kind in (walk.CONVOLUTION, walk.LINEAR)]
    classes = ("Conv1d", "Conv2d", "Linear")
    of_torch = [m for name, m in original.named_modules() if type(m).__name__ in classes and name != "classes"]
    assert len(convolutions) == len(of_torch)
    assert {network.component_of(name.split("/", 1)[1]) for name, _ in named_leaves(imported.variables)}


@pytest.mark.slow
def test_an_export_by_torch_dynamo(torch_networks, tmp_path):
    pytest.importorskip("onnxscript", reason="torch's newer exporter needs onnxscript")
    original = torch_networks.export("xvector", tmp_path / "m.onnx", dynamo=True)
    imported = pretrained.read(tmp_path / "m.onnx")
    x = features(3, 90)
    assert furthest(network_of(imported).apply(imported.variables, x), torch_networks.embed(original, x)) < 1e-4
    assert set(imported.variables["params"]) >= {"frame1", "frame2", "segment1", "segment2"}


FAMILIES = ("xvector", "ecapa", "campplus", "redimnet", "resnet", "eres2net", "titanet")


def session_of(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("family", FAMILIES)
def test_import_quantize_extract_export_of_every_family(family, torch_networks, tmp_path, monkeypatch):
    """At 8 bits, beside the original in PyTorch on the same recordings."""
    original = torch_networks.export(family, tmp_path / "m.onnx")
    asked = onnx_network.Asked(output="embs") if family == "titanet" else onnx_network.NOTHING_ASKED
    model = import_model(tmp_path / "m.onnx", tmp_path / "full", asked=asked)
    rule = quant.QuantRule("/kernel$", quant.QuantSpec(8, only_smaller=False))  # in so small a network few shrink
    save_model(tmp_path / "8.kmq", quantize.quantize_model(model, [rule]))
    found = named_leaves(load_model(tmp_path / "8.kmq").variables["params"], quant.is_codebook_tensor)
    kernels = [leaf for name, leaf in found if name.endswith("/kernel")]
    classes = ("Conv1d", "Conv2d", "Linear")
    of_torch = [m for name, m in original.named_modules() if type(m).__name__ in classes and name != "classes"]
    assert len(kernels) == len(of_torch) and all(map(quant.is_codebook_tensor, kernels))

    data, seconds = "synthetic:dev?speakers=3&utterances=2", 2.5
    flags = (f"--model={tmp_path / '8.kmq'}", f"--data={data}", f"--out={tmp_path / 'e.npz'}")
    assert commands.run(monkeypatch, "extract", *flags, "--engine=onnxruntime", f"--max_seconds={seconds}") == 0
    assert commands.run(monkeypatch, "export", f"--model={tmp_path / '8.kmq'}", f"--out={tmp_path / '8.onnx'}") == 0
    utterances = source.open_source(data)
    waves = np.stack([utterances.load(n)[: int(seconds * source.SAMPLE_RATE)] for n in range(len(utterances))])
    x = np.array(frontend.features_of(waves, frontend_of(model.frontend)))  # PyTorch takes what can be written
    wanted = torch_networks.embed(original, x)
    table = commands.arrays_of(tmp_path / "e.npz")
    extracted = dict(zip(table["ids"].tolist(), table["embeddings"]))
    extracted = np.stack([extracted[name] for name in utterances.ids])
    assert cosines(extracted, wanted).min() > 0.999 and np.abs(extracted - wanted).max() > 0  # it is quantized
    exported = session_of(tmp_path / "8.onnx").run(["embs"], {"feats": x})[0]
    assert cosines(exported, wanted).min() > 0.999 and furthest(exported, extracted) < 1e-4


OURS = [
    *((name, None) for name in ("xvector", "campplus", "ecapa_c512", "ecapa_speechbrain_c512", "redimnet_b0")),
    ("wespeaker_resnet18", 3),
]


@pytest.mark.parametrize(("name", "bits"), OURS)
def test_our_own_files_come_back(name, bits, tmp_path):
    network = registry.build(name, **registry.smoke_settings(name))
    variables = registry.initialize(network, jax.random.key(0))
    if bits:
        variables = {**variables, "params": quant.quantize_params(variables["params"], {"^stage1/.*/kernel$": bits})}
    onnx_export.export(tmp_path / "m.onnx", network, variables)
    imported = onnx_network.read(tmp_path / "m.onnx", onnx_network.Asked("wespeaker"))  # of whatever features
    ours = network_of(imported)
    x = features(2, 90, network.features)
    theirs = jax.jit(network.apply)(quant.dequantize_params(variables), x)
    assert furthest(jax.jit(ours.apply)(imported.variables, x), np.asarray(theirs)) < 1e-5
    kernels = {n for n, _ in named_leaves(variables["params"], quant.is_codebook_tensor) if n.endswith("/kernel")}
    named = {layer.name.replace(".", "/") + "/kernel" for layer in walk.layers(ours) if layer.kernel}
    assert named == kernels  # by name, from packed weights too


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """`full`, an imported TDNN; `8.kmq` and `2.kmq`, its weights rounded; `m.onnx`, the file."""
    pytest.importorskip("torch", reason="the original is a PyTorch network")
    import torch_networks

    place = tmp_path_factory.mktemp("graph")
    torch_networks.export("xvector", place / "m.onnx")
    patch = pytest.MonkeyPatch()
    assert commands.run(patch, "import_model", f"--source={place / 'm.onnx'}", f"--out={place / 'full'}") == 0
    for bits in (8, 2):
        flags = (f"--model={place / 'full'}", f"--bits={bits}", "--unfitted", f"--out={place / f'{bits}.kmq'}")
        assert commands.run(patch, "quantize", *flags) == 0
    patch.undo()
    return place


def test_import_quantize_extract(workdir, tmp_path, monkeypatch):
    original = embed_all(load_model(workdir / "full"), source.open_source(DATA), max_seconds=SECONDS)
    for engine in ("jax", "onnxruntime"):
        flags = (f"--model={workdir / '8.kmq'}", f"--data={DATA}", f"--out={tmp_path / 'e.npz'}", f"--engine={engine}")
        assert commands.run(monkeypatch, "extract", *flags, f"--max_seconds={SECONDS}") == 0
        assert cosines(commands.arrays_of(tmp_path / "e.npz")["embeddings"], original).min() > 0.999


def integer_convolutions(path):
    """Convolutions of a file whose input and kernel both are 8-bit integers."""
    graph = onnx.load(path).graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    return sum({makers.get(name) for name in node.input[:2]} == {"DequantizeLinear"} for node in convolutions)


def test_8_bit_activations_are_those_of_the_exported_file(workdir, tmp_path, monkeypatch):
    flags = (f"--model={workdir / 'full'}", f"--out={tmp_path / 'a.kmq'}", f"--data={DATA}", "--crops=16")
    assert commands.run(monkeypatch, "quantize", *flags, "--bits=4", "--activations=8") == 0
    assert commands.run(monkeypatch, "export", f"--model={tmp_path / 'a.kmq'}", f"--out={tmp_path / 'a.onnx'}") == 0
    assert integer_convolutions(tmp_path / "a.onnx") == 2
    model, full = load_model(tmp_path / "a.kmq"), load_model(workdir / "full")
    x = np.asarray(moments.random_features(frontend_of("wespeaker"), source.open_source(DATA), 4, SECONDS))
    ours = np.asarray(model.network().apply(quant.dequantize_params(model.variables), x))
    assert cosines(session_of(tmp_path / "a.onnx").run(None, {"feats": x})[0], ours).min() > 0.998
    without = {key: tree for key, tree in model.variables.items() if key != integers.COLLECTION}
    floating = np.asarray(model.network().apply(quant.dequantize_params(without), x))
    assert 1e-6 < 1 - cosines(floating, ours).min() < 0.05  # it does round, and not far
    assert cosines(ours, np.asarray(full.network().apply(full.variables, x))).min() > 0.95


def test_onnx_runtime_convolves_integers_of_a_graph(torch_networks, tmp_path):
    """Where nothing but a ReLU lies between two convolutions: the first gives integers to the second."""
    torch_networks.export("resnet", tmp_path / "m.onnx")
    model = SpeakerModel(*pretrained.read(tmp_path / "m.onnx"), about={})
    rules = [quant.QuantRule("conv./kernel$", quant.QuantSpec(8, only_smaller=False)), quant.QuantRule("", None)]
    params = quant.quantize_params(model.variables["params"], rules)
    packed = dataclasses.replace(model, variables={**model.variables, "params": params})
    # By hand, for measuring compiles every operator: sound has both signs, what a ReLU gives has one.
    ranges = {place: integers.grid_of(-8.0 if "conv1" in place else 0.0, 8.0) for place in activations.places_of(model)}
    packed = activations.with_ranges(packed, ranges)
    onnx_export.export(tmp_path / "8.onnx", packed.network(), packed.variables)
    assert integer_convolutions(tmp_path / "8.onnx") == 3
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(tmp_path / "optimized.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "8.onnx"), options, providers=["CPUExecutionProvider"])
    kinds = collections.Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert kinds["QLinearConv"] == 1  # pooling follows the first one, and what the last one gives is not rounded
    x = features(2, 60)
    ours = np.asarray(jax.jit(packed.network().apply)(quant.dequantize_params(packed.variables), x))
    assert cosines(session.run(None, {"feats": x})[0], ours).min() > 0.998


def test_utterances_of_unlike_length_share_no_batch(workdir):
    model = load_model(workdir / "full")
    waves = [np.random.default_rng(n).normal(0, 0.1, n).astype(np.float32) for n in (9000, 17000, 9000)]
    together = model.embed(waves, 16000, engine="jax")
    alone = np.stack([model.embed(wave, 16000, engine="onnxruntime") for wave in waves])
    assert furthest(together, alone) < 1e-4
    with pytest.raises(UserError, match=r"\d frames, but the network needs at least 10"):
        model.embed(waves[0][:1300], 16000)


def test_fitting_brings_it_nearer_to_the_reference(workdir):
    reference = load_model(workdir / "full")
    params = quant.quantize_params(reference.variables["params"], {"^frame2/kernel$": 2})
    two = dataclasses.replace(reference, variables={**reference.variables, "params": params})
    fitted = fit.fit_on(reference, two, source.open_source(DATA), crops=16, seconds=SECONDS)
    exact, before, after = (
        embed_all(model, source.open_source(DATA), max_seconds=SECONDS) for model in (reference, two, fitted)
    )
    assert np.mean((after - exact) ** 2) < 0.5 * np.mean((before - exact) ** 2)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "measured"), [("campplus", False), ("ecapa", True), ("redimnet", False)])
def test_fitting_all_kernels_brings_a_graph_nearer(family, measured, torch_networks, tmp_path):
    """Dense and pre-activated layers; convolution, ReLU, normalisation; grouped convolutions and attention."""
    torch_networks.export(family, tmp_path / "m.onnx")
    reference = SpeakerModel(*pretrained.read(tmp_path / "m.onnx"), about={})
    rule = quant.QuantRule("/kernel$", quant.QuantSpec(2))
    front, heard = frontend_of(reference.frontend), moments.random_features
    crops = heard(front, source.open_source(DATA), 16, SECONDS)
    # As training would leave them: a network whose only normalisation is in the head gets those of its own inputs.
    reference = moments.own_statistics(reference, crops) if measured else reference
    two = quantize.quantize_model(reference, [rule])
    kernels = [leaf for name, leaf in named_leaves(two.variables, quant.is_codebook_tensor) if name.endswith("/kernel")]
    assert len(kernels) > 5 and all(map(quant.is_codebook_tensor, kernels))
    fitted = fit.fit(reference, two, crops)
    others = np.asarray(heard(front, source.open_source("synthetic:train?speakers=4&utterances=2"), 8, SECONDS))

    def embeddings(model):
        onnx_export.export(tmp_path / "e.onnx", model.network(), model.variables)
        return session_of(tmp_path / "e.onnx").run(None, {"feats": others})[0]

    exact, before, after = map(embeddings, (reference, two, fitted))
    assert np.mean((after - exact) ** 2) < np.mean((before - exact) ** 2)


def test_training_leaves_statistics_as_they_are(workdir):
    model = load_model(workdir / "full")
    _, state = model.network().apply(model.variables, features(2, 30), train=True, mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, state["batch_stats"], model.variables["batch_stats"])


def test_it_is_diagnosed(workdir):
    options = DiagnosisOptions(
        retention_utterances=12, layer_utterances=12, hessian_draws=1, hessian_utterances=2, hessian_seconds=0.6,
        replicates=20, max_seconds=SECONDS,
    )  # fmt: skip
    reference, two = load_model(workdir / "full"), load_model(workdir / "2.kmq")
    tables = diagnose_models(reference, {2: two}, DATA, DATA, options).tables
    assert [row["layer"] for row in tables["layers"]] == ["frame1", "frame2", "segment1", "segment2"]
    assert [row["block"] for row in tables["blocks"]] == ["frame1", "bn1", "frame2", "bn2", "segment1", "segment2"]
    assert all(row["damage"] > 0 and np.isfinite(row["activation_sqnr_db"]) for row in tables["layers"])


def test_it_stands_in_a_cascade(workdir, tmp_path, monkeypatch, capsys):
    """Two levels with a gate between them: from embeddings, lazily from recordings, and for two recordings."""

    def run(command, *words, **flags):
        assert commands.run(monkeypatch, command, *words, *(f"--{name}={value}" for name, value in flags.items())) == 0

    monkeypatch.chdir(tmp_path)
    given = {32: workdir / "full", 2: workdir / "2.kmq"}
    for bits, model in given.items():  # by ONNX Runtime: no length is compiled
        run("extract", model=model, data=DATA, out=f"{bits}.npz")
    levels = [f"--stage={bits}:{bits}.npz" for bits in (2, 32)]
    models = [f"--model={bits}:{given[bits]}" for bits in (2, 32)]
    common = {"reference": "32.npz", "trials": DATA, "replicates": 20}
    run("calibrate", *levels, *models, out="p.json", cascade="both", **common)
    policy = read_policy("p.json")
    (low, high), *others = policy.gates
    assert policy.bits == (2, 32) and low < high and not others
    run("cascade", *levels, policy="p.json", out="d.csv", json="c.json", **common)
    run("cascade", cascade="both", data=DATA, engine="onnxruntime", out="lazy.csv", json="lazy.json", **common)
    whole, lazy = (json.loads((tmp_path / name).read_text()) for name in ("c.json", "lazy.json"))
    assert 0 < whole["resolved"]["32"] < 1 and lazy["resolved"] == pytest.approx(whole["resolved"])
    assert 0 <= whole["eer"] <= 100 and lazy["eer"] == pytest.approx(whole["eer"])
    rows = [np.genfromtxt(tmp_path / name, delimiter=",", skip_header=1)[:, 2:] for name in ("d.csv", "lazy.csv")]
    np.testing.assert_allclose(*rows, atol=1e-4)
    assert set(np.unique(rows[0][:, 2])) == {2, 32}

    utterances = source.open_source(DATA)
    for n in (0, 1):
        soundfile.write(f"{n}.wav", utterances.load(n), source.SAMPLE_RATE, subtype="FLOAT")
    capsys.readouterr()
    run("verify", cascade="both", enrol="0.wav", test="1.wav", engine="onnxruntime", json="v.json")
    found = json.loads((tmp_path / "v.json").read_text())
    assert found["decision"] == (found["score"] >= policy.threshold) and found["bits"] in (2, 32)
    cascade = kmq_jax.load_cascade("both", engine="onnxruntime")
    cascade.policy = dataclasses.replace(policy, gates=((-9.0, 9.0),))  # to the last level
    table = commands.arrays_of("32.npz")["embeddings"][:2]
    assert cascade.verify("0.wav", "1.wav").score == pytest.approx(cosines(*table[:, None])[0], abs=1e-4)


def test_it_trains_quantized_with_a_teacher(workdir, tmp_path):
    model = load_model(workdir / "full")
    section = smoke(default_config("graph", **model.settings))
    section.validation.data, section.average_last = "", 0
    section.frontend, section.init_from = model.frontend, str(workdir / "full")
    distilled(section, 2).distill.teacher = str(workdir / "full")
    assert loop.train(section, tmp_path / "run")["finished"]
    found = load_model(tmp_path / "run")
    assert [leaf.bits for _, leaf in named_leaves(found.variables, quant.is_codebook_tensor) if leaf.ndim > 1]


def test_a_quantized_graph_is_exported(workdir, tmp_path):
    model = load_model(workdir / "2.kmq")
    onnx_export.export(tmp_path / "2.onnx", model.network(), model.variables)
    x = features(2, 50)
    session = onnxruntime.InferenceSession(str(tmp_path / "2.onnx"), providers=["CPUExecutionProvider"])
    ours = model.network().apply(quant.dequantize_params(model.variables), x)
    assert furthest(session.run(None, {"feats": x})[0], np.asarray(ours)) < 1e-4
    assert (tmp_path / "2.onnx").stat().st_size < 0.5 * (workdir / "m.onnx").stat().st_size


class Drawn:
    """A file made by hand: the mean over time, what `change` puts behind it, and a linear layer."""

    def __init__(self, shape=("B", "T", 80), opset=17):
        self.nodes, self.tensors, self.shape, self.opset = [], {}, list(shape), opset
        self.outputs = {"embs": ["B", 6]}

    def node(self, operator, *inputs, output=None, domain=None, **attributes):
        output = output or f"v{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(operator, inputs, [output], f"n{len(self.nodes)}", domain=domain, **attributes)
        )
        return output

    def constant(self, *values, dtype=np.int64):
        name = f"c{len(self.tensors)}"
        self.tensors[name] = np.array(values, dtype)
        return name

    def finish(self, x):
        weight = np.random.default_rng(0).normal(size=(80, 6)).astype(np.float32)
        self.tensors |= {"head.weight": weight, "head.bias": np.ones(6, np.float32)}
        self.node("Gemm", x, "head.weight", "head.bias", output="embs")
        return self

    def save(self, path):
        feats = helper.make_tensor_value_info("feats", TensorProto.FLOAT, self.shape)
        given = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in self.outputs.items()]
        tensors = [numpy_helper.from_array(value, name) for name, value in self.tensors.items()]
        graph = helper.make_graph(self.nodes, "drawn", [feats], given, tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        path.write_bytes(model.SerializeToString())
        return path


def drawn(change=None, **settings):
    made = Drawn(**settings)
    x = made.node("ReduceMean", "feats", axes=[1], keepdims=0)
    return made.finish(change(made, x) if change else x)


def test_a_file_made_by_hand(tmp_path):
    made = drawn()
    imported = onnx_network.read(made.save(tmp_path / "m.onnx"))
    assert set(imported.variables["params"]) == {"head"} and imported.settings["frames"] == 1
    x = features(2, 9)
    wanted = x.mean(1) @ made.tensors["head.weight"] + 1
    np.testing.assert_allclose(network_of(imported).apply(imported.variables, x), wanted, rtol=1e-4, atol=1e-5)


def test_an_operator_that_is_right_at_one_length_alone_is_found(tmp_path, monkeypatch):
    counted = lambda call: np.asarray([150])  # noqa: E731 - the frames that reading compares first
    monkeypatch.setitem(operators._ALL, "Shape", counted)

    def mean(made, x):
        made.nodes.clear()
        frames = made.node("Cast", made.node("Shape", "feats", start=1, end=2), to=TensorProto.FLOAT)
        return made.node("Div", made.node("ReduceSum", "feats", made.constant(1), keepdims=0), frames)

    with pytest.raises(UserError, match="our embeddings of 187 frames are .* an operator is not understood"):
        onnx_network.read(drawn(mean).save(tmp_path / "m.onnx"))


def of_every_form(opset):
    """Operators whose form changed between operator sets 11 and 22, each in the form that it has in `opset`."""
    made = Drawn(opset=opset)

    def over(kind, x, *axes, since, **more):
        """An operator whose axes are an input since some operator set, and were an attribute before."""
        if opset >= since:
            return made.node(kind, x, made.constant(*axes), **more)
        return made.node(kind, x, axes=list(axes), **more)

    def scaled(x, by):
        return made.node("Mul", x, made.constant(by, dtype=np.float32))

    x = over("Unsqueeze", "feats", 1, since=13)
    pads = [made.constant(1, 1), "", made.constant(3)] if opset >= 18 else [made.constant(0, 0, 0, 1, 0, 0, 0, 1)]
    x = made.node("Pad", x, *pads, mode="edge")
    x = made.node("AveragePool", x, kernel_shape=[1, 3])
    x = over("Squeeze", made.node("MaxPool", x, kernel_shape=[1, 1]), 1, since=13)
    limits = [made.node("Squeeze", made.constant(limit, dtype=np.float32)) for limit in (-1.5, 2.0)]
    x = made.node("Clip", x, *limits)
    if opset >= 18:
        made.nodes.append(helper.make_node("Split", [x], ["low", "high"], "split", axis=2, num_outputs=2))
    elif opset >= 13:
        made.nodes.append(helper.make_node("Split", [x, made.constant(40, 40)], ["low", "high"], "split", axis=2))
    else:
        made.nodes.append(helper.make_node("Split", [x], ["low", "high"], "split", axis=2, split=[40, 40]))
    low = made.node("Softmax", "low", axis=2)
    high = made.node("LogSoftmax", "high", **({} if opset >= 13 else {"axis": 2}))  # the last axis is the default
    if opset >= 14:
        low = made.node("HardSwish", low)
    if opset >= 20:
        high = made.node("Gelu", high)
    dropped = {"ratio": 0.5} if opset < 12 else {}
    x = made.node("Dropout", made.node("Concat", low, high, axis=2), **dropped)
    time = made.node("Shape", x, start=1, end=2) if opset >= 15 else made.node("Slice", made.node("Shape", x),
        made.constant(1), made.constant(2))  # fmt: skip
    frames = made.node("Cast", time, to=TensorProto.FLOAT)
    total = made.node("Div", over("ReduceSum", x, 1, since=13, keepdims=0), frames)
    parts = [total, *(over(f"Reduce{kind}", x, 1, since=18, keepdims=0) for kind in ("Mean", "Max", "Min"))]
    parts += [scaled(over(f"Reduce{kind}", x, -2, since=18, keepdims=0), 0.01) for kind in ("L1", "L2", "SumSquare")]
    parts += [over("ReduceLogSumExp", x, 1, since=18, keepdims=0)]
    names = []
    for value in (np.linspace(0.5, 1, 80), np.ones(80), np.zeros(80), np.linspace(1, 2, 80)):
        names.append(made.constant(*value, dtype=np.float32))
    return made.finish(made.node("BatchNormalization", made.node("Sum", *parts), *names))


@pytest.mark.parametrize("opset", range(11, 23))
def test_every_operator_set_from_11_to_22(opset, tmp_path):
    imported = onnx_network.read(of_every_form(opset).save(tmp_path / "m.onnx"))
    x = features(2, 150)  # as many as reading compares, which is compiled already
    theirs = session_of(tmp_path / "m.onnx").run(None, {"feats": x})[0]
    network = network_of(imported)
    ours = jax.jit(lambda v, x: network.apply(v, x))(imported.variables, x)
    assert furthest(ours, theirs) < 1e-5 and np.ptp(theirs) > 1


@pytest.mark.parametrize("opset", [11, 12])
def test_a_softmax_over_several_axes_is_refused(opset, tmp_path):
    """As the default, from axis 1 on, was before operator set 13."""
    made = Drawn(opset=opset)
    x = made.node("ReduceMean", made.node("Softmax", "feats"), axes=[1], keepdims=0)
    with pytest.raises(UserError, match="node Softmax n0: a softmax over several axes, as before operator set 13"):
        onnx_network.read(made.finish(x).save(tmp_path / "m.onnx"))


def looped(made, x):
    made.nodes.append(helper.make_node("Add", [x, "late"], ["early"], "first"))
    made.nodes.append(helper.make_node("Relu", ["early"], ["late"], "second"))
    return "late"


def bomb(operator):
    """What makes `operator` ask for petabytes, of constants or of what the sound gives."""

    def change(made, x):
        huge = made.constant(1 << 24, 1 << 24)
        long = made.constant(1 << 40, 1, 1)
        if operator == "ConstantOfShape":
            return made.node("Add", x, made.node("ReduceMax", made.node("ConstantOfShape", huge), keepdims=0))
        if operator == "Range":
            one = [made.node("Squeeze", made.constant(n)) for n in (0, 1 << 50, 1)]
            return made.node("Add", x, made.node("Cast", made.node("ReduceMax", made.node("Range", *one)), to=1))
        if operator == "Expand":
            y = made.node("Expand", x, long)
        elif operator == "Tile":
            y = made.node("Tile", x, huge)
        else:
            y = made.node("Pad", x, made.constant(0, 0, 1 << 40, 1 << 40))
        return made.node("Add", x, made.node("ReduceMax", y, keepdims=0))

    return change


def outside(made, x):
    made.nodes.append(helper.make_node("Add", [x, "head.bias2"], ["y"], "n"))
    return "y"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, x: m.node("Hardmax", x), "operator Hardmax of node n1 is not supported"),
        (lambda m, x: m.node("FusedGemm", x, domain="com.microsoft"), "FusedGemm n1 .* operator set 'com.microsoft'"),
        (outside, "node Add n reads head.bias2, which no node before it gives, and no tensor"),
        (looped, "node Add first reads late, which no node before it gives"),
        (bomb("ConstantOfShape"), r"node ConstantOfShape n1: it would give values of shape \(16777216, 16777216\)"),
        (bomb("Range"), "node Range n4: it would give values of shape"),
        (bomb("Expand"), "node Expand n1: it would give values of shape"),
        (bomb("Tile"), "node Tile n1: it would give values of shape"),
        (bomb("Pad"), "node Pad n1: it would give values of shape"),
        (lambda m, x: m.node("Reshape", x, m.constant(3, 7)), "node Reshape n1: .*reshape"),
        (lambda m, x: m.node("Concat", x, m.node("Transpose", x, perm=[1, 0]), axis=0), "node Concat n2: "),
        (lambda m, x: m.node("Slice", x, m.node("Cast", x, to=7), m.constant(3)), "node Slice n2: its start depends"),
        (lambda m, x: m.node("Cast", x), "node Cast n1 is damaged: .*to"),
        *((lambda m, x, kind=kind: m.node(kind, x), f"node {kind} n1 is damaged") for kind in ("MatMul", "Conv")),
        (lambda m, x: m.node("BatchNormalization", x, m.constant(1.0)), "node BatchNormalization n1 is damaged"),
        (lambda m, x: m.node("Identity"), "node Identity n1 lacks an input or an output"),
    ],
)
def test_what_cannot_be_computed_is_one_line(change, message, tmp_path):
    with pytest.raises(UserError, match=message) as failed:
        pretrained.read(drawn(change).save(tmp_path / "m.onnx"))
    assert "\n" not in str(failed.value) and "m.onnx" in str(failed.value)


def test_what_a_file_leaves_open_is_asked_for(tmp_path):
    def refuses(made, message, *asked):
        with pytest.raises(UserError, match=message):
            onnx_network.read(made.save(tmp_path / "m.onnx"), onnx_network.Asked(*asked))

    refuses(drawn(shape=("B", 200, 80)), "is of a fixed length: export the file with a free time axis")
    refuses(drawn(shape=("B", "T", "F")), "does not tell frames from features: name --layout")
    refuses(drawn(shape=("B", "N")), "is not features")
    refuses(drawn(opset=10), "operator set 10; 11 to 25 are supported")
    refuses(drawn(shape=("B", "T", 33)), "no front end gives 33 features")
    refuses(drawn(), "--output=logits must be one of embs", None, None, "logits")
    refuses(drawn(), "--layout=features-first does not fit", None, "features-first")
    two = drawn()
    two.node("Relu", "embs", output="more")
    two.outputs = {"more": ["B", 6], "other": ["B", 6]}
    two.node("Neg", "embs", output="other")
    refuses(two, "outputs more, other: name the embedding by --output")
    assert onnx_network.read(two.save(tmp_path / "m.onnx"), onnx_network.Asked(output="other"))
    free = drawn(shape=("B", "T", "F"))
    found = onnx_network.read(free.save(tmp_path / "m.onnx"), onnx_network.Asked("3dspeaker", "frames-first"))
    assert found.frontend == "3dspeaker" and found.settings["features"] == 80
    frames = drawn()
    frames.outputs = {"v0": ["B", 80]}
    frames.nodes[0] = helper.make_node("Relu", ["feats"], ["v0"], "n0")
    refuses(frames, "output v0 grows with the frames")


@pytest.mark.parametrize(
    ("about", "front"),
    [
        ({}, "wespeaker"),
        ({"frontend": "speechbrain"}, "speechbrain"),  # as our own files say it, of whatever features
        ({"framework": "3d-speaker", "feature_normalize_type": "global-mean"}, "3dspeaker"),
        ({"frontend": "redimnet72"}, "wespeaker"),  # it gives 72 features, the network takes 80
        ({"frontend": "unheard of"}, "wespeaker"),
    ],
)
def test_the_front_end_is_the_one_that_the_file_names(about, front, tmp_path):
    model = onnx.load(drawn().save(tmp_path / "m.onnx"))
    helper.set_model_props(model, about)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert pretrained.read(tmp_path / "m.onnx").frontend == front


def test_data_outside_the_file_is_not_read(tmp_path):
    path = drawn().save(tmp_path / "m.onnx")
    model = onnx.load(path)
    tensor = next(one for one in model.graph.initializer if one.name == "head.weight")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="secret")
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="tensor head.weight lies outside the file"):
        pretrained.read(path)


def one(kind="Relu", inputs=(0,), outputs=(2,), **attributes):
    return [kind, list(inputs), list(outputs), attributes]


SWAP = one("Transpose", perm=[0, 2, 1])
SEVEN = base64.b64encode(np.array([7]).tobytes()).decode()
SHAPE = base64.b64encode(np.array([1 << 40, 1, 1, 1]).tobytes()).decode()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not the text of a graph"),
        ({"nodes": 7}, "is not the text of a graph"),
        ({"nodes": [one("Exec")]}, "the operator 'Exec' is unknown"),
        ({"nodes": [one(inputs=(7,))]}, r"node 0 of the graph \(Relu\): value 7 is not there"),
        ({"nodes": [one(outputs=(0,))]}, "values of a node Relu are numbers"),
        ({"nodes": [one(), one()]}, "a value is given twice"),
        ({"nodes": [one(what={"a": 1})]}, "attribute 'what'"),
        ({"nodes": [one("Linear", layer="a/b", component="c", size=3, bias=True)]}, "'a/b' cannot name a layer"),
        ({"nodes": [one("Conv", layer="a", component="c", channels=1 << 40)]}, "a number of layer a"),
        ({"nodes": [one()], "output": 9}, "has no output"),
        ({"nodes": [one()], "output": [2]}, "has no output"),
        ({"nodes": [one(outputs=(2, 3))]}, r"node 0 of the graph \(Relu\): it gives 1 values, not 2"),
        (
            {"nodes": [SWAP, one("ReduceMean", (2, 5), (3,))], "literals": [[5, "int64", [1], SEVEN]]},
            r"node 1 of the graph \(ReduceMean\): axis 7 is outside 3 axes",
        ),
        ({"nodes": [SWAP, one("Concat", (2, 2), (3,), axis=7)]}, r"node 1 of the graph \(Concat\)"),
        ({"nodes": [one()], "literals": [[5, "int64", [1 << 40], SHAPE]]}, "is not the text of a graph"),
        ({"nodes": [one()], "literals": [[5, "object", [1], SHAPE]]}, "a literal of type 'object'"),
        (
            {"nodes": [one("Expand", (0, 5))], "literals": [[5, "int64", [4], SHAPE]]},
            "would give values of shape",
        ),
        ({"nodes": [one("Parameter", (), layer="a", component="c", shape=[1 << 40])]}, "parameters of shape"),
        ({"nodes": [one() for _ in range(20_001)]}, "20001 nodes"),
    ],
)
def test_a_models_graph_may_come_from_anyone(text, message, tmp_path):
    whole = text if isinstance(text, str) else json.dumps({"literals": [], "output": 2, **text})
    settings = {"features": 80, "embedding_size": 6, "graph": whole, "frames": 1}
    save_model(tmp_path / "m.kmq", SpeakerModel("graph", settings, "wespeaker", {"params": {}, "batch_stats": {}}))
    with pytest.raises(UserError, match=message) as failed:
        load_model(tmp_path / "m.kmq")
    assert "\n" not in str(failed.value)


def test_an_empty_graph_is_told():
    with pytest.raises(UserError, match="import_model makes one"):
        registry.parameter_count(registry.build("graph"))
    assert graphs._read.cache_info().maxsize == 16
    with pytest.raises(UserError, match="must be a text"):
        graphs.read(["no text"])
