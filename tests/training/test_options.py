"""Options are checked once, whatever made them, and errors name the setting as its flag does."""

import dataclasses
import subprocess
import sys

import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.quant.kmeans import INITS
from kmq_jax.quant.types import HALF
from kmq_jax.training import options
from kmq_jax.training.config import default_config, distilled, published_kmqat, smoke
from kmq_jax.training.options import TrainOptions
from kmq_jax.training.prepare import _check_sizes

NAN, INF = float("nan"), float("inf")


def of(**changes):
    """The options of a default configuration with changes such as `{"loss.kind": "am"}`."""
    config = default_config("resnet18")
    for name, value in changes.items():
        *folders, last = name.split(".")
        place = config
        for folder in folders:
            place = place[folder]
        place[last] = value
    return TrainOptions.from_config(config)


def test_a_configuration_comes_back_as_it_was():
    config = distilled(default_config("resnet18", width=16), 4, coarse=(3, 2), grow_from="x", rules=[["^stem/", 0]])
    config.init_from = "y"
    made = TrainOptions.from_config(config)
    assert made.model["name"] == "resnet18" and made.model["width"] == 16
    assert made.quant.rules == (("^stem/", 0),) and made.quant.on and made.quant.trained_bits == (3, 4)
    assert made.loss.weight == 0 and made.distill.weight == 1
    again = TrainOptions.from_config(dataclasses.asdict(made))
    assert again == made


def test_a_study_is_left_out_and_anything_else_unknown_is_told():
    config = default_config("resnet18")
    config.study = {"bits": (2,)}
    assert TrainOptions.from_config(config) == of()
    with pytest.raises(UserError, match=r"no option `quant.widths`"):
        of(**{"quant.widths": (2,)})
    with pytest.raises(UserError, match=r"no option `epoch`; did you mean `epochs`"):
        of(epoch=2.0)


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "loss.kind": ("arc",),
        "loss.scale": (0.0, -1.0, NAN, INF),
        "loss.margin": (-0.1, NAN),
        "loss.weight": (-1.0, INF),
        "loss.smoothing": (1.0, -0.1),
        "loss.sub_centres": (0,),
        "data.crop_seconds": (0.0, NAN),
        "data.speeds": ((1.0, 0.0), ()),
        "data.threads": (-1,),
        "distill.weight": (-1.0,),
        "quant.bits": (9, -1),
        "quant.recipe": ("mean", "kmqat"),
        "quant.init": ("random",),
        "quant.granularity": ("layer",),
        "quant.centroids": ("mean",),
        "quant.retention": (0.0, 1.1),
        "quant.fit_crops": (-1,),
        "quant.thaw_epochs": (-1.0, NAN),
        "quant.lloyd_every": (0,),
        "quant.lloyd_rate": (1.5,),
        "quant.reassign_every": (-1,),
        "quant.budget": (-0.1, 1.5, NAN),
        "quant.budget_bits": ((0,), (9,)),
        "quant.hessian_draws": (0,),
        "quant.rules": ((("first",),), (("first", 9),), (("first", 2.0),)),
        "optimizer.name": ("lion",),
        "optimizer.momentum": (1.0, NAN),
        "optimizer.weight_decay": (-1.0, INF),
        "optimizer.clip": (-1.0,),
        "optimizer.groups": ((("a",),), (("a", -1.0, 0.0),)),
        "learning_rate.kind": ("flat",),
        "learning_rate.peak": (0.0, NAN, INF),
        "learning_rate.factor": (1.0,),
        "learning_rate.every": (0.0,),
        "dtype": ("float16",),
        "spec_augment": (-0.1, 1.1, NAN),
        "batch_size": (0, -8),
        "epochs": (0.0, -1.0, NAN),
        "epoch_steps": (-1,),
        "log_every": (0,),
        "keep_checkpoints": (0,),
        "checkpoint_epochs": (-1.0,),
        "validation.epochs": (-1.0, NAN),
    }.items(),
)
def test_a_value_out_of_range_is_one_line_that_names_it(name, values):
    for value in values:
        with pytest.raises(UserError) as error:
            of(**{name: value})
        assert f"`{name}`" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant.coarse": (2,), "quant.bits": 4}, "`quant.coarse` and `grow_from`"),
        ({"quant.grow_from": "runs/2bit"}, "`quant.coarse` and `grow_from`"),
        ({"quant.coarse": (4,), "quant.bits": 4, "quant.grow_from": "x"}, "must be below `bits` (=4)"),
        (
            {"quant.coarse": (2,), "quant.bits": 4, "quant.grow_from": "x", "quant.reassign_every": 5},
            "`quant.reassign_every` cannot be used",
        ),
        ({"quant.budget": 0.1, "quant.bits": 2}, "`quant.budget` chooses bits itself"),
        ({"quant.budget": 0.1, "quant.budget_bits": ()}, "`quant.budget_bits` must hold at least one"),
        ({"loss.weight": 0.0}, "`loss.weight` and distill.weight are both 0"),
        ({"learning_rate.kind": "exponential"}, "`learning_rate.final` (=0)"),
        ({"learning_rate.kind": "step"}, "`learning_rate.flat_until` (=0) of the step schedule must be above 0"),
        (
            {"learning_rate.kind": "step", "learning_rate.flat_until": 0.5},
            "`learning_rate.flat_until` (=0.5) of the step schedule must be above 0 and not below warmup_epochs (=1)",
        ),
        ({"average_last": 2, "quant.bits": 2}, "`average_last` (=2) cannot be used with quant"),
        ({"batch_norm": "running"}, "`batch_norm` (=running) needs init_from"),
        (
            {"batch_norm": "running", "init_from": "x", "quant.bits": 2, "quant.bn_passes": 2},
            "`quant.bn_passes` measures statistics of batches",
        ),
        ({"distill.weight": 1.0}, "distill.teacher or init_from must name"),
        (
            {"data.normalize": "utterance", "data.utterance_seconds": 2.0, "data.crop_seconds": 3.0},
            "`data.utterance_seconds` (=2) must be at least crop_seconds (=3)",
        ),
    ],
)
def test_what_does_not_go_together(changes, message):
    with pytest.raises(UserError) as error:
        of(**changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"model": {"name": "resnet18"}, "data": 3}, "`data` (=3) must be a section of settings"),
        ({"model": {"features": 80}}, "`model` must have a `name`"),
        ({"model": "resnet18"}, "`model` must have a `name`"),
    ],
)
def test_a_configuration_of_another_form(tree, message):
    with pytest.raises(UserError) as error:
        TrainOptions.from_config(tree)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("settings", [{"average_bits": 3.0}, {"rules": (("^stem/", 2),)}])
