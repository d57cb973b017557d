"""Paired differences of a study's networks, on embeddings made by hand, and the controls that a study trains."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from kmq_jax.study import compare, networks
from kmq_jax.study.config import study_config
from kmq_jax.study.networks import Network, Run
from kmq_jax.study.options import PATTERNED, EvaluationSet, StudyOptions
from kmq_jax.training.config import default_config
from kmq_jax.training.options import TrainOptions

CONFIGS = Path(__file__).parents[2] / "configs"
LEVELS = ("", "uniform-", "minmax-", "powers-")
SPEAKERS, EACH = 12, 4


def embeddings(path, noise):
    """Random embeddings, a centre for each speaker; the more noise the more errors."""
    rng = np.random.default_rng(0)
    centres = np.repeat(rng.standard_normal((SPEAKERS, 8)), EACH, axis=0)
    ids = [f"s{i // EACH}-{i}" for i in range(SPEAKERS * EACH)]
    rows = (centres + noise * rng.standard_normal(centres.shape)).astype(np.float32)
    np.savez(path, embeddings=rows, ids=np.array(ids), speakers=np.array([one.split("-")[0] for one in ids]))
    return ids


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    place = tmp_path_factory.mktemp("compare")
    full = Network("fp32", "full precision", 32, place)
    made = {}
    for recipe, bits, seed, noise in (
        ("distilled", 2, 0, 1.2), ("distilled", 2, 1, 1.4), ("distilled", 32, 0, 0.4),
        ("distilled", 32, 1, 0.4), ("kmqat", 2, 0, 0.4),
    ):  # fmt: skip
        run = Run(str(bits), bits if bits < 32 else 0, recipe=recipe, seed=seed)
        made[Network(run.step, "trained", bits, place, run=run)] = noise
    for network, noise in {full: 0.4, **made}.items():
        ids = embeddings(place / f"{network.name}-a.npz", noise)
    trials = place / "trials.txt"
    lines = [f"{int(a.split('-')[0] == b.split('-')[0])} {a} {b}\n" for i, a in enumerate(ids) for b in ids[i + 1 :]]
    trials.write_text("".join(lines))
    evaluated = EvaluationSet(name="a", data="", trials=str(trials))
    rows = compare.differences(
        [full, *made], [evaluated], lambda one, on: Path(place / f"{one.name}-{on.name}.npz"), replicates=100
    )
    assert all(row["trained"] for row in rows)
    return {(row["recipe"], row["bits"], row["against"]): row for row in rows}


def test_everything_is_compared_once(found):
    assert set(found) == {
        ("distilled", 2, "full precision"), ("distilled", 2, "control"), ("distilled", 32, "full precision"),
        ("kmqat", 2, "full precision"), ("kmqat", 2, "distilled"),
    }  # fmt: skip
    assert found["distilled", 2, "control"]["seeds"] == 2 and found["kmqat", 2, "full precision"]["seeds"] == 1


def test_others_are_compared_with_this_projects_recipe_also_where_it_is_not_the_studys_own():
    ours, theirs = compare.Group("distilled", 2, True), compare.Group("kmqat", 2, True)
    for groups in ([ours, theirs], [theirs, ours]):
        assert [one for one in compare.pairs(groups) if one[2]] == [(theirs, "distilled", ours)]


def test_the_same_embeddings_differ_in_nothing(found):
    row = found["kmqat", 2, "full precision"]
    assert (row["eer_change"], row["eer_change_ci95"], row["min_dcf_change"], row["min_dcf_change_ci95"]) == (
        0,
        [0, 0],
        0,
        [0, 0],
    )


def test_a_worse_network_is_told_apart_and_seeds_are_averaged(found):
    row = found["distilled", 2, "control"]
    full = found["distilled", 2, "full precision"]
    assert (
        row["eer_change"] == full["eer_change"] and row["eer_change_ci95"] == full["eer_change_ci95"]
    )  # the control is as good
    assert 0 < row["eer_change_ci95"][0] < row["eer_change"] < row["eer_change_ci95"][1]
    few, many = full["eer_by_seed"]
    better = found["kmqat", 2, "distilled"]
    assert few < many and better["eer_change"] == -full["eer_change"]
    assert full["eer_change"] == pytest.approx((few + many) / 2 - found["kmqat", 2, "full precision"]["eer_by_seed"][0])


def settings(**changes):
    config = study_config(default_config("resnet18"), **changes)
    config.study.evaluate = {"a": {"data": "d", "trials": "t"}}
    return config, StudyOptions.of(json.loads(config.to_json())["study"])


def test_a_study_trains_what_it_is_asked_for_once():
    _, options = settings(bits=(4, 2), nested=False, epochs={"4": 1.0, "2": 1.0, "32": 1.0}, also=("kmqat",), seeds=2)
    steps = [run.step for run in networks.runs_of(options)]
    first = ["distilled-4", "distilled-2", "distilled-32", "kmqat-4", "kmqat-2", "kmqat-32"]
    assert steps == [*first, *(f"{step}-seed1" for step in first)]
    assert [run.step for run in networks.runs_of(options) if run.untrained] == ["distilled-4", "distilled-2"]


def test_levels_that_k_means_does_not_place_are_measured_untrained_too():
    config, options = settings(bits=(2,), nested=False, epochs={"2": 1.0, "32": 1.0}, also=("powers",))
    runs = {run.step: run for run in networks.runs_of(options)}
    assert list(runs) == ["distilled-2", "distilled-32", "powers-2"]
    run = runs["powers-2"]
    assert run.untrained and run.untrained_step == "ptq-powers-2"
    made = TrainOptions.from_config(networks.training_config(config, options, run, "fp32.kmq"))
    assert (made.quant.levels, made.quant.centroids) == ("powers", "fixed")
    group = compare.Group("powers", 2, True)
    assert group.control == compare.Group("distilled", 32, True)


def configured(name, arg):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(arg)
    return config, StudyOptions.of(json.loads(config.to_json())["study"])


def test_recipes_are_compared_at_equal_steps():
    """KMQAT hears no other speeds, so that a pass over the data is shorter for it."""
    config, options = configured("so762_resnet36_small", "compare")
    runs = [run for run in networks.runs_of(options) if networks.epochs_of(options, run)]
    made = [TrainOptions.from_config(networks.training_config(config, options, run, "fp32")) for run in runs]
    assert {(one.epochs, one.epoch_steps, one.batch_size, one.data.crop_seconds) for one in made} == {
        (40.0, config.epoch_steps, config.batch_size, config.data.crop_seconds)
    }
    assert config.epoch_steps > 0 and len(runs) == 3 * (2 * 5 + 2)
    # As the results page says: 400 steps of 16 crops, under two passes over its utterances.
    assert (40 * config.epoch_steps, config.batch_size) == (400, 16) and 400 * 16 < 2 * 3465
    assert {(run.recipe, run.name) for run in runs} == {
        *((recipe, bits) for recipe in ("distilled", "kmqat", *PATTERNED) for bits in "32"),
        ("distilled", "32"), ("kmqat", "32"),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["so762_resnet36_small", "wespeaker_so762"])
def test_every_set_of_levels_is_fitted_at_all_bits(name):
    _, options = configured(name, "levels")
    fitted = [run.untrained_step for run in networks.runs_of(options) if run.untrained]
    assert sorted(fitted) == sorted(f"ptq-{levels}{bits}" for levels in LEVELS for bits in "432")
    assert not any(networks.epochs_of(options, run) for run in networks.runs_of(options))


@pytest.mark.parametrize("recipe", ["distilled", "kmqat"])
def test_the_control_differs_from_its_recipe_in_nothing_but_the_bits(recipe):
    config, options = settings(recipe=recipe, rules=(("^stem/", 0),), epochs={"2": 1.0, "32": 1.0}, bits=(2,))
    made = {
        run.name: TrainOptions.from_config(networks.training_config(config, options, run, "fp32.kmq"))
        for run in networks.runs_of(options)
        if run.name in ("2", "32")
    }
    control, trained = made["32"], made["2"]
    assert control.quant.bits == 0 and not control.quant.rules and trained.quant.bits == 2
    for part in ("data", "loss", "distill", "epochs", "batch_size", "init_from", "seed", "spec_augment"):
        assert getattr(control, part) == getattr(trained, part)
    assert control.optimizer.name == trained.optimizer.name
    if recipe == "kmqat":
        assert control.learning_rate == trained.learning_rate
