"""The networks of a study: full precision first, then every number of bits, without and with training."""

import copy
import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import ml_collections

from kmq_jax import quant
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import file_hash, write_json
from kmq_jax.interop import pretrained
from kmq_jax.models.speaker_model import SpeakerModel, fingerprint, load_model, save_model
from kmq_jax.ptq.quantize import quantize_model
from kmq_jax.study.options import FULL, MIXED, NESTED, PATTERNED, Recipe, StudyOptions
from kmq_jax.study.steps import Steps
from kmq_jax.training import loop, qat
from kmq_jax.training.config import distilled, published_kmqat
from kmq_jax.training.options import QatOptions, section
from kmq_jax.training.workdir import settings_of

RECIPES = {"fp32": 1, "ptq": 3, "distilled": 1, "kmqat": 1, "uniform": 1, "minmax": 1, "powers": 1, MIXED: 3}
"""To be raised when a change of the code changes what a step computes: studies then repeat it (see `study.steps`).
Mixed precision has a number of its own, whatever the recipe."""

CONTROL_RATE = 3e-5
"""Learning rate of the control in full precision: a thousandth of a kernel's usual standard deviation, .03."""

CHECKPOINTS = (".onnx", ".pt", ".pth", ".ckpt", ".safetensors")
"""Suffixes of other toolkits' files."""


@dataclasses.dataclass(frozen=True)
class Network:
    """A model of the study, read at one number of bits.

    Attributes:
        step: the step that made it, such as "distilled-2", "kmqat-2" or "ptq-nested".
        method: how it was made, as reports show it.
        bits: its bits; of mixed precision the mean over its quantized weights.
        path: the MODEL.
        read_at: the bits at which a nested model is read; None for any other.
        run: the quantization it comes from; None for the full-precision network.
    """

    step: str
    method: str
    bits: float
    path: Path
    read_at: int | None = None
    run: "Run | None" = None

    @property
    def name(self) -> str:
        """Names its embeddings and scores."""
        return f"{self.step}-{self.bits}"

    @property
    def trained(self) -> bool:
        """Whether it was trained at its bits; else it is full precision, or fitted without training."""
        return self.run is not None and self.step == self.run.step


@dataclasses.dataclass(frozen=True)
class Run:
    """A quantization of the study: to one number of bits, to all of them in one file, or to mixed precision.

    Attributes:
        name: "2", "3", ..., "32", "nested" or "mixed".
        bits: the most it has; 0 where bits are chosen tensor by tensor, or where the network stays in full precision.
        coarse: the fewer bits of nested codebooks, descending.
        recipe: how it is trained.
        grow_from: the step whose trained network nested codebooks grow from; empty for any other.
        seed: what is added to the configuration's seed.
        untrained: whether it is measured without training too.
    """

    name: str
    bits: int
    coarse: tuple[int, ...] = ()
    recipe: Recipe = "distilled"
    grow_from: str = ""
    seed: int = 0
    untrained: bool = True

    @property
    def step(self) -> str:
        """The step that trains it."""
        return f"{self.recipe}-{self.name}" + (f"-seed{self.seed}" if self.seed else "")

    @property
    def untrained_step(self) -> str:
        """The step that quantizes it without training."""
        return f"ptq-{self.step}" if self.recipe in PATTERNED else f"ptq-{self.name}"


def runs_of(options: StudyOptions) -> list[Run]:
    """The quantizations that a study is asked for.

    Most bits first; then nested ones and mixed precision; then, seed by seed and recipe by recipe, the other trainings
    of each number of bits. The control, which trains on in full precision, comes last of its recipe and seed.
    """
    ordered = sorted(options.bits, reverse=True)
    runs = [Run(str(bits), bits, recipe=options.recipe) for bits in ordered]
    if options.nested and len(ordered) > 1:  # of one number of bits there is nothing to nest
        # They grow from the trained network of the fewest bits.
        runs.append(Run(NESTED, ordered[0], tuple(ordered[1:]), grow_from=f"{options.recipe}-{ordered[-1]}"))
    if options.mixed:
        runs.append(Run(MIXED, 0, recipe=options.recipe))
    recipes = dict.fromkeys((options.recipe, *options.also))
    more = [
        Run(str(bits or FULL), bits, recipe=recipe, seed=seed, untrained=recipe in PATTERNED and not seed)
        for seed in range(options.seeds)
        for recipe in recipes
        for bits in (ordered if recipe in PATTERNED else (*ordered, 0))  # 0 is the control
    ]
    # The first seed of the study's own recipe stands above; of the rest, what has no epochs would do nothing.
    known = {run.step for run in runs}
    return runs + [run for run in more if run.step not in known and (run.untrained or options.epochs.get(run.name))]


