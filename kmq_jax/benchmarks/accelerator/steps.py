"""Training steps as `train` runs them: whole, in parts, quantized, with recomputation."""

import dataclasses
import functools
import gzip
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import optax
from jax.stages import Compiled, Lowered

from kmq_jax.benchmarks import steps as ready
from kmq_jax.benchmarks.accelerator import device
from kmq_jax.benchmarks.accelerator.lines import Log
from kmq_jax.benchmarks.options import AcceleratorBench
from kmq_jax.benchmarks.timing import Figures
from kmq_jax.core import mesh
from kmq_jax.frontend import KIWANO, num_frames
from kmq_jax.models import registry
from kmq_jax.training import step as steps
from kmq_jax.training.config import paper_config, published_kmqat
from kmq_jax.training.options import TrainOptions
from kmq_jax.training.state import Trainable, TrainState

NETWORK, DEEPER = "resnet36", "resnet200"
FRAMES, CLASSES, BATCHES = 350, 5994, (256, 128, 64)
TINY_FRAMES, TINY_CLASSES, TINY_BATCH = 40, 10, 4


@dataclasses.dataclass
class Run:
    """A compiled training step with its state and a batch that stays on the device.

    Attributes:
        recipe: what the step is made of.
        state: of the training; every call takes it and leaves the next.
        data: the batch.
        step: the compiled program.
        lowered: the program before compilation.
        compile_seconds: what compiling took.
    """

    recipe: steps.Recipe
    state: TrainState
    data: steps.Batch
    step: Compiled
    lowered: Lowered
    compile_seconds: float

    def __call__(self) -> steps.Metrics:
        """Puts one step on the device; returns its metrics."""
        metrics: steps.Metrics
        self.state, metrics = self.step(self.state, self.data)
        return metrics

    @property
    def batch(self) -> int:
        """Examples."""
        return self.recipe.objective.options.batch_size

    @property
    def frames(self) -> int:
        """Frames of an example."""
        return int(num_frames(self.data["wave"].shape[1], self.recipe.objective.fbank))

    def macs(self) -> int:
        """Multiply-accumulates of the network's forward pass over the batch."""
        return self.batch * registry.macs(self.recipe.objective.network, self.frames)


def configure(
    name: str, batch: int, tiny: bool, keeps: str = "", bits: int = 0, published: bool = False
) -> TrainOptions:
    """The paper's recipe for a network, the mean removed over the crop; with `tiny` of its smallest form.

    Args:
        name: of the network.
        batch: examples.
        tiny: whether the network is of its smallest form.
        keeps: its blocks are recomputed in the backward pass, but for what this names (`models.resnet.KEPT`); empty:
            nothing is recomputed.
        bits: of the codebooks; 0: full precision.
        published: whether these are KMQAT's as published, else those of this project's recipe without a teacher. The
            batch is augmented all the same, so that quantization and its optimizer alone are what differs.
    """
    config = paper_config(name)
    config.data.normalize = "crop"
    config.batch_size, config.model.remat, config.quant.bits = batch, bool(keeps), bits
    config.remat_keeps = keeps or config.remat_keeps
    if published:
        augment, masks = config.data.augment, config.spec_augment
        published_kmqat(config, bits)
        config.data.augment, config.spec_augment = augment, masks
    if tiny:
        config.model.update(registry.smoke_settings(name))
    return TrainOptions.from_config(config)


def samples_of(tiny: bool) -> int:
    """Samples of a crop: exactly as many as its frames need."""
    return KIWANO.length + ((TINY_FRAMES if tiny else FRAMES) - 1) * KIWANO.shift


def make(options: TrainOptions, tiny: bool, of_features: bool = False) -> Run:
    """Makes and compiles a step; with `of_features` one that starts from features instead of waveforms."""
    devices, classes = mesh.make_mesh(jax.devices()[:1]), TINY_CLASSES if tiny else CLASSES
    begun = ready.start(options, classes, devices)
    recipe, outputs = begun.recipe, (begun.shardings, None)
    data = jax.device_put(ready.noise(options.batch_size, samples_of(tiny), classes), mesh.batch_sharding(devices))
    if of_features:
        features = jax.jit(functools.partial(steps.features_of, recipe.objective))
        data["features"] = features(jax.random.key(0), data)
        jitted = jax.jit(functools.partial(network_step, recipe), donate_argnums=0, out_shardings=outputs)
    else:
        whole = steps.jit_train_step(recipe, begun.shardings)
        jitted = jax.jit(lambda state, data: whole(state, data, None), donate_argnums=0, out_shardings=outputs)
    start = time.perf_counter()
    lowered = jitted.lower(begun.state, data)
    step = lowered.compile()
    return Run(recipe, begun.state, data, step, lowered, time.perf_counter() - start)


