"""Locks between processes: one writer of a directory, or one process at a time. A lock ends with its holder."""

import contextlib
import errno
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from kmq_jax.core.errors import UserError, reason_of
from kmq_jax.core.flock import HAS_LOCKS, lock

NAME = ".lock"


@contextlib.contextmanager
def sole_writer(directory: str | os.PathLike[str], flag: str = "workdir", shared: bool = False) -> Iterator[None]:
    """Makes a directory where it is missing, and lets no other process write into it while the block runs.

    The system drops the lock when its holder ends, killed or not; a `.lock` that is left behind hinders nobody. Readers
    need no lock. On a file system without locks there is a warning instead.

    Args:
        directory: what is written into.
        flag: the one that named it, for messages.
        shared: other processes may write too, if they also share it; one that wants it alone may not.

    Raises:
        UserError: another process holds it (the message tells which), or it cannot be written to.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place, sole_writer(place, "out"):
    ...     os.listdir(place)
    ['.lock']
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        held = _hold(directory, flag, shared)
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise UserError(f"--{flag}={directory} cannot be written to: {reason_of(error)}") from error
    try:
        yield
    finally:
        _drop(held, directory / NAME)


@contextlib.contextmanager
def in_turn(path: Path, waiting: str = "") -> Iterator[None]:
    """Lets one process at a time run the block; others wait.

    Args:
        path: of the lock's file, in a directory that exists; it is removed afterwards.
        waiting: a line for stderr, printed if another process holds the lock.

    Raises:
        OSError: the directory is not there, or is removed while this process waits.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place, in_turn(Path(place) / ".step.lock"):
    ...     os.listdir(place)
    ['.step.lock']
    """
    held = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        while _waited(held, waiting) and not _is_at(held, path):
            # The file that was waited for is gone: its holder removed it. The lock is now another file of that name.
            old, held = held, os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            os.close(old)
            waiting = ""
        yield
    finally:
        _drop(held, path)


@contextlib.contextmanager
def if_free(path: Path) -> Iterator[bool]:
    """Takes a lock if it is free, and yields whether it did; on a file system without locks always true.

    Args:
        path: of the lock's file, in a directory that exists; it is removed afterwards.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     with if_free(Path(place) / "a") as one, if_free(Path(place) / "a") as two:
    ...         one, two
    (True, False)
    """
    held = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        lock(held)
    except BlockingIOError:
        os.close(held)
        yield False
        return
    except OSError:
        pass  # a file system without locks
    if HAS_LOCKS and not _is_at(held, path):  # its holder before removed it just now: whoever comes next may have it
        os.close(held)
        yield False
        return
    try:
        yield True
    finally:
        _drop(held, path)


def _waited(held: int, waiting: str) -> bool:
    """Waits until this process has the lock; false on a file system without locks."""
    with contextlib.suppress(OSError):
        try:
            lock(held)
        except BlockingIOError:
            if waiting:
                print(waiting, file=sys.stderr)
            lock(held, wait=True)
        return True
    return False


def _is_at(held: int, path: Path) -> bool:
    """Whether an open file is the one at `path`: its holder before may have removed it before it was locked."""
    with contextlib.suppress(OSError):
        return os.fstat(held).st_ino == os.stat(path).st_ino
    return False


def _drop(held: int, path: Path) -> None:
    """Ends a lock. Its last holder removes the file while it still holds it; who waits checks for that by `_is_at`."""
    with contextlib.suppress(OSError):
        # Fails where others share it: then the file stays for them.
        lock(held)
        if _is_at(held, path):  # not what another process has put there
            os.unlink(path)
    os.close(held)


def _hold(directory: Path, flag: str, shared: bool) -> int:
    path = directory / NAME
    # Until what was locked is still the file at this path: the holder before may have removed it in between.
    while True:
        held = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            lock(held, shared=shared)
        except OSError as error:
            holder = os.pread(held, 1000, 0).decode(errors="replace").strip()
            os.close(held)
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                raise UserError(
                    f"--{flag}={directory} is being written to by {holder or 'another process'}: wait for it, or name "
                    "another directory"
                ) from None
            print(f"warning: {directory} cannot be locked ({error.strerror}): start one process there", file=sys.stderr)
            return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if _is_at(held, path):
            break
        os.close(held)
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    command = " ".join(sys.argv)[:500]
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(held, 0)
        os.pwrite(held, os.fsencode(f"process {os.getpid()} on {platform.node()} since {started} ({command})"), 0)
    return held
