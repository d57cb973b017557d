"""The input pipeline on shards: alone, and beside the training step that it feeds."""

import contextlib
import dataclasses
import shutil
import tempfile
import time
from pathlib import Path

import grain
import jax

from kmq_jax.benchmarks.accelerator import device, steps
from kmq_jax.benchmarks.accelerator.extraction import RATE, recordings
from kmq_jax.benchmarks.accelerator.lines import Log
from kmq_jax.benchmarks.options import AcceleratorBench
from kmq_jax.benchmarks.timing import processors
from kmq_jax.core import mesh
from kmq_jax.data import pipeline, source, writer
from kmq_jax.data.table import Utterances
from kmq_jax.training.feed import on_devices
from kmq_jax.training.step import Metrics

_AHEAD = 10  # steps between two looks at metrics, as between training's log lines


def shards(directory: Path, count: int, speakers: int, workers: int) -> Utterances:
    """Writes recordings of noise as a prepared dataset and opens it."""
    table = recordings(count)
    table = dataclasses.replace(table, speakers=tuple(f"speaker{i % speakers}" for i in range(count)))
    writer.prepare(table, directory, workers=workers)
    return source.open_source(directory)


def batches_of(speech: Utterances, noise: Utterances, batch: int, samples: int, threads: int) -> grain.IterDataset:
    """The pipeline's batches; every crop reads its record afresh."""
    return pipeline.training_batches(
        speech,
        noise=noise,
        music=noise,
        batch_size=batch,
        crop_samples=samples,
        seed=0,
        threads=threads,
        cache_bytes=0,
    )


def rate(batches: grain.DatasetIterator, batch: int, seconds: float) -> float:
    """Examples a second of an iterator, over about `seconds` and at least two batches."""
    start, count = time.perf_counter(), 0
    while count < 2 or time.perf_counter() - start < seconds:
        next(batches)
        count += 1
    return count * batch / (time.perf_counter() - start)


def beside(run: steps.Run, batches: grain.DatasetIterator, count: int) -> tuple[float, float]:
    """Trains from batches on the device as `train` does; returns seconds a step, and how many of them are waiting.

    As there, metrics are waited for once the next step is on the device.
    """
    waited, start = 0.0, time.perf_counter()
    metrics: Metrics = {}
    for i in range(count):
        begin = time.perf_counter()
        run.data = next(batches)
        waited += time.perf_counter() - begin
        before, metrics = metrics, run()
        if i % _AHEAD == 0:
            jax.block_until_ready(before)
    jax.block_until_ready(metrics)
    return (time.perf_counter() - start) / count, waited / count


def run_input(log: Log, options: AcceleratorBench) -> None:
    """Writes shards, reads them alone, and trains from them; every crop reads its record afresh."""
    directory = Path(tempfile.mkdtemp())
    try:
        _measure(log, options, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _measure(log: Log, options: AcceleratorBench, directory: Path) -> None:
    cores = processors()
    workers = 1 if options.tiny else cores
    start = time.perf_counter()
    speech = shards(directory / "speech", 12 if options.tiny else 2048, 6 if options.tiny else 256, workers)
    noise = shards(directory / "noise", 6 if options.tiny else 128, 1, workers)
    log.write("written", recordings=len(speech), workers=workers, seconds=time.perf_counter() - start)

    ways = (1, 2) if options.tiny else (4, cores)
    samples = steps.samples_of(options.tiny)
    rates = {}
    for threads in ways:
        small = 4 if options.tiny else 64
        batches = iter(batches_of(speech, noise, small, samples, threads))
        for _ in range(2 if options.tiny else 2 * threads):  # what was made ahead meanwhile is not counted
            next(batches)
        rates[threads] = rate(batches, small, 0.1 if options.tiny else 4.0)
        log.write(
            f"alone, {threads} threads",
            cores=cores,
            crop_seconds=samples / RATE,
            examples_per_second=rates[threads],
        )
        batches.close()  # its threads would go on reading ahead
    threads = max(rates, key=lambda way: rates[way])

    batch = int(options.batch or log.known("step", "whole", "batch") or steps.batches_of(options)[0])
    run = steps.make(steps.configure(steps.NETWORK, batch, options.tiny), options.tiny)
    without = device.seconds_of(run, 0.1 if options.tiny else 3.0)
    devices = mesh.make_mesh(jax.devices()[:1])
    with contextlib.closing(on_devices(batches_of(speech, noise, batch, samples, threads), devices)) as fed:
        next(fed)  # the first takes longest: threads start, files are opened
        seconds, waited = beside(run, fed, 2 if options.tiny else 60)
    log.write(
        "beside the step",
        batch=batch,
        threads=threads,
        step_seconds=seconds,
        step_seconds_without_input=without,
        waiting_seconds=waited,
        slowdown_by_input=seconds / without,
        examples_per_second=batch / seconds,
        program_memory_gb=device.program_gb(run.step),
        peak_memory_gb=device.peak_gb(),
    )
