"""Signals that are handled within a block."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def handled(numbers: tuple[int, ...], handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handles signals within the block, and afterwards as before. For the main thread alone, as `signal.signal` is.

    Args:
        numbers: of the signals.
        handle: is called with a signal's number and the frame that it interrupts.

    >>> heard = []
    >>> with handled((signal.SIGTERM,), lambda number, frame: heard.append(signal.Signals(number).name)):
    ...     signal.raise_signal(signal.SIGTERM)
    >>> heard
    ['SIGTERM']
    """
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
