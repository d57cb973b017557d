"""A bound on the time that input from elsewhere may take."""

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

    A timer (`SIGALRM`) that the caller has set keeps running. If it falls due within the block, it fires after it.

    Args:
        seconds: of wall-clock time, above 0.
        what: what is timed, for the message.

    Raises:
        UserError: the time is up.

    >>> import re
    >>> with time_limit(0.2, "the pattern"):
    ...     re.search("(a|aa)+$", "a" * 60 + "b")
    Traceback (most recent call last):
    kmq_jax.core.errors.UserError: the pattern: stopped after 0.2 s
    """
    # Only the main thread receives signals, and Windows has no such timer.
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    done = False

    def stop(number: int, frame: FrameType | None) -> None:
        if not done:
            raise UserError(f"{what}: stopped after {seconds:g} s")

    began = time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, 0)  # the caller's
    before = signal.signal(signal.SIGALRM, stop)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            yield
        finally:
            done = True  # an alarm from here on comes too late; one that came just before has rung its only time
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:  # the caller's timer; one that is overdue gets a microsecond, since zero would turn it off
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 1e-6), interval)
