"""What quantization adds to a training step: the same step in full precision and with codebooks, in turns."""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kmq_jax.core.files import write_json
from kmq_jax.core.memory import keep_freed_memory

WARM_UP = 2
CLASSES = 1000


def add_flags(flags: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    flags.add_argument("--model", default="resnet36", help="network, by its registry name")
    flags.add_argument("--bits", type=int, nargs="+", default=[4, 2], help="widths to compare with full precision")
    flags.add_argument("--batch", type=int, default=16, help="utterances in a batch")
    flags.add_argument("--frames", type=int, default=200, help="frames of an utterance")
    flags.add_argument("--dtype", default="float32", help="compute dtype; parameters are float32")
    flags.add_argument("--repeats", type=int, default=5, help="timed steps of each")
    flags.add_argument("--json", type=Path, help="also write the figures to this file")


def make_step(args: argparse.Namespace, bits: int) -> Callable[[], float]:
    """Makes a whole training step of `train`, augmentation and optimizer included; 0 bits is full precision."""
    import jax
    import jax.numpy as jnp

    from kmq_jax import frontend
    from kmq_jax.core import mesh
    from kmq_jax.models.speaker_model import SpeakerModel
    from kmq_jax.training import step as steps
    from kmq_jax.training.config import default_config
    from kmq_jax.training.from_models import describe
    from kmq_jax.training.options import TrainOptions
    from kmq_jax.training.tasks import Speech

    config = default_config(args.model)
    config.update(batch_size=args.batch, dtype=args.dtype)
    config.data.augment, config.quant.bits, config.quant.fit_crops = False, bits, 0
    devices = mesh.make_mesh()
    options = TrainOptions.from_config(config)
    network = describe(options).network(options.dtype)
    fbank = frontend.KIWANO if config.model.features == frontend.KIWANO.num_features else frontend.WESPEAKER
    params, batch_stats = steps.init_params(network, options, CLASSES)
    objective, task = steps.make_objective(network, fbank, options, devices, 100), steps.make_task(options, 100)
    reference = SpeakerModel("", {}, "", {"params": params.network, "batch_stats": batch_stats})
    own, batch_stats = task.init(reference, Speech(lambda: jnp.zeros(0), lambda count: ()))
    params = dataclasses.replace(params, network=own)
    recipe = steps.make_recipe(objective, task, params)
    state = steps.init_state(recipe, params, batch_stats)
    shardings = mesh.tree_shardings(state, devices, [])
    step = steps.jit_train_step(recipe, shardings)
    samples = fbank.length + (args.frames - 1) * fbank.shift
    batch = {
        "wave": 0.1 * jax.random.normal(jax.random.key(0), (args.batch, samples)),
        "speaker": jnp.arange(args.batch) % CLASSES,
    }
    held = [jax.device_put(state, shardings)]

    def run() -> float:
        held[0], metrics = step(held[0], batch, None)
        return float(metrics["loss"])

    return run


def main(args: argparse.Namespace) -> None:
    """Runs the benchmark."""
    keep_freed_memory()
    steps = {bits: make_step(args, bits) for bits in (0, *args.bits)}
    seconds: dict[int, list[float]] = {bits: [] for bits in steps}
    for turn in range(args.repeats + WARM_UP):
        for bits in list(steps) if turn % 2 else list(steps)[::-1]:
            start = time.perf_counter()
            steps[bits]()
            seconds[bits].append(time.perf_counter() - start)
    figures: dict[str, Any] = {"model": args.model, "batch": args.batch, "frames": args.frames, "dtype": args.dtype}
    print(f"{args.model}, {args.batch} x {args.frames} frames, {args.dtype}: one training step")
    for bits, runs in seconds.items():
        name = f"{bits} bits" if bits else "full precision"
        ratio = statistics.median(a / b for a, b in zip(runs[WARM_UP:], seconds[0][WARM_UP:]))
        figures[name] = {"seconds": statistics.median(runs[WARM_UP:]), "ratio": ratio}
        print(f"{name:16}{figures[name]['seconds']:8.3f} s   {ratio:6.3f} of full precision")
    if args.json:
        write_json(args.json, figures)
