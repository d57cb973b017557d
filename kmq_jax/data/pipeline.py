"""The training pipeline: shuffled, cropped, augmented batches, whose position can be saved and restored.

The host chooses and cuts; the device does the signal processing (`frontend.augment`). Samples stay integers of 16 bits
until they are on the device: half of the bytes to copy and to send. A batch depends on the seed and its number alone.
So a resumed run sees the same batches, and so does a run with other numbers of threads.
"""

import dataclasses
import importlib.util
import logging
import threading
from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import grain

from kmq_jax.core.errors import UserError, needed
from kmq_jax.data import audio
from kmq_jax.data.table import Utterances

KINDS = ("clean", "noise", "music", "babble", "reverb")
SNR_DB = {"noise": (0.0, 15.0), "music": (5.0, 15.0), "babble": (13.0, 20.0)}  # PAPER's ranges, as MUSAN recipes have
BABBLE_VOICES = (3, 7)
WHOLE_SECONDS = 60.0  # lossy and resampled files up to this long are decoded whole, and cached
ROOM_SAMPLES = 16000  # of a room's impulse response, from the direct sound
_WHOLE_ROOM = 10 * ROOM_SAMPLES  # where the direct sound is looked for
_DRY = np.zeros(ROOM_SAMPLES, np.float32)
_TRIES = 100
_MOST_AHEAD = 8  # batches kept on the host: one of 512 whole utterances of 20 s takes 1.3 GB

log = logging.getLogger(__name__)


def num_speakers(utterances: Utterances, speeds: Sequence[float] = (1.0,)) -> int:
    """How many classes a classifier needs: a voice at another speed is another speaker.

    >>> from kmq_jax.data.source import open_source
    >>> num_speakers(open_source("synthetic:dev?speakers=4&utterances=2"), speeds=(1.0, 0.9, 1.1))
    12
    """
    return len(utterances.speaker_names) * len(speeds)


def _repeated(wave: np.ndarray, samples: int) -> np.ndarray:
    """The wave from its beginning again and again, `[samples]`."""
    return wave if len(wave) == samples else np.resize(wave, samples)


