"""CAM++, ECAPA-TDNN, x-vector, ReDimNet and GE2E checkpoints against numbers of the original code; ONNX; padding.

golden_networks.json holds outputs of the original code (each entry names repository, commit and file) run by PyTorch
2.13 or 2.14 in float32 on weights and features from tests/originals.py, and a checksum of the names and shapes of its
tensors; of tiny networks these themselves.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import originals
import pytest
import safetensors.numpy
from commands import parity_of

from kmq_jax import frontend
from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import named_leaves
from kmq_jax.interop import campplus, export, pretrained, redimnet, tdnn
from kmq_jax.interop.export import export_model
from kmq_jax.interop.import_model import describe, import_model
from kmq_jax.models import onnx_export, registry
from kmq_jax.models.speaker_model import FRONTENDS, SpeakerModel, embed_waves, fingerprint, load_model, save_model

GOLDEN = json.loads((Path(__file__).parent / "golden_networks.json").read_text())
TINY = [name for name in GOLDEN if "tiny" in name]
IDRND = redimnet.namer(registry.default_settings("redimnet_b2")["stages"], redimnet.IDRND)
FULL = {
    "campplus": ("campplus", campplus._name_of),
    "campplus 3dspeaker": ("campplus", campplus._name_of),
    "ecapa c512": ("ecapa_c512", tdnn.wespeaker_name),
    "ecapa c1024": ("ecapa_c1024", tdnn.wespeaker_name),
    "xvector": ("xvector", tdnn.xvector_name),
    "ecapa speechbrain c512": ("ecapa_speechbrain_c512", tdnn.speechbrain_name),
    "ecapa speechbrain c1024": ("ecapa_speechbrain_c1024", tdnn.speechbrain_name),
    **{
        f"redimnet b{n}": (f"redimnet_b{n}", redimnet.namer(registry.default_settings(f"redimnet_b{n}")["stages"]))
        for n in range(7)
    },
    "redimnet idrnd b2": ("redimnet_b2", IDRND),
}
SETTINGS = {"campplus 3dspeaker": {"embedding_size": 192}, "redimnet idrnd b2": {"head_norm": True}}
_imported: dict[str, tuple] = {}


def their_shapes(architecture, name_of, **settings):
    """Names and shapes of the original's tensors, from those of our network."""
    shapes = {}
    for name, leaf in named_leaves(registry.shapes(registry.build(architecture, **settings))):
        ours = name.split("/", 1)[1]
        shape = tuple(leaf.shape)
        if ours.endswith("/kernel"):
            shape = {4: lambda t, f, i, o: (o, i, f, t), 3: lambda t, i, o: (o, i, t), 2: lambda i, o: (o, i)}[
                leaf.ndim
            ](*shape)
        if ours.endswith("/weights"):
            shape = (1, *shape, 1)
        if architecture == "campplus" and ours == "head/linear/kernel":
            shape = (*shape, 1)
        if "speechbrain" in architecture and ours.endswith("/kernel") and len(shape) == 2:
            shape = (*shape, 1)  # all their linear layers are convolutions
        shapes[name_of(ours)] = shape
    return shapes


def saved(directory, shapes, golden):
    """A file of tensors of these shapes; IDRnD's hold their settings, too."""
    tensors = originals.fill(shapes)
    if "model_config" not in golden:
        safetensors.numpy.save_file(tensors, directory / "model.safetensors")
        return directory / "model.safetensors"
    torch = pytest.importorskip("torch", reason="PyTorch checkpoints need torch")
    state = {name: torch.from_numpy(value) for name, value in tensors.items()}
    torch.save({"state_dict": state, "model_config": golden["model_config"]}, directory / "model.pt")
    return directory / "model.pt"


def read(path, name):
    """Both toolkits' CAM++ have the same names. 3D-Speaker's own code has no ReLU behind the embedding."""
    if "3dspeaker" in name:
        return pretrained.read(path, "3dspeaker", activation="none")
    return pretrained.read(path, "wespeaker-torch" if "campplus" in name else None)


def imported(name, directory):
    """The imported tiny network, and its variables."""
    if name not in _imported:
        held = GOLDEN[GOLDEN[name].get("shapes_of", name)]["shapes"]  # both toolkits' CAM++ have the same
        shapes = {theirs: tuple(shape) for theirs, shape in held.items()}
        found = read(saved(directory, shapes, GOLDEN[name]), name)
        _imported[name] = registry.build(found.architecture, **found.settings), found.variables
    return _imported[name]


