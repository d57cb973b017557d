"""Seconds of functions that take turns, so that a busy machine slows all of them alike; files of figures."""

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json, atomic_write, write_json

Figures: TypeAlias = Json
"""What a benchmark finds, by name; values that JSON can hold."""


REST = 0.1
"""Seconds after which the threads of a runtime have come to rest."""


def in_turns(
    sides: Mapping[str, Callable[[], object]],
    repeats: int,
    warm_up: int = 1,
    alternate: bool = False,
    between: Callable[[str], None] = lambda name: None,
    rest: float = 0.0,
) -> dict[str, list[float]]:
    """Seconds of every call of each function.

    >>> sorted(in_turns({"a": lambda: 1, "b": lambda: 2}, repeats=3))
    ['a', 'b']

    Args:
        sides: the functions by name; what they return is waited for where it is on a device.
        repeats: calls of each that count.
        warm_up: calls of each before, which are left out.
        alternate: whether every second round runs backwards.
        between: called with the name after each call, outside of what is timed.
        rest: seconds to wait before each call. Threads of ONNX Runtime and OpenVINO wait busily for a while after a
            call, and would take the processor from the next side: `REST` is enough.

    Returns:
        The seconds of the calls that count, `repeats` for each name, in order.
    """
    import jax  # here, so that a process that runs PyTorch alone does without

    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warm_up + repeats):
        for name in list(sides)[::-1] if alternate and turn % 2 else sides:
            time.sleep(rest)
            start = time.perf_counter()
            jax.block_until_ready(sides[name]())
            seconds[name].append(time.perf_counter() - start)
            between(name)
    return {name: times[warm_up:] for name, times in seconds.items()}


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each.

    >>> medians({"a": [1.0, 9.0, 2.0]})
    {'a': 2.0}
    """
    return {name: statistics.median(times) for name, times in seconds.items()}


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_figures(path: Path, bench: str, figures: Mapping[str, object]) -> None:
    """Writes what a benchmark found as JSON; to a file that ends in `.jsonl` it is added as a line.

    A line begins with `bench` and `processors`. An older line of the same benchmark stays: tables show the newest.

    Args:
        path: the file.
        bench: the benchmark's name.
        figures: what it found.

    Raises:
        UserError: a figure is NaN or infinite, which are not JSON, or the file cannot be written.
    """
    if path.suffix != ".jsonl":
        write_json(path, figures)
        return
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    if before and not before.endswith("\n"):
        before += "\n"
    try:
        line = json.dumps({"bench": bench, "processors": processors(), **figures}, allow_nan=False)
    except ValueError as error:
        raise UserError(f"cannot write {path}: a figure is infinite or not a number, which JSON has not") from error
    with atomic_write(path) as temporary:
        temporary.write_text(f"{before}{line}\n", encoding="utf-8")