def network_step(recipe: steps.Recipe, state: TrainState, data: steps.Batch) -> tuple[TrainState, steps.Metrics]:
    """The training step without augmentation and front end: from features to the next state."""

    def loss_of(params: Trainable) -> tuple[jax.Array, tuple[steps.Metrics, object]]:
        args = (params.classifier, params.network, state.batch_stats, data["features"], data["speaker"], state.step)
        return steps.total_loss(recipe.objective, *args)

    gradients, (metrics, batch_stats) = jax.grad(loss_of, has_aux=True)(state.params)
    updates, opt_state = recipe.optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, batch_stats, opt_state), metrics


def largest(make_one: Callable[[int], Run], batches: tuple[int, ...], log: Log) -> Run:
    """Makes the step of the largest batch that fits the device's memory, and runs it once."""
    for batch in batches:
        try:
            run = make_one(batch)
            log.write("compiled", batch=batch, compile_seconds=run.compile_seconds)
            jax.block_until_ready(run())
            return run
        except Exception as error:
            if not device.out_of_memory(error) or batch == batches[-1]:  # no smaller one is left
                raise
            log.write("too large", batch=batch, error=str(error)[:200])
    raise ValueError("no batch is given")


def batches_of(options: AcceleratorBench) -> tuple[int, ...]:
    """Batch sizes to try, in turn."""
    return (options.batch,) if options.batch else (TINY_BATCH,) if options.tiny else BATCHES


def figures_of(run: Run, seconds: float) -> Figures:
    """What is said of a step that takes `seconds`.

    Its share of peak is told by the network's own multiplications, and by XLA's count of the program, the one that a
    goal is set for: it counts all arithmetic, so also what is computed a second time in the backward pass.
    """
    peak, options = device.peak_flops(jax.devices()[0].device_kind), run.recipe.objective.options
    flops = 6.0 * run.macs()  # two operations each; backward takes twice as many as forward
    metrics, by_xla = jax.device_get(run()), device.flops_of(run.lowered)
    return {
        "model": options.model["name"],
        "remat": options.model["remat"],
        "remat_keeps": options.remat_keeps if options.model["remat"] else None,
        "dtype": options.dtype,
        "batch": run.batch,
        "frames": run.frames,
        "step_seconds": seconds,
        "examples_per_second": run.batch / seconds,
        "tflop_per_step": flops / 1e12,
        "xla_tflop_per_step": _tera(by_xla),
        "tflop_per_second": flops / seconds / 1e12,
        "share_of_peak": flops / seconds / peak if peak else None,
        "share_of_peak_by_xla": by_xla / seconds / peak if by_xla and peak else None,
        "peak_tflop_per_second": _tera(peak),
        "program_memory_gb": device.program_gb(run.step),
        "peak_memory_gb": device.peak_gb(),
        "compile_seconds": run.compile_seconds,
        "loss": float(metrics["loss"]),
    }


def _tera(value: float | None) -> float | None:
    return None if value is None else value / 1e12


def _profile(run: Run, what: str, log: Log, options: AcceleratorBench) -> None:
    times = device.kernels(run)
    longest = sorted(times.items(), key=lambda item: -item[1][0])[:40]
    rows = [[name[:90], round(ms, 3), count] for name, (ms, count) in longest]
    log.write(f"{what} kernels", milliseconds=device.by_sort(times), longest_milliseconds_and_launches=rows)
    if options.programs:
        options.programs.mkdir(parents=True, exist_ok=True)
        with gzip.open(options.programs / f"{what.replace(' ', '_')}.txt.gz", "wt") as file:
            file.write(run.step.as_text() or "")


def _budget(options: AcceleratorBench) -> float:
    return 0.1 if options.tiny else 4.0


def run_step(log: Log, options: AcceleratorBench) -> None:
    """The whole step; then its front end, its network, and the network's forward pass, alone."""

    def make_one(batch: int) -> Run:
        return make(configure(NETWORK, batch, options.tiny), options.tiny)

    run = largest(make_one, batches_of(options), log)
    log.write("whole", **figures_of(run, device.seconds_of(run, _budget(options))))
    _profile(run, "whole", log, options)

    front = jax.jit(functools.partial(steps.features_of, run.recipe.objective))
    seconds = device.seconds_of(lambda: front(jax.random.key(1), run.data), _budget(options) / 4)
    log.write("augmentation and front end", batch=run.batch, seconds=seconds)

    settings = run.recipe.objective.options
    del run  # its state leaves the device before the next is made
    run = make(settings, options.tiny, of_features=True)
    log.write("network", **figures_of(run, device.seconds_of(run, _budget(options))))
    _forward(run, log, options)


