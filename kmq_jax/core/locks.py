"""One writer a directory, by a lock that ends with its process, however that ends."""

import contextlib
import errno
import fcntl
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from kmq_jax.core.errors import UserError

NAME = ".lock"


@contextlib.contextmanager
def sole_writer(directory: str | os.PathLike[str], flag: str = "workdir") -> Iterator[None]:
    """Makes a directory where it is missing, and lets no other process write into it while the block runs.

    The system drops the lock when its holder ends, killed or not; what then is left of `.lock` hinders nobody. Readers
    need no lock. On a file system without locks there is a warning instead.

    Args:
        directory: what is written into.
        flag: the one that named it, for messages.

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
        held = _hold(directory, flag)
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise UserError(
            f"--{flag}={directory} cannot be written to: {getattr(error, 'strerror', None) or error}"
        ) from error
    try:
        yield
    finally:
        # While it is still held: whoever waits for it looks whether it is still there.
        with contextlib.suppress(OSError):
            os.unlink(directory / NAME)
        os.close(held)


def _hold(directory: Path, flag: str) -> int:
    path = directory / NAME
    while True:
        held = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(held, 1000, 0).decode(errors="replace").strip()
            os.close(held)
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                raise UserError(
                    f"--{flag}={directory} is being written to by {holder or 'another process'}: wait for it, or name "
                    "another directory"
                ) from None
            print(f"warning: {directory} cannot be locked ({error.strerror}): start one process there", file=sys.stderr)
            return os.open(directory, os.O_RDONLY)
        # The one before may have removed the file between opening and locking.
        with contextlib.suppress(OSError):
            if os.fstat(held).st_ino == os.stat(path).st_ino:
                break
        os.close(held)
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    command = " ".join(sys.argv)[:500]
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(held, 0)
        os.pwrite(held, f"process {os.getpid()} on {platform.node()} since {started} ({command})".encode(), 0)
    return held
