"""Embeddings in Kaldi's format: an `.ark` file holds vectors by key, an `.scp` file says where each of them begins.

kaldiio writes and parses both. A file that is read may come from anyone, and kaldiio would run a command that an index
names, and would unpickle what an archive holds. So both are refused here before kaldiio sees them, and the size that a
vector claims is compared with the file's size before memory is allocated.
"""

import contextlib
import os
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import numpy as np

from kmq_jax.core.errors import UserError, reason_of
from kmq_jax.core.files import atomic_write, require_regular
from kmq_jax.data.kaldi import read_table
from kmq_jax.data.table import require_utf8

SUFFIXES = ".ark", ".scp"
_LONGEST_KEY = 4096  # letters; a file of another kind may hold no space at all
_LARGEST = 1 << 20  # dimensions of an embedding
_LONGEST_TEXT = 32 * _LARGEST  # letters: no number printed needs over 32
# Bytes of a number, by kind: float (F) or double (D), vector (V) or matrix (M).
_BYTES = {b"FV ": 4, b"DV ": 8, b"FM ": 4, b"DM ": 8}


def _library() -> ModuleType:
    try:
        import kaldiio
    except ImportError:
        raise UserError('Kaldi\'s archives need kaldiio: pip install "kmq_jax[kaldi]"') from None
    return kaldiio


def is_archive(path: str | os.PathLike[str]) -> bool:
    """Whether a file of embeddings is Kaldi's, by its name.

    >>> is_archive("xvector.scp"), is_archive("dev.npz")
    (True, False)
    """
    return Path(path).suffix in SUFFIXES


def files_of(path: Path) -> tuple[Path, ...]:
    """The files that embeddings are written to: an index has its archive beside it.

    >>> [file.name for file in files_of(Path("dev.scp"))]
    ['dev.scp', 'dev.ark']
    """
    return (path, path.with_suffix(".ark")) if path.suffix == ".scp" else (path,)


def check_archive(path: Path, ids: Sequence[str]) -> None:
    """Checks that embeddings can be written, before any recording is embedded.

    Args:
        path: `.ark` or `.scp`.
        ids: `[utterances]`, the keys.

    Raises:
        UserError: kaldiio is not installed, the name is one of Kaldi's for several files, or an id has a space, is
            empty or is not UTF-8.
    """
    _library()
    if re.search(r"^(ark|scp)[^/]*:|\.(ark|scp),", str(path)):
        raise UserError(f"{path} names more than a file: give the .scp alone, whose .ark is written beside it")
    for key in ids:
        if not key or re.search(r"\s", key):
            raise UserError(f"{path}: the id {key!r} has a space, which keys of Kaldi's files have not")
    require_utf8(ids, "Kaldi's files")


def write_archive(path: Path, ids: Sequence[str], embeddings: np.ndarray) -> None:
    """Writes embeddings as float vectors.

    Args:
        path: `.ark`; or `.scp`: then an `.ark` of the same stem is written beside it, and the index holds that file's
            absolute path.
        ids: `[utterances]`, the keys.
        embeddings: `[utterances, dim]`.

    Raises:
        UserError: kaldiio is not installed, an id has a space, is empty or is not UTF-8, or a file cannot be written.
    """
    check_archive(path, ids)
    kaldiio = _library()
    ark = path.with_suffix(".ark")
    rows = dict(zip(ids, np.asarray(embeddings, np.float32)))
    with contextlib.ExitStack() as written:
        # The stack unwinds in reverse: the archive gets its name before the index that points into it.
        index = written.enter_context(atomic_write(path)) if path.suffix == ".scp" else None
        archive = written.enter_context(atomic_write(ark))
        with archive.open("wb") as file, open(os.devnull if index is None else index, "w", encoding="utf-8") as listed:
            kaldiio.save_ark(file, rows, scp=listed)
        if index is not None:
            # kaldiio wrote the archive's temporary name. The replacement is a function, so that backslashes in a path
            # are not read as escapes.
            places = re.sub(r" \S.*:(?=\d+$)", lambda _: f" {ark.resolve()}:", index.read_text("utf-8"), flags=re.M)
            index.write_text(places, "utf-8")