def check(network, variables, golden):
    features = originals.features(2, golden["frames"], golden["features"])
    found = np.asarray(jax.jit(network.apply)(variables, features))
    np.testing.assert_allclose(found[:, :8].ravel(), golden["embedding"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(found), golden["norm"], rtol=1e-4)


@pytest.mark.parametrize("name", [*TINY, "ge2e"])
def test_tiny_networks_are_those_of_the_original_code(name, tmp_path):
    check(*imported(name, tmp_path), GOLDEN[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_full_networks_are_those_of_the_original_code(name, tmp_path):
    golden = GOLDEN[name]
    shapes = their_shapes(*FULL[name], **SETTINGS.get(name, {}))
    assert originals.digest(shapes) == golden["names"]
    found = read(saved(tmp_path, shapes, golden), name)
    assert found.architecture == FULL[name][0]
    check(registry.build(found.architecture, **found.settings), found.variables, golden)


@pytest.mark.parametrize("name", TINY)
def test_padding_changes_nothing(name, tmp_path):
    network, variables = imported(name, tmp_path)
    features = np.random.default_rng(0).normal(size=(2, 90, 16)).astype(np.float32)
    features[1, 47:] = 1e3
    together = jax.jit(network.apply)(variables, features, jnp.array([90, 47]))
    alone = jax.jit(network.apply)(variables, features[1:, :47])
    np.testing.assert_allclose(together[1], alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in TINY if "campplus" not in name and "ge2e" not in name])
def test_onnx_runtime_gives_their_embeddings(name, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    network, variables = imported(name, tmp_path)
    onnx_export.export(tmp_path / "a.onnx", network, variables)
    features = np.random.default_rng(1).normal(size=(2, 53, 16)).astype(np.float32)
    (found,) = runtime.InferenceSession(tmp_path / "a.onnx").run(["embs"], {"feats": features})
    np.testing.assert_allclose(found, jax.jit(network.apply)(variables, features), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_has_a_component(name, tmp_path):
    network, variables = imported(name, tmp_path)
    names = [leaf for leaf, _ in named_leaves(variables["params"])]
    assert {network.component_of(leaf) for leaf in names} <= set(network.components())


def test_a_missing_and_a_left_over_tensor_are_named(tmp_path):
    shapes = {theirs: tuple(shape) for theirs, shape in GOLDEN["ecapa tiny"]["shapes"].items()}
    tensors = originals.fill(shapes)
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({**tensors, "bn2.weight": np.ones(8, np.float32)}, path)
    with pytest.raises(UserError, match=r"bn2\.weight is not part of the network"):
        pretrained.read(path)
    del tensors["layer3.se_res2block.1.convs.4.weight"]
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(UserError, match=r"layer3\.se_res2block\.1\.convs\.4\.weight is missing"):
        pretrained.read(path)


@pytest.fixture
def idrnd(tmp_path):
    """Writes a checkpoint of IDRnD's tiny network with other settings, or without any."""
    torch = pytest.importorskip("torch", reason="PyTorch checkpoints need torch")
    golden = GOLDEN["redimnet idrnd tiny"]
    tensors = originals.fill({theirs: tuple(shape) for theirs, shape in golden["shapes"].items()})
    state = {name: torch.from_numpy(value) for name, value in tensors.items()}

    def write(config):
        content = {"state_dict": state} | ({"model_config": golden["model_config"] | config} if config else {})
        torch.save(content, tmp_path / "b.pt")
        return tmp_path / "b.pt"

    return write


def test_settings_of_idrnd_choose_the_front_end_or_are_refused(idrnd):
    assert pretrained.read(idrnd({"hop_length": 160})).frontend == "redimnet16"
    assert pretrained.read(idrnd({"hop_length": 240})).frontend == "redimnet16-15ms"
    assert pretrained.read(idrnd({"num_classes": 3, "spec_params": {"f_max": 7600}})).settings["head_norm"]
    for config, said in (
        ({"hop_length": 200}, r"hop_length \(=200\) must be one of 160, 240"),
        ({"feat_type": "tf"}, "feat_type"),
        ({"block_2d_type": "convnext_like_relu"}, "block_2d_type"),
        ({"spec_params": {"norm_signal": True}}, r"spec_params.norm_signal \(=True\) must be False"),
        ({}, "`model_config`, which tells the step of the filterbank, is not in the file"),
    ):
        with pytest.raises(UserError, match=said):
            pretrained.read(idrnd(config))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("lstm.bias_hh_l1"), r"lstm\.bias_hh_l1 is missing"),
        (lambda t: t.pop("lstm.weight_ih_l1"), r"lstm\.weight_ih_l1 is missing"),
        (lambda t: t.update({"lstm.bias_ih_l0": np.ones(4, np.float32)}), "different shapes"),
        (lambda t: t.update({"lstm.weight_hr_l0": np.ones((8, 4), np.float32)}), r"lstm\.weight_hr_l0 is not part"),
    ],
)
def test_a_tensor_of_ge2e_that_does_not_fit_is_named(change, said, tmp_path):
    tensors = originals.fill({theirs: tuple(shape) for theirs, shape in GOLDEN["ge2e tiny"]["shapes"].items()})
    change(tensors)
    safetensors.numpy.save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=said):
        pretrained.read(tmp_path / "m.safetensors")


