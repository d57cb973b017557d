"""Centred mel features against numbers that the original code gave, librosa's filters, and padding.

golden_mel.json holds features by the original code (each entry names repository, commit and function; PyTorch 2.14,
torchaudio 2.11, librosa 0.11) of the wave below: every eighth of the first, the middle and the last frame.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import librosa_filters
import numpy as np
import originals
import pytest

from kmq_jax import frontend
from kmq_jax.core.errors import UserError
from kmq_jax.frontend import mel
from kmq_jax.models import onnx_export, registry
from kmq_jax.models.speaker_model import FRONTENDS

GOLDEN = json.loads((Path(__file__).parent / "golden_mel.json").read_text())
QUIET = {"resemblyzer": 0.05}  # below the level that recordings are raised to


def wave(name: str) -> np.ndarray:
    """Near silence, noise with a rising tone, and another tone; float32 `[20123]`."""
    time = np.arange(20123) / 16000
    tones = 0.2 * np.sin(2 * np.pi * 220 * time) * (time > 0.3) + 0.02 * np.sin(2 * np.pi * 3100 * time * (1 + time))
    sound = (originals.uniform("wave", time.shape) - 0.5) * 0.05 + tones
    return (sound * np.where(time < 0.1, 1e-4, 1)).astype(np.float32) * np.float32(QUIET.get(name, 1))


@pytest.mark.parametrize("name", GOLDEN)
def test_features_are_those_of_the_original_code(name):
    golden = GOLDEN[name]
    found = np.asarray(frontend.features_of(jnp.asarray(wave(name))[None], FRONTENDS[name])[0], np.float64)
    assert list(found.shape) == golden["shape"]
    largest = np.abs(golden["first"] + golden["middle"] + golden["last"]).max()
    for frame, place in (("first", 0), ("middle", len(found) // 2), ("last", -1)):
        np.testing.assert_allclose(found[place, ::8], golden[frame], rtol=1e-4, atol=1e-4 * largest)
    np.testing.assert_allclose(np.abs(found).mean(), golden["mean_abs"], rtol=1e-4)


@pytest.mark.parametrize("name", GOLDEN)
def test_padding_changes_nothing(name):
    """A recording gives the same numbers alone and in a longer batch, whatever stands behind it."""
    config = FRONTENDS[name]
    lengths = [20123, 12345, 400]
    batch = np.full((3, 25000), 0.5, np.float32)
    for row, length in zip(batch, lengths):
        row[:length] = wave(name)[:length]
    together = np.asarray(frontend.features_of(jnp.asarray(batch), config, jnp.array(lengths)))
    for row, length in zip(together, lengths):
        alone = np.asarray(frontend.features_of(jnp.asarray(wave(name)[None, :length]), config))[0]
        frames = frontend.num_frames(length, config)
        assert len(alone) == frames == 1 + length // config.shift
        np.testing.assert_allclose(row[:frames], alone, rtol=1e-4, atol=1e-4 * np.abs(alone).max())
        assert not row[frames:].any()


@pytest.mark.parametrize("name", GOLDEN)
def test_onnx_runtime_gives_the_same_features(name, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    config = FRONTENDS[name]
    settings = {**registry.smoke_settings("xvector"), "features": config.num_features}
    network = registry.build("xvector", **settings)
    variables = registry.initialize(network, jax.random.key(0))
    onnx_export.export(tmp_path / "a.onnx", network, variables, fbank=config)
    session = runtime.InferenceSession(tmp_path / "a.onnx")
    features = frontend.features_of(jnp.asarray(wave(name))[None], config)
    expected = np.asarray(network.apply(variables, features))
    (found,) = session.run(["embs"], {"wave": wave(name)[None]})
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())
    (silent,) = session.run(["embs"], {"wave": np.zeros((1, 8000), np.float32)})
    assert np.isfinite(silent).all()


def test_digital_silence_is_finite():
    for name in GOLDEN:
        features = frontend.features_of(jnp.zeros((1, 8000)), FRONTENDS[name], jnp.array([4000]))
        assert np.isfinite(np.asarray(features)).all()


@pytest.mark.parametrize("form", ["librosa", "torchaudio"])
def test_filters_are_librosa_s(form):
    config = mel.MelConfig(40, fft_size=512, filters=form, low_freq=20.0, high_freq=7600.0)
    np.testing.assert_allclose(mel.mel_filters(config), librosa_filters.filters(form).T, atol=1e-9)


@pytest.mark.slow  # librosa compiles for a third of a minute
@pytest.mark.parametrize("name", librosa_filters.KEPT)
def test_the_filters_that_are_kept_are_librosa_s(name):
    librosa = pytest.importorskip("librosa")
    settings = librosa_filters.COMMON | librosa_filters.KEPT[name]["settings"]
    theirs = librosa.filters.mel(**settings, dtype=np.float64)
    np.testing.assert_allclose(librosa_filters.filters(name), theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "settings", [{"num_mel_bins": 0}, {"fft_size": 256}, {"low_freq": 9000.0}, {"frame_shift_ms": 0.0}]
)
def test_settings_out_of_range_are_named(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        mel.MelConfig(**{"num_mel_bins": 40, **settings})
