"""The file of a store of speakers: one SQLite database, which any process may write to, one at a time.

It may come from anyone. Its schema must be ours word for word, so it has no triggers and no views. Sizes are checked
before values are read, and each value's type and range after.
"""

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import require_regular
from kmq_jax.scoring.cosine import lengths, unusable

FILE = "speakers.sqlite"
_MAGIC = 0x4B4D5153  # "KMQS", as the application's number in the file's header
_LONGEST = 1 << 20  # bytes of any value
_LONGEST_NAME = 200  # characters
_WAIT = 60.0  # seconds for others to finish writing; one enrolment writes for milliseconds
_SCHEMA = (
    "CREATE TABLE model (one INTEGER PRIMARY KEY CHECK (one = 1), place BLOB NOT NULL, bits INTEGER, "
    "fingerprint TEXT NOT NULL, dim INTEGER NOT NULL)",
    "CREATE TABLE recording (number INTEGER PRIMARY KEY, speaker TEXT NOT NULL, path BLOB NOT NULL, "
    "hash TEXT NOT NULL UNIQUE, seconds REAL NOT NULL, enrolled REAL NOT NULL, embedding BLOB NOT NULL)",
    "CREATE INDEX of_speaker ON recording (speaker)",
)


@dataclass(frozen=True)
class ModelRow:
    """The model that made a store's embeddings.

    Attributes:
        place: where it was read from, as bytes, for names of files are any; empty where that is not known.
        bits: at how many bits a nested model was read; None: the most.
        fingerprint: `models.speaker_model.fingerprint` of it.
        dim: how long its embeddings are.
    """

    place: bytes
    bits: int | None
    fingerprint: str
    dim: int


@dataclass(frozen=True, eq=False)
class RecordingRow:
    """A recording of an enrolled speaker.

    Attributes:
        speaker: the name.
        path: of the file, absolute, as bytes.
        hash: SHA-256 of the file, in hexadecimal.
        seconds: how long it is.
        enrolled: when, in seconds since 1970.
        embedding: float32 `[dim]`, finite and not zero; not length-normalised.
        number: its place in the order of enrolment; None before it is written.
    """

    speaker: str
    path: bytes
    hash: str
    seconds: float
    enrolled: float
    embedding: np.ndarray
    number: int | None = None


def valid_name(name: str) -> bool:
    r"""Whether a speaker can have that name: printable, not too long, without space around it.

    >>> [valid_name(name) for name in ("alice", "Zoë B.", " ", "two\nlines")]
    [True, True, False, False]
    """
    return 0 < len(name) <= _LONGEST_NAME and name.isprintable() and name == name.strip()


def shown_path(path: bytes) -> str:
    r"""A path for messages. It may come from anyone, and a terminal obeys what it is sent.

    >>> shown_path(b"/a.wav"), shown_path(b"/\x1b[2J")
    ('/a.wav', "'/\\x1b[2J'")
    """
    text = os.fsdecode(path)
    return text if text.isprintable() else ascii(text)


