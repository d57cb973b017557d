"""The embedded corpus: synthetic voices, and noises to disturb them, that need no download.

A DATA argument `synthetic:SPLIT[?key=value&key=value]` names it:

    synthetic:train     200 female and male speakers of 10 utterances, to train on
    synthetic:dev       40 others of 10, to choose by
    synthetic:test      40 others of 10, to report
    synthetic:noise     coloured noises, tones, clicks and hums for augmentation

The keys are `speakers`, `utterances` (of each speaker), `seed`, and `seconds`, the length of every utterance in place
of 2 to 5. Another seed gives other people. Nothing is stored: every utterance is a function of (seed, split, speaker,
utterance, seconds), is the same whatever else is asked for, and is made when it is loaded. The trials of a split are
named like the split, `--trials=synthetic:dev`.
"""

import functools
from dataclasses import dataclass
from urllib.parse import parse_qsl

import numpy as np
from scipy.signal import lfilter

from kmq_jax.core.errors import UserError
from kmq_jax.data import voice
from kmq_jax.data.table import Trials, Utterances

PREFIX = "synthetic:"
NOISES = ("colour", "tone", "click", "hum")
_SPLITS = ("train", "dev", "test", "noise")  # a split's place is part of its seeds, so splits share no speaker
_SIZES = {"train": (200, 10), "dev": (40, 10), "test": (40, 10), "noise": (len(NOISES), 25)}
_SECONDS = (2.0, 5.0)  # shortest and longest utterance
_LONGEST = 60  # seconds of an utterance, where they are given
_MOST = 10_000_000  # utterances in one table


