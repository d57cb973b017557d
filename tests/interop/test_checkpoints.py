"""PyTorch checkpoints of WeSpeaker and Kiwano against numbers that the original code gave, and what is refused.

golden.json holds outputs of the original code (each entry names repository, commit and file) run by PyTorch 2.13 in
float32 on weights and features from tests/originals.py, and a checksum of the names and shapes of its tensors.
"""

import json
from pathlib import Path

import jax
import numpy as np
import originals
import pytest
import safetensors.numpy

from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import named_leaves
from kmq_jax.interop import kiwano, pretrained
from kmq_jax.interop.torch_checkpoint import Checkpoint, read
from kmq_jax.models import registry

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
SHAPES = {"wespeaker": originals.wespeaker_shapes, "kiwano": originals.kiwano_shapes}
FULL = {"wespeaker resnet34", "wespeaker resnet293", "kiwano 3/8/18/3"}
CASES = [pytest.param(name, marks=pytest.mark.slow if name in FULL else ()) for name in GOLDEN]


def wespeaker_tensors():
    return originals.fill(originals.wespeaker_shapes([1, 1, 1, 1], 4, False, 16, 8))


def kiwano_tensors():
    return originals.fill(originals.kiwano_shapes([1, 1, 1, 1], 4, 3, 8))


def save(path, tensors):
    safetensors.numpy.save_file(tensors, path)
    return path


