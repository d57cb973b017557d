"""Scores of trials, AS-norm, the cascade, and k-means of a network's weights, on the device."""

import time
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from kmq_jax import quant
from kmq_jax.benchmarks import cascade as cascades
from kmq_jax.benchmarks import quant as weights
from kmq_jax.benchmarks.accelerator import device
from kmq_jax.benchmarks.accelerator.lines import Log
from kmq_jax.benchmarks.options import AcceleratorBench
from kmq_jax.cascade.run import run as run_cascade
from kmq_jax.scoring import cosine, device_scores, snorm

T = TypeVar("T")

DEEPER = "resnet200"
TRIALS, UTTERANCES, COHORT, DIM, TOP, CASCADE = 580_000, 145_000, 6_000, 256, 300, 10_000_000


def _timed(run: Callable[[], T]) -> tuple[T, float, float]:
    """The result of a call, and seconds of the first and of the second."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        result = jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return result, seconds[0], seconds[1]


def run_trials(log: Log, options: AcceleratorBench) -> None:
    """Cosine scores and AS-norm of VoxCeleb1-E's size, then a cascade of CommonBench's size; host and device."""
    scale = 1000 if options.tiny else 1
    trials, utterances, members = TRIALS // scale, UTTERANCES // scale, max(COHORT // scale, 40)
    top = 20 if options.tiny else TOP
    rng = np.random.default_rng(0)
    table = rng.standard_normal((utterances, DIM), np.float32)
    cohort = rng.standard_normal((members, DIM), np.float32)
    enrol, test = rng.integers(utterances, size=(2, trials))

    host, _, host_seconds = _timed(lambda: cosine.cosine_scores(table, table, enrol, test))
    made, first, seconds = _timed(lambda: device_scores.cosine_scores(table, table, enrol, test))
    log.write(
        "cosine",
        trials=trials,
        utterances=utterances,
        seconds=seconds,
        first_seconds=first,
        numpy_seconds=host_seconds,
        greatest_difference=float(np.abs(made - host).max()),
    )
    statistics = device_scores.cohort_statistics
    normed, first, seconds = _timed(
        lambda: snorm.adaptive_snorm(made, table, table, enrol, test, cohort, top, statistics=statistics)
    )
    few = min(utterances, 2000)  # numpy takes minutes for all
    mean, deviation = snorm.cohort_statistics(table[:few], cohort, top)
    ours = statistics(table[:few], cohort, top)
    difference = max(float(np.abs(a - b).max()) for a, b in zip(ours, (mean, deviation)))
    log.write(
        "as-norm",
        trials=trials,
        utterances=utterances,
        cohort=members,
        top_n=top,
        seconds=seconds,
        first_seconds=first,
        greatest_difference_of_statistics=difference,
        finite=bool(np.isfinite(normed).all()),
        peak_memory_gb=device.peak_gb(),
    )
    count = CASCADE // scale
    scores, _, enrol, test, policy = cascades.make(count, count // 10)
    _, first, seconds = _timed(lambda: run_cascade(policy, scores, enrol, test).level)
    log.write("cascade", trials=count, levels=3, seconds=seconds, first_seconds=first, peak_memory_gb=device.peak_gb())


def run_kmeans(log: Log, options: AcceleratorBench) -> None:
    """Codebooks of every kernel of a deep network, a codebook a channel, at 4 bits; rows of one length at a time."""
    layers = weights.kernels(DEEPER, 6 if options.tiny else 0)
    by_length: dict[int, list[np.ndarray]] = {}
    for kernel in layers.values():
        rows = kernel.reshape(-1, kernel.shape[-1]).T
        # Kernels with rows of one length are clustered together: each length is compiled once.
        by_length.setdefault(rows.shape[1], []).append(rows)
    tables = [jnp.asarray(np.concatenate(rows)) for rows in by_length.values()]
    sort = jax.jit(lambda x: jnp.sort(x, axis=-1))
    _, sort_first, sort_seconds = _timed(lambda: [sort(rows) for rows in tables])
    books, first, seconds = _timed(lambda: [quant.kmeans(rows, 16) for rows in tables])
    log.write(
        "4 bits",
        weights=sum(rows.size for rows in tables),
        channels=sum(len(rows) for rows in tables),
        lengths=len(tables),
        seconds=seconds,
        first_seconds=first,
        sort_seconds=sort_seconds,
        sort_first_seconds=sort_first,
        times_one_sort=seconds / sort_seconds,
        finite=all(bool(jnp.isfinite(book).all()) for book in books),
        peak_memory_gb=device.peak_gb(),
    )
