"""Batches put on the devices ahead: their position is that of the last one used; a step waits for nothing else."""

import contextlib
import logging
import time

import grain
import jax
import numpy as np
import own_network  # noqa: F401  # registers the network
import pytest

from kmq_jax.core import mesh
from kmq_jax.core.errors import UserError
from kmq_jax.models.speaker_model import frontend_of
from kmq_jax.training import step as steps
from kmq_jax.training.config import default_config, smoke
from kmq_jax.training.feed import on_devices
from kmq_jax.training.from_models import describe
from kmq_jax.training.options import TrainOptions


def numbers(made=None, rows=8):
    """Batch n is `rows` times the number n; what was made is noted."""

    def batch(n):
        if made is not None:
            made.append(n)
        return {"x": np.full(rows, n)}

    return grain.MapDataset.range(100).map(batch).to_iter_dataset(grain.ReadOptions(num_threads=0))


def feed(batches, ahead, devices=None):
    return contextlib.closing(on_devices(batches, mesh.make_mesh(devices), ahead))


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_the_position_is_that_of_the_last_batch_used(ahead):
    host = iter(numbers())
    with feed(numbers(), ahead) as batches:
        assert batches.get_state() == host.get_state()
        for _ in range(4):
            np.testing.assert_array_equal(next(batches)["x"], next(host)["x"])
            assert batches.get_state() == host.get_state()
        position = batches.get_state()
        assert int(next(batches)["x"][0]) == 4
    for other in (0, 2):  # a run goes on with as many ahead as it likes
        with feed(numbers(), other) as batches:
            batches.set_state(position)
            assert [int(next(batches)["x"][0]) for _ in range(3)] == [4, 5, 6]


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_so_many_batches_are_made_before_they_are_asked_for_and_no_more(ahead):
    made = []
    with feed(numbers(made), ahead) as batches:
        assert next(batches)["x"].sharding.is_equivalent_to(mesh.batch_sharding(mesh.make_mesh()), 1)
        most = ahead + 2 if ahead else 1  # the one given, those that wait, and the one in the thread's hands
        deadline = time.monotonic() + 60
        while len(made) < most and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert made == list(range(most))


def test_a_fault_of_a_batch_is_told_where_it_is_asked_for():
    told = pytest.raises(UserError, match="batch of 6 .* does not divide over 4 devices")
    with feed(numbers(rows=6), 1, jax.devices()[:4]) as batches, told:
        next(batches)


def test_a_step_takes_nothing_from_the_host_and_is_compiled_once(caplog):
    config = smoke(default_config("own_tdnn"))
    options = TrainOptions.from_config(config)
    devices = mesh.make_mesh(jax.devices()[:2])
    network = describe(options).network()
    objective = steps.make_objective(network, frontend_of("kiwano"), options, devices, epoch_steps=4)
    params, statistics = steps.init_params(network, options, classes=8)
    recipe = steps.make_recipe(objective, steps.make_task(options, 4), params)
    state = steps.init_state(recipe, params, statistics)
    shardings = mesh.tree_shardings(state, devices)
    state, rng = jax.device_put(state, shardings), np.random.default_rng(0)
    waves = rng.normal(0, 3000, (5, 2, 8, 16000)).astype(np.int16)
    batches = [
        {
            "wave": wave,
            "interference": noise,
            "snr_db": np.full(8, 10, np.float32),
            "reverb": np.arange(8) < 2,
            "speaker": np.arange(8, dtype=np.int32),
        }
        for wave, noise in waves
    ]
    step, metrics = steps.jit_train_step(recipe, shardings), []
    made = grain.MapDataset.source(batches).to_iter_dataset(grain.ReadOptions(num_threads=0))
    with contextlib.closing(on_devices(made, devices)) as fed, jax.log_compiles(), caplog.at_level(logging.WARNING):
        state, _ = step(state, next(fed))
        assert "Compiling jit(train_step)" in caplog.text  # so it would be seen
        caplog.clear()
        for _ in range(3):
            batch = next(fed)
            with jax.transfer_guard("disallow"):
                state, found = step(state, batch)
            metrics.append(found)
        assert "Compiling" not in caplog.text
        with jax.transfer_guard("disallow"), pytest.raises(Exception, match="(?i)disallowed host-to-device"):
            step(state, batches[4])  # a batch that was not put: so it would be seen
    assert all(np.isfinite(float(found["loss"])) for found in metrics)
