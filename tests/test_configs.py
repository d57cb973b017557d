"""Every configuration loads, and runs in its smoke form."""

import importlib.util
import json
from pathlib import Path

import pytest

from kmq_jax.cli.train import parse_flags
from kmq_jax.core.errors import UserError
from kmq_jax.frontend import num_frames
from kmq_jax.models.registry import parameter_count
from kmq_jax.models.speaker_model import frontend_of
from kmq_jax.training import loop
from kmq_jax.training.from_models import describe
from kmq_jax.training.optim import make_schedule
from kmq_jax.training.options import TrainOptions

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


def get_config(path, arg):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, module.get_config(arg)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_config_says_how_to_run_it_and_fits_the_registry(path):
    module, config = get_config(path, None)
    assert f"--config=configs/{path.name}" in module.__doc__
    config.init_from = config.init_from or "a model"
    describe(TrainOptions.from_config(config)).network(config.dtype)
    json.loads(config.to_json())


ARGUMENTS = {
    "wespeaker_so762": ("", "compare", "free", "levels", "so762"),
    "campplus_so762": ("", "free"),
    "so762_resnet36_small": ("", "compare", "ecapa", "free", "levels"),
}


def paths_in(value):
    """All strings of a configuration that are below `data/`, where its data lie unless told otherwise."""
    if isinstance(value, dict):
        return [path for one in value.values() for path in paths_in(one)]
    if isinstance(value, list):
        return [path for one in value for path in paths_in(one)]
    return [part for part in value.split(",") if part.startswith("data/")] if isinstance(value, str) else []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_another_root_of_the_data_is_that_of_all_of_them(path):
    for arg in ARGUMENTS.get(path.stem, ("",)):
        _, config = get_config(path, arg or None)
        if not config.data.root:
            continue  # its data are named one by one
        before = paths_in(json.loads(config.to_json()))
        config.data.root = "elsewhere"
        assert before and not paths_in(json.loads(config.to_json()))


@pytest.mark.parametrize(
    ("name", "batch", "epochs", "decay"),
    [("ecapa", 256, 150, 1e-4), ("xvector", 256, 150, 1e-4), ("redimnet", 512, 120, 2e-5)],
)
def test_wespeaker_s_recipe_is_as_it_is_published(name, batch, epochs, decay):
    """By the files that `wespeaker_config` names: 0.1 and 5e-5 for every 64 crops of a batch."""
    _, config = get_config(CONFIGS[0].parent / f"voxceleb2_{name}.py", None)
    made = TrainOptions.from_config(config)
    rate = make_schedule(made.learning_rate, epoch_steps=10, total_steps=10 * epochs)
    rates = [float(rate(10 * epoch)) / (batch / 64) for epoch in (0, 6, epochs)]
    assert rates == pytest.approx([0, 0.1, 5e-5], rel=1e-4)
    assert (made.batch_size, made.epochs, made.optimizer.weight_decay) == (batch, epochs, decay)
    assert num_frames(made.data.crop_samples, frontend_of(made.frontend)) == 200
    assert (made.loss.margin, made.loss.scale, made.loss.margin_start, made.loss.margin_end) == (0.2, 32, 20, 40)


def test_networks_that_are_set_side_by_side_are_of_one_size():
    sizes = []
    for arg in ("free", "ecapa"):
        _, config = get_config(CONFIGS[0].parent / "so762_resnet36_small.py", arg)
        sizes.append(parameter_count(describe(TrainOptions.from_config(config)).network(config.dtype)))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of ml_collections' way to load a file
def test_what_a_configuration_refuses_is_told_as_it_says_it():
    path = Path(__file__).parents[1] / "configs/wespeaker34_distilled.py"
    with pytest.raises(UserError) as error:
        parse_flags(["train", f"--config={path}:5", "--workdir=runs/x"])
    assert str(error.value) == "--config: configs/wespeaker34_distilled.py:5 must be 2, 3, 4, nested or smoke"


FIRST = {"ge2e_so762"}
"""The quickest. The others differ in settings, which the first test reads, or in networks, which have tests of their
own; a distillation is part of quickstart's smoke form, a job of CI."""


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=() if path.stem in FIRST else pytest.mark.slow, id=path.stem) for path in CONFIGS]
)
def test_smoke(path, tmp_path):
    summary = loop.train(get_config(path, "smoke")[1], tmp_path)
    assert summary["finished"] and 0 <= summary["validation_eer"] <= 100
