"""GE2E: windows by numpy, an LSTM by numpy, counts, padding, quantization and fitting of what sees the past."""

import dataclasses
import importlib.util
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import originals
import pytest

from kmq_jax import quant
from kmq_jax.core.tree import named_leaves
from kmq_jax.interop.import_model import import_model
from kmq_jax.models import registry
from kmq_jax.models.ge2e import windows_of
from kmq_jax.models.speaker_model import SpeakerModel, embed_waves
from kmq_jax.nn.recurrent import recur
from kmq_jax.ptq import fit
from kmq_jax.ptq.moments import measure

SETTINGS = {"width": 8, "layers": 2, "embedding_size": 6, "features": 5}


@pytest.fixture(scope="module")
def tiny():
    network = registry.build("ge2e", **SETTINGS)
    return network, registry.initialize(network, jax.random.key(1))


def lstm_by_hand(x, kernel):
    """One window `[time, 4 * width]` in float64, frame by frame."""
    width = len(kernel)
    cell, output, outputs = np.zeros(width), np.zeros(width), []
    for frame in np.asarray(x, np.float64):
        gates = frame + output @ np.asarray(kernel, np.float64)
        enters, keeps, leaves = (1 / (1 + np.exp(-gates[i * width : (i + 1) * width])) for i in (0, 1, 3))
        cell = keeps * cell + enters * np.tanh(gates[2 * width : 3 * width])
        output = leaves * np.tanh(cell)
        outputs.append(output)
    return np.array(outputs)


def test_each_window_is_an_lstm_of_its_own():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 14, 12)), rng.normal(size=(3, 12))
    found = np.asarray(recur(jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32), 7))
    for batch in range(2):
        for start in (0, 7):
            expected = lstm_by_hand(x[batch, start : start + 7], kernel)
            np.testing.assert_allclose(found[batch, start : start + 7], expected, atol=1e-5)


def windows_by_rule(samples: int) -> int:
    """Resemblyzer's rule: 1.3 windows a second; three quarters of the last must be covered but for an only one."""
    frames, step = int(np.ceil((samples + 1) / 160)), round(16000 / 1.3 / 160)
    starts = list(range(0, max(1, frames - 160 + step + 1), step))
    covered = (samples - 160 * starts[-1]) / (160 * 160)
    return len(starts) - (covered < 0.75 and len(starts) > 1)


