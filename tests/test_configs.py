"""Every configuration loads, and runs in its smoke form."""

import importlib.util
import json
from pathlib import Path

import pytest

from kmq_jax import train_loop

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
    train_loop.describe(config).network(config.dtype)
    json.loads(config.to_json())


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_smoke(path, tmp_path):
    summary = train_loop.train(get_config(path, "smoke")[1], tmp_path)
    assert summary["finished"] and 0 <= summary["validation_eer"] <= 100
