"""The file of figures: one JSON object a line, written as soon as it is known, so that a kill loses none."""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from kmq_jax.benchmarks.timing import Figures


def append(path: Path, figures: Figures) -> None:
    """Adds a line, and waits until it is on the disk."""
    with path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        # A part that was killed while it wrote has left a line without its end.
        begin = b"" if file.read(1) in (b"", b"\n") else b"\n"
        file.write(begin + json.dumps(figures).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Figures]:
    """Every line of figures in a file, in order; what else it holds, such as half a line, is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) and "part" in row else []
    return rows


class Log:
    """What a part writes its figures to."""

    def __init__(self, path: Path, part: str, tiny: bool = False):
        """Starts the part's clock. Lines in tiny sizes say so."""
        self.path, self._part, self._start, self._tiny = path, part, time.monotonic(), tiny

    def write(self, what: str, card: str | None = None, **figures: Any) -> None:
        """Writes a line: what was measured, the card's name (default: JAX's), JAX's version, and figures."""
        import jax

        line = {"part": self._part, "what": what, "card": card or jax.devices()[0].device_kind, "jax": jax.__version__}
        line |= {"tiny": True} if self._tiny else {}
        append(self.path, {**line, **figures, "after_seconds": round(time.monotonic() - self._start, 1)})

    def known(self, part: str, what: str, figure: str, card: str | None = None) -> Any:
        """The newest value of a figure in the file, or None.

        An earlier run counts where it was on such a card and in such sizes.

        Args:
            part: that wrote it.
            what: was measured.
            figure: its name.
            card: the card's name; default: JAX's.
        """
        if card is None:
            import jax

            card = jax.devices()[0].device_kind
        wanted = {"part": part, "what": what, "card": card}
        rows = [row for row in (read(self.path) if self.path.exists() else []) if wanted.items() <= row.items()]
        found = [row[figure] for row in rows if figure in row and row.get("tiny", False) == self._tiny]
        return found[-1] if found else None