@dataclass(frozen=True)
class Corpus:
    """One split of the embedded corpus, of a given size.

    Attributes:
        split: "train", "dev", "test" or "noise".
        speakers: How many; kinds of noise for "noise".
        utterances: How many of each.
        seed: Other seeds give other speakers.
        seconds: The length of every utterance; 0: 2 to 5 seconds.
        spread: How hard it is to tell the speakers apart.
    """

    split: str
    speakers: int
    utterances: int
    seed: int = 0
    seconds: int = 0
    spread: voice.Spread = voice.Spread()

    def rng(self, speaker: int, utterance: int | None = None) -> np.random.Generator:
        """The generator that draws a speaker, or one of the speaker's utterances."""
        # Stream 0 draws the speaker, the others the utterances: asking for more of them changes none.
        stream = 0 if utterance is None else utterance + 1
        return np.random.default_rng([self.seed, _SPLITS.index(self.split), speaker, stream])

    def sex(self, speaker: int) -> str:
        """Female and male speakers alternate."""
        return ("female", "male")[speaker % 2]

    def speaker(self, speaker: int) -> voice.Speaker:
        """The voice of speaker number `speaker`."""
        return voice.speaker(self.rng(speaker), self.sex(speaker), self.spread)

    def samples(self, speaker: int) -> np.ndarray:
        """`[utterances]` int64 lengths of a speaker's utterances at 16 kHz, whole frames."""
        if self.seconds:
            return np.full(self.utterances, self.seconds * voice.SAMPLE_RATE // voice.HOP * voice.HOP)
        shortest, longest = (int(seconds * voice.SAMPLE_RATE / voice.HOP) for seconds in _SECONDS)
        # A stream that no utterance has: lengths do not depend on what is said.
        rng = np.random.default_rng([self.seed, _SPLITS.index(self.split), speaker, 2**32 - 1])
        return rng.integers(shortest, longest, self.utterances, endpoint=True) * voice.HOP

    def name(self, speaker: int) -> str:
        """The speaker's name, as in `syn-train-0003`."""
        return f"syn-{self.split}-{NOISES[speaker] if self.split == 'noise' else f'{speaker:04d}'}"

    def wave(self, speaker: int, utterance: int) -> np.ndarray:
        """`[samples]` float32 in (-1, 1) at 16 kHz: one utterance, or one clip of noise."""
        rng = self.rng(speaker, utterance)
        samples = int(self.samples(speaker)[utterance])
        if self.split == "noise":
            return noise(NOISES[speaker], samples, rng)
        person = self.speaker(speaker)
        tracks = voice.plan(person, rng, samples / voice.SAMPLE_RATE, self.spread)
        return voice.transmit(voice.render(tracks, person, rng), rng, self.spread)


class Reader:
    """Gives an utterance by its id. It remembers what it made, as 16-bit samples, while that fits in memory.

    So training pays for an utterance once, not once an epoch, and a study once, not once a model (`reader_of`). Copies
    in other processes begin with nothing.
    """

    def __init__(self, corpus: Corpus, room: int = 1 << 29):
        """Reads `corpus`, remembering up to `room` bytes."""
        self.corpus, self.room = corpus, room
        self._made: dict[str, np.ndarray] = {}
        self._left = room

    def __reduce__(self) -> tuple[type["Reader"], tuple[Corpus, int]]:
        return Reader, (self.corpus, self.room)

    def __call__(self, name: str) -> np.ndarray:
        """`[samples]` float32 in [-1, 1), as a 16-bit recording holds them."""
        coded = self._made.get(name)
        if coded is None:
            split = self.corpus.split
            speaker, utterance = name.removeprefix(f"syn-{split}-").split("-")
            number = NOISES.index(speaker) if split == "noise" else int(speaker)
            coded = np.rint(self.corpus.wave(number, int(utterance)) * 32768).astype(np.int16)
            if self._left >= coded.nbytes:  # threads may overshoot by an utterance each
                self._left -= coded.nbytes
                self._made[name] = coded
        return coded.astype(np.float32) / 32768


@functools.lru_cache(maxsize=4)
def reader_of(corpus: Corpus) -> Reader:
    """The reader that all tables of a corpus share."""
    return Reader(corpus)


def parse(spec: str) -> Corpus:
    """Reads `synthetic:SPLIT[?key=value&...]`.

    Raises:
        UserError: the split, a key or a value is unknown; the message names it.

    >>> parse("synthetic:dev?speakers=3").speakers
    3
    """
    split, _, query = spec.removeprefix(PREFIX).partition("?")
    if split not in _SPLITS:
        raise UserError(f"{spec}: unknown split {split!r}; it must be one of {', '.join(_SPLITS)}")
    values = dict(zip(("speakers", "utterances"), _SIZES[split]), seed=0, seconds=0)
    fixed = {"speakers": values.pop("speakers")} if split == "noise" else {}  # one for each kind
    for key, text in parse_qsl(query, keep_blank_values=True, separator="&"):
        if key not in values:
            raise UserError(f"{spec}: unknown key {key!r}; the keys are {', '.join(values)}")
        least, most = 0 if key in ("seed", "seconds") else 1, _LONGEST if key == "seconds" else 2**32 - 2
        if not (text.isascii() and text.isdigit()) or not least <= int(text) <= most:
            up_to = f" to {most}" if key == "seconds" else ""
            raise UserError(f"{spec}: {key} must be a whole number from {least}{up_to}, got {text!r}")
        values[key] = int(text)
    sizes = {**values, **fixed}
    corpus = Corpus(split, sizes["speakers"], sizes["utterances"], sizes["seed"], sizes["seconds"])
    if corpus.speakers * corpus.utterances > _MOST:
        raise UserError(f"{spec}: {corpus.speakers} speakers of {corpus.utterances} utterances; at most {_MOST} in all")
    return corpus


def open_synthetic(spec: str) -> Utterances:
    """Opens `synthetic:SPLIT[?key=value&...]` as a table; ids are like `syn-train-0003-07`.

    Raises:
        UserError: the split, a key or a value is unknown.
    """
    return table(parse(spec))


def table(corpus: Corpus) -> Utterances:
    """The utterances of a corpus; each is made when it is loaded."""
    names = [corpus.name(speaker) for speaker in range(corpus.speakers)]
    ids = tuple(f"{name}-{utterance:02d}" for name in names for utterance in range(corpus.utterances))
    return Utterances(
        ids=ids,
        paths=ids,
        speakers=tuple(name for name in names for _ in range(corpus.utterances)),
        samples=np.concatenate([corpus.samples(speaker) for speaker in range(corpus.speakers)]),
        genders={} if corpus.split == "noise" else {name: corpus.sex(i)[0] for i, name in enumerate(names)},
        reader=reader_of(corpus),
    )


def synthetic_trials(spec: str, most: int = 20_000) -> Trials:
    """Trials of a split: pairs of one speaker, and as many of two speakers, half of them of the same sex.

    Args:
        spec: as for `open_synthetic`; rows of the trials are rows of that table.
        most: if there are more target pairs, this many of them, evenly spread.

    Raises:
        UserError: the split has no pair of some kind.
    """
    corpus = parse(spec)
    speakers, utterances = corpus.speakers, corpus.utterances
    if corpus.split == "noise" or speakers < 4 or utterances < 2:
        raise UserError(f"{spec}: trials need at least 4 speakers of 2 utterances")
    pairs = utterances * (utterances - 1) // 2
    count = min(speakers * pairs, most)
    chosen = np.linspace(0, speakers * pairs, count, endpoint=False).astype(np.int64)
    # All target pairs are numbered, speaker by speaker; the quotient is the speaker, the remainder the pair.
    target = chosen[:, None] // pairs * utterances + _pairs(chosen % pairs, utterances)

    rng = np.random.default_rng([corpus.seed, _SPLITS.index(corpus.split), 2**32 - 1, 2**32 - 1])
    enrol = rng.integers(speakers, size=count)
    same_sex = np.arange(count) % 2 == 0
    # An even step stays within a sex and an odd one leaves it: sexes alternate.
    even, odd = (speakers + 1) // 2, speakers // 2
    step = rng.integers(2**32, size=count)
    sex = enrol % 2
    size = np.where(sex == 0, even, odd)
    # Within a sex, one to size - 1 places on: never the speaker again.
    near = (enrol // 2 + 1 + step % (size - 1)) % size * 2 + sex
    far = step % np.where(sex == 0, odd, even) * 2 + 1 - sex
    test = np.where(same_sex, near, far)
    nontarget = np.stack([enrol, test], 1) * utterances + rng.integers(utterances, size=(count, 2))

    rows = np.concatenate([target, nontarget]).astype(np.int32)
    label = np.arange(2 * count) < count
    return Trials(rows[:, 0], rows[:, 1], label, table(corpus).ids, rows[:, 0], rows[:, 1])


def _pairs(numbers: np.ndarray, utterances: int) -> np.ndarray:
    """The pairs `[n, 2]` of these numbers, among all pairs of utterances in the order of `itertools.combinations`.

    >>> _pairs(np.arange(6), 4).tolist()
    [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    """
    first = np.arange(utterances - 1, dtype=np.int64)
    starts = first * (2 * utterances - first - 1) // 2  # the number of the first pair with each first utterance
    one = np.searchsorted(starts, numbers, side="right") - 1
    return np.stack([one, numbers - starts[one] + one + 1], 1)


def noise(kind: str, samples: int, rng: np.random.Generator) -> np.ndarray:
    """A clip of noise, `[samples]` float32 in [-1, 1) at 16 kHz. It has no speech in it.

    Args:
        kind: one of `NOISES`: "colour" is wind or hiss, "tone" a drifting chord, "click" crackle, "hum" a motor.
        samples: its length.
        rng: draws it.

    Raises:
        ValueError: the kind is none of these.
    """
    time = np.arange(samples) / voice.SAMPLE_RATE
    white = rng.standard_normal(samples)
    if kind == "colour":
        frequency = np.fft.rfftfreq(samples, 1 / voice.SAMPLE_RATE)
        colour = (np.maximum(frequency, 40.0) / 1000) ** rng.uniform(-1.2, 0.3)
        wave = np.fft.irfft(np.fft.rfft(white) * colour, samples)
        wave *= 1 + 0.8 * np.sin(2 * np.pi * rng.uniform(0.2, 3.0) * time + rng.uniform(0, 6.3)) * rng.random()
    elif kind == "tone":
        wave = 0.02 * white
        for frequency in rng.uniform(120, 3500, rng.integers(1, 5)):
            drift = 1 + 0.01 * np.sin(2 * np.pi * rng.uniform(0.1, 6.0) * time)
            wave += rng.random() * np.sin(2 * np.pi * np.cumsum(frequency * drift) / voice.SAMPLE_RATE)
    elif kind == "click":
        clicks = np.where(rng.random(samples) < rng.uniform(2, 40) / voice.SAMPLE_RATE, white, 0.0)
        radius, angle = np.exp(-np.pi * rng.uniform(100, 800) / voice.SAMPLE_RATE), 2 * np.pi * rng.uniform(0.01, 0.25)
        wave = lfilter([1.0], [1.0, -2 * radius * np.cos(angle), radius**2], clicks) + 0.01 * white
    elif kind == "hum":
        harmonics = np.arange(1, 25)
        phases = 2 * np.pi * (rng.uniform(45, 180) * harmonics[:, None] * time + rng.random((len(harmonics), 1)))
        wave = (rng.random(len(harmonics)) / harmonics) @ np.sin(phases) + 0.05 * rng.random() * white
    else:
        raise ValueError(f"kind (={kind!r}) must be one of {', '.join(NOISES)}")
    peak = np.max(np.abs(wave)) + 1e-9
    return (wave * (rng.uniform(0.1, 0.7) / peak)).astype(np.float32)
