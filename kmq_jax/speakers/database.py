"""The file of a store of speakers: an SQLite database that any process may write to, one at a time.

The file may come from anyone. Its schema must be ours word for word, so it has no triggers and no views. Sizes are
checked before values are read, and the type and range of each value afterwards.
"""

import contextlib
import os
import sqlite3
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kmq_jax.core.errors import UserError, reason_of
from kmq_jax.core.files import require_regular
from kmq_jax.scoring.cosine import lengths, unusable

FILE = "speakers.sqlite"
_MAGIC = 0x4B4D5153  # "KMQS", the application id in the file's header
_LONGEST = 1 << 20  # bytes of any value
_LONGEST_NAME = 200  # characters
_WAIT = 60.0  # seconds to wait for other writers; one enrolment writes for milliseconds
_SCHEMA = (
    "CREATE TABLE model (one INTEGER PRIMARY KEY CHECK (one = 1), place BLOB NOT NULL, bits INTEGER, "
    "fingerprint TEXT NOT NULL, dim INTEGER NOT NULL)",
    "CREATE TABLE recording (number INTEGER PRIMARY KEY, speaker TEXT NOT NULL, path BLOB NOT NULL, "
    "hash TEXT NOT NULL UNIQUE, seconds REAL NOT NULL, enrolled REAL NOT NULL, embedding BLOB NOT NULL, vad INTEGER)",
    "CREATE INDEX of_speaker ON recording (speaker)",
)
# Stores made before have no such column; who writes to one adds it. SQLite then has the very text of the schema above.
_VAD = ", vad INTEGER"


class Empty(UserError):
    """A store into which nothing was enrolled: no file, an empty one, or one whose making was cut off and is undone."""


@dataclass(frozen=True)
class ModelRow:
    """The model that made a store's embeddings.

    Attributes:
        place: the file it was read from, as bytes, since a file's name need not be text; empty where not known.
        bits: at how many bits a nested model was read; None: the most it has.
        fingerprint: by `models.speaker_model.fingerprint`.
        dim: dimension of its embeddings.
    """

    place: bytes
    bits: int | None
    fingerprint: str
    dim: int


@dataclass(frozen=True, eq=False)
class RecordingRow:
    """A recording of an enrolled speaker.

    Attributes:
        speaker: the speaker's name.
        path: of the file, absolute, as bytes.
        hash: SHA-256 of the file, in hexadecimal.
        seconds: of sound that was embedded; with voice activity detection, of speech.
        enrolled: when, in seconds since 1970, UTC.
        embedding: float32 `[dim]`, finite and not zero; not length-normalised.
        number: its place in the order of enrolment; None before it is written.
        vad: whether what is not speech was left out; None where that is not known, in a store made before it was kept.
    """

    speaker: str
    path: bytes
    hash: str
    seconds: float
    enrolled: float
    embedding: np.ndarray
    number: int | None = None
    vad: bool | None = None


def composed(name: str) -> str:
    r"""A name in the form that is kept (NFC): a letter and its accent are one character, however they were typed.

    >>> composed("Zoe\u0308") == "Zo\u00eb"
    True
    """
    return unicodedata.normalize("NFC", name)


def valid_name(name: str) -> bool:
    r"""Whether a speaker can have that name: 1 to 200 printable characters, without space around them.

    >>> [valid_name(name) for name in ("alice", "Zoë B.", " ", "two\nlines")]
    [True, True, False, False]
    """
    return 0 < len(name) <= _LONGEST_NAME and name.isprintable() and name == name.strip()


def shown_path(path: bytes) -> str:
    r"""A path as text for messages. It may come from anyone, so control characters are escaped: a terminal obeys them.

    >>> shown_path(b"/a.wav"), shown_path(b"/\x1b[2J")
    ('/a.wav', "'/\\x1b[2J'")
    """
    text = os.fsdecode(path)
    return text if text.isprintable() else ascii(text)