def test_ge2e_without_any_input_weight_is_told(tmp_path):
    shapes = {theirs: tuple(shape) for theirs, shape in GOLDEN["ge2e tiny"]["shapes"].items()}
    tensors = {name: value for name, value in originals.fill(shapes).items() if "weight_ih" not in name}
    safetensors.numpy.save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="of no known network"):
        pretrained.read(tmp_path / "m.safetensors")


@pytest.mark.parametrize("name", ["ge2e", "ecapa speechbrain"])
def test_a_file_becomes_a_model_with_its_own_front_end(name, tmp_path):
    """From the file to embeddings of waves: front end and network are those of the toolkit."""
    if name == "ge2e":
        shapes, front = {theirs: tuple(shape) for theirs, shape in GOLDEN[name]["shapes"].items()}, "resemblyzer"
    else:
        shapes = their_shapes("ecapa_speechbrain_c512", tdnn.speechbrain_name, width=16, aggregated=48)
        front = "speechbrain"
    safetensors.numpy.save_file(originals.fill(shapes), tmp_path / "m.safetensors")
    model = import_model(tmp_path / "m.safetensors", tmp_path / "out")
    assert model.frontend == front
    wave = 0.05 * np.random.default_rng(0).standard_normal(30000).astype(np.float32)
    features = frontend.features_of(wave[None], FRONTENDS[front])
    expected = jax.jit(model.network().apply)(model.variables, features)
    found = embed_waves(load_model(tmp_path / "out"), [wave, wave[:9000]])
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=1e-3 * np.abs(expected).max())
    assert np.isfinite(found).all()


def test_files_with_features_that_are_not_kaldi_s_do_not_look_like_it(tmp_path):
    """sherpa-onnx would compute Kaldi's features by these names, and give embeddings that mean nothing."""
    onnx = pytest.importorskip("onnx")
    settings = {"width": 16, "aggregated": 16, "embedding_size": 8, "layout": "speechbrain"}
    network = registry.build("ecapa_speechbrain_c512", **settings)
    model = SpeakerModel(
        "ecapa_speechbrain_c512", settings, "speechbrain", registry.initialize(network, jax.random.key(0))
    )
    save_model(tmp_path / "model.kmq", model)
    said = export_model(tmp_path / "model.kmq", tmp_path / "m.onnx").parity
    about = {entry.key: entry.value for entry in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert "filters" in about and not about.keys() & {"framework", "feature_normalize_type", "window_type"}
    assert about["frontend"] == "speechbrain"  # by which our own import finds it again
    assert about["bits"] == "32" and about["fingerprint"] == fingerprint(load_model(tmp_path / "model.kmq"))
    assert said is None or parity_of(said)[0] >= 0.99999


def test_an_export_is_compared_at_two_lengths(tmp_path, monkeypatch):
    """A graph that holds the frames of one length is right at that length alone."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    settings = registry.smoke_settings("wespeaker_resnet34")
    variables = registry.initialize(registry.build("wespeaker_resnet34", **settings), jax.random.key(0))
    save_model(tmp_path / "m.kmq", SpeakerModel("wespeaker_resnet34", settings, "wespeaker", variables))
    cosine, difference = parity_of(export_model(tmp_path / "m.kmq", tmp_path / "m.onnx").parity)
    assert cosine > 0.9999995 and difference < 1e-5
    seen, ours = [], export.embed_waves

    def other_but_for_the_first(model, waves, **more):
        seen.append(len(waves[0]))
        return ours(model, waves, **more) * (1 if seen == seen[:1] else -1)

    monkeypatch.setattr(export, "embed_waves", other_but_for_the_first)
    cosine, difference = parity_of(export_model(tmp_path / "m.kmq", tmp_path / "m.onnx").parity)
    assert cosine < -0.9999995 and difference == 2
    assert len(set(seen)) == 2


@pytest.mark.parametrize(("activation", "lines"), [("relu", 3), ("none", 2)])
def test_a_relu_on_the_embedding_is_told(activation, lines):
    """3D-Speaker's own code has none, so who asks for nothing has to hear of it."""
    settings = registry.smoke_settings("campplus") | {"activation": activation}
    variables = registry.initialize(registry.build("campplus", **settings), jax.random.key(0))
    told = describe(SpeakerModel("campplus", settings, "3dspeaker", variables)).splitlines()
    assert len(told) == lines and ("--activation=none" in told[-1]) == (activation == "relu")
