"""What the paper says of a training, line by line, beside the settings that a configuration trains with.

Paper: Leguillier et al., "On Low-Bit Quantization Errors in Speaker Verification", Odyssey 2026; its training method,
KMQAT, is by Liu, Wang and Qian, TASLP 2024. Each line names the test that fails once it no longer holds.
"""

import dataclasses
import re
from collections.abc import Mapping

import ml_collections

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json
from kmq_jax.data.pipeline import SNR_DB
from kmq_jax.frontend import SpecAugmentConfig
from kmq_jax.study.networks import runs_of, training_config, training_steps
from kmq_jax.study.options import FULL, MIXED, StudyOptions
from kmq_jax.training.options import DataOptions, TrainOptions

PAPER, CODE, OPEN = "paper", "code", "neither"
_HERE = "tests/training/test_published.py::"
_SETTINGS = {"fp32": "test_full_precision_is_trained_as_published", "kmqat": "test_two_bits_are_trained_as_published"}


@dataclasses.dataclass(frozen=True)
class Line:
    """One thing that is published of a training.

    Attributes:
        says: the thing, in words.
        source: who says so: the paper, its first author's public code, or neither.
        setting: the option of `TrainOptions`, or of `FIXED`, that holds it; empty where the code can do nothing else.
        published: the option's value as published; None where none is.
        test: the test that checks it; empty: the one that goes through all settings.
        why: what is chosen where none is published or sources differ.
    """

    says: str
    source: str
    setting: str = ""
    published: object = None
    test: str = ""
    why: str = ""

    def beside(self, options: TrainOptions, kind: str) -> Json:
        """The line beside a configuration: `says, source, published, setting, here, equal, why, test`.

        `equal` is None where no value is published. It is true of what no setting can change: the test checks that.
        """
        here = _plain(value_of(options, self.setting)) if self.setting else None
        known = not self.setting or self.published is not None
        return {
            "says": self.says,
            "source": self.source,
            "setting": self.setting,
            "published": _plain(self.published),
            "here": here,
            "equal": here == _plain(self.published) if known else None,
            "why": self.why,
            "test": self.test or _HERE + _SETTINGS[kind],
        }


_MASKS = SpecAugmentConfig()
FIXED = {
    **{f"data.pipeline.SNR_DB[{kind}]": between for kind, between in SNR_DB.items()},
    "frontend.SpecAugmentConfig.max_frames": _MASKS.max_frames,
    "frontend.SpecAugmentConfig.max_bands": _MASKS.max_bands,
}
"""What training goes by without an option of its own, by where the code has it."""


def value_of(options: TrainOptions, setting: str) -> object:
    """The value of an option, or one of `FIXED`, by its dotted name; None where an optimizer has no such group.

    `optimizer.groups[NAME].FIELD` is a field of the group that matches a parameter of that name.

    >>> value_of(TrainOptions(model={"name": "resnet18"}), "loss.scale")
    30.0
    """
    if setting in FIXED:
        return FIXED[setting]
    value: object = options
    for part in re.findall(r"[^.\[\]]+", setting):
        if value is None:
            break
        if isinstance(value, tuple):  # the optimizer's groups; the first match wins, as in `match_rules`
            value = next((own for pattern, own in options.optimizer.group_rules if re.search(pattern, part)), None)
        else:
            value = value.get(part) if isinstance(value, Mapping) else getattr(value, part)
    return value


def _plain(value: object) -> object:
    """A value as JSON holds it."""
    return [_plain(one) for one in value] if isinstance(value, tuple | list) else value


_GROUP = _HERE + "test_groups_of_the_published_optimizer"
_FULL_GROUP = _HERE + "test_the_classifier_does_not_decay"
_STEP = "tests/quant/test_ste.py::"
SCALE, BIAS = "optimizer.groups[layer/raw_scale].", "optimizer.groups[layer/bias]."
CLASSIFIER = "optimizer.groups[classifier]."
_UTTERANCE = f"of at most {DataOptions().utterance_seconds:g} s (`data.utterance_seconds`): of longer ones, of a piece"