@pytest.mark.parametrize("name", CASES)
def test_activations_are_those_of_the_original_code(name, tmp_path):
    golden = GOLDEN[name]
    shapes = SHAPES[golden["family"]](**golden["config"])
    assert originals.digest(shapes) == golden["names"]
    path = save(tmp_path / "model.safetensors", originals.fill(shapes))
    imported = pretrained.read(path, activation=golden.get("activation"))
    network = registry.build(imported.architecture, **imported.settings)
    features = originals.features(golden["batch"], golden["frames"], imported.settings["features"])
    names = network.distilled_parts()  # the last block of each stage
    embedding, outputs, _ = jax.jit(lambda v, x: network.taps(v, x, names=names))(imported.variables, features)
    got = originals.summary(embedding, [outputs[name] for name in names])
    assert np.abs(embedding).max() > 0.1
    np.testing.assert_allclose(got["embedding"], golden["embedding"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(got["stages"], golden["stages"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("blocks", "bottleneck", "architecture"),
    [
        ([2, 2, 2, 2], False, "wespeaker_resnet18"),
        ([3, 4, 6, 3], False, "wespeaker_resnet34"),
        ([3, 4, 6, 3], True, "wespeaker_resnet50"),
        ([3, 4, 23, 3], True, "wespeaker_resnet101"),
        ([3, 8, 36, 3], True, "wespeaker_resnet152"),
        ([6, 16, 48, 3], True, "wespeaker_resnet221"),
        ([10, 20, 64, 3], True, "wespeaker_resnet293"),
    ],
)
def test_depth_and_sizes_are_read_off_the_tensors(blocks, bottleneck, architecture, tmp_path):
    tensors = originals.fill(originals.wespeaker_shapes(blocks, 2, bottleneck, 24, 6))
    imported = pretrained.read(save(tmp_path / "m.safetensors", tensors))
    assert imported.architecture == architecture
    assert imported.settings == {
        "blocks": blocks, "width": 2, "features": 24, "embedding_size": 6, "norm": "batch"
    }  # fmt: skip
    assert imported.frontend == "wespeaker"


@pytest.mark.parametrize(
    ("blocks", "taps", "architecture"), [([3, 8, 18, 3], 3, "resnet50"), ([3, 24, 36, 3], 1, "resnet200")]
)
def test_kiwano_presets(blocks, taps, architecture, tmp_path):
    tensors = originals.fill(originals.kiwano_shapes(blocks, 2, taps, 6))
    imported = pretrained.read(save(tmp_path / "m.safetensors", tensors))
    assert imported.architecture == architecture
    assert imported.settings["blocks"] == blocks and imported.settings["last_taps"] == taps
    assert imported.frontend == "kiwano"


def test_running_statistics_come_along(tmp_path):
    tensors = wespeaker_tensors()
    variables = pretrained.read(save(tmp_path / "m.safetensors", tensors)).variables
    statistics = dict(named_leaves(variables["batch_stats"]))
    np.testing.assert_array_equal(statistics["stem/bn/mean"], tensors["bn1.running_mean"])
    np.testing.assert_array_equal(
        statistics["stage2/block0/shortcut/bn/var"], tensors["layer2.0.shortcut.1.running_var"]
    )
    assert all(leaf.dtype == np.float32 for _, leaf in named_leaves(variables))


def test_the_classifier_is_left_behind(tmp_path):
    tensors = {**wespeaker_tensors(), "projection.weight": np.zeros((5, 8), np.float32)}
    pretrained.read(save(tmp_path / "m.safetensors", tensors))


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (wespeaker_tensors, lambda t: t.pop("layer3.0.bn2.running_var"), "layer3.0.bn2.running_var is missing"),
        (wespeaker_tensors, lambda t: t.update({"layer3.0.extra": np.zeros(3, np.float32)}), "layer3.0.extra is not"),
        (wespeaker_tensors, lambda t: t.update({"bn1.bias": np.zeros(5, np.float32)}), r"bn1.bias has shape \(5,\)"),
        (wespeaker_tensors, lambda t: t.update({"bn1.bias": np.zeros(4, np.int32)}), "bn1.bias is of type int32"),
        (wespeaker_tensors, lambda t: t["seg_1.bias"].fill(np.nan), "seg_1.bias holds values that are not finite"),
        (
            wespeaker_tensors,
            lambda t: t.update({"seg_2.weight": np.zeros((8, 8), np.float32)}),
            "seg_2.weight: networks with two embedding layers",
        ),
        (
            wespeaker_tensors,
            lambda t: t.update({"pool.linear1.weight": np.zeros((2, 2, 1), np.float32)}),
            "pool.linear1.weight: only the pooling TSTP",
        ),
        (wespeaker_tensors, lambda t: t.update({"seg_1.weight": np.zeros((8, 65), np.float32)}), "reads 65 values"),
        (
            wespeaker_tensors,
            lambda t: t.update({"conv1.weight": np.zeros((0, 1, 3, 3), np.float32)}),
            r"conv1.weight of shape \(0, 1, 3, 3\) is empty",
        ),
        (wespeaker_tensors, lambda t: t.pop("layer2.0.conv1.weight"), "layer2.0.conv1.weight is missing"),
        (kiwano_tensors, lambda t: t.pop("preresnet.layer1.0.se.fc.2.bias"), "preresnet.layer1.0.se.fc.2.bias is mis"),
        (kiwano_tensors, lambda t: t.update({"embedding.x": np.zeros(1, np.float32)}), "embedding.x is not part"),
        (kiwano_tensors, lambda t: t.pop("temporal_pooling.attention.2.weight"), "temporal_pooling.attention.2.weight"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(make, change, message, tmp_path):
    tensors = make()
    change(tensors)
    with pytest.raises(UserError, match=message):
        pretrained.read(save(tmp_path / "m.safetensors", tensors))


@pytest.mark.parametrize("strides", [3, None, [1, 1, 2, 2], "1222"])
def test_other_strides_are_refused_whatever_a_file_calls_them(strides):
    about = {"config": {"stage_strides": strides}}
    with pytest.raises(UserError, match=r"m.ckpt: stage_strides .* are not supported"):
        kiwano.convert(Checkpoint(kiwano_tensors(), about), "m.ckpt")


def test_a_missing_stage_is_named(tmp_path):
    tensors = {name: value for name, value in wespeaker_tensors().items() if not name.startswith("layer4.")}
    with pytest.raises(UserError, match="layer4.0 is missing"):
        pretrained.read(save(tmp_path / "m.safetensors", tensors))


def test_what_a_file_has_no_use_for_is_refused(tmp_path):
    path = save(tmp_path / "m.safetensors", wespeaker_tensors())
    with pytest.raises(UserError, match="--activation is for Kiwano's checkpoints and CAM"):
        pretrained.read(path, activation="relu")
    with pytest.raises(UserError, match="--format=3dspeaker"):
        pretrained.read(path, form="3dspeaker")
    (tmp_path / "m.onnx").write_bytes(b"no zip, no pickle")
    with pytest.raises(UserError, match="--activation is for"):
        pretrained.read(tmp_path / "m.onnx", activation="relu")


def test_unknown_networks_and_damaged_files(tmp_path):
    with pytest.raises(UserError, match="are of no known network"):
        pretrained.read(save(tmp_path / "m.safetensors", {"layers.0.weight": np.zeros(3, np.float32)}))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "m.safetensors").read_bytes()[:-4])
    with pytest.raises(UserError, match="cut.safetensors is not a safetensors file"):
        pretrained.read(tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match="cannot read .*nothing.ckpt"):
        pretrained.read(tmp_path / "nothing.ckpt")


class TestPyTorchFiles:
    """The same tensors in PyTorch's own format."""

    @pytest.fixture(autouse=True)
    def torch(self):
        self.torch = pytest.importorskip("torch", reason="PyTorch checkpoints need torch")

    def save(self, path, content):
        self.torch.save(content, path)
        return path

    def state(self, tensors):
        return {name: self.torch.from_numpy(value) for name, value in tensors.items()}

    @pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model": s, "epoch": 3}])
    def test_containers(self, wrap, tmp_path):
        tensors = wespeaker_tensors()
        state = {f"module.{name}": value for name, value in self.state(tensors).items()}
        got = pretrained.read(self.save(tmp_path / "m.pt", wrap(state))).variables
        want = pretrained.read(save(tmp_path / "m.safetensors", tensors)).variables
        jax.tree.map(np.testing.assert_array_equal, got, want)

    def test_kiwano_training_checkpoint_with_its_settings(self, tmp_path, monkeypatch):
        """As kiwano's train_resnet.py writes it: the settings are an object of Kiwano's own class."""
        import sys
        import types

        config = type("KiwanoResNetConfig", (), {"__module__": "kiwano.model.resnet"})
        for name in ("kiwano", "kiwano.model", "kiwano.model.resnet"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["kiwano.model.resnet"].KiwanoResNetConfig = config
        settings = config()
        settings.in_channels, settings.stage_strides = 81, [1, 2, 2, 2]
        content = {"version": "1.0", "epoch": 51, "model": self.state(kiwano_tensors()), "optimizer": {"lr": 0.1}}
        path = self.save(tmp_path / "model50.ckpt", {**content, "name": "KiwanoResNet", "config": settings})
        settings.stage_strides = [2, 2, 2, 1]
        other = self.save(tmp_path / "other.ckpt", {**content, "name": "KiwanoResNet", "config": settings})
        for name in ("kiwano", "kiwano.model", "kiwano.model.resnet"):
            monkeypatch.delitem(sys.modules, name)
        imported = pretrained.read(path)
        assert imported.settings["features"] == 81 and imported.settings["last_taps"] == 3
        assert read(path).about["config"]["in_channels"] == 81
        with pytest.raises(UserError, match=r"stage_strides \(2, 2, 2, 1\) are not supported"):
            pretrained.read(other)

    def test_other_networks_of_kiwano_are_refused_by_name(self, tmp_path):
        content = {"model": self.state(kiwano_tensors()), "name": "XIKiwanoResNet"}
        with pytest.raises(UserError, match="holds a XIKiwanoResNet"):
            pretrained.read(self.save(tmp_path / "m.ckpt", content))

    def test_no_code_of_the_file_is_run(self, tmp_path):
        class Trap:
            def __reduce__(self):
                return Path.touch, (tmp_path / "sprung",)

        path = self.save(tmp_path / "m.pt", {"conv1.weight": Trap()})
        with pytest.raises(UserError, match="is not a checkpoint of plain tensors"):
            pretrained.read(path)
        assert not (tmp_path / "sprung").exists()

    def test_a_view_larger_than_the_file_is_not_copied_out(self, tmp_path):
        state = self.state(wespeaker_tensors())
        state["conv1.weight"] = self.torch.zeros(1).expand(1 << 40, 1, 3, 3)
        with pytest.raises(UserError, match="conv1.weight claims more data than the file holds"):
            pretrained.read(self.save(tmp_path / "m.pt", state))

    def test_half_precision(self, tmp_path):
        state = {name: v.bfloat16() if v.is_floating_point() else v for name, v in self.state(kiwano_tensors()).items()}
        leaves = named_leaves(pretrained.read(self.save(tmp_path / "m.pt", state)).variables)
        assert all(leaf.dtype == np.float32 for _, leaf in leaves)

    def test_what_is_not_a_state_dict(self, tmp_path):
        with pytest.raises(UserError, match="holds a list"):
            pretrained.read(self.save(tmp_path / "m.pt", [1, 2]))
        with pytest.raises(UserError, match="entry 'lr' is a float, not a tensor"):
            pretrained.read(self.save(tmp_path / "m.pt", {"lr": 0.1}))
        whole = self.save(tmp_path / "m.pt", self.state(wespeaker_tensors())).read_bytes()
        (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match="cut.pt is not a checkpoint"):
            pretrained.read(tmp_path / "cut.pt")


def test_without_pytorch_the_message_says_what_to_do(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "m.pt").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(UserError, match="PyTorch is not installed: pip install torch"):
        pretrained.read(tmp_path / "m.pt")


def test_people_s_checkpoints(shared):
    cases = shared / "cases" / "import_checkpoints"
    if not cases.is_dir():
        pytest.skip("no cases")
    expected = None
    for name in ("bf16.safetensors", "nest_model_state_dict.pt", "orig_mod.pt", "resnet_prefix_pyannote.ckpt"):
        if not name.endswith(".safetensors"):
            pytest.importorskip("torch")
        found = pretrained.read(cases / name)
        expected = expected or found.settings
        assert found.architecture == "wespeaker_resnet18" and found.settings == expected
        assert all(np.asarray(leaf).dtype == np.float32 for leaf in jax.tree.leaves(found.variables))
    with pytest.raises(UserError, match="tensor .* is of type F8_E4M3, which is not read"):
        pretrained.read(cases / "f8.safetensors")
    with pytest.raises(UserError, match=r"it holds numpy\S*scalar, which is none$"):
        pretrained.read(cases / "np_scalar.pt")
