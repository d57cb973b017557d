"""Writing files so that a crash, a full disk or a second reader never sees half of one."""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from kmq_jax.core.errors import UserError, reason_of
from kmq_jax.core.flock import HAS_LOCKS, lock

Json: TypeAlias = dict[str, Any]
"""A JSON object, read or to be written: values are numbers, texts, true and false, null, lists and objects."""

Row: TypeAlias = Mapping[str, Any]
"""One row of a table of results, by column; or any other JSON object that is only read."""


_MARK = ".part-"  # in the names of temporary files, between a dot with the target's name and a random end
_LONGEST_JSON = 1 << 28  # bytes
_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/(\d+)$")
_STANDARD = {"/dev/stdout": 1, "/dev/stderr": 2}


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; it takes that name only when the block ends well.

    The temporary file keeps the suffix, for writers that choose a format by it. Where `path` is a link, the file that
    it leads to is replaced. A device or a pipe is written to. Temporary files that killed commands left for the same
    name are removed.

    >>> with tempfile.TemporaryDirectory() as directory:
    ...     with atomic_write(f"{directory}/a.txt") as temporary:
    ...         written = temporary.write_text("whole")
    ...     print(os.listdir(directory))
    ['a.txt']

    Raises:
        UserError: the directory cannot be written to, or the disk is full; `path` is left as it was. Any OSError
            within the block is taken for such a failure; of another file, the message names that one, too.
    """
    path = Path(path)
    try:
        through = _is_special(path)
        # Beside the file itself: a rename is atomic within one file system only, and must not replace a link.
        target = path if through else Path(os.path.realpath(path))
        folder = Path(tempfile.gettempdir()) if through else target.parent
        folder.mkdir(parents=True, exist_ok=True)
        temporary, handle = _temporary(folder, target)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise UserError(f"cannot write {path}: {reason_of(error)}") from error
    held: int | None = handle
    try:
        yield temporary
        if through:
            _copy_into(temporary, path)
            return
        # On the disk before it gets its name: a crash leaves the old file or the whole new one.
        with temporary.open("r+b") as written:  # Windows flushes only what may be written
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_mask())  # mkstemp gives 0600; a finished file is as readable as any other
        if not HAS_LOCKS:  # Windows renames no open file
            os.close(handle)
            held = None
        temporary.replace(target)
    except OSError as error:
        other = "" if str(error.filename) in ("None", str(temporary), str(path)) else f"{error.filename}: "
        raise UserError(f"cannot write {path}: {other}{reason_of(error)}") from error
    finally:
        if held is not None:
            os.close(held)
        temporary.unlink(missing_ok=True)


def _is_special(path: Path) -> bool:
    """Whether a path leads to a device, a pipe or an open descriptor, which are written to and never replaced."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    # Standard output that goes to a file is written to, not replaced: who opened it would keep the old file.
    return not stat.S_ISREG(mode) or _descriptor(path) is not None


def _descriptor(path: Path) -> int | None:
    """The open file of this process that a path such as /dev/stdout stands for."""
    text = str(path)
    found = _DESCRIPTOR.match(text)
    return int(found[1]) if found else _STANDARD.get(text)


def _copy_into(source: Path, path: Path) -> None:
    """Writes a finished file into a device or a pipe."""
    number = _descriptor(path)
    # Without waiting: a pipe that nobody reads from would wait forever.
    target = os.dup(number) if number is not None else os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    with os.fdopen(target, "wb") as written, source.open("rb") as read:
        os.set_blocking(target, True)
        shutil.copyfileobj(read, written)


def _temporary(folder: Path, target: Path) -> tuple[Path, int]:
    """Makes a temporary file for a target, and a lock on it that ends with this process; removes those without."""
    # Only the beginning of a long name, so that the whole is not too long for the file system.
    prefix = f".{target.stem[:40]}{_MARK}"
    suffix = target.suffix if len(target.suffix) <= 20 else ""
    sweep(folder, prefix)
    while True:
        held, name = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=folder)
        with contextlib.suppress(OSError):  # a file system without locks: then nothing is swept there, either
            lock(held)
        # Another process may have swept it between the two lines above.
        if os.fstat(held).st_nlink:
            return Path(name), held
        os.close(held)


def sweep(folder: Path, prefix: str = ".") -> None:
    """Removes temporary files of `atomic_write` whose process was killed: nobody holds their lock any more."""
    try:
        left = [entry.path for entry in os.scandir(folder) if entry.name.startswith(prefix) and _MARK in entry.name]
    except OSError:
        return
    for name in left:
        with contextlib.suppress(OSError):
            opened = os.open(name, os.O_RDWR)
            try:
                lock(opened)  # raises where its process still runs
                os.unlink(name)
            finally:
                os.close(opened)


def _mask() -> int:
    # The mask cannot be read without setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def cache_directory() -> Path:
    """Where this user's files lie that can be made again: `kmq_jax` in `XDG_CACHE_HOME`, else in `~/.cache`.

    Raises:
        UserError: the user has no home directory, as in a container whose user nobody knows.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kmq_jax"
    except RuntimeError as error:
        raise UserError(f"there is no cache directory ({error}): set HOME or XDG_CACHE_HOME") from error


def require_regular(path: str | os.PathLike[str]) -> None:
    """Refuses a pipe or a device as a file to read: it may never end, or never begin. What is missing passes.

    Raises:
        UserError: it is one, or a directory.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    if stat.S_ISDIR(mode):
        raise UserError(f"cannot read {os.fspath(path)}: {os.strerror(errno.EISDIR)}")
    if not stat.S_ISREG(mode):
        raise UserError(f"cannot read {os.fspath(path)}: it is a pipe or a device; write it to a file first")


def size_and_time(path: str | os.PathLike[str]) -> str:
    """Bytes and time of writing, as a text that changes when another file takes the place; "-" where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return "-"
    return f"{found.st_size} {found.st_mtime_ns}"


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
    """Writes `value` as indented JSON, atomically.

    Raises:
        UserError: it holds NaN or infinity, which are not JSON, or the file cannot be written.

    >>> with tempfile.TemporaryDirectory() as directory:
    ...     write_json(f"{directory}/a.json", {"bits": 2})
    ...     read_json(f"{directory}/a.json")
    {'bits': 2}
    """
    try:
        text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    except ValueError as error:
        raise UserError(f"cannot write {path}: a figure is infinite or not a number, which JSON has not") from error
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file.

    Raises:
        UserError: the file is missing or is not JSON, which has no NaN and no infinity, or it is deeper or longer than
            any of ours; the message names it, and the line at fault.
    """
    require_regular(path)
    try:
        if os.stat(path).st_size > _LONGEST_JSON:
            raise UserError(f"{path} is too large for a JSON file of ours")
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason_of(error)}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def parse_json(text: str) -> Any:
    """Reads JSON from a text that may come from anyone.

    Raises:
        ValueError: it is not JSON, which has no NaN and no infinity, or is nested too deeply.

    >>> parse_json("[1e999]")
    Traceback (most recent call last):
    ValueError: 1e999 is not a finite number
    """
    try:
        return json.loads(text, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return number


def read_object(path: str | os.PathLike[str]) -> Json:
    """Reads a JSON file that holds an object.

    Raises:
        UserError: as `read_json`, or it holds something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value