class Crops:
    """Cuts pieces out of utterances without decoding more than it must.

    Of lossless 16 kHz files only the piece is read. Others are decoded whole and kept in memory, as 16-bit samples, up
    to a limit: pieces of a lossy file differ slightly with the place where decoding begins. So what a crop holds never
    depends on what is cached. Safe to use from several threads.

    Attributes:
        failures: reasons by the place of utterances that could not be read.
    """

    def __init__(
        self, utterances: Utterances, cache_bytes: int = 1 << 30, failures: MutableMapping[str, str] | None = None
    ):
        self.utterances = utterances
        self.failures: MutableMapping[str, str] = {} if failures is None else failures
        self._bad: set[int] = set()
        self._room = cache_bytes
        self._waves: dict[int, np.ndarray] = {}
        self._parts: dict[int, int] = {}  # length of those that are read in parts
        self._lock = threading.Lock()

    def crop(self, i: int, samples: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """Cuts `samples` at a random place of utterance `i`; a shorter one is repeated.

        An utterance that cannot be read is reported once and replaced by the next that can.

        Returns:
            int16 `[samples]`, and the index of the utterance that was used.

        Raises:
            UserError: a hundred utterances in a row, or all there are, cannot be read.
        """
        piece, used = self.piece(i, samples, rng)
        return _repeated(piece, samples), used

    def piece(self, i: int, samples: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """As `crop`, but a shorter utterance is not repeated.

        Returns:
            int16, at most `[samples]`, and the index of the utterance that was used.

        Raises:
            UserError: as `crop`.
        """
        # Drawn before anything is read: which files are damaged must not shift later draws.
        place = rng.random()
        tries = min(_TRIES, len(self.utterances))
        for step in range(tries):
            used = (i + step) % len(self.utterances)
            if used in self._bad:
                continue
            try:
                return self._piece(used, samples, place), used
            except audio.AudioError as error:
                self._report(used, error)
        if tries == 1:
            raise UserError(f"the only utterance cannot be read: {self.utterances.where(used)}")
        raise UserError(f"{tries} utterances in a row cannot be read; the last: {self.utterances.where(used)}")

    def _piece(self, i: int, samples: int, place: float) -> np.ndarray:
        wave = self._waves.get(i)
        length = self._parts.get(i)
        if wave is None and length is None:
            wave, length = self._first_read(i)
        if wave is None:
            assert length is not None
            start = int(place * max(length - samples + 1, 1))
            first = start / audio.SAMPLE_RATE
            offset = 0.0 if self.utterances.spans is None else float(self.utterances.spans[i, 0])
            seconds = min(samples, length) / audio.SAMPLE_RATE
            place_of = self.utterances.location(i)
            part = audio.read_audio(place_of, start=offset + first, seconds=seconds, min_seconds=0, silence=0)
            wave, start = audio.to_int16(part), 0
        else:
            start = int(place * max(len(wave) - samples + 1, 1))
        return wave[start : start + samples]

    def _first_read(self, i: int) -> tuple[np.ndarray | None, int | None]:
        """Decides how utterance `i` is read: returns it whole, or its length where it is read in parts."""
        table = self.utterances
        if table.reader is None:
            length = table.num_samples(i)
            if length > WHOLE_SECONDS * audio.SAMPLE_RATE or audio.is_exact(table.location(i)):
                self._parts[i] = length
                return None, length
        wave = table.load_int16(i)
        with self._lock:
            # Another thread may have read it meanwhile.
            if i not in self._waves and wave.nbytes <= self._room:
                self._waves[i] = wave
                self._room -= wave.nbytes
        return wave, None

    def _report(self, i: int, error: audio.AudioError) -> None:
        with self._lock:
            new = i not in self._bad
            self._bad.add(i)
            self.failures[error.path] = error.reason
        if new:
            log.warning("%s; another utterance takes its place (%d unreadable so far)", error, len(self.failures))


@dataclasses.dataclass(frozen=True, eq=False)
class _Examples:
    """Makes example number n: which utterance, which piece, at which speed, disturbed by what."""

    speech: Crops
    noise: Crops | None
    music: Crops | None
    babble: Crops | None
    rooms: Crops | None
    samples: int
    whole: bool
    speeds: tuple[float, ...]
    kinds: tuple[str, ...]

    def __call__(self, number: int, rng: np.random.Generator) -> dict[str, np.ndarray | np.generic]:
        table = self.speech.utterances
        # Examples are numbered speed by speed: all utterances at the first, then all at the second.
        version, i = divmod(int(number), len(table))
        wave, used = self._speech(i, self.speeds[version], rng)
        more: dict[str, np.ndarray | np.generic] = {}
        if self.whole:
            more = {"length": np.int32(min(len(wave), self.samples)), "place": np.float32(rng.random())}
        wave = _repeated(wave, self.samples)
        kind = self.kinds[rng.integers(len(self.kinds))]
        snr = np.inf
        if len(self.kinds) > 1:  # else the device never looks at it, and it would be half of the bytes
            more["interference"] = np.zeros(self.samples, np.int16)
        if kind in SNR_DB:
            snr = rng.uniform(*SNR_DB[kind])
            more["interference"] = self._interference(kind, int(table.labels[used]), rng)
        if self.rooms is not None:
            more["rir"] = self._room(rng) if kind == "reverb" else _DRY
        return {
            "wave": wave,
            "snr_db": np.float32(snr),
            "reverb": np.bool_(kind == "reverb"),
            "speaker": np.int32(table.labels[used] + version * len(table.speaker_names)),
            **more,
        }

    def _speech(self, i: int, speed: float, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """A piece of utterance `i` at a speed, and the utterance that was used."""
        wanted = round(self.samples * speed)  # so that `samples` are left once the speed is changed
        wave, used = (self.speech.piece if self.whole else self.speech.crop)(i, wanted, rng)
        if speed == 1.0:
            return wave, used
        # Taken to be sampled at speed * 16 kHz, it becomes 1 / speed as long, and lower where speed < 1.
        return audio.to_int16(audio.resample(audio.from_int16(wave), round(audio.SAMPLE_RATE * speed))), used

    def _room(self, rng: np.random.Generator) -> np.ndarray:
        """A room's impulse response `[ROOM_SAMPLES]`, its loudest sound, the direct one, first and of height 1."""
        assert self.rooms is not None
        piece, _ = self.rooms.piece(int(rng.integers(len(self.rooms.utterances))), _WHOLE_ROOM, rng)
        response = audio.from_int16(piece)
        direct = int(np.argmax(np.abs(response)))
        response = response[direct : direct + ROOM_SAMPLES] / (response[direct] or 1.0)
        return np.pad(response, (0, ROOM_SAMPLES - len(response))).astype(np.float32)

    def _interference(self, kind: str, speaker: int, rng: np.random.Generator) -> np.ndarray:
        clips = {"noise": self.noise, "music": self.music, "babble": self.babble or self.speech}[kind]
        assert clips is not None
        if kind != "babble":
            return clips.crop(int(rng.integers(len(clips.utterances))), self.samples, rng)[0]
        labels = clips.utterances.labels
        babble = np.zeros(self.samples, np.float32)
        for _ in range(rng.integers(BABBLE_VOICES[0], BABBLE_VOICES[1] + 1)):
            other = int(rng.integers(len(labels)))
            # Babble with the speaker's own voice in it would be no disturbance. Other data have other speakers.
            while clips is self.speech and labels[other] == speaker:
                other = int(rng.integers(len(labels)))
            voice = audio.from_int16(clips.crop(other, self.samples, rng)[0])
            voice /= max(float(np.sqrt(voice @ voice / self.samples)), audio.SILENCE)  # all equally loud
            babble += voice
        return audio.to_int16(babble / max(float(np.abs(babble).max()), 1.0))


def training_batches(
    utterances: Utterances,
    *,
    batch_size: int,
    crop_samples: int,
    seed: int,
    noise: Utterances | None = None,
    music: Utterances | None = None,
    babble: Utterances | None = None,
    rooms: Utterances | None = None,
    whole_samples: int = 0,
    augment: bool = True,
    speeds: Sequence[float] = (1.0,),
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 2,
    cache_bytes: int = 1 << 30,
    failures: MutableMapping[str, str] | None = None,
) -> "grain.IterDataset":
    """Makes the endless sequence of training batches.

    Every epoch is a new permutation of all utterances at all speeds. Each example gets one disturbance out of those at
    hand, uniformly: none, noise (0-15 dB), music (5-15 dB), babble of 3 to 7 other voices (13-20 dB), or
    reverberation. The batches of all processes together are those of a single process with the larger batch.

    Args:
        utterances: the training set.
        batch_size: examples in a batch of this process.
        crop_samples: samples of a crop; shorter utterances are repeated.
        seed: decides every draw.
        noise: noise clips; without them no example gets noise.
        music: music clips; likewise.
        babble: speech that babble is made of; without it that of other training speakers.
        rooms: room impulse responses; without them the device simulates rooms.
        whole_samples: utterances are left whole, up to so many samples, for the device to cut crops of their features.
            Shorter ones are repeated to this length. 0: crops are cut here.
        augment: False gives clean crops, and no `interference`.
        speeds: speed factors; each but the first makes `len(speaker_names)` further speakers. Usually (1.0, 0.9, 1.1).
        process_index: this process's number.
        process_count: how many processes train together.
        threads: batches made at the same time; twice as many are kept ahead, at most eight. With 0 a batch is made when
            it is asked for.
        cache_bytes: memory for decoded speech, as 16-bit samples; noise and music get a quarter each on top.
        failures: filled with the reason by the place of each utterance that could not be read and was replaced.

    Returns:
        A grain `IterDataset` of dictionaries: `wave` and `interference` `[batch, samples]` int16, `snr_db` `[batch]`
        float32 (infinite without interference), `reverb` `[batch]` bool, `speaker` `[batch]` int32. Where utterances
        are whole, also `length` `[batch]` int32, the samples before they repeat, and `place` `[batch]` float32 in
        [0, 1), where a crop begins; where rooms are given, `rir` `[batch, ROOM_SAMPLES]` float32. Its iterator has
        `get_state` and `set_state`.

    Raises:
        UserError: no utterance, or a setting out of range.
    """
    grain = needed("grain", "training")
    _check(utterances, batch_size, crop_samples, speeds, process_index, process_count)
    voices = len(utterances.speaker_names)
    at_hand = {"noise": noise is not None, "music": music is not None, "babble": babble is not None or voices > 1}
    kinds = tuple(kind for kind in KINDS if at_hand.get(kind, True)) if augment else ("clean",)
    examples = _Examples(
        Crops(utterances, cache_bytes, failures),
        None if noise is None else Crops(noise, cache_bytes // 4, failures),
        None if music is None else Crops(music, cache_bytes // 4, failures),
        None if babble is None else Crops(babble, cache_bytes // 4, failures),
        None if rooms is None else Crops(rooms, cache_bytes // 4, failures),
        whole_samples or crop_samples,
        bool(whole_samples),
        tuple(speeds),
        kinds,
    )
    dataset = grain.MapDataset.range(len(utterances) * len(speeds)).seed(seed).shuffle().repeat().random_map(examples)
    # Sliced last, so that a process's random draws follow from the place in the whole sequence.
    dataset = dataset[process_index::process_count].batch(batch_size, drop_remainder=True)
    ahead = max(min(2 * threads, _MOST_AHEAD), 1)
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead))


def clean_crops(utterances: Utterances, count: int, crop_samples: int) -> np.ndarray:
    """Random clean crops of utterances, float32 `[count, crop_samples]`.

    They are the first batch of training without augmentation. Without grain, which a light install leaves out, they are
    other crops, drawn alike.

    Raises:
        UserError: no utterance, or a setting out of range.
    """
    if importlib.util.find_spec("grain"):
        batches = training_batches(
            utterances, batch_size=count, crop_samples=crop_samples, seed=0, augment=False, threads=0
        )
        return audio.from_int16(next(iter(batches))["wave"])
    _check(utterances, count, crop_samples, (1.0,), 0, 1)
    clips, rng = Crops(utterances), np.random.default_rng(0)
    epochs = -(-count // len(utterances))
    order = np.concatenate([rng.permutation(len(utterances)) for _ in range(epochs)])[:count]
    return audio.from_int16(np.stack([clips.crop(int(place), crop_samples, rng)[0] for place in order]))


def _check(
    utterances: Utterances, batch_size: int, crop_samples: int, speeds: Sequence[float], process: int, processes: int
) -> None:
    if not len(utterances):
        raise UserError("the training set has no utterance")
    for name, value in (("batch_size", batch_size), ("crop_samples", crop_samples), ("process_count", processes)):
        if value < 1:
            raise UserError(f"`{name}` (={value}) must be at least 1")
    if not 0 <= process < processes:
        raise UserError(f"`process_index` (={process}) must be in [0, {processes})")
    if not speeds or any(not 0.5 <= speed <= 2.0 for speed in speeds) or len(set(speeds)) < len(speeds):
        raise UserError(f"`speeds` (={tuple(speeds)}) must be different factors between 0.5 and 2")
