"""Enrols speakers with recordings, verifies a recording as one of them, or identifies it among all of them."""

import contextlib
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kmq_jax.core.errors import UserError, reason_of
from kmq_jax.core.files import Json, file_hash
from kmq_jax.core.progress import progress, say_once
from kmq_jax.data import audio, speech
from kmq_jax.models.choices import Engine
from kmq_jax.models.embedder import Embedder
from kmq_jax.scoring.cosine import average, cosine_scores, lengths, unusable
from kmq_jax.scoring.threshold import Decider, check_threshold, read_threshold
from kmq_jax.speakers.database import (
    FILE,
    Database,
    Empty,
    ModelRow,
    RecordingRow,
    composed,
    reading,
    shown_path,
    valid_name,
    writing,
)

if TYPE_CHECKING:
    from kmq_jax.models.speaker_model import SpeakerModel

Recording = str | os.PathLike[str] | tuple[np.ndarray, int]


@dataclass(frozen=True)
class Speaker:
    """An enrolled speaker.

    Attributes:
        name: as enrolled.
        recordings: how many there are.
        seconds: of all of them together.
        since: when the first of them was enrolled, in UTC.
    """

    name: str
    recordings: int
    seconds: float
    since: datetime


@dataclass(frozen=True)
class Match:
    """How a recording compares with an enrolled speaker.

    Attributes:
        speaker: the name.
        score: cosine of the recording's embedding and the speaker's mean, -1 to 1.
        decision: whether the score is at least the threshold; None where no threshold was given.
    """

    speaker: str
    score: float
    decision: bool | None

    def describe(self, threshold: Decider | None) -> str:
        """The verdict in one line, with what is known of the threshold.

        >>> Match("alice", 0.625, True).describe(Decider(0.5))
        'alice: accepted, score 0.6250 is at least the threshold 0.5000'
        """
        if threshold is None:
            return f"{self.speaker}: score {self.score:.4f}; nothing is decided without a threshold"
        verdict, side = ("accepted", "at least") if self.decision else ("rejected", "below")
        known = f"the threshold {threshold.value:.4f}{threshold.known}"
        return f"{self.speaker}: {verdict}, score {self.score:.4f} is {side} {known}"


