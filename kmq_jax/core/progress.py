"""Progress of long work: a bar on a terminal, plain lines elsewhere. And lines that are printed only once."""

import functools
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


class Bar:
    """How far work is, on standard error: a bar on a terminal, a plain line every `interval` seconds elsewhere."""

    def __init__(
        self,
        total: int | None,
        desc: str = "",
        unit: str = "it",
        *,
        done: int = 0,
        interval: float = 10.0,
        hidden: bool = False,
    ):
        """Starts the clock.

        Args:
            total: how much there is to do; None where that is not known.
            desc: what is done.
            unit: what is counted.
            done: how much of it was done before.
            interval: seconds between plain lines.
            hidden: show nothing, as in all processes but the first.
        """
        self._total, self._desc, self._unit, self._first = total, desc, unit, done
        self._interval, self._hidden = interval, hidden
        self._start = self._shown = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty() and not hidden:
            from tqdm import tqdm

            self._bar = tqdm(initial=done, total=total, desc=desc, unit=unit, dynamic_ncols=True)

    def show(self, done: int, figures: str = "") -> None:
        """Shows how much is done, with figures beside it.

        A plain line is printed where the last one is an interval ago, and at the end of work that took an interval.
        """
        if self._bar is not None:
            # tqdm counts steps, not totals.
            self._bar.update(done - self._bar.n)
            self._bar.set_postfix_str(figures, refresh=False)
        elif not self._hidden:
            now = time.monotonic()
            last = done == self._total and now - self._start >= self._interval
            if now - self._shown >= self._interval or last:
                self._shown = now
                self.say(self._line(done, now, figures))

    def _line(self, done: int, now: float, figures: str) -> str:
        # Work of an earlier run that was resumed took none of this time.
        rate = (done - self._first) / max(now - self._start, 1e-9)
        parts = [f"{self._desc}: {done}"]
        if self._total:
            parts = [f"{self._desc}: {done}/{self._total} ({100 * done / self._total:.0f} %)"]
            if rate > 0:
                parts.append(f"{(self._total - done) / rate:.0f} s left")
        return ", ".join([*parts, figures or f"{rate:.1f} {self._unit}/s"])

    def say(self, line: str) -> None:
        """Prints a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        elif not self._hidden:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()


def progress(
    items: Iterable[T],
    total: int | None = None,
    desc: str = "",
    unit: str = "it",
    interval: float = 10.0,
    hidden: bool = False,
) -> Iterator[T]:
    """Yields the items, and shows how far it is, as `Bar` does; `total` where they have no length."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    bar = Bar(total, desc, unit, interval=interval, hidden=hidden)
    try:
        for done, item in enumerate(items, 1):
            yield item
            bar.show(done)
    finally:
        bar.close()


@functools.lru_cache(maxsize=64)  # once a process: commands open the same data several times
def say_once(line: str) -> None:
    """Prints a line about data on standard error; the same line only once."""
    print(line, file=sys.stderr)
