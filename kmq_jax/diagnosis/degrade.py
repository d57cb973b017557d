"""Recordings made shorter or worse: the conditions that a comparison of networks is repeated under."""

import dataclasses
import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import signal

from kmq_jax.core.errors import UserError
from kmq_jax.data import audio
from kmq_jax.data.source import SAMPLE_RATE, Utterances
from kmq_jax.diagnosis.options import CONDITIONS

TELEPHONE_RATE = 8000
TELEPHONE_BAND = (300.0, 3400.0)  # Hz, of ITU-T G.711's telephone channel
CODECS = {  # container, coding and sample rate, as libsndfile names them
    "ulaw": ("WAV", "ULAW", TELEPHONE_RATE),
    "alaw": ("WAV", "ALAW", TELEPHONE_RATE),
    "gsm": ("WAV", "GSM610", TELEPHONE_RATE),
    "opus": ("OGG", "OPUS", SAMPLE_RATE),
    "vorbis": ("OGG", "VORBIS", SAMPLE_RATE),
    "mp3": ("MP3", "MPEG_LAYER_III", SAMPLE_RATE),
}
"""What `codec=` may name. The last three are coded at the lowest quality that libsndfile offers."""
_LOSSIEST = {"compression_level": 0.99}


@dataclass(frozen=True)
class Condition:
    """What is done to every recording, on both sides of a trial.

    Attributes:
        kind: "whole" (nothing), "first" (cut after `value` seconds), "telephone" (8 kHz, 300 to 3,400 Hz), "noise"
            (added at `value` dB) or "codec" (there and back).
        value: of "first" and "noise".
        codec: of "codec".
    """

    kind: str
    value: float = 0.0
    codec: str = ""

    def __str__(self) -> str:
        if self.kind in ("first", "noise"):
            return f"{self.kind}={self.value:g}"
        return f"codec={self.codec}" if self.codec else self.kind

    @property
    def title(self) -> str:
        """As a table names it.

        >>> Condition("first", 2.0).title
        'first 2 s'
        """
        if self.kind == "first":
            return f"first {self.value:g} s"
        if self.kind == "noise":
            return f"noise at {self.value:g} dB"
        return f"{self.codec} coded" if self.codec else self.kind


def parse_condition(text: str) -> Condition:
    """Reads `whole`, `first=2`, `telephone`, `noise=10` or `codec=ulaw`.

    Raises:
        UserError: it is none of them.

    >>> parse_condition("noise=10")
    Condition(kind='noise', value=10.0, codec='')
    """
    kind, equals, given = text.partition("=")
    if text in ("whole", "telephone"):
        return Condition(text)
    if kind == "codec" and given in CODECS:
        return Condition(kind, codec=given)
    try:
        value = float(given) if equals else float("nan")
    except ValueError:
        value = float("nan")
    if (kind == "first" and audio.MIN_SECONDS <= value <= audio.MAX_SECONDS) or (kind == "noise" and abs(value) <= 100):
        return Condition(kind, value)
    raise UserError(f"condition {text!r} must be {CONDITIONS}; NAME is one of {', '.join(CODECS)}")


def telephone(wave: np.ndarray) -> np.ndarray:
    """What a telephone channel leaves of a recording `[samples]` at 16 kHz: 300 to 3,400 Hz, by way of 8 kHz.

    >>> tone = np.sin(2 * np.pi * 6000 * np.arange(16000) / 16000).astype(np.float32)
    >>> bool(np.abs(telephone(tone)[1000:-1000]).max() < 1e-3)
    True
    """
    return _fit(audio.resample(_narrow(wave), TELEPHONE_RATE), len(wave))


def _narrow(wave: np.ndarray) -> np.ndarray:
    """`[samples]` at 8 kHz within the telephone band."""
    low = audio.resample(wave, SAMPLE_RATE, TELEPHONE_RATE)
    band = signal.butter(4, TELEPHONE_BAND, "bandpass", fs=TELEPHONE_RATE, output="sos")
    return np.asarray(signal.sosfilt(band, low), np.float32)


