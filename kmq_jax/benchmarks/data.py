"""The training pipeline's examples a second, beside a plain loop."""

import itertools
import time
from collections.abc import Callable, Iterator

import numpy as np

from kmq_jax.benchmarks.options import DataBench
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import write_json
from kmq_jax.data.audio import SAMPLE_RATE
from kmq_jax.data.pipeline import training_batches
from kmq_jax.data.source import open_sources
from kmq_jax.data.table import Utterances


def plain_batches(utterances: Utterances, batch: int, samples: int) -> Iterator[np.ndarray]:
    """Yields `[batch, samples]` without end, as a first script does: decodes a recording, cuts a crop, stacks."""
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(len(utterances))
        for first in range(0, len(order) - batch + 1, batch):
            crops = []
            for i in order[first : first + batch]:
                wave = utterances.load(int(i))
                start = rng.integers(max(len(wave) - samples + 1, 1))
                # `resize` repeats a recording that is too short.
                crops.append(np.resize(wave[start : start + samples], samples))
            yield np.stack(crops)


def main(options: DataBench) -> None:
    """Runs the benchmark."""
    table = open_sources(options.data)
    table = table.select(np.unique(np.linspace(0, len(table) - 1, min(options.utterances, len(table))).astype(int)))
    if len(table) < options.batch:
        raise UserError(f"`batch` (={options.batch}) is more than the {len(table)} utterances")
    samples, steps = int(options.crop_seconds * SAMPLE_RATE), max(len(table) // options.batch, 2)
    noise = open_sources(options.noise) if options.noise else None
    ours = iter(
        training_batches(
            table, noise=noise, batch_size=options.batch, crop_samples=samples, seed=0, threads=options.threads
        )
    )
    plain = plain_batches(table, options.batch, samples)
    next(ours), next(plain)  # imports and the first open files are not counted

    def rate(batches: Iterator) -> float:
        start = time.perf_counter()
        for _ in itertools.islice(batches, steps):
            pass
        return steps * options.batch / (time.perf_counter() - start)

    # The order matters: the first epoch decodes what later epochs find in memory.
    runs: list[tuple[str, Callable[[], float]]] = [
        ("first epoch", lambda: rate(ours)),
        ("plain loop", lambda: rate(plain)),
        ("later epochs", lambda: rate(ours)),
    ]
    figures = {name: round(run(), 1) for name, run in runs}
    for name, value in figures.items():
        print(f"{name:14} {value:8.1f} examples/s of {options.crop_seconds} s")
    if options.json:
        write_json(options.json, {"examples_per_second": figures, "threads": options.threads})
