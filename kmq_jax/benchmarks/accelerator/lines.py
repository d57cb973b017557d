"""The file of figures: one JSON object a line, written as soon as it is known, so that a kill loses none."""

import json
import os
import time
from pathlib import Path
from typing import Any

from kmq_jax.benchmarks.timing import Figures


def append(path: Path, figures: Figures) -> None:
    """Adds a line, and waits until it is on the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(figures) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Figures]:
    """Every line of a file, in order."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


class Log:
    """What a part writes its figures to."""

    def __init__(self, path: Path, part: str):
        """Starts the part's clock."""
        self.path, self._part, self._start = path, part, time.monotonic()

    def write(self, what: str, card: str | None = None, **figures: Any) -> None:
        """Writes a line: what was measured, the card's name (default: JAX's), JAX's version, and figures."""
        import jax

        line = {"part": self._part, "what": what, "card": card or jax.devices()[0].device_kind, "jax": jax.__version__}
        append(self.path, {**line, **figures, "after_seconds": round(time.monotonic() - self._start, 1)})

    def known(self, part: str, what: str, figure: str) -> Any:
        """The newest value of a figure that an earlier part wrote, or None."""
        rows = read(self.path) if self.path.exists() else []
        found = [r[figure] for r in rows if r["part"] == part and r.get("what") == what and figure in r]
        return found[-1] if found else None