def coded(wave: np.ndarray, codec: str) -> np.ndarray:
    """A recording `[samples]` at 16 kHz after a codec of `CODECS`; codecs at 8 kHz get the telephone band first."""
    import soundfile

    container, coding, rate = CODECS[codec]
    sent = _narrow(wave) if rate == TELEPHONE_RATE else wave
    more = _LOSSIEST if rate == SAMPLE_RATE else {}
    file = io.BytesIO()
    soundfile.write(file, np.clip(sent, -1, 1), rate, format=container, subtype=coding, **more)
    file.seek(0)
    received, _ = soundfile.read(file, dtype="float32")
    return _fit(audio.resample(received, rate), len(wave))


def _fit(wave: np.ndarray, samples: int) -> np.ndarray:
    """Cut, or filled up with zeros: resamplers and codecs add or lose a few samples at the end."""
    return np.pad(wave[:samples], (0, max(samples - len(wave), 0))).astype(np.float32)


def noisy(wave: np.ndarray, clip: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """Adds a clip from a random place on, repeated where it is short; both powers are means over all samples.

    Args:
        wave: `[samples]`, the recording.
        clip: `[any]`, the noise.
        snr_db: the recording's power over that of the added noise.
        rng: draws the place.

    >>> rng = np.random.default_rng(0)
    >>> wave, clip = rng.standard_normal(8000), rng.standard_normal(300)
    >>> added = noisy(wave, clip, 10.0, rng) - wave
    >>> round(float(10 * np.log10(np.mean(wave**2) / np.mean(added**2))), 2)
    10.0
    """
    start = int(rng.integers(max(len(clip) - len(wave), 0) + 1))
    noise = np.resize(clip[start:], len(wave))
    # The floor is for a clip of digital silence.
    gain = np.sqrt(np.mean(wave**2) / max(float(np.mean(noise**2)), 1e-20)) * 10 ** (-snr_db / 20)
    return np.asarray(wave + gain * noise, wave.dtype)


@dataclass(frozen=True, eq=False)
class _Worse:
    """Reads an utterance by its id and makes it worse, in the same way each time."""

    table: Utterances
    rows: dict[str, int]
    condition: Condition
    noise: Utterances | None
    seed: int

    def __call__(self, name: str) -> np.ndarray:
        made = self._made(name)
        try:
            return audio.checked(made, name)
        except audio.AudioError as error:  # the recording itself may be fine
            raise audio.AudioError(name, f"{error.reason} in the condition {self.condition}") from None

    def _made(self, name: str) -> np.ndarray:
        wave, how = self.table.load(self.rows[name]), self.condition
        if how.kind == "first":
            return wave[: int(how.value * SAMPLE_RATE)]
        if how.kind == "telephone":
            return telephone(wave)
        if how.kind == "codec":
            return coded(wave, how.codec)
        assert self.noise is not None
        # By the utterance's name, so that neither order nor the number of others matters.
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode(errors="surrogateescape"))])
        try:
            clip = self.noise.load(int(rng.integers(len(self.noise))))
        except audio.AudioError as error:  # as another error: this one would be taken for the recording's
            raise UserError(f"noise: {error}") from None
        return noisy(wave, clip, how.value, rng)


def degrade(table: Utterances, condition: Condition, noise: Utterances | None = None, seed: int = 0) -> Utterances:
    """The table with every recording as the condition leaves it.

    Args:
        table: the recordings.
        condition: what is done to them.
        noise: clips; "noise" needs them. Which of them an utterance gets, and from where on, goes by its id.
        seed: of that choice.

    Raises:
        UserError: there are no clips of noise.
    """
    if condition.kind == "whole":
        return table
    if condition.kind == "noise" and noise is None:
        raise UserError(f"the condition {condition} needs clips of noise: --noise")
    lengths = table.lengths()
    if condition.kind == "first":
        lengths = np.minimum(lengths, int(condition.value * SAMPLE_RATE))
    reader: Callable[[str], np.ndarray] = _Worse(table, dict(zip(table.ids, range(len(table)))), condition, noise, seed)
    return dataclasses.replace(table, reader=reader, samples=lengths, spans=None)


def speech_seconds(table: Utterances) -> float:
    """The mean length of its recordings, in seconds."""
    return float(np.mean(table.lengths()) / SAMPLE_RATE)