class Database:
    """A store's file within one transaction; `reading` and `writing` make it."""

    def __init__(self, path: Path, connection: sqlite3.Connection, has_vad: bool = True):
        """Takes over a connection within a transaction; `has_vad` as of `_check_schema`."""
        self._path, self._sql, self._has_vad = path, connection, has_vad

    def model(self) -> ModelRow | None:
        """The model; None before the first enrolment.

        Raises:
            UserError: its values are of the wrong type or out of range.
        """
        row = self._sql.execute("SELECT place, bits, fingerprint, dim FROM model").fetchone()
        if row is None:
            return None
        place, bits, fingerprint, dim = row
        # Text comes as bytes, too (`_transaction`); SQLite's columns hold values of any type.
        ok = isinstance(place, bytes) and (bits is None or isinstance(bits, int) and 1 <= bits <= 64)
        if not ok or not isinstance(fingerprint, bytes) or not isinstance(dim, int) or not 1 <= dim <= _LONGEST // 4:
            raise self._damaged("its model is none")
        return ModelRow(place, bits, self._text(fingerprint), dim)

    def recordings(self, speaker: str | None = None) -> list[RecordingRow]:
        """All recordings in the order of enrolment, or those of one speaker.

        Raises:
            UserError: a value is of the wrong type or out of range.
        """
        model = self.model()
        if model is None:
            return []
        where, which = ("", ()) if speaker is None else (" WHERE speaker IN (?, ?)", _spellings(speaker))
        self._check_sizes(model.dim)
        columns = "number, speaker, path, hash, seconds, enrolled, embedding, " + ("vad" if self._has_vad else "NULL")
        found = self._sql.execute(f"SELECT {columns} FROM recording{where} ORDER BY number", which)
        return [self._recording(row, model.dim) for row in found]

    def _check_sizes(self, dim: int) -> None:
        """Refuses embeddings of another size, and more of them than the file has room for, without reading any."""
        sizes = "count(*), min(length(embedding)), max(length(embedding))"
        count, least, most = self._sql.execute(f"SELECT {sizes} FROM recording").fetchone()
        pages, page = (self._sql.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
        if count and (least, most) != (4 * dim, 4 * dim):
            raise self._damaged(f"an embedding is not of {dim} numbers")
        if 4 * dim * count > pages * page:
            raise self._damaged("its embeddings claim more than the file holds")

    def _recording(self, row: Sequence[Any], dim: int) -> RecordingRow:
        number, speaker, path, digest, seconds, enrolled, embedding, vad = row  # the number is whole: a primary key
        texts = isinstance(speaker, bytes) and isinstance(digest, bytes)
        blobs = isinstance(path, bytes) and isinstance(embedding, bytes) and len(embedding) == 4 * dim
        if not texts or not blobs or not isinstance(seconds, float) or not isinstance(enrolled, float):
            raise self._damaged("a recording's row is none")
        values = np.frombuffer(embedding, "<f4").astype(np.float32)
        # 1e11 seconds end in the year 5138, which a calendar can still show.
        ok = not unusable(lengths(values[None]))[0] and vad in (None, 0, 1)
        if not ok or not 0 <= seconds < 1e9 or not 0 <= enrolled < 1e11:
            raise self._damaged("a recording's numbers are out of range")
        if not valid_name(name := composed(self._text(speaker))):
            raise self._damaged("a speaker's name cannot be one")
        heard = None if vad is None else bool(vad)
        return RecordingRow(name, path, self._text(digest), seconds, enrolled, values, number, heard)

    def set_model(self, model: ModelRow) -> None:
        """Writes the model, in place of any before."""
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
        embedding = row.embedding.astype("<f4").tobytes()
        values = (composed(row.speaker), row.path, row.hash, row.seconds, row.enrolled, embedding, row.vad)
        columns = "speaker, path, hash, seconds, enrolled, embedding, vad"
        self._sql.execute(f"INSERT INTO recording ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", values)

    def set_embedding(self, number: int, embedding: np.ndarray, seconds: float, vad: bool) -> None:
        """Writes a recording's embedding, float32 `[dim]`, in place of the one before, and what it was made of."""
        values = embedding.astype("<f4").tobytes(), seconds, vad, number
        self._sql.execute("UPDATE recording SET embedding = ?, seconds = ?, vad = ? WHERE number = ?", values)

    def remove(self, speaker: str) -> int:
        """Removes a speaker's recordings, and returns how many there were."""
        return self._sql.execute("DELETE FROM recording WHERE speaker IN (?, ?)", _spellings(speaker)).rowcount

    def _text(self, value: bytes) -> str:
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise self._damaged("a name is not UTF-8") from None

    def _damaged(self, why: str) -> UserError:
        return UserError(f"{self._path} is no store of speakers: {why}")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[Database]:
    """Opens a store's file to read it as it is at one moment, whoever writes meanwhile.

    Raises:
        Empty: there is no file, or none with anything in it.
        UserError: it is not a store's.
    """
    try:
        empty = path.stat().st_size == 0
    except (FileNotFoundError, ValueError):  # ValueError: a null byte in the name
        empty = True
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason_of(error)}") from error
    nothing = Empty(f"{path.parent} holds no speakers yet: enroll them first")
    if empty:
        raise nothing
    with _transaction(path, "rw", "BEGIN") as connection:
        if not _has_tables(connection):  # SQLite undid what a process left that was killed as it made the store
            raise nothing
        yield Database(path, connection, _check_schema(path, connection))


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Database]:
    """Opens a store's file to write to it, or makes one. All is written when the block ends well, and else nothing.

    Other writers wait meanwhile, so nothing changes between what the block reads and what it writes.

    Raises:
        UserError: the file is not a store's, or cannot be written to.
    """
    with _transaction(path, "rwc", "BEGIN IMMEDIATE") as connection:
        if not _has_tables(connection):
            for line in (f"PRAGMA application_id = {_MAGIC}", *_SCHEMA):
                connection.execute(line)
        if not _check_schema(path, connection):
            connection.execute("ALTER TABLE recording ADD COLUMN" + _VAD.removeprefix(","))
        yield Database(path, connection)


