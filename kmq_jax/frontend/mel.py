"""Mel features of toolkits that do not follow Kaldi: SpeechBrain's, IDRnD's for ReDimNet, Resemblyzer's for GE2E.

Unlike Kaldi's, their frames are centred: frame `t` lies about sample `t * shift`, so that the first and the last reach
beyond the recording, where they see zeros or its mirror image. A frame's mean is not taken away, the window is not
quite symmetric (it is one period of a cosine), and the filters are straight-sided in Hz. Features are the filters'
energies in decibels (no more than 80 below the recording's loudest), their logarithms, or the energies themselves.

References: speechbrain/processing/features.py (https://github.com/speechbrain/speechbrain at 9c826ef),
redimnet/layers/features.py (https://github.com/IDRnD/redimnet at dd9f519) with torchaudio's `MelSpectrogram`, and
resemblyzer/audio.py (version 0.1.4) with librosa's `melspectrogram`.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from kmq_jax.core.errors import UserError

DECIBEL_FLOOR, LOUDEST = 1e-10, 80.0  # the least energy; decibels kept below the loudest one of a recording
LOG_OFFSET = 1e-6  # added to energies before the logarithm
_BREAK_HZ, _BREAK_MEL = 1000.0, 15.0  # Slaney's scale is straight up to here,
_STEP = np.log(6.4) / 27  # and logarithmic beyond
_COSINES = {"hamming": (0.54, 0.46), "hann": (0.5, 0.5)}


@dataclasses.dataclass(frozen=True)
class MelConfig:
    """The settings of `mel`; hashable, so that it can be a static argument of `jax.jit`. 25 ms every 10 ms at 16 kHz.

    Attributes:
        num_mel_bins: triangular filters.
        frame_shift_ms: step from one frame to the next.
        fft_size: points of the transform, at least the 400 samples of a frame.
        window: "hamming" or "hann".
        filters: "torchaudio" (equal steps on the HTK scale), "librosa" (on Slaney's, and of equal area) or
            "speechbrain" (as torchaudio's, but each filter is as wide on its right as on its left).
        scale: what becomes of the energies: "decibel", "log" or "power", which leaves them.
        low_freq: lower edge of the first filter, in Hz.
        high_freq: upper edge of the last.
        preemphasis: the coefficient of `y[n] = x[n] - p x[n-1]` over the whole recording; 0 turns it off.
        mirrored: whether frames see the recording's mirror image beyond its ends, or zeros.
        raised_to: a quieter recording is raised to so many dB of full scale; None leaves recordings as they are.
        subtract_mean: whether each feature's mean over the recording is taken away.

    >>> SPEECHBRAIN.num_features, SPEECHBRAIN.length, SPEECHBRAIN.shift
    (80, 400, 160)
    """

    num_mel_bins: int
    frame_shift_ms: float = 10.0
    fft_size: int = 400
    window: Literal["hamming", "hann"] = "hamming"
    filters: Literal["torchaudio", "librosa", "speechbrain"] = "torchaudio"
    scale: Literal["decibel", "log", "power"] = "log"
    low_freq: float = 0.0
    high_freq: float = 8000.0
    preemphasis: float = 0.0
    mirrored: bool = False
    raised_to: float | None = None
    subtract_mean: bool = True

    sample_rate = 16000
    length = 400
    margin = 400  # samples beyond both ends that frames see
    frame_length_ms = 25.0

    def __post_init__(self) -> None:
        """Checks the settings.

        Raises:
            UserError: a setting is out of range; the message names it.
        """
        if not 1 <= self.num_mel_bins <= self.fft_size // 2:
            raise UserError(f"num_mel_bins (={self.num_mel_bins}) must be 1 to {self.fft_size // 2}")
        if not self.length <= self.fft_size <= 4096:
            raise UserError(f"fft_size (={self.fft_size}) must be {self.length} to 4096")
        if not 0 <= self.low_freq < self.high_freq <= self.sample_rate / 2:
            raise UserError(f"low_freq (={self.low_freq}) and high_freq (={self.high_freq}) must be in order")
        if not 1 <= self.shift <= self.length:
            raise UserError(f"frame_shift_ms (={self.frame_shift_ms}) must be positive and at most 25")

    @property
    def shift(self) -> int:
        """Samples from one frame to the next."""
        return int(self.sample_rate * self.frame_shift_ms / 1000)

    @property
    def num_features(self) -> int:
        """Features in a frame."""
        return self.num_mel_bins


SPEECHBRAIN = MelConfig(80, filters="speechbrain", scale="decibel")
"""SpeechBrain's 80 features of its ECAPA-TDNN: decibels, Hamming window, filters up to 8,000 Hz."""

REDIMNET = MelConfig(72, fft_size=512, low_freq=20.0, high_freq=7600.0, preemphasis=0.97, mirrored=True)
"""IDRnD's 72 features of ReDimNet: a logarithm after pre-emphasis, Hamming window, filters from 20 to 7,600 Hz."""

RESEMBLYZER = MelConfig(40, window="hann", filters="librosa", scale="power", raised_to=-30.0, subtract_mean=False)
"""Resemblyzer's 40 features: energies as they are, recordings raised to -30 dB. It also cuts silences, before this."""


def operators(config: MelConfig) -> tuple[np.ndarray, np.ndarray]:
    """The constant matrices of a frame's features.

    Returns:
        `transform` float32 `[length, 2 bins]`, from a frame to the real and imaginary parts of its windowed spectrum,
        and `filters` float32 `[2 bins, num_mel_bins]`, from their squares to the filters' energies.

    >>> [matrix.shape for matrix in operators(SPEECHBRAIN)]
    [(400, 398), (398, 80)]
    """
    filters = mel_filters(config)
    used = np.flatnonzero(filters.sum(1))
    time = np.arange(config.length)
    # A cosine of period `length`, not `length - 1` as in NumPy: the last sample is not the first one's mirror image.
    offset, height = _COSINES[config.window]
    window = offset - height * np.cos(2 * np.pi * time / config.length)
    angle = 2 * np.pi / config.fft_size * np.outer(time, used)
    # The sine's sign does not matter: both parts are squared.
    transform = np.concatenate([np.cos(angle), np.sin(angle)], axis=1) * window[:, None]
    return transform.astype(np.float32), np.concatenate([filters[used]] * 2).astype(np.float32)


@functools.cache
def mel_filters(config: MelConfig) -> np.ndarray:
    """The triangular filters, float64 `[fft_size / 2 + 1, num_mel_bins]`.

    >>> mel_filters(RESEMBLYZER).shape
    (201, 40)
    """
    slaney = config.filters == "librosa"
    to_mel, to_hertz = (_slaney, _from_slaney) if slaney else (_htk, _from_htk)
    ends = to_mel(np.array([config.low_freq, config.high_freq]))
    edges = to_hertz(np.linspace(ends[0], ends[1], config.num_mel_bins + 2))
    # Of each frequency of the transform, as a column against the filters' row.
    hertz = np.arange(config.fft_size // 2 + 1)[:, None] * config.sample_rate / config.fft_size
    left, right = np.diff(edges)[:-1], np.diff(edges)[1:]
    if config.filters == "speechbrain":
        right = left
    middle = edges[1:-1]
    filters = np.maximum(0, np.minimum(1 - (middle - hertz) / left, 1 - (hertz - middle) / right))
    return filters * 2 / (edges[2:] - edges[:-2]) if slaney else filters


def _htk(hertz: np.ndarray) -> np.ndarray:
    return 2595 * np.log10(1 + hertz / 700)


def _from_htk(mel: np.ndarray) -> np.ndarray:
    return 700 * (10 ** (mel / 2595) - 1)


def _slaney(hertz: np.ndarray) -> np.ndarray:
    above = _BREAK_MEL + np.log(np.maximum(hertz, _BREAK_HZ) / _BREAK_HZ) / _STEP
    return np.where(hertz < _BREAK_HZ, hertz * _BREAK_MEL / _BREAK_HZ, above)


def _from_slaney(mel: np.ndarray) -> np.ndarray:
    above = _BREAK_HZ * np.exp(_STEP * (np.maximum(mel, _BREAK_MEL) - _BREAK_MEL))
    return np.where(mel < _BREAK_MEL, mel * _BREAK_HZ / _BREAK_MEL, above)


def padded(wave: jax.Array, samples: jax.Array, config: MelConfig) -> jax.Array:
    """A recording as its frames see it: raised, lifted at high frequencies, and continued beyond its ends.

    Args:
        wave: `[longest]`.
        samples: how many of them are real, a scalar.
        config: the settings.

    Returns:
        `[longest + margin]`; frame `t` begins at `t * shift`. Behind the real samples' margin stand zeros.

    >>> padded(jnp.ones(1000), jnp.array(800), SPEECHBRAIN).shape
    (1400,)
    """
    # `samples` is traced, so shapes stay those of the longest recording, and masks and dynamic slices do the rest.
    place = jnp.arange(len(wave))
    wave = jnp.where(place < samples, wave, 0)
    if config.raised_to is not None:
        level = jnp.sqrt(jnp.sum(wave**2) / jnp.maximum(samples, 1))
        # Raised and never lowered; digital silence, of level 0, stays as it is.
        wave = wave * jnp.maximum(10 ** (config.raised_to / 20) / jnp.where(level > 0, level, jnp.inf), 1)
    if config.preemphasis:
        # The first sample's neighbour is the second: the recording is mirrored there.
        before = jnp.concatenate([wave[1:2], wave[:-1]])
        wave = jnp.where(place < samples, wave - config.preemphasis * before, 0)
    half = config.margin // 2
    if not config.mirrored:
        return jnp.pad(wave, half)
    ahead = jnp.pad(wave, (half, half))
    start = wave[half:0:-1]
    # The `half` samples before the last one, backwards, are laid behind the real ones; the last is not repeated.
    end = jax.lax.dynamic_slice(jnp.pad(wave, (half, 0)), (samples - 1,), (half,))[::-1]
    return jax.lax.dynamic_update_slice(ahead.at[:half].set(start), end, (samples + half,))


def scaled(energies: jax.Array, real: jax.Array, config: MelConfig) -> jax.Array:
    """Brings the filters' energies `[frames, mel]`, of which the first `real` frames are real, to the network's scale.

    Decibels end 80 below the loudest of the real frames.

    >>> scaled(jnp.array([[100.0], [0.0]]), jnp.array(2), SPEECHBRAIN).tolist()
    [[20.0], [-60.0]]
    """
    if config.scale == "power":
        return energies
    if config.scale == "log":
        return jnp.log(energies + LOG_OFFSET)
    decibels = 10 * jnp.log10(jnp.maximum(energies, DECIBEL_FLOOR))
    there = jnp.arange(len(decibels))[:, None] < real
    return jnp.maximum(decibels, jnp.max(decibels, initial=-jnp.inf, where=there) - LOUDEST)
