"""Filterbank features against kaldi-native-fbank, librosa and float64 arithmetic."""

import jax
import jax.numpy as jnp
import librosa_filters
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from kmq_jax.benchmarks.frontend import kaldi_fbank
from kmq_jax.core.errors import UserError
from kmq_jax.frontend.fbank import KIWANO, WESPEAKER, FbankConfig, _mel_filters, fbank, num_frames

PRESETS = pytest.mark.parametrize("config", [KIWANO, WESPEAKER], ids=["kiwano", "wespeaker"])


def ours(wave: np.ndarray, config: FbankConfig) -> np.ndarray:
    return np.asarray(fbank(jnp.asarray(wave, jnp.float32), config))


def voice(seconds: float = 1.0, seed: int = 0) -> np.ndarray:
    """Harmonics of a gliding pitch under a slow envelope, with a little noise: speech enough for arithmetic."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(16000 * seconds)) / 16000
    phase = 2 * np.pi * np.cumsum(120 + 30 * np.sin(5 * time)) / 16000
    tone = sum(np.sin(k * phase) / k for k in range(1, 30))
    return (0.1 * tone * (1 + np.sin(9 * time)) + 1e-3 * rng.standard_normal(len(time))).astype(np.float32)


def check_parity(wave: np.ndarray, config: FbankConfig) -> None:
    difference = np.abs(ours(wave, config) - kaldi_fbank(wave, config))
    assert difference.max() < 1e-2
    assert difference.mean() < 1e-4


@PRESETS
@pytest.mark.parametrize("folder", ["so762/dev", "words/dev"])
def test_real_speech_equals_kaldi(shared, folder, config):
    files = sorted((shared / "data" / folder).rglob("*.opus"))[::50]
    assert len(files) >= 5
    differences = []
    for file in files:
        wave, rate = soundfile.read(file, dtype="float32")
        assert rate == 16000
        padded = np.pad(wave, (0, -len(wave) % 32000))  # few shapes to compile; padding adds frames at the end only
        differences.append(np.abs(ours(padded, config)[: num_frames(len(wave), config)] - kaldi_fbank(wave, config)))
    assert max(d.max() for d in differences) < 1e-2
    assert np.mean(np.concatenate([d.ravel() for d in differences])) < 1e-4


CLICK = np.zeros(16000, np.float32)
CLICK[8000] = 0.9
AWKWARD = {
    "voice": voice(),
    "silence": np.zeros(16000, np.float32),
    "click": CLICK,
    "clipping": np.clip(50 * voice(), -1, 32767 / 32768).astype(np.float32),
    "offset": 0.5 * voice() + 0.1,
    "noise": (0.3 * np.random.default_rng(0).standard_normal(16000)).astype(np.float32),
}


@PRESETS
@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_waves_equal_kaldi(name, config):
    check_parity(AWKWARD[name], config)


@pytest.mark.parametrize(
    "config",
    [
        FbankConfig(sample_rate=8000, num_mel_bins=23, window="hamming"),
        FbankConfig(frame_length_ms=32, frame_shift_ms=8, preemphasis=0.0, use_energy=True),
        FbankConfig(sample_rate=11025, num_mel_bins=30, frame_length_ms=25),  # an odd number of samples: 275
        FbankConfig(num_mel_bins=40, low_freq=100, high_freq=4000),
    ],
    ids=["telephone", "long frames", "odd frames", "narrow"],
)
def test_other_settings_equal_kaldi(config):
    check_parity(voice(), config)


def test_presets():
    assert (KIWANO.num_features, WESPEAKER.num_features) == (81, 80)
    assert (KIWANO.length, KIWANO.shift, KIWANO.fft_size) == (400, 160, 512)
    assert (KIWANO.top_freq, WESPEAKER.top_freq) == (7600, 8000)


def test_filters_of_librosa_and_kaldi_peak_at_the_same_frequencies():
    # librosa's triangles are straight in Hz and Kaldi's in mel; between, both follow the HTK formula.
    theirs = librosa_filters.filters("wide")
    mine = _mel_filters(FbankConfig(num_mel_bins=40)).T
    assert np.abs(mine.argmax(1) - theirs[:, :256].argmax(1)).max() <= 1
    np.testing.assert_allclose(mine, theirs[:, :256], atol=0.02)


def test_filters_sum_to_one_inside():
    filters = _mel_filters(WESPEAKER)
    np.testing.assert_allclose(filters[4:240].sum(1), 1, rtol=1e-12)


def test_silence_is_the_floor():
    np.testing.assert_allclose(ours(np.zeros(1600), KIWANO), np.log(np.finfo(np.float32).eps), rtol=1e-6)


def test_scale_shifts_every_feature_alike():
    plain, scaled = FbankConfig(), FbankConfig(waveform_scale=8.0)
    np.testing.assert_allclose(ours(voice(), scaled), ours(voice(), plain) + 2 * np.log(8), atol=1e-4)


def test_energy_is_the_raw_energy():
    wave = voice(0.025)
    expected = np.log(np.sum((wave - wave.mean(dtype=np.float64)) ** 2, dtype=np.float64))
    np.testing.assert_allclose(ours(wave, KIWANO)[0, 0], expected, rtol=1e-5)


@given(samples=st.integers(0, 5000))
@settings(max_examples=100, deadline=None)
def test_number_of_frames(samples):
    starts = range(0, max(samples - 399, 0), 160)
    assert num_frames(samples, KIWANO) == len(starts)
    assert num_frames(np.array([samples]), KIWANO).tolist() == [len(starts)]
    assert num_frames(jnp.array(samples), KIWANO) == len(starts)


@pytest.mark.parametrize("samples", [0, 1, 399])
def test_shorter_than_a_frame_has_no_frames(samples):
    assert ours(np.zeros((3, samples)), KIWANO).shape == (3, 0, 81)


def test_exactly_one_frame():
    check_parity(voice(0.025), KIWANO)
    assert ours(voice(0.025), KIWANO).shape == (1, 81)


def test_batch_equals_single_and_padding_changes_nothing():
    long, short = voice(1.0, 1), voice(0.73, 2)
    batch = np.stack([long, np.pad(short, (0, len(long) - len(short)), constant_values=0.5)])
    together = ours(batch, KIWANO)
    np.testing.assert_allclose(together[0], ours(long, KIWANO), atol=1e-4)
    frames = num_frames(len(short), KIWANO)
    np.testing.assert_allclose(together[1, :frames], ours(short, KIWANO), atol=1e-4)


def test_any_leading_axes():
    waves = np.stack([voice(0.1, seed) for seed in range(6)])
    np.testing.assert_array_equal(ours(waves.reshape(2, 3, -1), KIWANO).reshape(6, -1, 81), ours(waves, KIWANO))


def test_nan_stays_in_its_frames():
    wave = voice()
    wave[1000] = np.nan
    bad = np.isnan(ours(wave, WESPEAKER)).all(1)
    holds = [start <= 1000 < start + 400 for start in range(0, 16000 - 399, 160)]
    np.testing.assert_array_equal(bad, holds)


def test_compiles_once_for_a_batch_shape():
    config = FbankConfig(num_mel_bins=37)
    before = fbank._cache_size()
    for seed in range(3):
        fbank(jnp.asarray(voice(0.2, seed))[None], config)
    assert fbank._cache_size() == before + 1


def test_accelerators_get_the_whole_batch_and_no_fft():
    # What a GPU would run: no loop over utterances, no gather, no FFT (which XLA cannot split over devices).
    text = jax.jit(lambda x: fbank(x, KIWANO)).trace(jnp.zeros((4, 8000))).lower(lowering_platforms=("cuda",)).as_text()
    assert "dot_general" in text
    assert not any(operation in text for operation in ("stablehlo.while", "stablehlo.fft", "stablehlo.gather"))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"window": "hann"}, "window"),
        ({"preemphasis": 1.5}, "preemphasis"),
        ({"high_freq": 9000}, "high_freq"),
        ({"high_freq": -8000}, "high_freq"),
        ({"frame_shift_ms": 30}, "frame_shift_ms"),
        ({"frame_shift_ms": 0}, "frame_shift_ms"),
        ({"num_mel_bins": 0}, "num_mel_bins"),
        ({"num_mel_bins": 200}, "num_mel_bins"),
        # What these would take, no machine has.
        ({"num_mel_bins": 10**13}, "num_mel_bins"),
        ({"frame_length_ms": 1e13}, r"frame_length_ms \(=10000000000000.0\) must be at most 256"),
    ],
)
def test_wrong_settings_are_named(settings, name):
    with pytest.raises(UserError, match=name):
        FbankConfig(**settings)


def test_integers_are_refused():
    with pytest.raises(UserError, match="int16"):
        fbank(jnp.zeros(1600, jnp.int16), KIWANO)