def test_a_small_run_averages_no_checkpoints_of_a_quantized_network(settings):
    config = smoke(published_kmqat(default_config("resnet18"), 0, **settings))
    assert TrainOptions.from_config(config).average_last == 0
    assert TrainOptions.from_config(smoke(default_config("resnet18"))).average_last == 2


def test_the_ways_to_begin_are_those_of_k_means():
    assert options.INITS == INITS


def test_names_that_options_repeat_are_those_of_quant():
    assert (options.INITS, options.HALF) == (INITS, HALF)


def test_options_need_neither_jax_nor_numpy():
    found = "import sys, kmq_jax.training.options; print({'jax', 'numpy', 'ml_collections'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", found], capture_output=True, text=True).stdout.strip() == "set()"


def test_networks_and_batches_that_no_memory_holds_are_refused_before_it_is_taken():
    with pytest.raises(UserError, match=r"`batch_size` \(=1000000\) of 60 s: takes 7,680 GB or more"):
        _check_sizes(of(**{"batch_size": 1_000_000, "data.crop_seconds": 60.0}), 1000)
    whole = {"data.normalize": "utterance", "data.utterance_seconds": 60.0}  # which the devices hold, to cut crops of
    with pytest.raises(UserError, match=r"`batch_size` \(=1000000\) of 60 s: takes 7,680 GB or more"):
        _check_sizes(of(**{"batch_size": 1_000_000, "data.crop_seconds": 0.1, **whole}), 1000)
    with pytest.raises(UserError, match="`model` of 3,000,000,000,000 parameters: takes 24,000 GB or more"):
        _check_sizes(of(), 3_000_000_000_000)
    _check_sizes(of(), 30_000_000)