FP32 = (
    Line("embeddings of 256", PAPER, "model.embedding_size", 256),
    Line("80 mel bands and the log energy: 81 features", CODE, "model.features", 81),
    Line("350 frames a crop", PAPER, "data.crop_samples", 56240, why="25 ms and 349 steps of 10 ms at 16 kHz"),
    Line(
        "the mean is removed over the whole utterance, then it is cropped",
        CODE,
        "data.normalize",
        "utterance",
        why=_UTTERANCE,
    ),
    Line("noise, music, babble, rooms or nothing, one of five", PAPER, "data.augment", True),
    Line("noise at 0 to 15 dB", CODE, "data.pipeline.SNR_DB[noise]", (0.0, 15.0)),
    Line("music at 5 to 15 dB", CODE, "data.pipeline.SNR_DB[music]", (5.0, 15.0)),
    Line("babble at 13 to 20 dB", CODE, "data.pipeline.SNR_DB[babble]", (13.0, 20.0)),
    Line("other speeds", OPEN, "data.speeds", None, why="not told: none"),
    Line("SpecAugment with probability 0.6", CODE, "spec_augment", 0.6),
    Line("masks of 1 to 10 frames", CODE, "frontend.SpecAugmentConfig.max_frames", 10),
    Line("and of 1 to 8 bands", CODE, "frontend.SpecAugmentConfig.max_bands", 8),
    Line("batches of 512", PAPER, "batch_size", 512),
    Line("42 epochs", PAPER, "epochs", 42.0, why="51 in the code: `:public`"),
    Line("additive margin softmax", PAPER, "loss.kind", "am"),
    Line("scale 30", CODE, "loss.scale", 30.0),
    Line("margin 0.3", CODE, "loss.margin", 0.3),
    Line("which begins to rise at epoch 5", CODE, "loss.margin_start", 5.0),
    Line("and is reached at epoch 20", CODE, "loss.margin_end", 20.0),
    Line("stochastic gradient descent", PAPER, "optimizer.name", "sgd"),
    Line("momentum 0.9", PAPER, "optimizer.momentum", 0.9),
    Line("weight decay 2e-4", PAPER, "optimizer.weight_decay", 2e-4, why="1e-4 in the code: `:public`"),
    Line("none on the classifier", CODE, CLASSIFIER + "decay", 0.0, _FULL_GROUP),
    Line("learning rate from 1e-5", CODE, "learning_rate.start", 1e-5),
    Line("to 0.2", CODE, "learning_rate.peak", 0.2),
    Line("over 5 epochs", CODE, "learning_rate.warmup_epochs", 5.0),
    Line("flat to epoch 19", CODE, "learning_rate.flat_until", 19.0),
    Line("then divided by 5", CODE, "learning_rate.factor", 5.0),
    Line("every 10 epochs", CODE, "learning_rate.every", 10.0),
)
"""Full precision."""

KMQAT = (
    Line("2^b centroids: bits", PAPER, "quant.bits", 2),
    Line("with a learned scale, each layer", PAPER, "quant.granularity", "tensor",
         why="the code and the paper's memory table have one codebook and one scale an output channel"),
    Line("retention 0.9", PAPER, "quant.retention", 0.9),
    Line("bins of equal mass, a centroid their mean, divided by the largest magnitude", PAPER, "quant.recipe",
         "weights"),
    Line("weights clamped to their 5 % and 95 % quantiles; centroids of the clamped; indices nearest to clipped "
         "weights; alpha = max(w.q / q.q, 1e-5), kept as softplus", CODE,
         test=_STEP + "test_kmqat_start_step_by_step"),
    Line("first indices are nearest to clipped weights over the largest clamped one", CODE,
         test=_HERE + "test_indices_begin_as_the_paper_places_them"),
    Line("centroids need not come in pairs of opposite sign", CODE, "quant.symmetric", False),
    Line("forward: w / alpha, nearest centroid, times alpha: exactly", PAPER,
         test=_STEP + "test_forward_is_exactly_the_centroids"),
    Line("straight through to the latent weights and to alpha", PAPER, test=_STEP + "test_gradients"),
    Line("indices are assigned anew periodically", PAPER, "quant.reassign_every", None,
         why="the period is not told: every step"),
    Line("which hold in between", PAPER, test="tests/training/test_qat.py::"
         "test_cached_indices_hold_until_new_ones_are_due"),
    Line("weights only, activations stay as they are", PAPER, "quant.activations", 0),
    Line("40 epochs at each number of bits", PAPER, "epochs", 40.0),
    Line("from the full-precision checkpoint", PAPER, "init_from", "fp32"),
    Line("no augmentation", PAPER, "data.augment", False),
    Line("nor masks of features", PAPER, "spec_augment", 0.0),
    Line("nor other speeds", PAPER, "data.speeds", (1.0,)),
    Line("labels, by full precision's classification loss", CODE, "loss.weight", 1.0),
    Line("additive margin softmax", PAPER, "loss.kind", "am"),
    Line("at its final margin", CODE, "loss.margin", 0.3),
    Line("from the first step", CODE, "loss.margin_end", 0.0),
    Line("no teacher", PAPER, "distill.weight", 0.0),
    Line("every convolution and linear layer", CODE, "quant.rules", ()),
    Line("but the classifier, and no normalisation", CODE, test=_HERE + "test_the_memory_table_holds_in_every_cell"),
    Line("one number of bits alone in a file", PAPER, "quant.coarse", ()),
    Line("not fitted on speech before", CODE, "quant.fit_crops", 0),
    Line("alpha is frozen for 2 epochs", CODE, "quant.thaw_epochs", 2.0),
    Line("centroids move towards the mean of their members", CODE, "quant.centroids", "lloyd"),
    Line("once an epoch", CODE, "quant.lloyd_epochs", 1.0),
    Line("by 0.1", CODE, "quant.lloyd_rate", 0.1),
    Line("by 0.2 where many are unused", CODE, "quant.lloyd_unused_rate", 0.2),
    Line("members clipped to +-1", CODE, "quant.lloyd_clip", 1.0),
    Line("to the end", CODE, "quant.lloyd_until", 1.0),
    Line("no gradient moves them", CODE, "optimizer.groups[layer/centroids].rate", 0.0, _GROUP),
    Line("stochastic gradient descent", CODE, "optimizer.name", "sgd"),
    Line("momentum 0.9", CODE, "optimizer.momentum", 0.9),
    Line("weights' learning rate 1e-4", CODE, "learning_rate.peak", 1e-4),
    Line("weight decay 1e-4", CODE, "optimizer.weight_decay", 1e-4),
    Line("0 on normalisation and biases", CODE, BIAS + "decay", 0.0, _GROUP),
    Line("weight decay of the classifier", OPEN, CLASSIFIER + "decay", None, _FULL_GROUP,
         "not told: none, as in full precision"),
    Line("no clipping of theirs", CODE, "optimizer.clip", 0.0),
    Line("alpha's learning rate 0.75e-4", CODE, SCALE + "peak", 0.75e-4, _GROUP),
    Line("without momentum", CODE, SCALE + "momentum", 0.0, _GROUP),
    Line("its gradient clipped at 1.5", CODE, SCALE + "clip", 1.5, _GROUP),
    Line("alpha's weight decay", OPEN, SCALE + "decay", None, _GROUP, "not told: none, since it is a scale"),
    Line("cosine", CODE, "learning_rate.kind", "cosine"),
    Line("to 1e-7", CODE, "learning_rate.final", 1e-7),
    Line("from the first step, without warm-up", CODE, "learning_rate.warmup_epochs", 0.0),
    Line("two passes that measure batch normalisation, before and after", CODE, "quant.bn_passes", 2),
    Line("biases in FP16 in the file", PAPER, "quant.biases", "float16", why="by its memory table"),
)  # fmt: skip
"""KMQAT at 2 bits."""

