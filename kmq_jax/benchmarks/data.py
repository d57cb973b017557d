"""The training pipeline's examples per second, beside a plain loop that decodes each file whole and cuts a crop.

The first epoch decodes; later ones find lossy and short recordings in memory. The loop has no augmentation.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import write_json
from kmq_jax.data.audio import SAMPLE_RATE
from kmq_jax.data.pipeline import training_batches
from kmq_jax.data.source import open_sources
from kmq_jax.data.table import Utterances


def add_flags(flags: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    flags.add_argument("--data", default="synthetic:dev", help="recordings: any DATA form (default: synthetic voices)")
    flags.add_argument("--noise", default="", help="noise clips: any DATA form")
    flags.add_argument("--batch", type=int, default=64, help="examples in a batch")
    flags.add_argument("--crop_seconds", type=float, default=3.5, help="length of a crop")
    flags.add_argument("--threads", type=int, default=2, help="threads of the pipeline")
    flags.add_argument("--utterances", type=int, default=512, help="how many, evenly over the data")
    flags.add_argument("--json", type=Path, help="also write the figures to this file")


def plain_batches(utterances: Utterances, batch: int, samples: int) -> Iterator[np.ndarray]:
    """What a first script does: decode a recording, cut a crop, stack."""
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(len(utterances))
        for first in range(0, len(order) - batch + 1, batch):
            crops = []
            for i in order[first : first + batch]:
                wave = utterances.load(int(i))
                start = rng.integers(max(len(wave) - samples + 1, 1))
                crops.append(np.resize(wave[start : start + samples], samples))
            yield np.stack(crops)


def main(args: argparse.Namespace) -> None:
    """Runs the benchmark."""
    table = open_sources(args.data)
    table = table.select(np.unique(np.linspace(0, len(table) - 1, min(args.utterances, len(table))).astype(int)))
    if len(table) < args.batch:
        raise UserError(f"--batch={args.batch} is more than the {len(table)} utterances")
    samples, steps = int(args.crop_seconds * SAMPLE_RATE), max(len(table) // args.batch, 2)
    noise = open_sources(args.noise) if args.noise else None
    settings = {"batch_size": args.batch, "crop_samples": samples, "seed": 0, "threads": args.threads}
    ours = iter(training_batches(table, noise=noise, **settings))
    plain = plain_batches(table, args.batch, samples)
    next(ours), next(plain)  # imports and the first open files are not counted

    def rate(batches: Iterator) -> float:
        start = time.perf_counter()
        for _ in itertools.islice(batches, steps):
            pass
        return steps * args.batch / (time.perf_counter() - start)

    runs: list[tuple[str, Callable[[], float]]] = [
        ("first epoch", lambda: rate(ours)),
        ("plain loop", lambda: rate(plain)),
        ("later epochs", lambda: rate(ours)),
    ]
    figures = {name: round(run(), 1) for name, run in runs}
    for name, value in figures.items():
        print(f"{name:14} {value:8.1f} examples/s of {args.crop_seconds} s")
    if args.json:
        write_json(args.json, {"examples_per_second": figures, "threads": args.threads})