def _forward(run: Run, log: Log, options: AcceleratorBench) -> None:
    """The network's forward pass alone, by either kind of statistics."""
    variables = {"params": run.state.params.network, "batch_stats": run.state.batch_stats}
    apply = run.recipe.objective.network.apply
    for train in (True, False):
        forward = jax.jit(functools.partial(apply, train=train, mutable=["batch_stats"] if train else False))
        seconds = device.seconds_of(functools.partial(forward, variables, run.data["features"]), _budget(options))
        peak = device.peak_flops(jax.devices()[0].device_kind)
        log.write(
            "forward, batch statistics" if train else "forward, running statistics",
            batch=run.batch,
            seconds=seconds,
            share_of_peak=2 * run.macs() / seconds / peak if peak else None,
        )


def _timed(name: str, what: str, keeps: str, batches: tuple[int, ...], log: Log, options: AcceleratorBench) -> None:
    """The step with blocks recomputed but for what `keeps` names, by the largest batch that fits."""
    run = largest(lambda batch: make(configure(name, batch, options.tiny, keeps), options.tiny), batches, log)
    log.write(what, **figures_of(run, device.seconds_of(run, _budget(options))))
    _profile(run, f"{name} {what}", log, options)


def _recomputed(name: str, log: Log, options: AcceleratorBench) -> None:
    """The step with blocks recomputed; then with what convolutions give kept, which fits fewer examples."""
    _timed(name, "whole, recomputed but for statistics", "statistics", batches_of(options), log, options)
    _timed(name, "whole, recomputed but for convolutions", "convolutions", batches_of(options), log, options)


def run_step200(log: Log, options: AcceleratorBench) -> None:
    """The deeper network with nothing recomputed, where the first batch fits; then with its blocks recomputed."""
    try:
        _timed(DEEPER, "whole", "", batches_of(options)[:1], log, options)
    except Exception as error:  # what is raised where differs
        if not device.out_of_memory(error):
            raise
        log.write("too large", remat=False, batch=batches_of(options)[0], error=str(error)[:200])
    _recomputed(DEEPER, log, options)


def run_remat(log: Log, options: AcceleratorBench) -> None:
    """The network with its blocks recomputed: the price in time, the gain in memory."""
    _recomputed(NETWORK, log, options)


_FULL = "full precision"


def run_qat(log: Log, options: AcceleratorBench) -> None:
    """The step as KMQAT at 4 and 2 bits beside full precision, in turns; then by this project's recipe."""
    batch = int(options.batch or log.known("step", "whole", "batch") or batches_of(options)[0])

    def made(bits: int = 0, published: bool = False) -> Run:
        return make(configure(NETWORK, batch, options.tiny, bits=bits, published=published), options.tiny)

    with ThreadPoolExecutor(3) as pool:  # they are compiled at the same time
        runs = dict(zip((0, 4, 2), pool.map(made, (0, 4, 2), (False, True, True))))
    for bits, run in runs.items():
        log.write("compiled", batch=batch, bits=bits, compile_seconds=run.compile_seconds)
    full = runs.pop(0)
    jax.block_until_ready(full())
    for bits, run in runs.items():
        _beside(full, run, f"kmqat {bits} bits", log, options)
    del runs, run  # their states leave the device
    for bits in (4, 2):
        _beside(full, made(bits), f"{bits} bits", log, options)


def _beside(full: Run, run: Run, what: str, log: Log, options: AcceleratorBench) -> None:
    """A quantized step beside the one in full precision; steps that assign indices anew count as often as they come."""
    jax.block_until_ready(run())
    seconds = by_turns({_FULL: full, what: run}, 1 if options.tiny else 5)
    step, plain = statistics.median(seconds[what]), statistics.median(seconds[_FULL])
    ratio = statistics.median(a / b for a, b in zip(seconds[what], seconds[_FULL]))
    every = run.recipe.objective.options.quant.reassign_every
    anew = statistics.median(_reassigning(run, every) for _ in range(3)) if every else None
    log.write(
        what,
        batch=run.batch,
        step_seconds=step,
        full_precision_step_seconds=plain,
        reassigning_step_seconds=anew,
        reassign_every=every,
        ratio=ratio + ((anew - step) / every / plain if anew else 0.0),
        program_memory_gb=device.program_gb(run.step),
        full_precision_program_memory_gb=device.program_gb(full.step),
        peak_memory_gb=device.peak_gb(),
        compile_seconds=run.compile_seconds,
    )
    _profile(run, what, log, options)


def _reassigning(run: Run, every: int) -> float:
    """Seconds of a step that assigns every weight to its nearest centroid, waited for alone."""
    before = run.state.step
    run.state = dataclasses.replace(run.state, step=jax.device_put(jnp.full_like(before, every - 1), before.sharding))
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def by_turns(runs: dict[str, Run], calls: int, rounds: int = 7) -> dict[str, list[float]]:
    """Seconds a step of each run, in rounds of some steps each; every second round runs backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in list(runs) if turn % 2 else list(runs)[::-1]:
            start = time.perf_counter()
            for _ in range(calls):
                metrics = runs[name]()
            jax.block_until_ready(metrics)
            seconds[name].append((time.perf_counter() - start) / calls)
    return seconds
