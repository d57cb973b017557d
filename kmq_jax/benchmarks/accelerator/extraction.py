"""Embedding recordings of VoxCeleb's lengths, held in memory: speech seconds a second."""

import dataclasses
import functools
import os
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from kmq_jax.benchmarks.accelerator import device
from kmq_jax.benchmarks.accelerator.lines import Log
from kmq_jax.benchmarks.options import AcceleratorBench
from kmq_jax.core import mesh
from kmq_jax.data.table import Utterances
from kmq_jax.models import registry
from kmq_jax.models.speaker_model import SpeakerModel, embed_all, embed_batch, embedding_plan, frontend_of

SECONDS, SHORTEST, LONGEST, SPREAD = 8.0, 4.0, 20.0, 0.45
NETWORKS = (("resnet36", "kiwano", "bfloat16"), ("wespeaker_resnet34", "wespeaker", "bfloat16"))
RATE = 16000


@dataclasses.dataclass(frozen=True, eq=False)
class Noise:
    """Reads pieces of one stretch of noise as recordings.

    Attributes:
        samples: lengths by the recordings' ids.
        wave: the stretch.
    """

    samples: dict[str, int]
    wave: np.ndarray

    def __call__(self, name: str) -> np.ndarray:
        """The recording of that id."""
        start = 977 * int(name) % RATE  # a prime: recordings begin at different places
        return self.wave[start : start + self.samples[name]]


def recordings(count: int, longest: float = LONGEST) -> Utterances:
    """Recordings of noise whose lengths are log-normal, 8 s in the mean and cut to 4 to 20 s, as VoxCeleb's are."""
    rng = np.random.default_rng(0)
    # A log-normal's mean is exp(mu + s^2 / 2): mu is lowered by s^2 / 2 for a mean of 8 s.
    draws = rng.lognormal(np.log(SECONDS) - SPREAD**2 / 2, SPREAD, count)
    samples = (RATE * np.clip(draws, min(SHORTEST, longest), longest)).astype(np.int64)
    ids = tuple(str(i) for i in range(count))
    wave = 0.1 * rng.standard_normal(RATE * (int(longest) + 2)).astype(np.float32)
    reader = Noise(dict(zip(ids, samples.tolist())), wave)
    return Utterances(ids, ids, ids, samples=samples, reader=reader)


def speaker_model(name: str, front: str, tiny: bool) -> SpeakerModel:
    """A network with weights as training starts from."""
    settings = registry.smoke_settings(name) if tiny else {}
    variables = registry.initialize(registry.build(name, **settings), jax.random.key(0))
    return SpeakerModel(name, settings, front, variables)


def compile_all(made: SpeakerModel, table: Utterances, batch: int, compute: str) -> float:
    """Compiles, at the same time, what `embed_all` is going to run, for the cache on disk; returns seconds."""
    devices = mesh.make_mesh(jax.local_devices())
    variables = jax.device_put(made.variables, mesh.replicated(devices))
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=mesh.batch_sharding(devices))
    network, fbank = made.network(compute), frontend_of(made.frontend)
    shapes = {(len(plan.indices), plan.size) for plan in embedding_plan(network, fbank, table.lengths(), batch)}

    def one(size: tuple[int, int]) -> None:
        wave, samples = shape(size, jnp.float32), shape(size[:1], jnp.int32)
        embed_batch.lower(network, fbank, variables, wave, samples).compile()

    start = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, shapes))
    return time.perf_counter() - start


def run_extract(log: Log, options: AcceleratorBench) -> None:
    """Both networks, from waves to embeddings by `embed_all`; and the device's part of it alone."""
    table = recordings(8 if options.tiny else 4096, 4.0 if options.tiny else LONGEST)
    speech = float(table.lengths().sum()) / RATE
    for name, front, compute in NETWORKS:
        made = speaker_model(name, front, options.tiny)
        batch = 4 if options.tiny else 64
        network, fbank = made.network(compute), frontend_of(front)
        length = int((1 if options.tiny else SECONDS) * RATE)
        wave = 0.1 * jax.random.normal(jax.random.key(0), (batch, length))
        inputs = made.variables, wave, jnp.full(batch, length, jnp.int32)
        program = embed_batch.lower(network, fbank, *inputs).compile()
        seconds = device.seconds_of(functools.partial(program, *inputs), 0.2 if options.tiny else 2.0)
        peak = device.peak_flops(jax.devices()[0].device_kind)
        flops = 2.0 * batch * registry.macs(network, length // 160 - 2)  # frames of 25 ms, one each 10 ms
        log.write(
            f"{name}, device alone",
            dtype=compute,
            batch=batch,
            recording_seconds=length / RATE,
            times_real_time=batch * length / RATE / seconds,
            share_of_peak=flops / seconds / peak if peak else None,
            program_memory_gb=device.program_gb(program),
        )
        compiled = compile_all(made, table, batch, compute)
        log.write("compiled", model=name, compile_seconds=compiled)
        figures = {}
        for turn in ("first", "second"):
            start = time.perf_counter()
            embeddings = embed_all(made, table, compute, batch_size=batch)
            figures[turn] = time.perf_counter() - start
        log.write(
            name,
            dtype=compute,
            batch=batch,
            recordings=len(table),
            speech_seconds=speech,
            seconds=figures["second"],
            first_seconds=figures["first"],
            xla_flags=os.environ.get("XLA_FLAGS", ""),
            times_real_time=speech / figures["second"],
            finite=bool(np.isfinite(embeddings).all()),
            peak_memory_gb=device.peak_gb(),
        )
