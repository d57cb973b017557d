"""Locks on open files. A lock ends with the process that holds it. Windows has none: there nothing is locked."""

import errno
import os

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

HAS_LOCKS = fcntl is not None


def lock(handle: int, *, shared: bool = False, wait: bool = False) -> None:
    """Locks an open file for this process.

    Args:
        handle: the file's descriptor.
        shared: others may hold it too, if they also ask for it shared.
        wait: until whoever holds it lets go.

    Raises:
        BlockingIOError: another holds it, and it is not waited for.
        OSError: the system or the file system has no locks.

    >>> import tempfile
    >>> with tempfile.TemporaryFile() as file:
    ...     lock(file.fileno())
    """
    if fcntl is None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    # flock belongs to the open file: opening it twice in one process makes two that exclude each other.
    fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
