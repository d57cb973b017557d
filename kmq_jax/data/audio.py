"""Reads recordings of any common format as mono float32 at 16 kHz; errors say what is wrong with a bad one."""

import contextlib
import math
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kmq_jax.core.errors import UserError, reason_of
from kmq_jax.data import containers

if TYPE_CHECKING:
    from soundfile import SoundFile

SAMPLE_RATE = 16000  # Hz, of everything behind this module
RATES = (8000, 384000)  # Hz; below the first speech has lost too much, above the second a header is nonsense
MIN_SECONDS = 0.1  # four analysis frames; `prepare_data` asks for more
MAX_SECONDS = 4 * 3600.0  # bounds memory, whatever a header claims
SILENCE = 1e-4  # RMS around the mean below which nothing was recorded: -80 dB of full scale
_NO_SOUND = 100.0  # an array of floating point beyond this holds integers, not sound of full scale 1
LOUDEST = 2.0  # what lies above is no sound of full scale 1; a lossy decoder overshoots by less
MOST_OUTSIDE = 0.01  # share of a lossless recording's samples that may lie outside full scale
SUFFIXES = frozenset(
    {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".sph", ".aiff", ".aif", ".aifc", ".au", ".snd"}
)
SUFFIXES |= {".w64", ".rf64", ".caf", ".m4a", ".aac", ".mp4"}
CONTAINERS = frozenset({"WAV", "WAVEX", "RF64", "W64", "AIFF", "SVX", "AU", "NIST", "CAF", "FLAC", "OGG", "MP3"})
"""What is read, by libsndfile's names: those in which a file that was cut short shows (`containers`)."""
_FFMPEG_SUFFIXES = frozenset({".m4a", ".aac", ".mp4"})  # what libsndfile cannot read
_BLOCK = 1 << 18  # samples decoded at a time
_ENDLESS = 1 << 62  # frames, as libsndfile has it where a header does not know


class AudioError(UserError):
    """A recording that cannot be used.

    Attributes:
        path: the file.
        reason: what is wrong with it, as in `rejected.csv`.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str):
        super().__init__(f"{os.fspath(path)}: {reason}")
        self.path = os.fspath(path)
        self.reason = reason

    def __reduce__(self) -> tuple[type["AudioError"], tuple[str, str]]:
        """Rebuilds from both arguments: the default would pass the message alone."""
        return type(self), (self.path, self.reason)


def read_audio(
    path: str | os.PathLike[str],
    *,
    start: float = 0.0,
    seconds: float | None = None,
    min_seconds: float = MIN_SECONDS,
    max_seconds: float = MAX_SECONDS,
    silence: float = SILENCE,
) -> np.ndarray:
    """Reads a recording: channels are averaged, other sample rates are resampled.

    Args:
        path: WAV, FLAC, Ogg (Vorbis, Opus), MP3, SPHERE or AIFF; M4A and AAC too where `ffmpeg` is installed.
        start: where to begin, in seconds.
        seconds: how much to read; None reads to the end.
        min_seconds: less than this is "too short".
        max_seconds: more than this is "too long"; nothing larger is ever allocated.
        silence: RMS around the mean below which it is "silent"; 0 allows silence.

    Returns:
        `[samples]` float32 at 16 kHz, in [-1, 1]: what a lossy decoder or the resampler overshoots is clipped.

    Raises:
        AudioError: missing, unreadable, empty, truncated, silent, too short or too long, a sample rate out of range,
            or values that are not finite, or not of full scale 1.
    """
    path = Path(path)
    if _regular(path) == 0:
        raise AudioError(path, "empty")
    if path.suffix.lower() in _FFMPEG_SUFFIXES:
        wave, rate = _decode_ffmpeg(path, start, seconds, max_seconds), SAMPLE_RATE
    else:
        wave, rate = _decode(path, start, seconds, max_seconds)
    wave = resample(wave, rate)
    return checked(np.clip(wave, -1, 1, out=wave), path, min_seconds, silence)


def read_recording(recording: "str | os.PathLike[str] | tuple[np.ndarray, int]") -> np.ndarray:
    """A file, or `(wave, sample rate)`, as float32 `[samples]` at 16 kHz; see `read_audio` and `to_mono_16k`."""
    if isinstance(recording, tuple):
        return checked(to_mono_16k(*recording), "the recording")
    return read_audio(recording)


def _regular(path: Path) -> int:
    """The size of a file in bytes. A pipe or a device, which may never end, is refused before it is opened."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise AudioError(path, "missing") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise AudioError(path, f"unreadable ({reason_of(error)})") from None
    if not stat.S_ISREG(found.st_mode):
        raise AudioError(path, "unreadable (not a file)")
    return found.st_size


