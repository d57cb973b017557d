"""Log-mel filterbank features as Kaldi computes them, in JAX.

Most speaker networks are trained on Kaldi's features, so a network gives its best scores only when it is fed
the same numbers. For each frame of 25 ms, every 10 ms:

1. subtract the frame's mean (a microphone's constant offset says nothing of the speaker);
2. pre-emphasis, `y[n] = x[n] - 0.97 x[n-1]`: speech falls by about 6 dB an octave, and this lifts it level. The
   first sample has no neighbour, and Kaldi takes the sample itself: `y[0] = x[0] - 0.97 x[0]`;
3. a window, which fades the frame's edges so that a loud frequency does not leak over all the others;
4. the power spectrum of the frame, padded with zeros to 512 samples;
5. triangular filters, equally spaced on the mel scale, as the ear's frequency resolution is;
6. the logarithm of each, with float32's epsilon as its floor: digital silence gives -15.94, not minus infinity.

The discrete Fourier transform is two matrix products rather than a fast Fourier transform. A power spectrum
does not depend on where time zero lies. With time zero at the middle of the frame, the cosine terms see only
the even half of the frame and the sine terms only the odd half, so each product is a quarter of the full one.
That is about as fast as `jnp.fft.rfft` on a CPU, suits accelerators, and stays on its device when the batch is
sharded over them (for an FFT, XLA gathers the whole batch on every device).

References:
    Povey et al., "The Kaldi Speech Recognition Toolkit", ASRU 2011: `feat/feature-window.cc`,
    `feat/mel-computations.cc` and `feat/feature-fbank.cc` in its source.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from kmq_jax.core.errors import UserError
from kmq_jax.frontend import mel
from kmq_jax.frontend.normalize import mean_normalize

_FLOOR = float(np.finfo(np.float32).eps)  # Kaldi's
_LARGEST_FFT = 4096  # points: settings may come from anyone, and set the size of matrices


@dataclasses.dataclass(frozen=True)
class FbankConfig:
    """The settings of `fbank`; hashable, so that it can be a static argument of `jax.jit`.

    Attributes:
        sample_rate: in Hz.
        num_mel_bins: triangular filters.
        frame_length_ms: length of a frame.
        frame_shift_ms: step from one frame to the next.
        window: "povey" (a Hann window to the power 0.85, Kaldi's own: it reaches zero at the edges as Hann does but
            keeps a wider middle) or "hamming" (which stops at 0.08: a narrower main lobe, HTK's habit).
        preemphasis: the coefficient of step 2; 0 turns it off.
        low_freq: lower edge of the first filter, in Hz.
        high_freq: upper edge of the last filter in Hz; zero or a negative value counts from the Nyquist frequency.
        use_energy: put the frame's log energy before the filters. It is Kaldi's raw energy: after the mean is
            removed, before pre-emphasis and window.
        waveform_scale: factor on the waveform, which comes in [-1, 1). Kaldi itself reads 16-bit integers, hence
            32768. It shifts every log-mel by a constant, which mean normalisation takes away again, but
            it also lifts quiet frames off the floor: with 1, everything below about -70 dB is cut flat.

    >>> FbankConfig(num_mel_bins=40, window="hamming").frame_shift_ms
    10.0
    """

    sample_rate: int = 16000
    num_mel_bins: int = 80
    frame_length_ms: float = 25.0
    frame_shift_ms: float = 10.0
    window: str = "povey"
    preemphasis: float = 0.97
    low_freq: float = 20.0
    high_freq: float = 0.0
    use_energy: bool = False
    waveform_scale: float = 1.0

    margin = 0  # samples beyond both ends that frames see
    subtract_mean = True  # networks are fed features less their mean

    def __post_init__(self) -> None:
        """Checks the settings.

        Raises:
            UserError: a setting is out of range; the message names it.
        """
        if self.window not in ("povey", "hamming"):
            raise UserError(f'window (={self.window!r}) must be "povey" or "hamming"')
        if not 0 <= self.preemphasis <= 1:
            raise UserError(f"preemphasis (={self.preemphasis}) must lie in 0 to 1")
        if self.shift < 1 or self.length < 2 or self.shift > self.length:
            raise UserError(
                f"frame_shift_ms (={self.frame_shift_ms}) must be positive and at most "
                f"frame_length_ms (={self.frame_length_ms})"
            )
        if self.fft_size > _LARGEST_FFT:
            most = 1000 * _LARGEST_FFT / self.sample_rate
            raise UserError(f"frame_length_ms (={self.frame_length_ms}) must be at most {most:g} at this sample rate")
        if not 0 <= self.low_freq < self.top_freq <= self.sample_rate / 2:
            raise UserError(
                f"low_freq (={self.low_freq}) and high_freq (={self.high_freq}) must be in order and below "
                f"half the sample rate (={self.sample_rate})"
            )
        if not 1 <= self.num_mel_bins <= self.fft_size or (_mel_filters(self).sum(0) == 0).any():
            raise UserError(f"num_mel_bins (={self.num_mel_bins}) leaves a filter without a frequency; ask for fewer")

    @property
    def length(self) -> int:
        """Samples in a frame."""
        return int(self.sample_rate * self.frame_length_ms / 1000)

    @property
    def shift(self) -> int:
        """Samples from one frame to the next."""
        return int(self.sample_rate * self.frame_shift_ms / 1000)

    @property
    def fft_size(self) -> int:
        """The frame's length rounded up to a power of two; 512 for 25 ms at 16 kHz."""
        return 1 << (self.length - 1).bit_length()

    @property
    def top_freq(self) -> float:
        """Upper edge of the last filter, in Hz."""
        return self.high_freq if self.high_freq > 0 else self.sample_rate / 2 + self.high_freq

    @property
    def num_features(self) -> int:
        """Features in a frame: the filters, and one more with the log energy."""
        return self.num_mel_bins + self.use_energy


def _to_mel(hertz: np.ndarray | float) -> np.ndarray:
    """The mel scale as Kaldi has it: linear below about 700 Hz, logarithmic above."""
    return 1127.0 * np.log1p(np.asarray(hertz, np.float64) / 700.0)


@functools.cache
def _mel_filters(config: FbankConfig) -> np.ndarray:
    """Makes the triangular filters, straight-sided on the mel scale (librosa's are straight-sided in Hz).

    Returns:
        Weights [fft_size / 2, num_mel_bins]; Kaldi leaves out the Nyquist frequency itself.
    """
    edges = np.linspace(_to_mel(config.low_freq), _to_mel(config.top_freq), config.num_mel_bins + 2)
    width = edges[1] - edges[0]
    freqs = _to_mel(np.arange(config.fft_size // 2) * config.sample_rate / config.fft_size)[:, None]
    return np.maximum(0, np.minimum(freqs - edges[:-2], edges[2:] - freqs) / width)


FrontEnd: TypeAlias = FbankConfig | mel.MelConfig
"""The settings of any front end."""

KIWANO = FbankConfig(high_freq=-400.0, use_energy=True)
"""Kiwano's 81 features: log energy and 80 filters up to 7,600 Hz, povey window, waveform in [-1, 1)."""

WESPEAKER = FbankConfig(window="hamming", waveform_scale=32768.0)
"""WeSpeaker's 80 features: 80 filters up to 8,000 Hz, Hamming window, waveform in the range of 16-bit integers."""

SPEAKER3D = FbankConfig()
"""3D-Speaker's 80 features: 80 filters up to 8,000 Hz, povey window, waveform in [-1, 1)."""


def num_frames(samples: Any, config: FrontEnd) -> Any:
    """Counts the frames of a waveform: whole ones (Kaldi's `snip_edges=true`), or centred ones (`MelConfig`).

    Args:
        samples: an int, or a NumPy or JAX array of lengths.
        config: the settings.

    Returns:
        Frames, in the form that `samples` came in; 0 for anything shorter than one frame.

    >>> num_frames(16000, WESPEAKER), num_frames(399, WESPEAKER), num_frames(16000, mel.SPEECHBRAIN)
    (98, 0, 101)
    """
    frames = (samples + config.margin - config.length) // config.shift + 1
    return frames * (samples >= config.length)


def _window(config: FbankConfig) -> np.ndarray:
    """The window [length], symmetric."""
    if config.window == "povey":
        return np.hanning(config.length) ** 0.85
    return np.hamming(config.length)


@functools.cache
def _operators(config: FbankConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Makes the constant matrices: windowed cosines and sines [half, bins], filters [bins, num_mel_bins].

    `half` is half the frame's length, rounded up. Frequencies outside every filter are left out.
    """
    filters = _mel_filters(config)
    used = np.flatnonzero(filters.sum(1))
    half = (config.length + 1) // 2
    time = np.arange(half) - (config.length - 1) / 2
    angle = 2 * np.pi / config.fft_size * np.outer(time, used)
    window = _window(config)[:half, None].copy()
    if config.length % 2:
        window[-1] /= 2  # the middle sample of an odd frame meets itself when the frame is folded
    return (
        (np.cos(angle) * window).astype(np.float32),
        (np.sin(angle) * window).astype(np.float32),
        filters[used].astype(np.float32),
    )


def spectrum_operators(config: FrontEnd) -> tuple[np.ndarray, np.ndarray]:
    """Pre-emphasis, window and transform as one matrix, and the filters: for engines that multiply matrices.

    Args:
        config: the settings.

    Returns:
        `transform` float32 `[length, 2 bins]`, from a frame (for Kaldi's features less its mean) to the real and
        imaginary parts of its spectrum, and `filters` float32 `[2 bins, num_mel_bins]`, from their squares to the
        filters' energies.

    >>> [matrix.shape for matrix in spectrum_operators(WESPEAKER)]
    [(400, 510), (510, 80)]
    """
    if isinstance(config, mel.MelConfig):
        return mel.operators(config)
    kaldi = _mel_filters(config)
    used = np.flatnonzero(kaldi.sum(1))
    angle = 2 * np.pi / config.fft_size * np.outer(np.arange(config.length) - (config.length - 1) / 2, used)
    windowed = np.concatenate([np.cos(angle), np.sin(angle)], axis=1) * _window(config)[:, None]
    # frame @ emphasis is y[n] = x[n] - p x[n-1], and y[0] = x[0] - p x[0].
    emphasis = np.eye(config.length) - config.preemphasis * np.eye(config.length, k=1)
    emphasis[0, 0] -= config.preemphasis
    return (emphasis @ windowed).astype(np.float32), np.concatenate([kaldi[used]] * 2).astype(np.float32)


def _frames(wave: jax.Array, config: FrontEnd, count: int) -> jax.Array:
    """Cuts a waveform [..., samples] into `count` overlapping frames [..., frames, length].

    A frame is a few whole blocks of gcd(shift, length) samples, so all frames are a handful of strided slices laid
    side by side: no gather, and no table of indices as large as the output.
    """
    block = math.gcd(config.shift, config.length)
    step = config.shift // block
    blocks = wave[..., : wave.shape[-1] // block * block].reshape(*wave.shape[:-1], -1, block)
    last = (count - 1) * step + 1  # one past the first block of the last frame
    pieces = [blocks[..., i : i + last : step, :] for i in range(config.length // block)]
    return jnp.concatenate(pieces, axis=-1)


def _features(wave: jax.Array, config: FbankConfig) -> jax.Array:
    """Computes the features [..., frames, num_features] of waveforms [..., samples] of at least one frame."""
    cosines, sines, filters = _operators(config)
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    frames = _frames(wave * config.waveform_scale, config, num_frames(wave.shape[-1], config))
    frames = frames - frames.mean(-1, keepdims=True)
    # The first sample of a frame counts as its own predecessor, as in Kaldi.
    before = jnp.concatenate([frames[..., :1], frames[..., :-1]], axis=-1)
    lifted = frames - config.preemphasis * before

    # The window is symmetric: cosines see what is even in a frame, sines what is odd, and half of each tells all.
    half = cosines.shape[0]
    left, right = lifted[..., :half], lifted[..., ::-1][..., :half]
    spectrum = product(left + right, cosines) ** 2 + product(left - right, sines) ** 2
    features = product(spectrum, filters)
    if config.use_energy:
        # Of the frames before pre-emphasis and window: Kaldi's raw energy.
        features = jnp.concatenate([jnp.sum(frames**2, -1, keepdims=True), features], axis=-1)
    return jnp.log(jnp.maximum(features, _FLOOR))


@functools.partial(jax.jit, static_argnames="config")
def fbank(wave: jax.Array, config: FrontEnd, samples: jax.Array | None = None) -> jax.Array:
    """Computes filterbank features.

    Kaldi's frames never look beyond their own samples, so padding at the end of a waveform adds frames (count the real
    ones with `num_frames`) and changes none. Centred frames do: they need `samples`. A NaN sample makes the frames that
    hold it NaN, and no others.

    Args:
        wave: waveforms [..., samples], floating point in [-1, 1).
        config: the settings.
        samples: real samples of each waveform [...], integer; None when every sample is real.

    Returns:
        Features [..., frames, num_features], float32. `frames` is `num_frames(samples, config)`: zero when the
        waveform is shorter than a frame. Frames beyond the real ones hold anything.

    Raises:
        UserError: the waveform is a scalar, or not floating point (16-bit integers would be off by 32768).

    >>> fbank(jnp.zeros((2, 16000)), KIWANO).shape, fbank(jnp.zeros(16000), mel.SPEECHBRAIN).shape
    ((2, 98, 81), (101, 80))
    """
    if wave.ndim == 0 or not jnp.issubdtype(wave.dtype, jnp.floating):
        raise UserError(f"wave (of {wave.dtype}, shape {wave.shape}) must be [..., samples], floating point")
    if num_frames(wave.shape[-1], config) == 0:
        return jnp.zeros((*wave.shape[:-1], 0, config.num_features), jnp.float32)
    rows = wave.astype(jnp.float32).reshape(-1, wave.shape[-1])
    if isinstance(config, mel.MelConfig):
        full = jnp.full(wave.shape[:-1], wave.shape[-1]) if samples is None else samples
        # Row by row, with its own length: each recording ends at another sample.
        features = _by_row(_mel_features, config, rows, full.reshape(-1))
    else:
        features = _by_row(_features, config, rows)
    return features.reshape(*wave.shape[:-1], *features.shape[1:])


def _by_row(compute: Callable[..., jax.Array], config: FrontEnd, *rows: jax.Array) -> jax.Array:
    """Features of each row."""
    one = functools.partial(compute, config=config)
    # A CPU is several times faster when the frames of one utterance stay in its cache; an accelerator wants them all.
    return jax.lax.platform_dependent(
        *rows, cpu=lambda *x: jax.lax.map(lambda row: one(*row), x), default=lambda *x: jax.vmap(one)(*x)
    )


def _mel_features(wave: jax.Array, samples: jax.Array, config: mel.MelConfig) -> jax.Array:
    """Computes the features [frames, num_features] of one waveform [longest] of at least one frame."""
    transform, filters = mel.operators(config)
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    frames = _frames(mel.padded(wave, samples, config), config, num_frames(wave.shape[-1], config))
    energies = product(product(frames, transform) ** 2, filters)
    return mel.scaled(energies, num_frames(samples, config), config)


def features_of(wave: jax.Array, config: FrontEnd, samples: jax.Array | None = None) -> jax.Array:
    """What a network sees of waveforms: filterbank features, less their mean over the waveform if `subtract_mean`.

    Args:
        wave: waveforms [batch, samples], floating point in [-1, 1).
        config: the settings.
        samples: real samples of each waveform [batch], integer; None when every sample is real.

    Returns:
        Features [batch, frames, num_features], float32; frames beyond the real ones are zero.

    >>> features_of(jnp.zeros((2, 16000)), WESPEAKER, jnp.array([16000, 9000])).shape
    (2, 98, 80)
    """
    features = fbank(wave, config, samples)
    lengths = None if samples is None else num_frames(samples, config)
    if config.subtract_mean:
        return mean_normalize(features, lengths)
    if lengths is None:
        return features
    return jnp.where((jnp.arange(features.shape[1])[None] < lengths[:, None])[..., None], features, 0)
