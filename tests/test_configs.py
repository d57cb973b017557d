"""Every configuration loads, and runs in its smoke form."""

import importlib.util
import json
from pathlib import Path

import pytest

from kmq_jax.cli.train import parse_flags
from kmq_jax.core.errors import UserError
from kmq_jax.training import loop
from kmq_jax.training.from_models import describe
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


ARGUMENTS = {"wespeaker_so762": ("", "compare", "free", "levels", "so762"), "campplus_so762": ("", "free")}


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