def checked(
    wave: np.ndarray, path: str | os.PathLike[str], min_seconds: float = MIN_SECONDS, silence: float = SILENCE
) -> np.ndarray:
    """Returns `wave` `[samples]` at 16 kHz unchanged if it can be used.

    Args:
        wave: the samples.
        path: for messages.
        min_seconds: less than this is "too short".
        silence: RMS around the mean below which it is "silent".

    Raises:
        AudioError: it is empty, too short or silent, or holds values that are not finite.
    """
    if not wave.size:
        raise AudioError(path, "empty")
    if not np.isfinite(wave).all():
        raise AudioError(path, "values that are not finite (NaN or infinity)")
    if len(wave) < min_seconds * SAMPLE_RATE:
        raise AudioError(path, f"too short ({len(wave) / SAMPLE_RATE:.2f} s)")
    if _deviation(wave) < silence:
        raise AudioError(path, "silent")
    return wave


def _deviation(wave: np.ndarray) -> float:
    """The standard deviation in float64, block by block: for hours in one piece, it would take twice their memory."""
    blocks = [wave[start : start + _BLOCK] for start in range(0, len(wave), _BLOCK)]
    mean = sum(float(block.sum(dtype=np.float64)) for block in blocks) / len(wave)
    return math.sqrt(sum(float(np.square(block - mean, dtype=np.float64).sum()) for block in blocks) / len(wave))


def in_scale(wave: np.ndarray, path: str | os.PathLike[str], lossy: bool = False) -> np.ndarray:
    """Returns `wave` `[samples]` unchanged if its values are those of sound of full scale 1.

    A floating-point file may hold values of 16-bit scale: one reader would clip them to noise, another play them.

    Args:
        wave: `[samples]`.
        path: for messages.
        lossy: any share of the samples may lie outside full scale: a decoder overshoots wherever a recording is loud.

    Raises:
        AudioError: the values are of another scale, or not finite.

    >>> in_scale(np.float32([0.5, -1.0]), "a.wav").tolist()
    [0.5, -1.0]
    """
    peak = float(max(wave.max(initial=0.0), -wave.min(initial=0.0)))
    if not math.isfinite(peak):  # checked here: clipping would turn infinity into full scale
        raise AudioError(path, "values that are not finite (NaN or infinity)")
    if peak > 1 and (peak > LOUDEST or not lossy and np.mean(np.abs(wave) > 1) > MOST_OUTSIDE):
        raise AudioError(path, f"values up to {peak:.6g}, where full scale is 1: scale them to [-1, 1]")
    return wave


MOST_CHANNELS = 32
"""The most channels that an array of sound may have; a longer axis is that of samples."""


def to_mono_16k(wave: np.ndarray, rate: int) -> np.ndarray:
    """Makes mono float32 at 16 kHz of samples in memory.

    Args:
        wave: `[samples]`, `[samples, channels]` or `[channels, samples]`, floating point in [-1, 1) or 16-bit
            integers. An axis longer than 32 is that of samples.
        rate: its sample rate in Hz.

    Raises:
        UserError: another shape or type, values that are not finite, or a sample rate out of range.

    >>> to_mono_16k(np.int16([[16384, 0], [-16384, 0]]), rate=16000).tolist()
    [0.25, -0.25]
    """
    wave = np.asarray(wave)
    if wave.dtype == np.int16:
        wave = from_int16(wave)
    if wave.ndim not in (1, 2) or not np.issubdtype(wave.dtype, np.floating):
        raise UserError(
            f"audio must be [samples] or [samples, channels] of float or int16, not {wave.shape} {wave.dtype}"
        )
    if wave.ndim == 2 and min(wave.shape) > MOST_CHANNELS:
        raise UserError(f"audio of shape {wave.shape} has more than {MOST_CHANNELS} channels on either axis")
    if wave.ndim == 2 and wave.shape[0] <= MOST_CHANNELS < wave.shape[1]:
        wave = wave.T
    if wave.ndim == 2 and not wave.shape[1]:
        raise UserError(f"audio of shape {wave.shape} has no channels")
    if not RATES[0] <= rate <= RATES[1]:
        raise UserError(f"sample rate {rate} Hz is outside {RATES[0]}-{RATES[1]} Hz")
    if not np.isfinite(wave).all():
        raise UserError("audio holds values that are not finite (NaN or infinity)")
    return resample(of_sound((wave if wave.ndim == 1 else wave.mean(axis=1)).astype(np.float32)), rate)