MIXED_LINES = (
    Line("layers by the trace of the Hessian, 10 random vectors", PAPER, "quant.hessian_draws", 10),
    Line("in 4 sections, one number of bits each", PAPER, "quant.sections", 4),
    Line("of 2, 3 and 4", PAPER, "quant.budget_bits", (2, 3, 4)),
    Line("3.144 bits a weight", PAPER, "quant.average_bits", 3.144,
         why="the paper's model; a tenth of full precision's bytes in KMQAT's: `quant.budget`"),
    Line("in stages of ascending bits, each with its own optimizer and cosine", PAPER, "quant.multi_stage", True,
         _HERE + "test_every_phase_has_a_cosine_of_its_own"),
    Line("40 epochs a stage", PAPER, "epochs", 40.0,
         _HERE + "test_every_phase_lasts_as_many_epochs_however_many_there_are"),
    Line("alpha is frozen at the start of a stage", OPEN, "quant.thaw_epochs", None,
         _HERE + "test_scales_are_frozen_at_the_start_of_every_phase",
         "not told: of every stage, which begins anew with optimizer and cosine"),
)  # fmt: skip
"""What mixed precision in phases (MSFT) has beside KMQAT's lines, but for its bits and epochs."""


def lines_of(step: str) -> tuple[Line, ...]:
    """What is published of a training step, such as "fp32", "kmqat-2" or "kmqat-mixed"; nothing of other recipes.

    >>> [line.setting for line in lines_of("kmqat-4")][:2], lines_of("distilled-2")
    (['quant.bits', 'quant.granularity'], ())
    """
    if step == "fp32":
        return FP32
    recipe, _, bits = step.partition("-")
    if recipe != "kmqat" or bits.partition("-")[0] == str(FULL):
        return ()
    if bits == MIXED:
        return tuple(line for line in KMQAT if line.setting not in ("quant.bits", "epochs")) + MIXED_LINES
    # KMQAT's first line is of the bits: all others are the same at any.
    first = dataclasses.replace(KMQAT[0], published=int(bits.partition("-")[0]))
    return (first, *KMQAT[1:])


def settings_beside(config: ml_collections.ConfigDict, options: StudyOptions, step: str) -> Json:
    """A training of a study beside what is published of it.

    Args:
        config: of the full-precision training.
        options: of the study.
        step: one of `networks.training_steps`.

    Returns:
        `kind` ("settings"), `step`, and `rows`, as `Line.beside` gives them.

    Raises:
        UserError: the study has no such step, or nothing is published of it.
    """
    known = [name for name in training_steps(options) if lines_of(name)]
    if step not in known:
        raise UserError(f"--settings (={step}) must be of {', '.join(known)}")
    runs = {run.step: run for run in runs_of(options)}
    own = training_config(config, options, runs[step], "fp32") if step in runs else config
    made, kind = TrainOptions.from_config(own), step.partition("-")[0]
    return {"kind": "settings", "step": step, "rows": [line.beside(made, kind) for line in lines_of(step)]}