def test_windows_are_those_of_the_original_rule():
    for samples in range(400, 200_000, 397):
        assert windows_of(1 + samples // 160) == windows_by_rule(samples), samples


def test_counts():
    network = registry.build("ge2e")
    inputs, cells = 40 + 2 * 256, 3 * 256
    assert registry.parameter_count(network) == 1024 * (inputs + cells) + 3 * 1024 + 256 * 257
    assert registry.macs(network, 300) == 3 * (160 * 1024 * (inputs + cells) + 256 * 256)


@pytest.mark.parametrize("lengths", [[290, 61], [300, 197], [300, 198]])
def test_padding_changes_nothing(tiny, lengths):
    network, variables = tiny
    features = np.random.default_rng(0).uniform(size=(2, 300, 5)).astype(np.float32)
    run = jax.jit(network.apply)
    together = run(variables, features, jnp.array(lengths))
    for row, length in enumerate(lengths):
        alone = run(variables, features[row : row + 1, :length])
        np.testing.assert_allclose(together[row], alone[0], atol=1e-5)


@pytest.mark.parametrize("frames", [60, 197, 198, 300])
def test_a_part_gives_as_many_frames_as_its_windows_have(tiny, frames):
    network, variables = tiny
    _, outputs, _ = jax.eval_shape(network.taps, variables, np.zeros((1, frames, 5), np.float32))
    for part in network.parts()[:2]:
        assert part.frames(frames) == outputs[part.name].shape[1]


def test_embeddings_have_length_one_and_are_not_negative(tiny):
    network, variables = tiny
    found = np.asarray(network.apply(variables, np.random.default_rng(0).uniform(size=(3, 200, 5))))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    assert (found >= 0).all()


def recordings(seed):
    """Features `[16, 160, 40]`, each of a spectrum of its own."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.uniform(size=(16, 1, 40)) * rng.uniform(size=(16, 160, 40)), jnp.float32)


@pytest.fixture(scope="module")
def models():
    """A network, and its weights at 2 bits."""
    settings = {**SETTINGS, "width": 32, "features": 40, "embedding_size": 32}
    variables = registry.initialize(registry.build("ge2e", **settings), jax.random.key(1))
    # Steeper weights than the first ones: an LSTM that hardly moves would tell nothing.
    variables = {"params": jax.tree.map(lambda x: 2 * x, variables["params"])}
    reference = SpeakerModel("ge2e", settings, "resemblyzer", variables)
    plain = {"params": quant.quantize_params(variables["params"], quant.QuantSpec(2))}
    return reference, dataclasses.replace(reference, variables=plain)


def test_fitting_brings_embeddings_nearer_on_other_recordings(models):
    reference, plain = models
    fitted, other = fit.fit(reference, plain, recordings(0)), recordings(2)

    def embed(model):
        return np.asarray(model.network().apply(quant.dequantize_params(model.variables), other))

    wanted = embed(reference)
    before, after = (np.sum(wanted * embed(model), axis=1).mean() for model in (plain, fitted))
    assert 1 - after < 0.8 * (1 - before)
    assert quant.size_bytes(fitted.variables).total == quant.size_bytes(plain.variables).total


def test_what_sees_the_past_is_quantized_and_fitted(models):
    reference, plain = models
    fitted = fit.fit(reference, plain, recordings(0))
    for name in ("lstm1/input", "lstm1/recurrence", "lstm2/input", "lstm2/recurrence"):
        leaves = [model.variables["params"] for model in (plain, fitted)]
        before, after = (dict(named_leaves(tree, quant.is_codebook_tensor))[f"{name}/kernel"] for tree in leaves)
        assert before.bits == after.bits == 2
        assert not np.array_equal(before.packed, after.packed), name


def test_moments_are_measured_through_recurrences(models):
    assert set(measure(*models, recordings(0)).maps) == {"lstm1/input", "lstm2/input"}


def weights() -> Path:
    """Resemblyzer's own weights: of the variable KMQ_RESEMBLYZER, or of the installed package."""
    if given := os.environ.get("KMQ_RESEMBLYZER"):
        return Path(given)
    package = importlib.util.find_spec("resemblyzer")
    if package is None or package.origin is None:
        pytest.skip("no weights: install Resemblyzer, or name its pretrained.pt by KMQ_RESEMBLYZER")
    return Path(package.origin).parent / "pretrained.pt"


def test_real_weights_give_the_embeddings_of_resemblyzer(tmp_path):
    """golden_resemblyzer.json: Resemblyzer 0.1.4 itself on three waves, the shortest of less than a window."""
    golden = json.loads((Path(__file__).parents[1] / "interop" / "golden_resemblyzer.json").read_text())
    path = weights()
    pytest.importorskip("torch", reason="PyTorch checkpoints need torch")
    model = import_model(path, tmp_path / "model")
    assert model.frontend == "resemblyzer" and model.architecture == "ge2e"
    for samples, expected, near in zip((9000, 29123, 50123), golden["embedding"], (4e-3, 1e-5, 1e-5)):
        time = np.arange(samples) / 16000
        tones = 0.2 * np.sin(2 * np.pi * 220 * time) * (time > 0.3)
        tones += 0.02 * np.sin(2 * np.pi * 3100 * time * (1 + time))
        wave = ((originals.uniform("wave", (samples,)) - 0.5) * 0.05 + tones) * np.where(time < 0.1, 1e-4, 1)
        (found,) = embed_waves(model, [0.3 * wave.astype(np.float32)])
        np.testing.assert_allclose(found[:16], expected, atol=near)