def of_sound(wave: np.ndarray) -> np.ndarray:
    """Returns an array `[samples]` unchanged if it may be sound of about full scale 1; beyond 100 it holds integers.

    >>> of_sound(np.float32([0.5, -1.5])).tolist()
    [0.5, -1.5]

    Raises:
        UserError: it may not.
    """
    peak = float(max(wave.max(initial=0.0), -wave.min(initial=0.0)))
    if math.isfinite(peak) and peak > _NO_SOUND:
        raise UserError(f"the recording has values up to {peak:.6g}, where full scale is 1: divide by full scale")
    return wave


def num_samples(path: str | os.PathLike[str]) -> int:
    """Returns how many samples at 16 kHz `read_audio` would give, from the header alone where that tells it.

    Raises:
        AudioError: the file is missing or its header cannot be read.
    """
    path = Path(path)
    if path.suffix.lower() in _FFMPEG_SUFFIXES:
        return len(read_audio(path))
    with _open(path) as (sound, frames):
        if frames is None:
            frames = sum(map(len, _blocks(sound, path, MAX_SECONDS * sound.samplerate)))
        return resampled_length(frames, sound.samplerate)


def resampled_length(samples: int, rate: int, to: int = SAMPLE_RATE) -> int:
    """Returns the length at 16 kHz, or another rate, of `samples` taken at `rate` Hz.

    >>> resampled_length(44100, rate=44100)
    16000
    """
    return -(-samples * to // int(rate))  # in integers: rounded ratios give a sample more at some rates


def resample(wave: np.ndarray, rate: int, to: int = SAMPLE_RATE) -> np.ndarray:
    """Resamples `[samples]` from `rate` Hz to 16 kHz or another rate (soxr, high quality); as it is at that rate.

    >>> resample(np.zeros(44100, np.float32), 44100).shape
    (16000,)
    """
    if rate == to or not wave.size:
        return wave
    import soxr  # needed for few corpora

    made = soxr.resample(wave, rate, to, quality="HQ")
    wanted = resampled_length(len(wave), rate, to)  # soxr may give a sample less or more
    return np.pad(made[:wanted], (0, max(wanted - len(made), 0))).astype(np.float32, copy=False)


def to_int16(wave: np.ndarray) -> np.ndarray:
    """Rounds float samples in [-1, 1) to 16 bits; what lies outside is clipped.

    >>> to_int16(np.float32([0.5, -1.0, 1.5])).tolist()
    [16384, -32768, 32767]
    """
    return np.clip(np.rint(wave * 32768.0), -32768, 32767).astype(np.int16)


def from_int16(wave: np.ndarray) -> np.ndarray:
    """Turns 16-bit samples into float32 in [-1, 1).

    >>> from_int16(np.int16([16384, -32768])).tolist()
    [0.5, -1.0]
    """
    samples = wave.astype(np.float32)
    samples *= 1 / 32768  # in place: exact, as it is a power of two
    return samples


def is_exact(path: str | os.PathLike[str]) -> bool:
    """Whether any part of the file can be read alone and equals that part of the whole: 16 kHz, mono, lossless."""
    path = Path(path)
    if path.suffix.lower() not in (".wav", ".flac"):
        return False
    with _open(path) as (sound, frames):
        exact = sound.samplerate == SAMPLE_RATE and sound.channels == 1 and sound.subtype.startswith("PCM")
        return exact and frames is not None


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple["SoundFile", int | None]]:
    """Opens a file for decoding: yields the sound, and its frames where the header tells them."""
    import soundfile

    _regular(path)
    try:
        extent = containers.extent(path)
        if extent.truncated:
            raise AudioError(path, "truncated")
        if extent.joined:
            raise AudioError(path, "several recordings joined in one file: decode it, or split it")
        # As bytes: a name need not be UTF-8.
        sound = soundfile.SoundFile(containers.Patched(path, extent) if extent.mends else os.fsencode(path))
    except AudioError:
        raise
    except (soundfile.LibsndfileError, OSError, TypeError, ValueError) as error:
        raise AudioError(path, f"unreadable ({_plain(error)})") from None
    with sound:
        if sound.format not in CONTAINERS:
            raise AudioError(
                path, f"unreadable ({sound.format} files are not read, for they may be cut without a trace)"
            )
        if not RATES[0] <= sound.samplerate <= RATES[1]:
            raise AudioError(path, f"sample rate {sound.samplerate} Hz is outside {RATES[0]}-{RATES[1]} Hz")
        yield sound, None if sound.frames >= _ENDLESS else sound.frames


def _plain(error: Exception) -> str:
    # Messages begin with the file's name and a colon; the reason is what stands last.
    return str(error).split(": ")[-1].strip().rstrip(".") or type(error).__name__