class Database:
    """A store's file within one transaction; `reading` and `writing` make it."""

    def __init__(self, path: Path, connection: sqlite3.Connection):
        """Takes over a connection within a transaction."""
        self._path, self._sql = path, connection

    def model(self) -> ModelRow | None:
        """The model; None before the first enrolment.

        Raises:
            UserError: what the file says of it cannot be.
        """
        row = self._sql.execute("SELECT place, bits, fingerprint, dim FROM model").fetchone()
        if row is None:
            return None
        place, bits, fingerprint, dim = row
        ok = isinstance(place, bytes) and (bits is None or isinstance(bits, int) and 1 <= bits <= 64)
        if not ok or not isinstance(fingerprint, bytes) or not isinstance(dim, int) or not 1 <= dim <= _LONGEST // 4:
            raise self._damaged("its model is none")
        return ModelRow(place, bits, self._text(fingerprint), dim)

    def recordings(self, speaker: str | None = None) -> list[RecordingRow]:
        """All recordings in the order of enrolment, or those of one speaker.

        Raises:
            UserError: what the file says of one cannot be.
        """
        model = self.model()
        if model is None:
            return []
        where, which = ("", ()) if speaker is None else (" WHERE speaker = ?", (speaker,))
        self._check_sizes(model.dim)
        columns = "number, speaker, path, hash, seconds, enrolled, embedding"
        found = self._sql.execute(f"SELECT {columns} FROM recording{where} ORDER BY number", which)
        return [self._recording(row, model.dim) for row in found]

    def _check_sizes(self, dim: int) -> None:
        """Refuses embeddings of another size, and more of them than the file has room for."""
        sizes = "count(*), min(length(embedding)), max(length(embedding))"
        count, least, most = self._sql.execute(f"SELECT {sizes} FROM recording").fetchone()
        pages, page = (self._sql.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
        if count and (least, most) != (4 * dim, 4 * dim):
            raise self._damaged(f"an embedding is not of {dim} numbers")
        if 4 * dim * count > pages * page:
            raise self._damaged("its embeddings claim more than the file holds")

    def _recording(self, row: Sequence[Any], dim: int) -> RecordingRow:
        number, speaker, path, digest, seconds, enrolled, embedding = row  # the number is whole: a primary key
        texts = isinstance(speaker, bytes) and isinstance(digest, bytes)
        blobs = isinstance(path, bytes) and isinstance(embedding, bytes) and len(embedding) == 4 * dim
        if not texts or not blobs or not isinstance(seconds, float) or not isinstance(enrolled, float):
            raise self._damaged("a recording's row is none")
        values = np.frombuffer(embedding, "<f4").astype(np.float32)
        # Within what a calendar has, so that times can be shown.
        if unusable(lengths(values[None]))[0] or not 0 <= seconds < 1e9 or not 0 <= enrolled < 1e11:
            raise self._damaged("a recording's numbers are out of range")
        if not valid_name(name := self._text(speaker)):
            raise self._damaged("a speaker's name cannot be one")
        return RecordingRow(name, path, self._text(digest), seconds, enrolled, values, number)

    def set_model(self, model: ModelRow) -> None:
        """Writes the model, in place of one before."""
        row = (model.place, model.bits, model.fingerprint, model.dim)
        self._sql.execute("INSERT OR REPLACE INTO model VALUES (1, ?, ?, ?, ?)", row)

    def add(self, row: RecordingRow) -> None:
        """Adds a recording.

        Raises:
            UserError: the store has it already.
        """
        taken = self._sql.execute("SELECT speaker FROM recording WHERE hash = ?", (row.hash,)).fetchone()
        if taken is not None:
            raise UserError(f"{shown_path(row.path)} is enrolled already, as a recording of {self._text(taken[0])}")
        values = (row.speaker, row.path, row.hash, row.seconds, row.enrolled, row.embedding.astype("<f4").tobytes())
        columns = "speaker, path, hash, seconds, enrolled, embedding"
        self._sql.execute(f"INSERT INTO recording ({columns}) VALUES (?, ?, ?, ?, ?, ?)", values)

    def set_embedding(self, number: int, embedding: np.ndarray) -> None:
        """Writes a recording's embedding, float32 `[dim]`, in place of the one before."""
        values = embedding.astype("<f4").tobytes()
        self._sql.execute("UPDATE recording SET embedding = ? WHERE number = ?", (values, number))

    def remove(self, speaker: str) -> int:
        """Removes a speaker's recordings, and tells how many they were."""
        return self._sql.execute("DELETE FROM recording WHERE speaker = ?", (speaker,)).rowcount

    def _text(self, value: bytes) -> str:
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise self._damaged("a name is not UTF-8") from None

    def _damaged(self, why: str) -> UserError:
        return UserError(f"{self._path} is no store of speakers: {why}")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[Database]:
    """Opens a store's file, as it is at one moment.

    Raises:
        UserError: there is none, or it is another file.
    """
    try:
        empty = path.stat().st_size == 0
    except (OSError, ValueError):  # ValueError: a null byte in the name
        empty = True
    if empty:
        raise UserError(f"{path.parent} holds no speakers yet: enroll them first")
    with _transaction(path, "rw", "BEGIN") as connection:
        _check_schema(path, connection)
        yield Database(path, connection)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Database]:
    """Opens a store's file to write to it, and makes it where there is none; all is written when the block ends well.

    Others that write wait, so what the block reads is what it changes.

    Raises:
        UserError: it is another file, or cannot be written to.
    """
    with _transaction(path, "rwc", "BEGIN IMMEDIATE") as connection:
        if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            for line in (f"PRAGMA application_id = {_MAGIC}", *_SCHEMA):
                connection.execute(line)
        _check_schema(path, connection)
        yield Database(path, connection)


@contextlib.contextmanager
def _transaction(path: Path, mode: str, begin: str) -> Iterator[sqlite3.Connection]:
    require_regular(path)
    try:
        uri = f"{path.absolute().as_uri()}?mode={mode}"
        connection = sqlite3.connect(uri, uri=True, timeout=_WAIT, isolation_level=None)
        with contextlib.closing(connection):
            connection.text_factory = bytes  # decoded here, where what is not UTF-8 can be told
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST)
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA secure_delete = ON")  # whoever is removed leaves no embedding in a free page
            connection.execute(begin)
            try:
                yield connection
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
    except sqlite3.Error as error:
        # The low byte is the kind of error; the rest tells more of it.
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        foreign = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_ERROR)
        what = f"{path} is no store of speakers" if code in foreign else f"cannot read or write {path}"
        raise UserError(f"{what}: {error}") from error


def _check_schema(path: Path, connection: sqlite3.Connection) -> None:
    """Refuses another program's database, and one of ours to which anything was added.

    Raises:
        UserError: it is one.
    """
    magic = connection.execute("PRAGMA application_id").fetchone()[0]
    found = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL LIMIT 100").fetchall()
    ours = {line.encode() for line in _SCHEMA}
    if magic != _MAGIC or {sql for (sql,) in found} != ours:
        raise UserError(f"{path} is no store of speakers, but another database")
