"""Which parts of a recording are speech, by WebRTC's voice activity detector; the rest is left out on request."""

import dataclasses
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

import numpy as np

from kmq_jax.core.errors import UserError
from kmq_jax.core.progress import progress
from kmq_jax.data import audio
from kmq_jax.data.table import Utterances

Sound: TypeAlias = str | os.PathLike[str] | tuple[np.ndarray, int]
"""A recording's file, or `([samples], samples a second)`."""

FRAME = 480  # samples, 30 ms: the longest that the detector takes
_STRICTNESS = 2  # 0 to 3: how sure the detector must be
_MAJORITY = 11  # frames that vote on the one in their middle
_MARGIN = 5  # frames kept on either side of speech: consonants are quiet
_LEAST = 0.3  # seconds; less is no speech
_MOSTLY = 0.5  # share of a recording that is not speech from which on it is warned of


def activity(wave: np.ndarray) -> np.ndarray:
    """Which frames of 30 ms are speech, or near it.

    Args:
        wave: `[samples]` at 16 kHz, full scale 1.

    Returns:
        bool `[ceil(samples / 480)]`.

    Raises:
        UserError: the package webrtcvad-wheels is missing.
    """
    try:
        import webrtcvad
    except ImportError:
        raise UserError("`vad` needs the package webrtcvad-wheels: pip install webrtcvad-wheels") from None
    detector = webrtcvad.Vad(_STRICTNESS)
    found = np.zeros(-(-len(wave) // FRAME), bool)
    for i in range(len(found)):
        frame = np.zeros(FRAME, np.int16)
        part = audio.to_int16(wave[i * FRAME : (i + 1) * FRAME])
        frame[: len(part)] = part
        found[i] = detector.is_speech(frame.tobytes(), audio.SAMPLE_RATE)
    voted = _sum_around(found, _MAJORITY // 2) > _MAJORITY // 2
    return _sum_around(voted, _MARGIN) > 0  # widens what was voted for by the margin


def _sum_around(frames: np.ndarray, side: int) -> np.ndarray:
    """How many of each frame's neighbours up to `side` away, itself included, are true."""
    # Running sums, held at zero before the first frame and at the whole behind the last.
    total = np.concatenate([np.zeros(side + 1, int), np.cumsum(frames), np.full(side, frames.sum())])
    return total[2 * side + 1 :] - total[: len(frames)]


def kept(wave: np.ndarray, active: np.ndarray) -> np.ndarray:
    """The samples of active frames, one behind the other.

    >>> len(kept(np.zeros(1000, np.float32), np.array([True, False, True])))
    520
    """
    return wave[np.repeat(active, FRAME)[: len(wave)]]


def heard(enrol: Iterable[Path], test: Path, vad: bool) -> tuple[list[Sound], Sound]:
    """What to embed of an enrolment and of a test: their files; with `vad` only their speech, and its rate.

    Args:
        enrol: recordings of the claimed speaker.
        test: the recording to verify.
        vad: whether only speech counts; see `only`.

    Returns:
        Of each a file, or `([samples], 16000)`: what `embed` takes.

    Raises:
        UserError: with `vad`, one cannot be read or holds no speech; the message names it.
    """

    def one(path: Path) -> Sound:
        return (only(audio.read_audio(path), str(path)), audio.SAMPLE_RATE) if vad else path

    return [one(path) for path in enrol], one(test)


def only(wave: np.ndarray, where: str) -> np.ndarray:
    """The speech of a recording, `[speech samples]`. A line on standard error says how much that is.

    Args:
        wave: `[samples]` at 16 kHz.
        where: names the recording.

    Raises:
        UserError: there is none; the message names the recording.
    """
    speech = kept(wave, _checked(activity(wave), where))
    print(f"{where}: {describe(len(speech), len(wave))}", file=sys.stderr)
    return speech


def describe(used: int, samples: int) -> str:
    """How much of a recording, or of many, is used; with a warning where most is not speech.

    >>> describe(41 * 16000, 63 * 16000)
    'used 41.0 s of speech of 63.0 s'
    >>> describe(16000, 63 * 16000)
    'used 1.0 s of speech of 63.0 s; warning: mostly no speech'
    """
    rate = audio.SAMPLE_RATE
    warning = "; warning: mostly no speech" if used < (1 - _MOSTLY) * samples else ""
    return f"used {used / rate:.1f} s of speech of {samples / rate:.1f} s{warning}"


def of_table(utterances: Utterances) -> Utterances:
    """The same utterances with their speech alone. Lines on standard error say how much is used.

    Every recording is read once here, and once more when it is loaded.

    Raises:
        UserError: a recording cannot be read, or holds no speech; the message names it.
    """
    found, used, whole = [], [], 0
    for i in progress(range(len(utterances)), desc="finding speech", unit="recording"):
        wave = utterances.load(i)
        found.append(_checked(activity(wave), utterances.where(i)))
        used.append(len(kept(wave, found[i])))
        whole += len(wave)
        if used[i] < (1 - _MOSTLY) * len(wave):
            print(f"{utterances.where(i)}: {describe(used[i], len(wave))}", file=sys.stderr)
    print(f"{len(utterances)} recordings: {describe(sum(used), whole)}", file=sys.stderr)
    rows = {name: row for row, name in enumerate(utterances.ids)}
    return dataclasses.replace(
        utterances, samples=np.array(used), spans=None, reader=_SpeechOf(utterances, rows, tuple(found))
    )


@dataclasses.dataclass(frozen=True)
class _SpeechOf:
    """Reads the speech of an utterance by its id."""

    utterances: Utterances
    rows: dict[str, int]
    active: tuple[np.ndarray, ...]

    def stamps(self) -> list[str]:
        """Those of the recordings; see `Utterances.stamps`."""
        return self.utterances.stamps()

    def __call__(self, name: str) -> np.ndarray:
        row = self.rows[name]
        return kept(self.utterances.load(row), self.active[row])


def _checked(active: np.ndarray, where: str) -> np.ndarray:
    if active.sum() * FRAME < _LEAST * audio.SAMPLE_RATE:
        raise UserError(f"{where}: no speech was found in it")
    return active
