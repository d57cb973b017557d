"""Data-parallel training on paper: seconds a step from arithmetic, gradients and links, and the input it needs.

What a step sends is read off the compiled program for simulated devices of this machine. How long that and the
arithmetic take is reckoned from the makers' datasheets, not measured.
"""

import functools
import math
import os
import re
from dataclasses import dataclass

from kmq_jax.benchmarks.options import PodsBench
from kmq_jax.benchmarks.timing import Figures
from kmq_jax.core.files import write_json

# Crops and speakers as in the paper's training; 16-bit samples; three examples in five are read with interference.
FRAMES, CLASSES, BYTES_A_SAMPLE, SHARE_WITH_NOISE = 350, 5994, 2, 0.6
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
    """

    name: str
    chips: int
    peak: float
    link: float


SYSTEMS = (  # Google Cloud's pages of v5e (1,600 Gbit/s a chip, both directions) and v5p (4,800); NVIDIA's of H100 SXM
    System("TPU v5e-16", 16, 197e12, 100e9),
    System("TPU v5p-64", 32, 459e12, 300e9),  # named by its cores, two a chip
    System("8 x H100", 8, 989e12, 450e9),
)


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


@dataclass(frozen=True)
class Estimate:
    """A step on paper.

    Attributes:
        compute: seconds of arithmetic at the given share of peak.
        reduce: seconds of a ring all-reduce of what the step sends.
        step_bounds: seconds a step: all of the sending hidden behind arithmetic, or none.
        examples_per_second: of the whole system, with none of it hidden.
        input_bytes_per_second: of recordings at 16 bits, the share that gets noise included, that this reads.
    """

    compute: float
    reduce: float
    step_bounds: tuple[float, float]
    examples_per_second: float
    input_bytes_per_second: float


def estimate(system: System, flops: float, sent: float, batch: int, samples: int, share: float) -> Estimate:
    """Reckons a data-parallel step.

    Args:
        system: what it runs on.
        flops: operations a chip does in a step.
        sent: bytes that are reduced over all chips in a step.
        batch: examples a chip.
        samples: of an example.
        share: of peak that arithmetic runs at.

    >>> made = estimate(System("two", 2, 1e12, 1e9), flops=1e12, sent=1e9, batch=10, samples=1000, share=0.5)
    >>> made.compute, made.reduce, made.step_bounds, round(made.examples_per_second, 3)
    (2.0, 1.0, (2.0, 3.0), 6.667)
    """
    compute = flops / (share * system.peak)
    # A chip of a ring sends each byte twice, to add up and to hand out, but for one part in `chips`.
    reduce = 2 * (system.chips - 1) / system.chips * sent / system.link
    rate = system.chips * batch / (compute + reduce)
    heard = samples * BYTES_A_SAMPLE * (1 + SHARE_WITH_NOISE)
    return Estimate(compute, reduce, (max(compute, reduce), compute + reduce), rate, rate * heard)


def compiled_step(options: PodsBench) -> tuple[str, int, int]:
    """The program of a training step over this process's devices, its multiply-accumulates an example, and samples."""
    import jax

    from kmq_jax.benchmarks import steps as ready
    from kmq_jax.core import mesh
    from kmq_jax.frontend import KIWANO
    from kmq_jax.models import registry
    from kmq_jax.training import step as steps
    from kmq_jax.training.config import paper_config
    from kmq_jax.training.options import TrainOptions

    config = paper_config(options.model)
    config.data.normalize, config.quant.bits = "crop", options.bits
    devices = mesh.make_mesh()
    config.batch_size = 2 * devices.size
    if options.tiny:
        config.model.update(registry.smoke_settings(options.model))
    begun = ready.start(TrainOptions.from_config(config), CLASSES, devices)
    step = steps.jit_train_step(begun.recipe, begun.shardings)
    # What is sent does not depend on the batch or on its length, so that short crops will do.
    data = ready.noise(config.batch_size, KIWANO.length + 63 * KIWANO.shift, CLASSES)
    data = jax.device_put(data, mesh.batch_sharding(devices))
    lowered = jax.jit(lambda state, batch: step(state, batch, None), donate_argnums=0).lower(begun.state, data)
    text = lowered.compile().as_text() or ""
    macs = registry.macs(begun.recipe.objective.network, FRAMES)
    return text, macs, KIWANO.length + (FRAMES - 1) * KIWANO.shift


def main(options: PodsBench) -> None:
    """Prints the table."""
    _simulate(options.devices)
    import jax

    text, macs, samples = compiled_step(options)
    sent = collective_bytes(text)
    flops = 6.0 * macs * options.batch  # two operations each; backward takes twice as many as forward
    print(f"{options.model}, {options.batch} crops of {FRAMES} frames a chip, {100 * options.share:.0f} % of peak")
    print(f"a step over {jax.device_count()} simulated devices sends, by XLA's program: "
          + ", ".join(f"{kind} {size / 1e6:.1f} MB" for kind, size in sent.items()))  # fmt: skip
    figures: Figures = {"model": options.model, "bits": options.bits, "sent_bytes": sent, "share": options.share}
    reckon = functools.partial(estimate, flops=flops, sent=sum(sent.values()), batch=options.batch, samples=samples)
    for system in SYSTEMS:
        made = reckon(system, share=options.share)
        low, high = made.step_bounds
        print(f"{system.name:12}{1e3 * low:8.1f} to {1e3 * high:.1f} ms a step (arithmetic {1e3 * made.compute:.1f}, "
              f"sending {1e3 * made.reduce:.1f}), {made.examples_per_second:,.0f} examples/s, "
              f"input {made.input_bytes_per_second / 1e6:,.0f} MB/s")  # fmt: skip
        figures[system.name] = {**vars(made), "step_bounds": list(made.step_bounds)}
    if options.json:
        write_json(options.json, figures)


def _simulate(devices: int) -> None:
    """Makes JAX show so many devices of the CPU; too late where it has begun."""
    flag = f"--xla_force_host_platform_device_count={devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"
