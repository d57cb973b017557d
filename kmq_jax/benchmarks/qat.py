"""What quantization adds to a training step: the same step in full precision and with codebooks, in turns."""

import statistics
from collections.abc import Callable

from kmq_jax.benchmarks.options import QatBench
from kmq_jax.benchmarks.timing import Figures, in_turns, write_figures
from kmq_jax.core.memory import keep_freed_memory

CLASSES = 1000


def make_step(options: QatBench, bits: int) -> Callable[[], object]:
    """Makes a whole training step of `train`, optimizer included, without augmentation; 0 bits is full precision."""
    from kmq_jax.benchmarks.steps import noise, start
    from kmq_jax.core import mesh
    from kmq_jax.models.speaker_model import FRONTENDS
    from kmq_jax.training import step as steps
    from kmq_jax.training.config import default_config
    from kmq_jax.training.options import TrainOptions

    config = default_config(options.model)
    config.frontend = next(name for name, fbank in FRONTENDS.items() if fbank.num_features == config.model.features)
    config.update(batch_size=options.batch, dtype=options.dtype)
    config.data.augment, config.quant.bits, config.quant.fit_crops = False, bits, 0
    ready = start(TrainOptions.from_config(config), CLASSES, mesh.make_mesh())
    fbank = ready.recipe.objective.fbank
    batch = noise(options.batch, fbank.length + (options.frames - 1) * fbank.shift, CLASSES)
    step = steps.jit_train_step(ready.recipe, ready.shardings)
    held = [ready.state]  # each step takes the state that the last one left: it is donated

    def run() -> object:
        held[0], metrics = step(held[0], batch, None)
        return metrics["loss"]

    return run


def main(options: QatBench) -> None:
    """Prints the comparison."""
    keep_freed_memory()
    names = {f"{bits} bits" if bits else "full precision": bits for bits in (0, *options.bits)}
    made = {name: make_step(options, bits) for name, bits in names.items()}
    seconds = in_turns(made, options.repeats, warm_up=2, alternate=True)
    figures: Figures = {key: getattr(options, key) for key in ("model", "batch", "frames", "dtype")}
    print(f"{options.model}, {options.batch} x {options.frames} frames, {options.dtype}: one training step")
    for name, runs in seconds.items():
        # Of the same round, so that a busy machine slows both sides.
        ratio = statistics.median(a / b for a, b in zip(runs, seconds["full precision"]))
        figures[name] = {"seconds": statistics.median(runs), "ratio": ratio}
        print(f"{name:16}{figures[name]['seconds']:8.3f} s   {ratio:6.3f} of full precision")
    if options.json:
        write_figures(options.json, "qat", figures)