class SpeakerStore:
    """Enrolled speakers, in a directory that several processes may use at once.

    A speaker is compared by the mean of the length-normalised embeddings of all its recordings. The store remembers the
    model, and the path and hash of each recording; it keeps no sound. A method that fails has changed nothing.

    >>> import tempfile
    >>> import jax
    >>> import soundfile
    >>> from kmq_jax.data import source
    >>> from kmq_jax.models import registry
    >>> from kmq_jax.models.speaker_model import SpeakerModel
    >>> settings = {"width": 4, "blocks": [1, 1, 1, 1], "embedding_size": 8}
    >>> weights = registry.initialize(registry.build("wespeaker_resnet34", **settings), jax.random.key(0))
    >>> model = SpeakerModel("wespeaker_resnet34", settings, "wespeaker", weights)
    >>> speech, place = source.open_source("synthetic:dev?speakers=2&utterances=2"), tempfile.mkdtemp()
    >>> files = [f"{place}/{row}.wav" for row in range(4)]
    >>> for row, file in enumerate(files):
    ...     soundfile.write(file, speech.load(row), source.SAMPLE_RATE)
    >>> store = SpeakerStore(f"{place}/store", model)
    >>> store.enrol("alice", files[:2]).recordings, store.enrol("bob", files[2:3]).recordings
    (2, 1)
    >>> store.verify("bob", files[2], threshold=0.99).decision
    True
    >>> [match.speaker for match in store.identify(files[2], top=1)]
    ['bob']
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        model: "SpeakerModel | str | os.PathLike[str] | None" = None,
        bits: int | None = None,
        engine: Engine = "auto",
        vad: bool = False,
    ):
        """Names the store; nothing is read or written yet.

        Args:
            directory: of the store; the first enrolment makes it.
            model: the model that embeds recordings, or the MODEL to load; left out: the one that the store remembers.
            bits: at which a nested MODEL is read; None: the most it has.
            engine: what runs the network: "jax", "onnxruntime", or "auto", ONNX Runtime on a CPU.
            vad: leave out of all recordings what is not speech (`data.speech.only`). The store remembers this of each
                recording, and warns where it is otherwise now.

        Raises:
            UserError: bits are given without a model.
        """
        if bits and model is None:
            raise UserError("`bits` needs `model`: without it, the store's own model is read at the store's own bits")
        self._file, self._given, self._bits = Path(directory) / FILE, model, bits
        self._engine: Engine = engine
        self._vad = vad
        self._loaded: tuple[Embedder, ModelRow] | None = None

    def enrol(self, name: str, recordings: Sequence[str | os.PathLike[str]], replace: bool = False) -> Speaker:
        """Adds recordings to a speaker; a new name makes a new speaker.

        Args:
            name: of the speaker: 1 to 200 printable characters.
            recordings: files. `enrol_again` reads them again, so they should stay where they are.
            replace: drop the speaker's recordings so far.

        Returns:
            The speaker, with earlier recordings and these.

        Raises:
            UserError: the name cannot be one; a recording cannot be read or is enrolled already; the store is of
                another model, or is no store.
        """
        name = composed(name)
        _check_name(name)
        if not recordings:
            raise UserError(f"there is no recording to enroll of `speaker` (={name})")
        embedder = self._model()
        rows = [self._embedded(embedder, name, path) for path in recordings]
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:  # ValueError: a null byte in the name
            raise UserError(f"`store` (={self._file.parent}) cannot be written: {reason_of(error)}") from error
        with writing(self._file) as database:
            # Checked once more: another process may have enrolled with another model meanwhile.
            model = self._checked(database.model())
            database.set_model(model)
            if replace:
                database.remove(name)
            for row in rows:
                database.add(row)
            kept = database.recordings(name)
        self._warn_of_vad(kept)
        return _summary(name, kept)

    def enrol_again(self) -> int:
        """Embeds every recording again with the model given to the store, and remembers that model from then on.

        Returns:
            How many recordings there are.

        Raises:
            UserError: no model was given; a recording is missing or is another file than was enrolled; or another
                process changed the store meanwhile.
        """
        if self._given is None:
            raise UserError("`model` must be given: the one to embed all recordings with again")
        with reading(self._file) as database:
            before, rows = database.model(), database.recordings()
        for row in rows:  # all of them, before the work
            _check_unchanged(row)
        embedder, model = self._load(before)
        paths = [os.fsdecode(row.path) for row in rows]
        made = [self._embed(embedder, path) for path in progress(paths, desc="embedding", unit="recording")]
        with writing(self._file) as database:
            now = [(row.number, row.hash) for row in database.recordings()]
            if database.model() != before or now != [(row.number, row.hash) for row in rows]:
                raise UserError(f"{self._file.parent} was changed by another process meanwhile: run this again")
            database.set_model(model)
            for row, (embedding, seconds) in zip(rows, made):
                assert row.number is not None  # it was read
                database.set_embedding(row.number, embedding, seconds, self._vad)
        return len(rows)

    def speakers(self) -> list[Speaker]:
        """All speakers, sorted by name.

        Raises:
            UserError: there is no store, or its file is of another kind.
        """
        with reading(self._file) as database:
            groups = _by_speaker(database.recordings())
        return [_summary(name, groups[name]) for name in sorted(groups)]

    def remove(self, name: str) -> int:
        """Removes a speaker.

        Returns:
            How many recordings there were.

        Raises:
            UserError: there is no such speaker, or no store.
        """
        with reading(self._file) as database:  # first, for `writing` would make a store where there is none
            self._of(database, name)
        with writing(self._file) as database:
            self._of(database, name)
            return database.remove(name)

    def verify(self, name: str, recording: Recording, threshold: float | None = None) -> Match:
        """Compares a recording with the speaker whom it is claimed to be of.

        Args:
            name: of the speaker.
            recording: a file, or `(wave, sample rate)` with float `[samples]` or `[samples, channels]`.
            threshold: a score of at least this is accepted; None: nothing is decided.

        Raises:
            UserError: there is no such speaker; the recording cannot be read; the model is not the store's.
        """
        return self._matches(recording, threshold, name)[0]

    def identify(self, recording: Recording, threshold: float | None = None, top: int | None = None) -> list[Match]:
        """Compares a recording with every speaker.

        Args:
            recording: as for `verify`.
            threshold: a score of at least this is accepted. The set is open: if no speaker's is, it is a stranger.
            top: how many of the best speakers to return; None: all.

        Returns:
            A match for each speaker, the best first.

        Raises:
            UserError: nobody is enrolled; the recording cannot be read; the model is not the store's.
        """
        if top is not None and top < 1:
            raise UserError(f"`top` (={top}) must be 1 or more")
        return self._matches(recording, threshold)[:top]

    def _matches(self, recording: Recording, threshold: float | None, name: str | None = None) -> list[Match]:
        """A match for each speaker, or for the one of that name; the best first."""
        if threshold is not None:
            check_threshold(threshold)
        with reading(self._file) as database:
            known = database.model()
            groups = _by_speaker(database.recordings() if name is None else self._of(database, name))
        if not groups:
            raise UserError(f"{self._file.parent} holds no speakers: enroll them first")
        self._checked(known)
        embedder = self._load(known)[0]
        test, _ = self._embed(embedder, recording)
        # All recordings end to end, a speaker's side by side, then cut between speakers.
        rows = [row for group in groups.values() for row in group]
        self._warn_of_vad(rows)
        ends = np.cumsum([len(group) for group in groups.values()])
        means = average(np.stack([row.embedding for row in rows]), np.split(np.arange(len(rows)), ends[:-1]))
        scores = cosine_scores(means, test[None], np.arange(len(groups)), np.zeros(len(groups), np.int64))
        names = list(groups)
        return [_match(names[i], scores[i], threshold) for i in np.argsort(-scores, kind="stable")]

    @property
    def vad(self) -> bool:
        """Whether what is not speech is left out of recordings."""
        return self._vad

    @property
    def fingerprint(self) -> str:
        """The model's fingerprint; the model is loaded for it.

        Raises:
            UserError: the model is not the store's, or cannot be read.
        """
        return self._model().fingerprint

    def _model(self) -> Embedder:
        """The model given, or else the one remembered. A wrong model is refused here, before any work.

        Raises:
            UserError: it is not the store's.
        """
        known = None
        with contextlib.suppress(Empty), reading(self._file) as database:
            known = database.model()
        self._checked(known)
        return self._load(known)[0]

    def _load(self, known: ModelRow | None) -> tuple[Embedder, ModelRow]:
        """The model, loaded once, and what a store is to remember of it."""
        if self._loaded is None:
            given, bits = self._given, self._bits
            if given is None:
                if known is None or not known.place:
                    raise UserError(f"`model` must be given: {self._file.parent} does not know where its model lies")
                given, bits = os.fsdecode(known.place), known.bits
            embedder = Embedder(given, bits, self._engine)
            about = b"" if embedder.place is None else os.fsencode(embedder.place)
            self._loaded = embedder, ModelRow(about, embedder.bits, embedder.fingerprint, embedder.size)
        return self._loaded

    def _checked(self, known: ModelRow | None) -> ModelRow:
        """What a store remembers of its model; of a new store, what it is to remember of ours.

        Raises:
            UserError: the store is of another model.
        """
        model = self._load(known)[1]
        if known is None:
            return model
        if known.fingerprint != model.fingerprint:
            shown = shown_path(model.place) or repr(self._given)
            raise UserError(
                f"`model` (={shown}) is not the one of {self._file.parent}, which was made with "
                f"{shown_path(known.place)} as it was then: name that one, or embed all again (enroll --again)"
            )
        return known

    def _of(self, database: Database, name: str) -> list[RecordingRow]:
        """A speaker's recordings.

        Raises:
            UserError: there are none.
        """
        rows = database.recordings(name) if valid_name(name) else []
        if not rows:
            raise UserError(f"{self._file.parent} has no speaker {repr(name)[:100]}")
        return rows

    def _embedded(self, embedder: Embedder, name: str, path: str | os.PathLike[str]) -> RecordingRow:
        """A recording of a speaker as a row that can be written."""
        embedding, seconds = self._embed(embedder, path)
        place = os.fsencode(Path(path).absolute())
        return RecordingRow(name, place, file_hash(path), seconds, time.time(), embedding, vad=self._vad)

    def _warn_of_vad(self, rows: Sequence[RecordingRow]) -> None:
        """Warns of recordings that were enrolled with voice activity detection while it is off now, or the reverse."""
        others = [row for row in rows if row.vad not in (None, self._vad)]
        if others:
            then, now = ("without", "with") if self._vad else ("with", "without")
            shown = f"{shown_path(others[0].path)} of {others[0].speaker}"
            say_once(f"warning: {len(others)} recordings, {shown} first, were enrolled {then} vad, now it is {now}")

    def _embed(self, embedder: Embedder, recording: Recording) -> tuple[np.ndarray, float]:
        """A recording's embedding `[dim]` and its seconds; with `vad`, those of its speech.

        Raises:
            UserError: it cannot be read, or is too short; the message names it.
        """
        where = "the recording" if isinstance(recording, tuple) else os.fspath(recording)
        wave = audio.read_recording(recording)
        wave = speech.only(wave, where) if self._vad else wave
        try:
            embedding = embedder.embed([wave])[0]
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if unusable(lengths(embedding[None]))[0]:
            raise UserError(f"{where}: its embedding is zero or not finite")
        return embedding, len(wave) / audio.SAMPLE_RATE


def false_accept_rate(rate: float, speakers: int) -> float:
    """How often a stranger is accepted as some enrolled speaker, if the comparisons err independently.

    That is `1 - (1 - rate)^speakers`. The true rate is lower where several speakers accept the same strangers, and
    `speakers * rate` bounds it in any case.

    Args:
        rate: how often a single comparison accepts a stranger, at the threshold in use; a fraction.
        speakers: how many are enrolled.

    >>> round(false_accept_rate(0.01, speakers=20), 4)
    0.1821
    """
    return 1 - (1 - rate) ** speakers


def false_accept_rates(threshold: Decider | None, given: float | None, speakers: int) -> Json:
    """How often a stranger is accepted as one of the enrolled, as `false_accept_rate` has it.

    Args:
        threshold: its file may say how often a single comparison accepts a stranger.
        given: that rate, if it is known otherwise; it goes first.
        speakers: how many are enrolled.

    Returns:
        `false_accept_rate`; `false_accept_rate_ci95`, for the interval of a file's rate; `false_accept_rate_at_most`,
        which holds however the comparisons depend on each other, at the upper end of that interval. None where nothing
        is known.

    >>> rates = false_accept_rates(Decider(0.5), 0.01, speakers=20)
    >>> round(rates["false_accept_rate"], 4), rates["false_accept_rate_at_most"], rates["false_accept_rate_ci95"]
    (0.1821, 0.2, None)
    """
    known = threshold.false_accept if threshold and given is None else None
    one = known.value if known else given
    most = known.high if known else given
    interval = [false_accept_rate(end, speakers) for end in (known.low, known.high)] if known else None
    return {
        "false_accept_rate": None if one is None else false_accept_rate(one, speakers),
        "false_accept_rate_ci95": interval,
        "false_accept_rate_at_most": None if most is None else min(1.0, most * speakers),
    }


def describe_strangers(rates: Json, speakers: int) -> str:
    """The rates of `false_accept_rates` in one line.

    >>> describe_strangers(false_accept_rates(Decider(0.5), 0.01, speakers=2), speakers=2)[:64]
    'a stranger is accepted as one of 2 at a rate of about 0.0199 if '
    """
    ends = rates["false_accept_rate_ci95"]
    interval = f" [{ends[0]:.3g}, {ends[1]:.3g}]" if ends else ""
    return (
        f"a stranger is accepted as one of {speakers} at a rate of about {rates['false_accept_rate']:.4g}{interval} "
        f"if comparisons err independently, of at most {rates['false_accept_rate_at_most']:.4g} in any case"
    )


def threshold_of(text: str | None, store: SpeakerStore) -> Decider | None:
    """The threshold that is meant by a number, or by a file of `kmq-jax threshold`; None where none is given.

    Warns of a file that was found with voice activity detection where the store is without it, or the reverse.

    Args:
        text: the number, or the file.
        store: whose model the file must be for. It is loaded only where the file names its model.

    Raises:
        UserError: it is neither, or was found with another model than the store's.
    """
    if text is None:
        return None
    threshold = read_threshold(text)
    if threshold.model is not None:
        threshold.require(store.fingerprint, "the store's")
    threshold.warn_of_vad(store.vad)
    return threshold


def _match(name: str, score: float, threshold: float | None) -> Match:
    # Scores are float32: a threshold that a score equals in float32 must accept it.
    return Match(name, float(score), None if threshold is None else bool(score >= np.float32(threshold)))


def _check_name(name: str) -> None:
    if not valid_name(name):
        raise UserError(f"`speaker` (={repr(name)[:100]}) must be 1 to 200 printable characters, no space around")


def _check_unchanged(row: RecordingRow) -> None:
    """Refuses a recording that is gone, or is another file now.

    Raises:
        UserError: the message names it.
    """
    path, shown = os.fsdecode(row.path), shown_path(row.path)
    if not os.path.isfile(path):
        raise UserError(f"{shown}, a recording of {row.speaker}, is missing: nothing was changed")
    if file_hash(path) != row.hash:
        raise UserError(
            f"{shown}, a recording of {row.speaker}, is another file than was enrolled: nothing was changed"
        )


def _by_speaker(rows: Iterable[RecordingRow]) -> dict[str, list[RecordingRow]]:
    """Recordings by speaker; speakers and their recordings stay in the order of enrolment."""
    groups: dict[str, list[RecordingRow]] = {}
    for row in rows:
        groups.setdefault(row.speaker, []).append(row)
    return groups


def _summary(name: str, rows: Sequence[RecordingRow]) -> Speaker:
    since = datetime.fromtimestamp(min(row.enrolled for row in rows), UTC)
    return Speaker(name, len(rows), sum(row.seconds for row in rows), since)
