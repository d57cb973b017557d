"""The tables that every form of DATA and TRIALS becomes: utterances, and pairs of them."""

import dataclasses
import math
import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import size_and_time
from kmq_jax.data import audio

OVERSHOOT = 0.5  # seconds by which a part may run past its recording's end, as in Kaldi's extract-segments


@dataclasses.dataclass(frozen=True, eq=False)
class Utterances:
    """A list of recordings and who speaks in them. Nothing is decoded until `load`.

    Attributes:
        ids: the key that trial lists use; unique.
        paths: as the source names them: relative to `root`, or absolute.
        speakers: the speaker's name, one an utterance.
        root: the directory of relative paths.
        spans: `[n, 2]` seconds, first and last (infinity: the end), where utterances are parts of recordings; None for
            whole files.
        samples: `[n]` lengths at 16 kHz where the source knows them; else None.
        genders: "f" or "m" by speaker, where known.
        ages: years by speaker, where known.
        reader: gives the samples of an utterance by its id, for audio that is not in files of its own. It must be
            picklable and safe to call from several threads. It has `stamps` where it reads files.
        listing: the file that lists the utterances, for messages.
        lines: the line of each utterance in it.
    """

    ids: tuple[str, ...]
    paths: tuple[str, ...]
    speakers: tuple[str, ...]
    root: Path = Path()
    spans: np.ndarray | None = None
    samples: np.ndarray | None = None
    genders: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ages: Mapping[str, float] = dataclasses.field(default_factory=dict)
    reader: Callable[[str], np.ndarray] | None = None
    listing: Path | None = None
    lines: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def speaker_names(self) -> tuple[str, ...]:
        """The different speakers, sorted; a speaker's label is the place here."""
        return tuple(sorted(set(self.speakers)))

    @cached_property
    def labels(self) -> np.ndarray:
        """`[n]` int32: the speaker of each utterance as an index into `speaker_names`."""
        index = {name: i for i, name in enumerate(self.speaker_names)}
        return np.fromiter((index[name] for name in self.speakers), np.int32, len(self))

    def location(self, i: int) -> Path:
        """The file of utterance `i`."""
        return self.root / self.paths[i]

    def where(self, i: int) -> str:
        """Names utterance `i` for a message: its file, and the line that lists it where there is one."""
        place = self.paths[i] if self.reader else str(self.location(i))
        return f"{self.listing}:{self.lines[i]}: {place}" if self.listing and self.lines is not None else place

    def load(self, i: int, min_seconds: float = audio.MIN_SECONDS) -> np.ndarray:
        """Reads utterance `i` as `[samples]` float32 in [-1, 1), mono, 16 kHz.

        Raises:
            AudioError: it cannot be used; the message names the file, and the line that lists it.
        """
        try:
            if self.reader is not None:
                return audio.checked(self.reader(self.ids[i]), self.location(i), min_seconds)
            if self.spans is None:
                return audio.read_audio(self.location(i), min_seconds=min_seconds)
            first, last = map(float, self.spans[i])
            wanted = None if math.isinf(last) else last - first
            wave = audio.read_audio(self.location(i), start=first, seconds=wanted, min_seconds=min_seconds)
            if wanted is not None:
                _check_reached(self.location(i), last, first + len(wave) / audio.SAMPLE_RATE)
            return wave
        except audio.AudioError as error:
            raise audio.AudioError(self.where(i), error.reason) from None

    def load_int16(self, i: int) -> np.ndarray:
        """Reads utterance `i` as `[samples]` int16, mono, 16 kHz.

        What a prepared dataset holds was checked when it was written, so it comes as it is stored: several times faster
        than `load`, which looks at every sample.

        Raises:
            AudioError: as `load`.
        """
        stored = getattr(self.reader, "int16", None)
        if stored is None:
            return audio.to_int16(self.load(i))
        try:
            return stored(self.ids[i])
        except audio.AudioError as error:
            raise audio.AudioError(self.where(i), error.reason) from None

    def num_samples(self, i: int) -> int:
        """The length of utterance `i` at 16 kHz, without decoding where the source or the header tells it.

        For a part of a recording it may be off by one sample.

        Raises:
            AudioError: the file is missing, cannot be read, or ends before the part does.
        """
        if self.samples is not None:
            return int(self.samples[i])
        if isinstance(self.reader, _Joined):
            return self.reader.num_samples(self.ids[i])
        if self.reader is not None:  # a reader gives samples only, so the recording is decoded
            return len(self.load(i))
        try:
            whole = audio.num_samples(self.location(i))
            if self.spans is None:
                return whole
            first, last = map(float, self.spans[i])
            if not math.isinf(last):
                _check_reached(self.location(i), last, whole / audio.SAMPLE_RATE)
        except audio.AudioError as error:
            raise audio.AudioError(self.where(i), error.reason) from None
        # Before rounding: infinity has no whole number.
        last = min(last, whole / audio.SAMPLE_RATE)
        return max(round(last * audio.SAMPLE_RATE) - round(first * audio.SAMPLE_RATE), 0)

    def lengths(self, workers: int = 8) -> np.ndarray:
        """`[n]` int64 lengths at 16 kHz of all utterances; a missing file is found here, before any work is done."""
        if self.samples is not None:
            return np.asarray(self.samples, np.int64)
        # Headers of many small files: threads wait for the disk together.
        with ThreadPoolExecutor(workers) as pool:
            return np.fromiter(pool.map(self.num_samples, range(len(self))), np.int64, len(self))

    def stamps(self, workers: int = 8) -> list[str]:
        """Texts that change where sound is written anew, by size and time: one a file that the utterances lie in.

        Of sound that is made, not read, there are none.
        """
        if self.reader is not None:
            found: list[str] = getattr(self.reader, "stamps", list)()
            return found
        with ThreadPoolExecutor(workers) as pool:  # a network disk answers many at once
            return list(pool.map(size_and_time, map(self.location, range(len(self)))))

    def select(self, indices: Sequence[int] | np.ndarray) -> "Utterances":
        """The table of some of the utterances, in the order given. Labels are numbered anew over the speakers left."""
        rows = np.asarray(indices, np.int64)

        def pick(values: Sequence) -> tuple:
            return tuple(values[i] for i in rows)

        return dataclasses.replace(
            self,
            ids=pick(self.ids),
            paths=pick(self.paths),
            speakers=pick(self.speakers),
            spans=None if self.spans is None else self.spans[rows],
            samples=None if self.samples is None else self.samples[rows],
            lines=None if self.lines is None else pick(self.lines),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Trials:
    """Trials as indices into an utterance table.

    Attributes:
        enrol: `[n]` int32, the enrolment utterance; with `models`, the model.
        test: `[n]` int32, the test utterance.
        label: `[n]` bool, True for the same speaker (target).
        names: every name the list uses, once, as the list writes it.
        enrol_name: `[n]` int32 into `names`.
        test_name: `[n]` int32 into `names`.
        models: the utterances of each enrolment model, where speakers are enrolled with several; else None.
    """

    enrol: np.ndarray
    test: np.ndarray
    label: np.ndarray
    names: tuple[str, ...]
    enrol_name: np.ndarray
    test_name: np.ndarray
    models: tuple[np.ndarray, ...] | None = None

    def __len__(self) -> int:
        return len(self.label)


def _check_reached(path: Path, last: float, end: float) -> None:
    """Refuses a part that ends far behind the recording's end; lists are often a few frames off."""
    if last > end + OVERSHOOT:
        raise audio.AudioError(path, f"the part ends at {last:g} s, but the recording at {end:.2f} s")


def concatenate(tables: Sequence[Utterances], same_speakers: bool = False) -> Utterances:
    """Joins tables into one. An id that an earlier table has, too, is prefixed with the number of its own table.

    Args:
        tables: what to join, at least one; each may itself be a joined table.
        same_speakers: whether a name in two tables is one speaker, as in the splits of one corpus; else it is two.

    Returns:
        The utterances in the order of the tables; a single table as it is.

    >>> tables = [Utterances(("a.wav",), ("a.wav",), ("0001",), Path(place)) for place in ("one", "two")]
    >>> joined = concatenate(tables)
    >>> joined.ids, joined.speakers
    (('a.wav', '1:a.wav'), ('0001', '1:0001'))
    """
    if len(tables) == 1:
        return tables[0]
    ids: list[str] = []
    speakers: list[str] = []
    genders: dict[str, str] = {}
    ages: dict[str, float] = {}
    rows: dict[str, tuple[int, int]] = {}
    known: set[str] = set()
    for t, table in enumerate(tables):
        # Two corpora may both have a speaker 0001: the second gets the number of its table before its name.
        taken: Container[str] = () if same_speakers else known
        new = {name: _free(name, t, taken) for name in table.speaker_names}
        known.update(new.values())
        for i, name in enumerate(table.ids):
            unique = _free(name, t, rows)
            rows[unique] = (t, i)
            ids.append(unique)
        speakers += [new[name] for name in table.speakers]
        genders |= {new[name]: value for name, value in table.genders.items() if name in new}
        ages |= {new[name]: value for name, value in table.ages.items() if name in new}
    # Whole files are found by their paths; anything else is read by the table it came from.
    plain = all(table.reader is None and table.spans is None for table in tables)
    known_lengths = [table.samples for table in tables if table.samples is not None]
    return Utterances(
        ids=tuple(ids),
        paths=tuple(str(table.location(i).absolute()) for table in tables for i in range(len(table))),
        speakers=tuple(speakers),
        samples=np.concatenate(known_lengths) if len(known_lengths) == len(tables) else None,
        genders=genders,
        ages=ages,
        reader=None if plain else _Joined(tuple(tables), rows),
    )


def _free(name: str, number: int, taken: Container[str]) -> str:
    """A name that is not taken: the table's number is put before it until it is free."""
    while name in taken:
        name = f"{number}:{name}"
    return name


@dataclasses.dataclass(frozen=True, eq=False)
class _Joined:
    """Reads an utterance of several tables by its id."""

    tables: tuple[Utterances, ...]
    rows: Mapping[str, tuple[int, int]]

    def __call__(self, name: str) -> np.ndarray:
        table, i = self.rows[name]
        return self.tables[table].load(i)

    def int16(self, name: str) -> np.ndarray:
        """The same as int16."""
        table, i = self.rows[name]
        return self.tables[table].load_int16(i)

    def stamps(self) -> list[str]:
        """Those of all tables."""
        return [stamp for table in self.tables for stamp in table.stamps()]

    def num_samples(self, name: str) -> int:
        """Its length, decoded only where its own table must."""
        table, i = self.rows[name]
        return self.tables[table].num_samples(i)


def gender_of(text: str) -> str | None:
    """A gender as lists write it, as "f" or "m"; None of what is neither, such as "unknown".

    >>> gender_of("Female"), gender_of("m"), gender_of("unknown")
    ('f', 'm', None)
    """
    return {"f": "f", "female": "f", "m": "m", "male": "m"}.get(text.lower())


def age_of(text: str) -> float | None:
    """An age in years; None of one that is below zero or not a number, by which lists say that it is unknown.

    Raises:
        ValueError: the text is no number.

    >>> age_of("31"), age_of("-1"), age_of("nan")
    (31.0, None, None)
    """
    age = float(text)
    return age if 0 <= age < math.inf else None


def require_utf8(names: Iterable[str], what: str) -> None:
    r"""Refuses file names that are not UTF-8, before they are written where only UTF-8 may stand.

    Args:
        names: as Python has them, with bytes that are not UTF-8 as surrogate escapes.
        what: where the names are to be written, for the message.

    Raises:
        UserError: there is one.

    >>> require_utf8(["caf\udce9.wav"], "a trial list")
    Traceback (most recent call last):
    kmq_jax.core.errors.UserError: b'caf\xe9.wav' is not UTF-8, as names in a trial list must be: rename the recording
    """
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{os.fsencode(name)!r} is not UTF-8, as names in {what} must be: rename the recording"
            ) from None


def require_unique(ids: Sequence[str], listing: Path, lines: Sequence[int]) -> None:
    """Raises `UserError`, naming file and line, where an id comes twice.

    >>> require_unique(["a", "b", "a"], Path("list.csv"), [2, 3, 4])
    Traceback (most recent call last):
    kmq_jax.core.errors.UserError: list.csv:4: utterance a was already given on line 2
    """
    if len(set(ids)) == len(ids):
        return
    seen: dict[str, int] = {}
    for name, line in zip(ids, lines):
        if name in seen:
            raise UserError(f"{listing}:{line}: utterance {name} was already given on line {seen[name]}")
        seen[name] = line
