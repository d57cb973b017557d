"""Bounds on the time and the memory that what comes from elsewhere may take."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from kmq_jax.core.errors import UserError


@contextlib.contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Stops the block after so many seconds. Works in the main thread; elsewhere there is no limit.

    An alarm that the caller has set goes on. One that is due within the block rings behind it.

    Args:
        seconds: of wall-clock time.
        what: takes too long, for the message.

    Raises:
        UserError: the time is up.

    >>> import re
    >>> with time_limit(0.2, "the pattern"):
    ...     re.search("(a|aa)+$", "a" * 60 + "b")
    Traceback (most recent call last):
    kmq_jax.core.errors.UserError: the pattern: stopped after 0.2 s
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise UserError(f"{what}: stopped after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    began = time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:  # zero would set none
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 1e-6), interval)
