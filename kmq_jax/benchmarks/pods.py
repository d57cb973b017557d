"""Data-parallel training on paper: seconds a step from arithmetic, memory, gradients and links, and the input it needs.

What a step sends and computes is read off XLA's programs for simulated devices of this machine. How well a chip does it
is taken from a step that was timed on an accelerator; how long the rest takes, from the makers' datasheets.
"""

import functools
import math
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from kmq_jax.benchmarks.accelerator import lines
from kmq_jax.benchmarks.options import PodsBench
from kmq_jax.benchmarks.timing import Figures, write_figures
from kmq_jax.core.errors import UserError
from kmq_jax.data.pipeline import BABBLE_VOICES, KINDS, SNR_DB

# Crops and speakers as in the paper's training; recordings of VoxCeleb's mean length, 16-bit samples.
FRAMES, CLASSES, RECORD_BYTES = 350, 5994, 8.0 * 16000 * 2
_BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "pred": 1}
_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
# A line `%name = SHAPES KIND(...)`. Several outputs are a tuple in parentheses; asynchronous kinds end in -start.
_COLLECTIVE = re.compile(rf"= (?P<shapes>\(.*?\)|\S+) (?P<kind>{_KINDS})(?:-start)?\(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


@dataclass(frozen=True)
class System:
    """Chips joined by links.

    Attributes:
        name: of the whole.
        chips: how many.
        peak: dense bfloat16 operations a second of a chip.
        link: bytes a second that a chip sends to its neighbours, all links together, one direction.
        bandwidth: bytes a second between a chip and its memory.
        memory: bytes of a chip.
    """

    name: str
    chips: int
    peak: float
    link: float
    bandwidth: float
    memory: float


SYSTEMS = (  # Google Cloud's pages of v5e (1,600 Gbit/s a chip, both directions) and v5p (4,800); NVIDIA's of H100 SXM
    System("TPU v5e-16", 16, 197e12, 100e9, 819e9, 16e9),
    System("TPU v5p-64", 32, 459e12, 300e9, 2765e9, 95e9),  # named by its cores, two a chip
    System("8 x H100", 8, 989e12, 450e9, 3.35e12, 80e9),
)
_BANDWIDTHS = (("H200", 4.8e12), ("H100", 3.35e12))  # of cards that a step may have been timed on: NVIDIA's pages
_USABLE = 0.94  # of a chip's memory, as in `bench accelerator`


def collective_bytes(program: str) -> dict[str, int]:
    """Bytes of the outputs of a compiled program's collectives, by kind.

    >>> collective_bytes("%a = (f32[2,3], bf16[4]) all-reduce(%b, %c), to_apply=%add")
    {'all-reduce': 32}
    """
    found: dict[str, int] = {}
    for match in _COLLECTIVE.finditer(program):
        shapes = _SHAPE.findall(match["shapes"])
        size = sum(_BYTES.get(kind, 4) * math.prod(map(int, filter(None, axes.split(",")))) for kind, axes in shapes)
        found[match["kind"]] = found.get(match["kind"], 0) + size
    return found


def ring_bytes(sent: dict[str, int], chips: int, simulated: int) -> float:
    """Bytes that each chip of a ring sends.

    Args:
        sent: outputs of collectives by kind, from `collective_bytes`.
        chips: of the ring.
        simulated: devices that the program was compiled for: of a reduce-scatter each has one part of so many.

    >>> ring_bytes({"all-reduce": 100, "all-gather": 100, "reduce-scatter": 25}, chips=4, simulated=4)
    300.0
    """
    # A byte is sent on once to add it up and once to hand it out, but for one part in `chips`.
    times = {"all-reduce": 2.0, "reduce-scatter": float(simulated)}
    return (chips - 1) / chips * sum(times.get(kind, 1.0) * size for kind, size in sent.items())


def records_an_example() -> float:
    """Records that the pipeline reads for an example, in the mean over its disturbances.

    >>> records_an_example()  # itself; of five kinds one reads noise, one music, and one 3 to 7 voices
    2.4
    """
    disturbing = sum(sum(BABBLE_VOICES) / 2 if kind == "babble" else 1.0 for kind in SNR_DB)
    return 1 + disturbing / len(KINDS)


@dataclass(frozen=True)
class Work:
    """How a chip does an example, by a step that was timed.

    Attributes:
        share: of peak, while convolutions and products run.
        passes: bytes to and from memory in all other kernels, at most: what the timed card moves in that time.
        held: bytes of memory; None where no such step was timed.
    """

    share: float
    passes: float = 0.0
    held: float | None = None


def work_of(rows: list[Figures], model: str, remat: bool) -> Work:
    """Reads a network's work off the lines of `bench accelerator`; a step with the same rematerialization comes first.

    Raises:
        UserError: no step of the network was timed with its kernels, or on a card of unknown memory.
    """
    kernels = {(row["part"], row["what"]): row for row in rows if "milliseconds" in row}
    timed = [
        (row, kernels[row["part"], f"{row['what']} kernels"]["milliseconds"])
        for row in rows
        if row.get("model") == model and row.get("xla_tflop_per_step") and row.get("peak_tflop_per_second")
        if (row["part"], f"{row['what']} kernels") in kernels
    ]
    if not timed:
        raise UserError(f"`measured`: no step of {model} was timed on an accelerator, with its kernels")
    row, times = next((pair for pair in timed if pair[0]["remat"] == remat), timed[0])
    bandwidth = next((rate for name, rate in _BANDWIDTHS if name in row["card"]), None)
    if bandwidth is None:
        raise UserError(f"`measured`: the bandwidth of {row['card']} is not known")
    busy = (times.get("convolutions", 0.0) + times.get("products", 0.0)) / sum(times.values())
    seconds, memory = row["step_seconds"], row.get("program_memory_gb") or row.get("peak_memory_gb")
    return Work(
        share=row["xla_tflop_per_step"] / (busy * seconds) / row["peak_tflop_per_second"],
        passes=(1 - busy) * seconds * bandwidth / row["batch"],
        held=1e9 * memory / row["batch"] if memory and row["remat"] == remat else None,
    )


@dataclass(frozen=True)
class Estimate:
    """A step on paper.

    Attributes:
        batch: examples a chip: the largest half, quarter, ... of the one asked for that its memory holds.
        compute: seconds of arithmetic at the given share of peak.
        passes: seconds of what memory bounds.
        send: seconds of a ring that sends what the step sends; latencies are left out.
        step_bounds: seconds a step: all of the sending hidden behind the rest, or none.
        examples_per_second: of the whole system, with none of it hidden.
        input_bytes_per_second: of whole records at 16 bits, those of disturbances included, that this reads.
    """

    batch: int
    compute: float
    passes: float
    send: float
    step_bounds: tuple[float, float]
    examples_per_second: float
    input_bytes_per_second: float


def estimate(system: System, work: Work, flops: float, sent: dict[str, int], batch: int, simulated: int) -> Estimate:
    """Reckons a data-parallel step.

    Args:
        system: what it runs on.
        work: how a chip does it.
        flops: operations an example.
        sent: outputs of the step's collectives, by kind.
        batch: examples a chip, at most.
        simulated: devices that the program with these collectives was compiled for.

    >>> system = System("two", 2, peak=1e12, link=1e9, bandwidth=1e9, memory=1e9)
    >>> made = estimate(system, Work(0.5, passes=1e8), 1e11, {"all-reduce": 10**9}, batch=10, simulated=2)
    >>> made.compute, made.passes, made.send, made.step_bounds
    (2.0, 1.0, 1.0, (3.0, 4.0))
    """
    while work.held and batch > 1 and batch * work.held > _USABLE * system.memory:
        batch //= 2
    compute, passes = batch * flops / (work.share * system.peak), batch * work.passes / system.bandwidth
    send = ring_bytes(sent, system.chips, simulated) / system.link
    own = compute + passes
    rate = system.chips * batch / (own + send)
    return Estimate(
        batch, compute, passes, send, (max(own, send), own + send), rate, rate * records_an_example() * RECORD_BYTES
    )


def compiled_step(options: PodsBench) -> tuple[str, float]:
    """The program of a training step over this process's devices, and its operations an example by XLA's count."""
    import jax

    from kmq_jax.benchmarks import steps as ready
    from kmq_jax.benchmarks.accelerator.device import flops_of
    from kmq_jax.core import mesh
    from kmq_jax.frontend import KIWANO
    from kmq_jax.models import registry
    from kmq_jax.training import step as steps
    from kmq_jax.training.config import paper_config
    from kmq_jax.training.options import TrainOptions

    config = paper_config(options.model)
    config.data.normalize, config.quant.bits, config.model.remat = "crop", options.bits, options.remat
    devices = mesh.make_mesh()
    config.batch_size = options.batch * devices.size
    classes = CLASSES
    if options.sharding:
        config.sharding = ((options.sharding, 0),)
        classes = -(-CLASSES // devices.size) * devices.size  # a part must be as large as another
    if options.tiny:
        config.model.update(registry.smoke_settings(options.model))
    # Shapes do: neither the state nor the batch would fit this machine.
    begun = ready.abstract(TrainOptions.from_config(config), classes, devices)
    step = steps.jit_train_step(begun.recipe, begun.shardings)
    samples = KIWANO.length + ((40 if options.tiny else FRAMES) - 1) * KIWANO.shift
    data = jax.tree.map(
        functools.partial(ready.placed, sharding=mesh.batch_sharding(devices)),
        jax.eval_shape(lambda: ready.noise(config.batch_size, samples, classes)),
    )
    lowered = jax.jit(lambda state, batch: step(state, batch, None), donate_argnums=0).lower(begun.state, data)
    # Collectives are decided before machine code is made, which need not be fast.
    quick: dict[str, str | bool] = {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": True}
    program = lowered.compile(quick)
    return program.as_text() or "", (flops_of(lowered) or math.nan) / config.batch_size


def main(options: PodsBench) -> None:
    """Prints the table."""
    _simulate(options.devices)
    import jax

    work = Work(options.share)
    if options.measured:
        work = work_of(_lines(options.measured), options.model, options.remat)
    text, flops = compiled_step(options)
    sent, simulated = collective_bytes(text), jax.device_count()
    kind = f"{options.model}{', blocks recomputed' if options.remat else ''}"
    print(f"{kind}, {FRAMES} frames: {flops / 1e9:.0f} GFLOP an example at {100 * work.share:.0f} % of peak, "
          f"{work.passes / 1e6:.0f} MB of other passes over memory")  # fmt: skip
    print(f"a step over {simulated} simulated devices sends, by XLA's program: "
          + ", ".join(f"{kind} {size / 1e6:.1f} MB" for kind, size in sent.items()))  # fmt: skip
    made = {system: estimate(system, work, flops, sent, options.batch, simulated) for system in SYSTEMS}
    for system, one in made.items():
        low, high = one.step_bounds
        print(f"{system.name:12}{one.batch:4} a chip, {1e3 * low:8.1f} to {1e3 * high:.1f} ms a step (arithmetic "
              f"{1e3 * one.compute:.1f}, memory {1e3 * one.passes:.1f}, sending {1e3 * one.send:.1f}), "
              f"{one.examples_per_second:,.0f} examples/s, "
              f"input {one.input_bytes_per_second / 1e6:,.0f} MB/s")  # fmt: skip
    if options.json:
        figures = {key: getattr(options, key) for key in ("model", "bits", "remat", "sharding", "tiny")}
        figures |= {"simulated": simulated, "flops": flops, "sent_bytes": sent, **asdict(work)}
        figures |= {"records_an_example": records_an_example(), "record_bytes": RECORD_BYTES}
        figures["systems"] = [{"system": s.name, "chips": s.chips, **asdict(one)} for s, one in made.items()]
        write_figures(options.json, "pods", figures)


def _lines(path: Path) -> list[Figures]:
    try:
        return lines.read(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _simulate(devices: int) -> None:
    """Makes JAX show so many devices of the CPU; too late where it has begun."""
    flag = f"--xla_force_host_platform_device_count={devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"
