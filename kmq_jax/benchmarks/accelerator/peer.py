"""The training step of resnet36 in PyTorch: channels last, bfloat16 by autocast, eager and compiled.

It starts from features that are already on the device, so our figure beside it is that of the network alone.
"""

import gc
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from kmq_jax.benchmarks.accelerator.lines import Log
from kmq_jax.benchmarks.options import AcceleratorBench

if TYPE_CHECKING:
    import torch
    from torch import nn

Step = Callable[[], "torch.Tensor"]
"""Puts one training step on the device; gives its loss."""

BLOCKS, CHANNELS, FEATURES, EMBEDDING, SCALE, MARGIN = (3, 4, 6, 3), (128, 128, 256, 256), 81, 256, 30.0, 0.3
FRAMES, CLASSES, BATCHES = 350, 5994, (256, 128, 64)


def make_network(channels: tuple[int, ...], blocks: tuple[int, ...], classes: int) -> "nn.Module":
    """The network with its classifier: features `[batch, 1, time, features]` and labels to the mean loss."""
    import torch
    import torch.nn.functional as F  # noqa: N812
    from torch import nn

    def convolution(cin: int, cout: int, taps: int, stride: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(cin, cout, taps, stride, taps // 2, bias=False), nn.BatchNorm2d(cout))

    class Block(nn.Module):
        def __init__(self, cin: int, cout: int, stride: int, squeeze: bool) -> None:
            super().__init__()
            self.first, self.second = convolution(cin, cout, 3, stride), convolution(cout, cout, 3, 1)
            same = cin == cout and stride == 1
            self.shortcut = nn.Identity() if same else convolution(cin, cout, 1, stride)
            gate = [nn.Linear(cout, cout), nn.SiLU(), nn.Linear(cout, cout), nn.Sigmoid()]
            self.gate = nn.Sequential(*gate) if squeeze else None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.second(F.relu(self.first(x)))
            if self.gate is not None:
                y = y * self.gate(y.mean((2, 3)))[:, :, None, None]
            return F.relu(self.shortcut(x) + y)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = convolution(1, channels[0], 3, 1)
            layers, cin = [], channels[0]
            for stage, (count, cout) in enumerate(zip(blocks, channels)):
                for block in range(count):
                    layers.append(Block(cin, cout, 2 if stage and not block else 1, stage < 2))
                    cin = cout
            self.stages = nn.Sequential(*layers)
            pooled = cin * -(-FEATURES // 8)  # three strides of 2, rounded up
            self.attention = nn.Sequential(nn.Conv1d(pooled, 128, 1), nn.Tanh(), nn.Conv1d(128, pooled, 1))
            self.head = nn.Sequential(
                nn.BatchNorm1d(2 * pooled), nn.Linear(2 * pooled, EMBEDDING), nn.BatchNorm1d(EMBEDDING)
            )
            self.centres = nn.Parameter(0.01 * torch.randn(classes, EMBEDDING))

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            y = self.stages(F.silu(self.stem(x)))
            y = y.permute(0, 1, 3, 2).flatten(1, 2)  # [batch, channel * freq, time]
            weights = self.attention(y).float().softmax(2)
            y = y.float()  # sums over time in full precision
            mean = (weights * y).sum(2)
            deviation = ((weights * (y - mean[:, :, None]) ** 2).sum(2)).clamp(min=1e-5).sqrt()
            with torch.autocast(x.device.type, enabled=False):
                embedding = self.head(torch.cat([mean, deviation], 1))
                cosines = F.normalize(embedding) @ F.normalize(self.centres).T
            true = cosines.gather(1, labels[:, None])
            return F.cross_entropy(SCALE * cosines.scatter(1, labels[:, None], true - MARGIN), labels)

    return Network()


def make_step(batch: int, tiny: bool, compiled: bool) -> Step:
    """Makes the step: forward, backward, SGD with momentum and weight decay. A call puts one on the device."""
    import torch

    name = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    channels, blocks = ((8, 8, 16, 16), (1, 1, 1, 1)) if tiny else (CHANNELS, BLOCKS)
    classes = 10 if tiny else CLASSES
    network = make_network(channels, blocks, classes).to(name).to(memory_format=torch.channels_last).train()
    features = torch.randn(batch, 1, 40 if tiny else FRAMES, FEATURES, device=name)
    features = features.contiguous(memory_format=torch.channels_last)
    labels = (torch.arange(batch) % classes).to(name)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=name == "cuda")
    forward = torch.compile(network) if compiled else network

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(name, torch.bfloat16):
            loss = forward(features, labels)
        loss.backward()
        optimizer.step()
        return loss

    return step


def seconds_of(step: Step, budget: float) -> float:
    """Median seconds of a step over groups of them, after two that are not counted."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    step(), step(), wait()
    start = time.perf_counter()
    step(), wait()
    # Five groups share the budget; each is waited for at its end only.
    calls = max(1, min(20, round(budget / 5 / (time.perf_counter() - start))))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            step()
        wait()
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def kernels(step: Step, calls: int = 3) -> list[list[str | float]]:
    """Name, milliseconds and launches a step of the forty kernels that take longest on the card."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            step()
        torch.cuda.synchronize()
    rows = sorted(profile.key_averages(), key=lambda row: -row.self_device_time_total)
    return [[row.key[:90], round(row.self_device_time_total / 1e3 / calls, 3), row.count // calls] for row in rows[:40]]


def measure(log: Log, options: AcceleratorBench, batch: int, compiled: bool) -> None:
    """Measures one way and batch."""
    import torch

    cuda = torch.cuda.is_available()
    card, what = torch.cuda.get_device_name() if cuda else "cpu", "compiled" if compiled else "eager"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    ours = log.known("step", "network", "examples_per_second", card)
    start = time.perf_counter()
    run = make_step(batch, options.tiny, compiled)
    loss = float(run().detach())
    first = time.perf_counter() - start
    seconds = seconds_of(run, 0.2 if options.tiny else 3.0)
    log.write(
        what,
        card,
        torch=torch.__version__,
        batch=batch,
        step_seconds=seconds,
        examples_per_second=batch / seconds,
        first_step_seconds=first,
        loss=loss,
        our_speed_over_it=ours * seconds / batch if ours else None,
        peak_memory_gb=torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
    )
    if cuda:
        log.write(f"{what} kernels", card, longest_milliseconds_and_launches=kernels(run))


def run_torch(log: Log, options: AcceleratorBench) -> None:
    """PyTorch's step, compiled, which a goal is set for, then eager; each beside our network's where that is known."""
    if importlib.util.find_spec("torch") is None:
        log.write("not installed")
        return
    import torch

    batches = (options.batch,) if options.batch else (4,) if options.tiny else BATCHES
    for compiled in (False,) if options.tiny else (True, False):
        for batch in batches:
            try:
                measure(log, options, batch, compiled)
                break  # the largest batch that fits
            except torch.OutOfMemoryError as error:
                log.write("too large", torch.cuda.get_device_name(), batch=batch, error=str(error)[:200])
            finally:
                gc.collect()
                torch.cuda.empty_cache()