def _blocks(sound: "SoundFile", path: Path, most: float, wanted: float = math.inf) -> Iterator[np.ndarray]:
    """Decodes block by block, so that a header that lies about the length allocates nothing.

    Args:
        sound: where decoding goes on.
        path: for messages.
        most: frames; more are "too long".
        wanted: frames to stop after.

    Yields:
        Mono `[frames]` float32.
    """
    import soundfile

    got = 0
    try:
        while got < wanted:
            ask = int(min(max(_BLOCK // sound.channels, 1), wanted - got))  # frames: a sample of every channel each
            block = sound.read(ask, dtype="float32", always_2d=True)
            if not len(block):
                return
            got += len(block)
            if got > most:
                raise AudioError(path, f"too long (over {most / sound.samplerate:.0f} s)")
            yield block.mean(axis=1) if block.shape[1] > 1 else block[:, 0]
    except soundfile.LibsndfileError as error:
        # FLAC says how long it should be, so an error on the way is nearly always a cut file.
        reason = "truncated" if sound.format == "FLAC" else f"unreadable ({_plain(error)})"
        raise AudioError(path, reason) from None


def _decode(path: Path, start: float, seconds: float | None, max_seconds: float) -> tuple[np.ndarray, int]:
    """Decodes with libsndfile."""
    import soundfile

    with _open(path) as (sound, frames):
        rate, most = sound.samplerate, max_seconds * sound.samplerate
        begin = round(start * rate)
        wanted = math.inf if seconds is None else round(seconds * rate)
        if frames is None:
            # Nowhere to seek to: what comes before is decoded, too.
            wave = _joined(_blocks(sound, path, begin + most, begin + wanted))[begin:]
            if len(wave) > most:
                raise AudioError(path, f"too long (over {max_seconds:.0f} s)")
        else:
            wanted = max(min(wanted, frames - begin), 0)
            if wanted > most:
                raise AudioError(path, f"too long ({wanted / rate:.0f} s)")
            try:
                if begin and wanted:
                    sound.seek(begin)
            except soundfile.LibsndfileError as error:
                raise AudioError(path, f"unreadable ({_plain(error)})") from None
            wave = _joined(_blocks(sound, path, most, wanted))
            if len(wave) < wanted:
                raise AudioError(path, "truncated")
        floats = sound.subtype in ("FLOAT", "DOUBLE")  # integers lie within full scale, or come from a lossy decoder
    return in_scale(wave, path, lossy=not floats), rate


def _joined(blocks: Iterator[np.ndarray]) -> np.ndarray:
    held = bytearray()  # grows in place, so that hours are never held twice
    for block in blocks:
        held += np.ascontiguousarray(block, np.float32).tobytes()
    return np.frombuffer(held, np.float32) if held else np.zeros(0, np.float32)


def _decode_ffmpeg(path: Path, start: float, seconds: float | None, max_seconds: float) -> np.ndarray:
    """Decodes what libsndfile cannot, by the `ffmpeg` program, which also mixes and resamples."""
    program = shutil.which("ffmpeg")
    if program is None:
        kind = path.suffix[1:]
        raise AudioError(path, f"unreadable ({kind} files need the ffmpeg program, which is not installed)")
    limit = min(max_seconds + 1, math.inf if seconds is None else seconds)  # a second more, so that "too long" shows
    source = ["-protocol_whitelist", "file,pipe", "-i", f"file:{path.absolute()}"]
    # After -i: before it, even `-ss 0` makes ffmpeg keep the samples by which AAC encoders delay the sound.
    part = ["-ss", f"{start:.6f}", "-t", f"{limit:.6f}"]  # exponents are not read
    samples = ["-ac", "1", "-ar", str(SAMPLE_RATE), "-f", "f32le", "pipe:1"]
    command = [program, "-v", "error", "-xerror", "-nostdin", *source, *part, *samples]
    try:
        done = subprocess.run(command, capture_output=True, timeout=60 + max_seconds / 10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AudioError(path, f"unreadable (ffmpeg: {_plain(error)})") from None
    if done.returncode:
        lines = re.sub(r"\[[^]]* @ 0x[0-9a-f]+\] ", "", done.stderr.decode(errors="replace")).strip().splitlines()
        raise AudioError(path, f"unreadable (ffmpeg: {lines[-1].strip() if lines else f'status {done.returncode}'})")
    wave = np.frombuffer(done.stdout[: len(done.stdout) // 4 * 4], "<f4")
    if len(wave) > max_seconds * SAMPLE_RATE:
        raise AudioError(path, f"too long (over {max_seconds:.0f} s)")
    return in_scale(wave.astype(np.float32), path, lossy=True)