def training_steps(options: StudyOptions) -> list[str]:
    """The steps that make networks: full precision, then each quantization; each may be a job of its own."""
    return ["fp32", *(run.step for run in runs_of(options))]


def make_networks(
    config: ml_collections.ConfigDict, options: StudyOptions, steps: Steps, only: Sequence[str] = ()
) -> Iterator[Network]:
    """Trains, imports and quantizes, one network after the other.

    Args:
        config: of the full-precision training.
        options: of the study.
        steps: of the study.
        only: names of training steps, such as "distilled-2", and "fp32"; what is not among them is not made, but for
            full precision. Empty: all.

    Yields:
        The full-precision network, then those of each quantization: without training, and trained. Each comes as soon
        as it is made.

    Raises:
        UserError: a setting, file or value is at fault.
    """
    runs, known = runs_of(options), training_steps(options)
    for name in only:
        if name not in known:
            raise UserError(f"--only (={name}) must be of {', '.join(known)}")
    reference = full_precision(config, steps)
    yield Network("fp32", "full precision", FULL, reference)
    for run in runs:
        if not only or run.step in only:
            make = mixed_network if run.name == MIXED else quantized_networks
            yield from make(config, options, steps, run, reference)


def full_precision(config: ml_collections.ConfigDict, steps: Steps) -> Path:
    """Trains the full-precision network, or takes the one that `init_from` names.

    Returns:
        The MODEL.

    Raises:
        UserError: there is no such file, or it is no model; or training failed.
    """
    given, recipe = Path(config.init_from), RECIPES["fp32"]
    if given.suffix in CHECKPOINTS:
        if not given.is_file():
            raise UserError(f"init_from={given}: there is no such file")
        about = file_hash(given)
        return steps.run("fp32", about, (), "fp32.kmq", functools.partial(_import, given), recipe=recipe)
    if config.init_from:
        # Nothing is copied; a step all the same, so that what depends on it notices another model.
        about = fingerprint(load_model(given))
        steps.run("fp32", about, (), "fp32.json", lambda path: write_json(path, str(given)), recipe=recipe)
        return given
    train = functools.partial(_train, config)
    return steps.run("fp32", settings_of(config), (), "fp32", train, data=data_of(config), recipe=recipe)


def quantized_networks(
    config: ml_collections.ConfigDict, options: StudyOptions, steps: Steps, run: Run, reference: Path
) -> Iterator[Network]:
    """Quantizes without training and, where the run has epochs, with it; a network for each of the run's bits."""
    grow_from = str(steps.directory / run.grow_from) if run.grow_from else ""
    own = training_config(config, options, run, str(reference), grow_from)
    nested = ", nested" if run.coarse else ""

    def each(step: str, how: str, path: Path) -> Iterator[Network]:
        method = _method(how, run, options) + nested
        for bits in (run.bits or FULL, *run.coarse):
            yield Network(step, method, bits, path, bits if run.coarse else None, run)

    if run.untrained:
        # Without training only the rules and the speech matter, not the schedule or the loss.
        rules = [settings_of(own)["quant"], own.data.train]
        untrained = functools.partial(quantize, own, reference)
        step, recipe = run.untrained_step, RECIPES["ptq"]
        path = steps.run(step, rules, ("fp32",), f"{step}.kmq", untrained, data=data_of(own), recipe=recipe)
        yield from each(step, "without training", path)
    if own.epochs:
        yield from each(run.step, "trained", _trained(own, steps, run))


def _method(how: str, run: Run, options: StudyOptions) -> str:
    """How reports name a network; the study's own recipe and the first seed go without saying."""
    marks = (
        run.recipe if run.recipe != options.recipe and run.name != NESTED else "",
        "full precision" if run.name == str(FULL) else "",
        f"seed {run.seed}" if run.seed else "",
    )
    return ", ".join([how, *filter(None, marks)])


def mixed_network(
    config: ml_collections.ConfigDict, options: StudyOptions, steps: Steps, run: Run, reference: Path
) -> Iterator[Network]:
    """Trains at mixed precision, in phases of ascending bits; nothing where the run has no epochs."""
    own = training_config(config, options, run, str(reference))
    if not own.epochs:
        return
    path = _trained(own, steps, run)
    tensors = quant.codebook_tensors(load_model(path).variables["params"])
    # Weighted by the tensors' sizes: bits a weight.
    mean = sum(leaf.bits * leaf.size for leaf in tensors) / sum(leaf.size for leaf in tensors)
    yield Network(run.step, "trained, mixed", round(mean, 3), path, run=run)


