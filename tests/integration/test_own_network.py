"""A network that is no ResNet, added by a user in fewer than sixty lines (tests/own_network.py), goes all the way:
training, quantization, fitting, quantized training, diagnosis, cascade, export."""

import json
from pathlib import Path

import commands
import jax
import jax.numpy as jnp
import numpy as np
import own_network
import pytest
from own_config import plain

from kmq_jax import quant
from kmq_jax.core.tree import named_leaves
from kmq_jax.data import source
from kmq_jax.diagnosis.options import DiagnosisOptions
from kmq_jax.diagnosis.run import diagnose_models
from kmq_jax.models import onnx_export, registry, walk
from kmq_jax.models.speaker_model import embed_all, load_model
from kmq_jax.ptq import fit
from kmq_jax.training import loop
from kmq_jax.training.config import default_config, distilled, smoke

DATA = "synthetic:dev?speakers=6&utterances=4"


def config(**changes):
    made = plain(smoke(default_config("own_tdnn")))
    made.validation.data = ""
    made.average_last = 0
    made.update(changes)
    return made


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Models of all kinds: `full`, trained four steps; `2.kmq`, quantized; `fit.kmq`, fitted."""
    place = tmp_path_factory.mktemp("own")
    assert loop.train(config(), place / "full")["steps"] == 4
    patch = pytest.MonkeyPatch()
    flags = (f"--model={place / 'full'}", "--bits=2", "--unfitted", f"--out={place / '2.kmq'}")
    assert commands.run(patch, "quantize", *flags) == 0
    patch.undo()
    return place


def test_it_is_short():
    code = Path(own_network.__file__).read_text().split('"""', 2)[2]
    assert len(code.strip().splitlines()) < 60


def test_what_is_known_without_running_it():
    network = registry.build("own_tdnn")
    assert registry.parameter_count(network) == 81 * 5 * 24 + 24 * 24 * 4 + 3 * 24 + 6 * 24 + 48 * 16 + 16
    macs = registry.layer_macs(network, 100)
    assert macs["frame2/conv/kernel"] == 3 * 24 * 24 * 92 and macs["embedding/kernel"] == 48 * 16
    assert network.components() == ("frame1", "frame2", "frame3", "pool", "head")
    assert all(layer.follows is None for layer in walk.layers(network) if layer.kind == walk.NORMALISATION)


def test_padding_changes_nothing():
    network = registry.build("own_tdnn")
    variables, run = registry.initialize(network, jax.random.key(0)), jax.jit(network.apply)
    features = np.random.default_rng(0).normal(size=(2, 60, 81)).astype(np.float32)
    padded = np.concatenate([features, np.full((2, 30, 81), 1e4, np.float32)], axis=1)
    together = run(variables, padded, jnp.array([60, 45]))
    np.testing.assert_allclose(together[0], run(variables, features)[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(together[1], run(variables, features[:, :45])[1], rtol=1e-5, atol=1e-5)


def test_fitting_brings_it_nearer_to_the_reference(workdir):
    reference, two = load_model(workdir / "full"), load_model(workdir / "2.kmq")
    fitted = fit.fit_on(reference, two, source.open_source(DATA), crops=24, seconds=1.0)
    exact, before, after = (embed_all(model, source.open_source(DATA)) for model in (reference, two, fitted))
    assert np.mean((after - exact) ** 2) < 0.5 * np.mean((before - exact) ** 2)
    assert quant.size_bytes(fitted.variables) == quant.size_bytes(two.variables)


def test_it_trains_quantized_with_a_teacher(workdir, tmp_path):
    section = distilled(config(init_from=str(workdir / "full")), 2)
    section.distill.update(weight=1.0, teacher=str(workdir / "full"))
    summary = loop.train(section, tmp_path / "run")
    assert summary["finished"]
    found = load_model(tmp_path / "run")
    tensors = [leaf for _, leaf in named_leaves(found.variables, quant.is_codebook_tensor)]
    assert sum(quant.is_codebook_tensor(leaf) for leaf in tensors) == 4


def test_it_is_diagnosed(workdir):
    reference, two = load_model(workdir / "full"), load_model(workdir / "2.kmq")
    options = DiagnosisOptions(
        retention_utterances=16, layer_utterances=16, hessian_draws=2, hessian_utterances=2, hessian_seconds=1.0,
        replicates=20,
    )  # fmt: skip
    tables = diagnose_models(reference, {2: two}, DATA, DATA, options).tables
    assert [row["layer"] for row in tables["layers"]] == ["frame1/conv", "frame2/conv", "frame3/conv", "embedding"]
    assert [row["block"] for row in tables["blocks"]] == ["frame1", "frame2", "frame3", "pool", "embedding"]
    assert all(row["damage"] > 0 and row["activation_sqnr_db"] is not None for row in tables["layers"])
    assert {row["component"] for row in tables["retention"]} == {"", "frame1", "frame2", "frame3", "head"}


def test_it_stands_in_a_cascade(workdir, monkeypatch):
    def run(command, **flags):
        assert commands.run(monkeypatch, command, *(f"--{name}={value}" for name, value in flags.items())) == 0

    monkeypatch.chdir(workdir)
    run("extract", model="full", data=DATA, out="32.npz")
    run("extract", model="2.kmq", data=DATA, out="2.npz")
    run("calibrate", stage="2:2.npz", reference="32.npz", trials=DATA, out="p.json", replicates=20)
    run("cascade", policy="p.json", stage="2:2.npz", reference="32.npz", trials=DATA, out="d.csv", json="c.json",
        replicates=20)  # fmt: skip
    assert 0 <= json.loads(Path("c.json").read_text())["eer"] <= 100


@pytest.mark.parametrize("name", ["full", "2.kmq"])
def test_onnx_runtime_gives_its_embeddings(workdir, tmp_path, name):
    runtime = pytest.importorskip("onnxruntime")
    model = load_model(workdir / name)
    network, variables = model.network(), quant.dequantize_params(model.variables)
    onnx_export.export(tmp_path / "own.onnx", network, model.variables)
    features = np.random.default_rng(0).normal(size=(3, 50, 81)).astype(np.float32)
    (found,) = runtime.InferenceSession(tmp_path / "own.onnx").run(["embs"], {"feats": features})
    np.testing.assert_allclose(found, network.apply(variables, features), rtol=1e-4, atol=1e-4)
