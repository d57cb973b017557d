"""One training step of a network (batch statistics, AAM softmax, no optimizer) beside PyTorch."""

import importlib.util
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from kmq_jax.benchmarks.options import TrainBench
from kmq_jax.benchmarks.timing import Figures, write_figures
from kmq_jax.core.errors import UserError
from kmq_jax.core.memory import keep_freed_memory, peak_memory_mb

NETWORK, CLASSES, SCALE, MARGIN = "wespeaker_resnet34", 1000, 32.0, 0.2
BLOCKS, CHANNELS, FEATURES, EMBEDDING = (3, 4, 6, 3), 32, 80, 256  # of the same network in PyTorch


def our_step(options: TrainBench) -> Callable[[], float]:
    """Makes our training step; a call runs it to its end and gives the loss."""
    keep_freed_memory()
    if hasattr(os, "sched_setaffinity"):  # XLA makes as many threads as it may use processors
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    import jax
    import jax.numpy as jnp

    from kmq_jax.core.tree import Params
    from kmq_jax.losses.margin import class_cosines, cross_entropy, init_centres, margin_logits
    from kmq_jax.models import registry

    model = registry.build(NETWORK, dtype=jnp.dtype(options.dtype))
    keys = jax.random.split(jax.random.key(0), 3)
    variables = registry.initialize(model, keys[0])
    centres = init_centres(keys[1], CLASSES, 1, model.embedding_size)
    features = jax.random.normal(keys[2], (options.batch, options.frames, model.features))
    labels = jnp.arange(options.batch) % CLASSES

    def loss_of(trained: tuple[Params, jax.Array], features: jax.Array) -> jax.Array:
        state = {"params": trained[0], "batch_stats": variables["batch_stats"]}
        embeddings, _ = model.apply(state, features, train=True, mutable=["batch_stats"])
        logits = margin_logits(class_cosines(embeddings, trained[1]), labels, MARGIN, SCALE, "aam")
        return jnp.mean(cross_entropy(logits, labels))

    step = jax.jit(jax.value_and_grad(loss_of))
    return lambda: float(jax.block_until_ready(step((variables["params"], centres), features))[0])


