"""The options of a training run, one dataclass a section of the configuration file. Values are checked once, here.

>>> LossOptions(kind="am", margin=0.3).margin
0.3
>>> LossOptions(scale=float("nan"))
Traceback (most recent call last):
kmq_jax.core.errors.UserError: `scale` (=nan) must be a finite number
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Row
from kmq_jax.core.options import Options, option, shown

INITS = ("optimal", "companding", "equal-mass", "quantile", "kmeans++")
"""Those of `quant.kmeans`, which is not imported here, so that `--help` does not wait for JAX."""
HALF = 16
"""`quant.types.HALF`."""

Section = TypeVar("Section", bound=Options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """What training hears."""

    root: str = option("a directory that a configuration's own places start from", "")
    train: str = option("DATA to train on, or several separated by commas", "")
    crop_seconds: float = option("length of a crop", 2.0, at_least=0.1, at_most=60)
    speeds: tuple[float, ...] = option(
        "speed perturbation: each speed other than 1 makes new speakers", (1.0,), at_least=0.5, at_most=2
    )
    augment: bool = option(
        "add one of noise, music, babble, reverberation or nothing to each crop, uniformly among those at hand", True
    )
    noise: str = option("DATA of noise", "")
    music: str = option("DATA of music", "")
    babble: str = option("DATA of speech that babble is made of; empty: other training speakers", "")
    rooms: str = option("DATA of room impulse responses; empty: rooms are simulated", "")
    normalize: Literal["crop", "utterance"] = option(
        "what the mean is removed over: the crop, or before it is cut the whole utterance", "crop"
    )
    utterance_seconds: float = option(
        "the most of an utterance that the latter takes in", 20.0, at_least=0.1, at_most=3600
    )
    threads: int = option("threads that read recordings", 2, at_least=0, at_most=1024)
    ahead: int = option(
        "batches that wait on the devices for their step; 0: each is put there when its step begins",
        1,
        at_least=0,
        at_most=64,
    )

    def __post_init__(self) -> None:
        """See `Options`."""
        super().__post_init__()
        if not self.speeds or len(set(self.speeds)) < len(self.speeds):
            raise UserError(f"`speeds` (={shown(self.speeds)}) must hold at least one speed, and none twice")
        if self.normalize == "utterance" and self.utterance_seconds < self.crop_seconds:
            # Utterances would be shorter than a crop, and repeated to fill it.
            raise UserError(
                f"`utterance_seconds` (={self.utterance_seconds:g}) must be at least crop_seconds "
                f"(={self.crop_seconds:g})"
            )

    @property
    def crop_samples(self) -> int:
        """Samples of a crop at 16 kHz.

        >>> DataOptions(crop_seconds=3.515).crop_samples
        56240
        """
        return round(self.crop_seconds * 16000)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossOptions(Options):
    """Classification of the training speakers."""

    weight: float = option("of this loss; 0 trains by distillation alone, without speaker labels", 1.0, at_least=0)
    kind: Literal["softmax", "am", "aam"] = option("margin softmax: none, on the cosine, or on the angle", "aam")
    scale: float = option("what cosines are multiplied by", 30.0, above=0, at_most=10_000)
    margin: float = option("the margin that is reached", 0.2, at_least=0, at_most=3)
    margin_start: float = option("epoch at which the margin begins to rise from 0, linearly", 0.0, at_least=0)
    margin_end: float = option("epoch at which it is reached", 0.0, at_least=0)
    sub_centres: int = option("centres of each speaker", 1, at_least=1, at_most=1000)
    jeffreys: bool = option("the Jeffreys loss in place of cross entropy", False)
    smoothing: float = option("its c1: the share of the target given to the other speakers", 0.1, at_least=0, below=1)
    spread: float = option("its c2: the weight of their own evenness", 0.025, at_least=0, below=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillOptions(Options):
    """Distillation: the network learns to answer as a full-precision one does."""

    weight: float = option("of this loss; 0: no teacher", 0.0, at_least=0)
    teacher: str = option("a MODEL; empty: the one in init_from", "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QatOptions(Options):
    """Quantization-aware training, where `bits`, `rules` or `budget` are given."""

    bits: int = option(
        "of every kernel, those that take more room so too; 0: as `rules` and `budget` say", 0, at_least=0, at_most=8
    )
    rules: tuple[tuple[str, int], ...] = option(
        "(regular expression, bits) before `bits`, first match wins; 0 keeps full precision", ()
    )
    granularity: Literal["channel", "tensor"] = option("what shares a codebook", "channel")
    coarse: tuple[int, ...] = option("nested codebooks: the fewer bits that the same indices serve", (), at_least=1)
    grow_from: str = option(
        "MODEL trained at the fewest of them: it stays as it is, and more bits are trained inside its cells", ""
    )
    recipe: Literal["normalized", "weights"] = option(
        "unit of the latents: a channel's standard deviation, or that of the weights, whose codebooks begin as KMQAT's "
        "do (the published method is more than that: training.config.published_kmqat)",
        "normalized",
    )
    levels: Literal["kmeans", "uniform", "minmax", "powers"] = option(
        "where centroids may lie, see quant.levels; other than by k-means, the scale alone is trained", "kmeans"
    )
    init: str = option("of the centroids, see quant.kmeans", "optimal", choices=INITS)
    retention: float = option(
        "share of a channel's weights that place its first centroids, of init equal-mass and of the recipe weights",
        0.9,
        above=0,
        at_most=1,
    )
    symmetric: bool = option("centroids come in pairs of opposite sign", False)
    fit_crops: int = option(
        "crops that weights are fitted on before training, and batch normalisation measured on after it; 0: neither",
        100,
        at_least=0,
        at_most=100_000,
    )
    bn_passes: int = option(
        "passes over the training data that batch normalisation is measured on before and after training",
        0,
        at_least=0,
        at_most=1000,
    )
    thaw_epochs: float = option("the scales stay as they are until then, in each phase", 0.0, at_least=0)
    centroids: Literal["gradient", "lloyd", "fixed"] = option("how centroids move", "gradient")
    lloyd_every: int = option("steps between moves towards the mean of the members", 100, at_least=1)
    lloyd_epochs: float = option("epochs between these moves, in place of steps; 0: `lloyd_every`", 0.0, at_least=0)
    lloyd_clip: float = option("members count at most this far from 0, in units of the scale; 0: any", 0.0, at_least=0)
    lloyd_rate: float = option("share of the way that centroids move", 0.1, at_least=0, at_most=1)
    lloyd_unused_rate: float = option("the same where many centroids have no members", 0.2, at_least=0, at_most=1)
    lloyd_until: float = option(
        "share of the run, or of a phase, after which centroids rest", 0.67, at_least=0, at_most=1
    )
    reassign_every: int = option("steps between assignments of latents to centroids; 0: every step", 0, at_least=0)
    reassign_epochs: float = option("epochs between them, in place of steps; 0: `reassign_every`", 0.0, at_least=0)
    budget: float = option(
        "mixed precision within this share of the kernels' float32 bytes; 0: bits as above", 0.0, at_least=0, at_most=1
    )
    average_bits: float = option(
        "mixed precision of at most so many bits a quantized weight on average; 0: bits as above", 0.0, at_least=0
    )
    budget_bits: tuple[int, ...] = option("bits that the budget is spent on", (2, 3, 4), at_least=1, at_most=8)
    sections: int = option(
        "groups of tensors of like sensitivity that share their bits; 0: none do", 4, at_least=0, at_most=100_000
    )
    hessian_draws: int = option("random vectors that sensitivity is estimated by", 10, at_least=1, at_most=100_000)
    multi_stage: bool = option(
        "in phases of `epochs` each: tensors of the fewest bits are quantized first, the others later; each phase has "
        "optimizer and schedule of its own, and scales thaw in each anew",
        False,
    )
    biases: Literal["float32", "float16"] = option("the type of the packed network's biases", "float32")
    activations: int = option(
        "8: steps round what goes into quantized convolutions to 8 bits as well, as an integer engine does; linear and "
        "LSTM layers stay in floating point. 0: all do",
        0,
    )

    def __post_init__(self) -> None:
        """See `Options`; also checks what goes together."""
        super().__post_init__()
        for rule in self.rules:
            if len(rule) != 2 or not isinstance(rule[1], int) or not (0 <= rule[1] <= 8 or rule[1] == HALF):
                raise UserError(f"`rules`: {rule!r} must be (regular expression, bits)")
        # The class is frozen: this is the one way to keep the converted value.
        object.__setattr__(self, "rules", tuple((str(pattern), bits) for pattern, bits in self.rules))
        if self.bits and any(bits >= self.bits for bits in self.coarse):
            raise UserError(f"`coarse` (={self.coarse}) must be below `bits` (={self.bits})")
        if bool(self.coarse) != bool(self.grow_from):
            raise UserError("`coarse` and `grow_from`, a MODEL trained at the fewest bits, go together")
        if self.grow_from and (self.reassign_every or self.reassign_epochs):
            raise UserError("`reassign_every` cannot be used with grow_from, whose cells stay as they are")
        if self.coarse and self.bn_passes:
            raise UserError("`bn_passes` cannot be used with coarse, whose statistics `fit_crops` measures")
        if self.levels != "kmeans" and (self.centroids != "fixed" or self.recipe != "normalized"):
            raise UserError(f"`levels` (={self.levels!r}) needs centroids='fixed' and recipe='normalized'")
        if self.mixed:
            self._check_mixed()
        if self.activations not in (0, 8):
            raise UserError(f"`activations` (={self.activations}) must be 8, or 0: in floating point")
        if self.activations and (self.granularity != "channel" or self.coarse or not self.fit_crops):
            raise UserError(
                f"`activations` (={self.activations}) needs granularity='channel', fit_crops, on which ranges are "
                "measured, and no coarse codebooks"
            )

    def _check_mixed(self) -> None:
        if self.bits or self.coarse or self.rules:
            name = "budget" if self.budget else "average_bits"
            raise UserError(f"`{name}` chooses bits itself: it cannot be used with bits, coarse or rules")
        if self.budget and self.average_bits:
            raise UserError("`budget` and `average_bits` cannot be used together")
        if not self.budget_bits:
            raise UserError("`budget_bits` must hold at least one number of bits")

    @property
    def on(self) -> bool:
        """Whether anything is quantized."""
        return bool(self.bits or self.rules or self.mixed)

    @property
    def mixed(self) -> bool:
        """Whether each tensor gets bits of its own, by its sensitivity."""
        return bool(self.budget or self.average_bits)

    @property
    def cached(self) -> bool:
        """Whether indices are kept between assignments."""
        return bool(self.reassign_every or self.reassign_epochs)

    def in_steps(self, epoch_steps: int) -> "QatOptions":
        """The same options with all periods in steps, whichever way they were given.

        >>> QatOptions(bits=2, lloyd_epochs=1.0).in_steps(40).lloyd_every
        40
        """
        lloyd = steps_of(self.lloyd_epochs, epoch_steps) or self.lloyd_every
        reassign = steps_of(self.reassign_epochs, epoch_steps) or self.reassign_every
        return dataclasses.replace(
            self, lloyd_every=lloyd, reassign_every=reassign, lloyd_epochs=0.0, reassign_epochs=0.0
        )

    @property
    def trained_bits(self) -> tuple[int, ...]:
        """The bits that are trained, ascending: all but those of the network that nested codebooks grow from.

        >>> QatOptions(bits=4, coarse=(2, 3), grow_from="runs/2bit").trained_bits
        (3, 4)
        """
        return (*sorted(self.coarse)[1:], self.bits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupOptions(Options):
    """What a group of parameters has of its own; what is None is as for the others."""

    rate: float = option("factor on the learning rate", 1.0, at_least=0)
    decay: float = option("factor on the weight decay", 1.0, at_least=0)
    peak: float | None = option("peak of a learning rate of its own, else by the same schedule", None, above=0)
    momentum: float | None = option("of sgd", None, at_least=0, below=1)
    clip: float | None = option("largest norm of the group's own gradient; 0: any", None, at_least=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerOptions(Options):
    """How gradients move parameters."""

    name: Literal["sgd", "adamw"] = option("momentum with L2 decay, or Adam with decoupled decay", "sgd")
    momentum: float = option("of sgd", 0.9, at_least=0, below=1)
    nesterov: bool = option("Nesterov's form of the momentum", False)
    weight_decay: float = option(
        "of every parameter, times the factor of its group; scales and centroids that are in no group have none",
        1e-4,
        at_least=0,
    )
    clip: float = option("largest norm of the whole gradient; 0: any", 0.0, at_least=0)
    groups: tuple[tuple[Any, ...], ...] = option(
        "(regular expression on names of parameters, learning-rate factor, weight-decay factor) or (regular "
        "expression, settings of `GroupOptions`); first match wins",
        ((r"/(bias|scale)$|classifier", 1.0, 0.0),),  # no decay of normalisation, biases and classifier
    )

    def __post_init__(self) -> None:
        """See `Options`."""
        super().__post_init__()
        for group in self.groups:
            factors = len(group) == 3 and all(isinstance(factor, int | float) and factor >= 0 for factor in group[1:])
            if not factors and not (len(group) == 2 and isinstance(group[1], Mapping)):
                raise UserError(f"`groups`: {group!r} must be (pattern, rate factor, decay factor)")
        groups = tuple((str(pattern), *own) for pattern, *own in self.groups)
        object.__setattr__(self, "groups", groups)
        self.group_rules  # noqa: B018  (settings are checked here)

    @property
    def group_rules(self) -> list[tuple[str, GroupOptions]]:
        """`groups` as rules on names, in their order: the first match wins.

        >>> OptimizerOptions(groups=(("bias$", 1.0, 0.0), ("scale$", {"clip": 1.5}))).group_rules[1]
        ('scale$', GroupOptions(rate=1.0, decay=1.0, peak=None, momentum=None, clip=1.5))
        """
        return [
            (pattern, GroupOptions.of(own[0], "groups") if len(own) == 1 else GroupOptions(rate=own[0], decay=own[1]))
            for pattern, *own in self.groups
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleOptions(Options):
    """The learning rate by step."""

    kind: Literal["cosine", "exponential", "step"] = option("how it falls after the warm-up", "cosine")
    start: float = option("at the first step", 0.0, at_least=0)
    peak: float = option("after the warm-up", 0.1, above=0)
    final: float = option("at the end, of cosine and exponential", 0.0, at_least=0)
    warmup_epochs: float = option("over which it rises from `start` to `peak`, linearly", 1.0, at_least=0)
    flat_until: float = option("epoch of the first drop, of step", 0.0, at_least=0)
    every: float = option("epochs between drops, of step", 10.0, above=0)
    factor: float = option("that each drop divides by, of step", 2.0, above=1)

    def __post_init__(self) -> None:
        """See `Options`."""
        super().__post_init__()
        if self.kind == "exponential" and self.final == 0:
            raise UserError("`final` (=0) must be above 0 for the exponential schedule")
        if self.kind == "step" and (not self.flat_until or self.flat_until < self.warmup_epochs):
            least = f"above 0 and not below warmup_epochs (={self.warmup_epochs:g})"
            raise UserError(f"`flat_until` (={self.flat_until:g}) of the step schedule must be {least}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationOptions(Options):
    """Trials that are scored as training goes."""

    data: str = option("DATA; empty: no validation", "")
    trials: str = option("TRIALS", "")
    epochs: float = option("between two validations; 0: only at the end", 1.0, at_least=0, at_most=1e6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions(Options):
    """All options of a run. Times are in epochs.

    An epoch is `epoch_steps` steps; 0 means one crop of every training utterance (at every speed).
    """

    seed: int = option("of everything that is drawn", 0, at_least=0, at_most=2**32 - 1)
    init_from: str = option(
        "a MODEL to start from: its network, and its classifier where that is of the same speakers", ""
    )
    model: Row = option("the network's `name` and its settings, see models.registry")
    frontend: str = option("filterbank setting, such as kiwano, wespeaker or speechbrain", "kiwano")
    dtype: Literal["float32", "bfloat16"] = option(
        "of the network's arithmetic; parameters and statistics stay float32", "float32"
    )
    remat_keeps: Literal["nothing", "statistics", "convolutions"] = option(
        "with model.remat: what recomputed blocks keep. statistics: two numbers a channel; convolutions: what they "
        "give as well, for about half of the memory of a network that keeps everything",
        "statistics",
    )
    data: DataOptions = option("what training hears", DataOptions())
    batch_norm: Literal["batch", "running"] = option(
        "what batch normalisation goes by in training: statistics of the batch, or the running ones, which then stay",
        "batch",
    )
    spec_augment: float = option(
        "probability that one band and one stretch of time are masked", 0.6, at_least=0, at_most=1
    )
    loss: LossOptions = option("classification of speakers", LossOptions())
    distill: DistillOptions = option("distillation", DistillOptions())
    quant: QatOptions = option("quantization-aware training", QatOptions())
    optimizer: OptimizerOptions = option("how gradients move parameters", OptimizerOptions())
    learning_rate: ScheduleOptions = option("by step", ScheduleOptions())
    batch_size: int = option("over all devices", 128, at_least=1, at_most=1_000_000)
    epochs: float = option("length of the run, or of each phase of quant.multi_stage", 10.0, above=0, at_most=1e6)
    epoch_steps: int = option("steps an epoch; 0: one pass over the data", 0, at_least=0, at_most=10**9)
    sharding: tuple[tuple[str, int], ...] = option(
        "(regular expression, axis) of parameters split over the devices; the rest is replicated", ()
    )
    log_every: int = option("steps between lines of metrics.jsonl", 10, at_least=1, at_most=10**9)
    checkpoint_epochs: float = option("between checkpoints; 0: only at the end", 1.0, at_least=0, at_most=1e6)
    keep_checkpoints: int = option("the newest so many, and one of a run that was stopped", 2, at_least=1, at_most=1000)
    average_last: int = option(
        "checkpoints that are averaged into the final model; 0: none", 0, at_least=0, at_most=1000
    )
    validation: ValidationOptions = option("trials scored as training goes", ValidationOptions())

    def __post_init__(self) -> None:
        """See `Options`; also checks what goes together."""
        super().__post_init__()
        if not isinstance(self.model, Mapping) or not isinstance(self.model.get("name"), str):
            raise UserError("`model` must have a `name`, one of models.registry, and its settings")
        for rule in self.sharding:
            if len(rule) != 2 or not isinstance(rule[0], str) or type(rule[1]) is not int:
                raise UserError(f"`sharding`: {rule!r} must be (regular expression, axis)")
        if self.quant.on and self.average_last > 1:
            raise UserError(f"`average_last` (={self.average_last}) cannot be used with quant: indices have no average")
        if not self.loss.weight and not self.distill.weight:
            raise UserError("`loss.weight` and distill.weight are both 0: there would be nothing to learn from")
        if self.distill.weight and not (self.distill.teacher or self.init_from):
            raise UserError("`distill.weight` is above zero, so distill.teacher or init_from must name a MODEL")
        if self.batch_norm == "running" and not self.init_from:
            raise UserError("`batch_norm` (=running) needs init_from, a MODEL whose running statistics are used")
        if self.batch_norm == "running" and self.quant.bn_passes:
            raise UserError("`quant.bn_passes` measures statistics of batches, and cannot go with batch_norm=running")

    @classmethod
    def from_config(cls, config: Row) -> "TrainOptions":
        """Turns a configuration (an `ml_collections.ConfigDict`, or plain mappings) into options.

        A section `study`, which says what a study does with the network, is left out.

        >>> TrainOptions.from_config({"model": {"name": "resnet18"}, "loss": {"margin": 0.3}}).loss.margin
        0.3

        Raises:
            UserError: a setting is unknown, or has a value that cannot be used; the message names it.
        """
        tree = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        tree.pop("study", None)
        # A field is a section where its default is a group of options.
        sections = {field.name: type(field.default) for field in dataclasses.fields(cls)}
        for name, kind in sections.items():
            if issubclass(kind, Options) and name in tree:
                tree[name] = section(kind, tree[name], f"{name}.")
        return section(cls, tree, "")


def section(kind: type[Section], values: Row, prefix: str) -> Section:
    """Makes the options of one section of a configuration; errors name settings as flags do.

    >>> section(LossOptions, {"kind": "arc"}, "loss.")
    Traceback (most recent call last):
    kmq_jax.core.errors.UserError: `loss.kind` (=arc) must be one of softmax, am, aam
    """
    if not isinstance(values, Mapping):
        raise UserError(f"`{prefix.rstrip('.')}` (={shown(values)}) must be a section of settings")
    try:
        return kind.of(values)
    except UserError as error:
        # A message names the setting first, in backquotes.
        raise UserError(str(error).replace("`", f"`{prefix}", 1)) from error


def steps_of(epochs: float, epoch_steps: int) -> int:
    """Turns epochs into whole steps; at least one where epochs is above zero.

    >>> [steps_of(epochs, epoch_steps=10) for epochs in (0.0, 0.01, 0.5, 2.0)]
    [0, 1, 5, 20]

    Raises:
        UserError: negative.
    """
    if epochs < 0:
        raise UserError(f"epochs (={epochs}) must not be negative")
    return max(1, round(epochs * epoch_steps)) if epochs else 0