def read_archive(path: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """Reads embeddings.

    Args:
        path: an archive of vectors, or of matrices of one row, binary or text; or an index of such archives. A relative
            path in an index is looked up from the working directory, as Kaldi does, and then from the index's own.

    Returns:
        Keys, and `[utterances, dim]` float32.

    Raises:
        UserError: kaldiio is not installed, a file cannot be read, or an entry is not an embedding; the message names
            the file, and the key or the line.
    """
    kaldiio = _library()
    ids: list[str] = []
    rows: list[np.ndarray] = []
    for key, place, row in _indexed(path, kaldiio) if path.suffix == ".scp" else _listed(path, kaldiio):
        if rows and len(row) != len(rows[0]):
            raise UserError(f"{place}: {key} has {len(row)} dimensions, those before it {len(rows[0])}")
        ids.append(key)
        rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no embedding")
    return tuple(ids), np.stack(rows)


def _listed(path: Path, kaldiio: ModuleType) -> Iterator[tuple[str, str, np.ndarray]]:
    """Reads every vector of an archive: its key, its place for messages, and its values `[dim]`."""
    with _opened(path, str(path)) as (file, size):
        while key := _key(file, path):
            yield key, str(path), _vector(file, size, f"{path}: {key}", kaldiio)


def _indexed(path: Path, kaldiio: ModuleType) -> Iterator[tuple[str, str, np.ndarray]]:
    """As `_listed`, of an index. An archive stays open for as long as consecutive lines name it."""
    places, lines = read_table(path)
    with contextlib.ExitStack() as held:
        last: Path | None = None
        for key, place in places.items():
            where = f"{path}:{lines[key]}"
            archive, offset = _place(place, path, f"{where}: {key}")
            if archive != last:
                held.close()  # the stack can be filled again
                file, size = held.enter_context(_opened(archive, where))
                last = archive
            if offset > size:
                raise UserError(f"{where}: {key} begins behind the end of {archive}")
            file.seek(offset)
            yield key, where, _vector(file, size, f"{where}: {key}", kaldiio)


def _place(text: str, index: Path, where: str) -> tuple[Path, int]:
    """The file and the offset that a line of an index names."""
    if text.startswith("|") or text.endswith("|"):
        raise UserError(f"{where} is a command ({text!r}), which is not run; write its output to an .ark file")
    if text.endswith("]"):
        raise UserError(f"{where} is part of a matrix ({text!r}), which is no embedding")
    # Without an offset a vector begins at the start of its file, and has no key there. 18 digits fit 64 bits.
    name, colon, offset = text.rpartition(":")
    if not colon or not re.fullmatch(r"[0-9]{1,18}", offset):
        name, offset = text, "0"
    path = Path(name)
    return (path if path.is_absolute() or path.exists() else index.parent / path), int(offset)


@contextlib.contextmanager
def _opened(path: Path, where: str) -> Iterator[tuple[BinaryIO, int]]:
    """Opens a file to read, with its size; errors within the block begin with `where`."""
    try:
        require_regular(path)
        with path.open("rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):  # a kind of ValueError
            raise
        raise UserError(f"{where}: cannot read {path}: {reason_of(error)}") from error


def _key(file: BinaryIO, path: Path) -> str:
    """The next key of an archive; empty at its end."""
    read = bytearray()
    while (letter := file.read(1)) not in (b" ", b""):
        read += letter
        if len(read) > _LONGEST_KEY:
            raise UserError(f"{path} is no archive of Kaldi: a key has over {_LONGEST_KEY} letters")
    try:
        text = read.decode().strip("\r\n")  # a line of text ends before it
    except UnicodeDecodeError:
        raise UserError(f"{path} is no archive of Kaldi: a key is not UTF-8") from None
    if text and not letter:
        raise UserError(f"{path} was cut short: the key {text} has no vector")
    if letter and not text:  # an empty key is the end to the caller
        raise UserError(f"{path} is no archive of Kaldi: a space where a key should begin, at byte {file.tell() - 1}")
    return text


def _vector(file: BinaryIO, size: int, where: str, kaldiio: ModuleType) -> np.ndarray:
    """The vector that begins here, float32 `[dim]`."""
    start = file.tell()
    head = file.read(15)  # as long as the longest header, a matrix's: `_check_binary` takes it apart
    file.seek(start)
    if head[:2] == b"\0B":
        _check_binary(head, size - start, where)
        parse = kaldiio.matio.read_matrix_or_vector
    elif re.match(rb"\s*\[", head):  # anything else could be a pickle or a sound, which kaldiio reads, too
        parse = _text
    else:
        raise UserError(f"{where} is no vector of Kaldi")
    try:
        value = np.asarray(parse(file))
    except (ValueError, AssertionError, RuntimeError, struct.error) as error:
        reason = (str(error).strip().splitlines() or ["damaged"])[0]
        raise UserError(f"{where} is no vector of Kaldi: {reason}") from error
    if value.ndim == 2 and len(value) == 1:
        value = value[0]
    if value.ndim != 1 or not value.size:
        raise UserError(f"{where} is of shape {value.shape}: an embedding is a vector")
    return value.astype(np.float32)


def _check_binary(head: bytes, left: int, where: str) -> None:
    """Compares what a vector claims with what is left of the file."""
    # Two bytes of mark, three of kind; then for each size a byte that says 4, and the four bytes of an int32.
    kind = head[2:5]
    if kind not in _BYTES:
        raise UserError(f"{where} is no vector of floating point")
    sizes = [head[6:10]] if kind.endswith(b"V ") else [head[6:10], head[11:15]]
    left -= 5 + 5 * len(sizes)  # the header
    if any(len(one) < 4 for one in sizes):
        raise UserError(f"{where} was cut short")
    counts = [struct.unpack("<i", one)[0] for one in sizes]
    if any(count < 0 or count > _LARGEST for count in counts):
        raise UserError(f"{where} claims {' x '.join(map(str, counts))} numbers, more than an embedding has")
    if int(np.prod(counts, dtype=np.int64)) * _BYTES[kind] > left:
        raise UserError(f"{where} claims more than is left of the file: it was cut short")


def _text(file: BinaryIO) -> np.ndarray:
    """The numbers of a vector in text, a row for each line of them. kaldiio takes `1 0.5` for whole numbers.

    Raises:
        ValueError: the closing bracket does not come within bounds or is not the last of its line, or it is no vector.
    """
    read = bytearray()
    while len(read) < _LONGEST_TEXT and (line := file.readline(_LONGEST_TEXT)):
        read += line
        if b"]" in line:
            break
    inside, bracket, rest = bytes(read).partition(b"]")
    if not bracket:
        raise ValueError("it was cut short: its bracket is not closed")
    if rest.strip():
        raise ValueError(f"{rest[:40]!r} follows its bracket")
    inside = inside.partition(b"[")[2]
    if len(inside.split(None, _LARGEST)) > _LARGEST:
        raise ValueError(f"it has over {_LARGEST} numbers, more than an embedding has")
    rows = [line.split() for line in inside.decode("ascii", "replace").splitlines()]
    return np.array([row for row in rows if row], np.float32)
