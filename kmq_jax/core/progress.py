"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def progress(
    items: Iterable[T], total: int | None = None, desc: str = "", unit: str = "it", interval: float = 10.0
) -> Iterator[T]:
    """Iterates with a progress bar on a terminal, and with a plain line every `interval` seconds elsewhere."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, total=total, desc=desc, unit=unit, dynamic_ncols=True)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= interval or (done == total and now - start >= interval):
            last = now
            rate = done / (now - start)
            of = f"/{total} ({100 * done / total:.0f} %), {(total - done) / rate:.0f} s left" if total else ""
            print(f"{desc}: {done}{of}, {rate:.1f} {unit}/s", file=sys.stderr, flush=True)