def torch_step(options: TrainBench, channels_last: bool) -> Callable[[], float]:
    """Makes the same step in PyTorch: eager, bfloat16 by autocast, in one of its two memory layouts."""
    import torch
    import torch.nn.functional as F  # noqa: N812
    from torch import nn

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    def convolution(cin: int, cout: int, taps: int, stride: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(cin, cout, taps, stride, taps // 2, bias=False), nn.BatchNorm2d(cout))

    class Block(nn.Module):
        def __init__(self, cin: int, cout: int, stride: int) -> None:
            super().__init__()
            self.first, self.second = convolution(cin, cout, 3, stride), convolution(cout, cout, 3, 1)
            self.shortcut = nn.Identity() if cin == cout else convolution(cin, cout, 1, stride)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = convolution(1, CHANNELS, 3, 1)
            layers, channels = [], CHANNELS
            for stage, blocks in enumerate(BLOCKS):
                for block in range(blocks):
                    layers.append(Block(channels, CHANNELS << stage, 2 if stage and not block else 1))
                    channels = CHANNELS << stage
            self.stages = nn.Sequential(*layers)
            self.head = nn.Linear(2 * channels * math.ceil(FEATURES / 8), EMBEDDING)  # three strides of 2
            self.centres = nn.Parameter(torch.randn(CLASSES, EMBEDDING))

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            y = self.stages(F.relu(self.stem(x.transpose(1, 2)[:, None])))  # [batch, channel, freq, time]
            statistics = torch.cat([y.mean(-1).flatten(1), (y.var(-1) + 1e-7).sqrt().flatten(1)], 1)
            cosines = (F.normalize(self.head(statistics)) @ F.normalize(self.centres).T).float()
            true = cosines.gather(1, labels[:, None])
            # cos(a + m). The square root is kept off zero, where its gradient is infinite.
            hard = true * math.cos(MARGIN) - (1 - true**2).clamp(min=1e-7).sqrt() * math.sin(MARGIN)
            return F.cross_entropy(SCALE * cosines.scatter(1, labels[:, None], hard), labels)

    network = Network().train()
    if channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    features = torch.randn(options.batch, options.frames, FEATURES)
    labels = torch.arange(options.batch) % CLASSES

    def step() -> float:
        network.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16"):
            loss = network(features, labels)
        loss.backward()
        return float(loss.detach())

    return step


SIDES: dict[str, Callable[[TrainBench], Callable[[], float]]] = {
    "ours": our_step,
    "torch": lambda options: torch_step(options, False),
    "torch, channels last": lambda options: torch_step(options, True),
}


def _serve(side: str, options: TrainBench, pipe: Connection) -> None:
    """Runs one step for each message: answers wall seconds, processor seconds, loss and peak memory in MB."""
    step = SIDES[side](options)
    while pipe.recv():
        start, busy = time.perf_counter(), time.process_time()
        loss = step()
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        pipe.send((seconds, busy, loss, peak_memory_mb()))


def measure(sides: list[str], options: TrainBench) -> Figures:
    """Lets the sides take turns, after two steps that are not counted.

    Returns:
        For each side medians of `seconds` and `processor_seconds`, the least `best_seconds`, `memory_mb`, `loss` of the
        first step and `runs`; for each peer `ratio`, the median over turns of our seconds over theirs.
    """
    context = multiprocessing.get_context("spawn")
    pipes, workers = {}, []
    for side in sides:
        pipes[side], end = context.Pipe()
        workers.append(context.Process(target=_serve, args=(side, options, end), daemon=True))
        workers[-1].start()
        end.close()
    answers: dict[str, list[tuple[float, ...]]] = {side: [] for side in sides}
    try:
        for turn in range(options.repeats + 2):
            for side in sides if turn % 2 else sides[::-1]:  # every second round runs backwards
                pipes[side].send(True)
                answers[side].append(pipes[side].recv())
    except (EOFError, ConnectionError):
        raise UserError(f"the process of {side!r} ended: its message stands above") from None
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()
    figures: Figures = {}
    for side, rows in answers.items():
        seconds, busy, loss, memory = zip(*rows)
        figures[side] = {
            "seconds": statistics.median(seconds[2:]),
            "best_seconds": min(seconds[2:]),
            "processor_seconds": statistics.median(busy[2:]),
            "memory_mb": memory[-1],
            "loss": loss[0],
            "runs": list(seconds[2:]),
        }
    for side in sides[1:]:
        pairs = zip(figures["ours"]["runs"], figures[side]["runs"])
        figures[side]["ratio"] = statistics.median(ours / theirs for ours, theirs in pairs)
    return figures


def main(options: TrainBench) -> None:
    """Runs the benchmark."""
    sides = ["ours"]
    if options.peer == "torch" and importlib.util.find_spec("torch") is None:
        print("PyTorch is not installed: ours is measured alone")
    elif options.peer == "torch":
        sides = list(SIDES)
    figures = measure(sides, options)
    print(
        f"{NETWORK}, {options.batch} x {options.frames} frames, {options.dtype}, "
        f"{options.threads} threads: one training step"
    )
    print(f"{'':22}{'median':>9}{'best':>9}{'processor':>11}{'memory':>10}{'ours / it':>11}")
    for side, row in figures.items():
        ratio = f"{row['ratio']:11.3f}" if "ratio" in row else ""
        times = f"{row['seconds']:8.3f}s{row['best_seconds']:8.3f}s{row['processor_seconds']:10.3f}s"
        print(f"{side:22}{times}{row['memory_mb']:7.0f} MB{ratio}")
    result: Figures = {key: getattr(options, key) for key in ("dtype", "batch", "frames", "threads", "repeats")}
    result["sides"] = figures
    if len(sides) > 1:
        result["ratio"] = max(figures[side]["ratio"] for side in sides[1:])
        print(f"ours takes {result['ratio']:.3f} of the time of the faster PyTorch layout")
    if options.json:
        write_figures(options.json, "train", result)