@contextlib.contextmanager
def _transaction(path: Path, mode: str, begin: str) -> Iterator[sqlite3.Connection]:
    """A connection within one transaction: committed when the block ends well, else rolled back."""
    require_regular(path)
    try:
        uri = f"{path.absolute().as_uri()}?mode={mode}"
        # Without an isolation level, Python begins no transactions of its own.
        connection = sqlite3.connect(uri, uri=True, timeout=_WAIT, isolation_level=None)
        with contextlib.closing(connection):
            connection.text_factory = bytes  # decoded by `Database`, which says so where it is not UTF-8
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST)
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA secure_delete = ON")  # a removed speaker leaves no embedding in a free page
            connection.execute(begin)
            try:
                yield connection
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:  # not after COMMIT, nor where SQLite rolled back by itself
                    connection.execute("ROLLBACK")
    except sqlite3.Error as error:
        # The low byte is the kind of error; the higher ones hold details.
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        foreign = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_ERROR)
        what = f"{path} is no store of speakers" if code in foreign else f"cannot read or write {path}"
        raise UserError(f"{what}: {error}") from error


def _spellings(name: str) -> tuple[str, str]:
    """A name composed, and decomposed as stores made before may have it."""
    return composed(name), unicodedata.normalize("NFD", name)


def _has_tables(connection: sqlite3.Connection) -> bool:
    return bool(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])


def _check_schema(path: Path, connection: sqlite3.Connection) -> bool:
    """Refuses another program's database, and one of ours to which anything was added.

    Returns:
        Whether recordings have the column `vad`.

    Raises:
        UserError: it is one.
    """
    magic = connection.execute("PRAGMA application_id").fetchone()[0]
    # Indexes that SQLite makes by itself have no SQL. The limit is for a foreign file with very many tables.
    found = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL LIMIT 100").fetchall()
    ours = {line.encode() for line in _SCHEMA}
    before = {line.replace(_VAD, "").encode() for line in _SCHEMA}
    schema = {sql for (sql,) in found}
    if magic != _MAGIC or schema not in (ours, before):
        raise UserError(f"{path} is no store of speakers, but another database")
    return schema == ours