def _trained(own: ml_collections.ConfigDict, steps: Steps, run: Run) -> Path:
    """The step that trains a quantization."""
    needs, train = ("fp32", *filter(None, [run.grow_from])), functools.partial(_train, own)
    recipe = RECIPES[MIXED if run.name == MIXED else run.recipe]
    return steps.run(run.step, settings_of(own), needs, run.step, train, data=data_of(own), recipe=recipe)


def epochs_of(options: StudyOptions, run: Run) -> float:
    """How long a quantization is trained; 0 where it is not."""
    if run.coarse and not options.epochs.get(str(min(run.coarse))):
        # Nested codebooks grow from the trained network of the fewest bits; without it they are not trained.
        return 0.0
    return options.epochs.get(run.name, 0.0)


def training_config(
    config: ml_collections.ConfigDict, options: StudyOptions, run: Run, reference: str, grow_from: str = ""
) -> ml_collections.ConfigDict:
    """The configuration of a quantized training: that of the full-precision one, with the study's changes.

    Args:
        config: of the full-precision training; it stays as it is.
        options: of the study.
        run: the quantization.
        reference: the MODEL in full precision, to start from.
        grow_from: the MODEL that nested codebooks grow from.
    """
    rules = tuple(tuple(rule) for rule in options.rules)
    recipe = published_kmqat if run.recipe == "kmqat" else distilled
    levels = {"levels": run.recipe, "centroids": "fixed"} if run.recipe in PATTERNED else {}
    # A copy: every run changes the configuration of the full-precision training in its own way.
    own = recipe(copy.deepcopy(config), run.bits, coarse=run.coarse, grow_from=grow_from, rules=rules, **levels)
    if run.name == str(FULL):
        full_precision_control(own)
    if run.name == MIXED:
        own.quant.update(average_bits=options.mixed, multi_stage=True, rules=())
    own.init_from = reference
    own.seed += run.seed
    own.average_last = 0
    if run.recipe != "kmqat":
        own.loss.weight = options.label_weight
    own.epochs = epochs_of(options, run)
    if options.learning_rate:
        own.learning_rate.peak = options.learning_rate
    # The study measures when training is done; nothing is chosen on the way.
    own.validation.data = ""
    return own


def full_precision_control(config: ml_collections.ConfigDict) -> None:
    """Turns a recipe of quantization-aware training into the same training in full precision.

    Weights are then in their own units, not in units of their channel's standard deviation. So the recipe that scales
    its learning rate by the bits takes a fixed one, `CONTROL_RATE`: about 1e-3 of a weight's standard deviation.

    Args:
        config: changed in place.
    """
    config.quant.update(rules=(), fit_crops=0, bn_passes=0, biases="float32")
    groups = config.optimizer.groups
    config.optimizer.groups = tuple(group for group in groups if not re.search(r"raw_scale|centroids", group[0]))
    if config.optimizer.name == "adamw":
        config.learning_rate.peak = CONTROL_RATE


def quantize(config: ml_collections.ConfigDict, reference: Path, out: Path) -> None:
    """Quantizes a model by the rules of a configuration, without training, fitted on training crops."""
    options = section(QatOptions, config.quant.to_dict(), "quant.")
    data = config.data.train if options.fit_crops else None
    # Nothing grows from these, so what would not shrink stays.
    rules = [
        rule if rule.spec is None else dataclasses.replace(rule, spec=dataclasses.replace(rule.spec, only_smaller=True))
        for rule in qat.rules_of(options)
    ]
    save_model(out, quantize_model(load_model(reference), rules, data, options.fit_crops))


def data_of(config: ml_collections.ConfigDict) -> list[str]:
    """The DATA and TRIALS that a training run reads."""
    data = config.data
    heard = [data.train, data.noise, data.music, data.babble, data.rooms]
    return [*heard, config.validation.data, config.validation.trials]


def _import(given: Path, out: Path) -> None:
    save_model(out, SpeakerModel(*pretrained.read(given, None, None)))


def _train(config: ml_collections.ConfigDict, workdir: Path) -> None:
    if not loop.train(config, workdir)["finished"]:
        raise UserError(f"{workdir}: training was stopped; the same command goes on from there")
