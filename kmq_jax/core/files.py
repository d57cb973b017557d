"""Writing files so that a crash, a full disk or a second reader never sees half of one."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from kmq_jax.core.errors import UserError

Json: TypeAlias = dict[str, Any]
"""A JSON object, read or to be written: values are numbers, texts, true and false, null, lists and objects."""

Row: TypeAlias = Mapping[str, Any]
"""One row of a table of results, by column; or any other JSON object that is only read."""


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; it takes that name only when the block ends well.

    The temporary file keeps the suffix, for writers that choose a format by it.

    >>> with tempfile.TemporaryDirectory() as directory:
    ...     with atomic_write(f"{directory}/a.txt") as temporary:
    ...         written = temporary.write_text("whole")
    ...     print(os.listdir(directory))
    ['a.txt']

    Raises:
        UserError: the directory cannot be written to, or the disk is full; `path` is left as it was.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target: a rename is atomic within one file system only.
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    temporary = Path(name)
    try:
        yield temporary
        # On the disk before it gets its name: a crash leaves the old file or the whole new one.
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        # The mask cannot be read without setting it.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp gives 0600; a finished file is as readable as any other
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def file_hash(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, in hexadecimal.

    >>> with tempfile.TemporaryDirectory() as directory:
    ...     written = Path(directory, "a").write_text("abc")
    ...     file_hash(f"{directory}/a")[:8]
    'ba7816bf'
    """
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Writes `value` as indented JSON, atomically. NaN and infinity are refused: they are not JSON.

    >>> with tempfile.TemporaryDirectory() as directory:
    ...     write_json(f"{directory}/a.json", {"bits": 2})
    ...     read_json(f"{directory}/a.json")
    {'bits': 2}
    """
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file.

    Raises:
        UserError: the file is missing or is not JSON; the message names it, and the line at fault.
    """
    try:
        return json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
