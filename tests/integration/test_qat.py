"""Quantization-aware training as users start it, of the smallest network at hand on synthetic voices."""

import dataclasses
import json
import os
import re
import signal

import jax
import numpy as np
import pytest
from own_config import plain  # which registers the network

from kmq_jax import quant
from kmq_jax.core import mesh
from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import named_leaves
from kmq_jax.data import pipeline, source
from kmq_jax.models.checkpoint import Checkpoints
from kmq_jax.models.speaker_model import at_bits, frontend_of, load_model
from kmq_jax.training import loop
from kmq_jax.training import step as steps
from kmq_jax.training.config import default_config, distilled, smoke
from kmq_jax.training.from_models import describe
from kmq_jax.training.options import TrainOptions
from kmq_jax.training.runlog import read_runlog
from kmq_jax.training.state import load_network


def tiny(network="own_tdnn", **changes):
    config = smoke(default_config(network))
    config.validation.data = ""
    config.update(average_last=0, checkpoint_epochs=0.5, **changes)
    return plain(config)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A full-precision model to start from."""
    workdir = tmp_path_factory.mktemp("full")
    loop.train(tiny(), workdir)
    return workdir


def qat_config(full, bits, **settings):
    config = distilled(tiny(init_from=str(full)), bits, **{"fit_crops": 8, **settings})
    config.optimizer.groups = (("raw_scale|centroids", 0.2, 0.0), ("/(bias|scale)$|classifier", 0.1, 0.0))
    return config


KEPT = ((r"^frame1/", 0),)  # in full precision
RUNS = {
    "nested": {"bits": 4, "coarse": (2, 3), "rules": KEPT},
    "cached, lloyd": {
        "bits": 2,
        "recipe": "weights",
        "centroids": "lloyd",
        "lloyd_every": 2,
        "reassign_every": 3,
        "thaw_epochs": 1.0,
    },
}


@pytest.fixture(scope="module")
def narrow(full, tmp_path_factory):
    """A 2-bit model to grow from."""
    workdir = tmp_path_factory.mktemp("narrow")
    loop.train(qat_config(full, 2, rules=KEPT), workdir)
    return workdir


@pytest.fixture(scope="module", params=RUNS)
def run(request, full, narrow, tmp_path_factory):
    """An uninterrupted run: its settings, its directory and its summary."""
    workdir = tmp_path_factory.mktemp("run")
    settings = RUNS[request.param] | ({"grow_from": str(narrow)} if request.param == "nested" else {})
    config = qat_config(full, **settings)
    if request.param == "nested":
        config.validation.data = config.validation.trials
    return settings, workdir, loop.train(config, workdir)


def test_a_run_leaves_a_packed_model(run):
    settings, workdir, summary = run
    assert summary["finished"] and summary["steps"] == 4
    assert len(json.loads((workdir / "inputs.json").read_text())["teacher"]) == 20
    trained = load_model(workdir)
    tensors = [t for t in jax.tree.leaves(trained.variables, is_leaf=quant.is_codebook_tensor) if hasattr(t, "packed")]
    names = [n for n, _ in named_leaves(trained.variables["params"], quant.is_codebook_tensor) if n.endswith("kernel")]
    assert len(tensors) == sum(not any(re.search(rule, n) for rule, _ in settings.get("rules", ())) for n in names) > 0
    assert all(t.all_bits == (*settings.get("coarse", ()), settings["bits"]) for t in tensors)
    named = [f"validation_eer_{b}bit" for b in settings.get("coarse", ())]
    assert all(0 <= summary[name] <= 100 for name in named) and (summary["validation_eer"] is None) == (not named)
    log = [line for line in read_runlog(workdir / "metrics.jsonl") if "loss" in line]
    assert all(-1 <= line["teacher_cosine"] <= 1 and np.isfinite(line["loss"]) for line in log)
    wave = np.random.default_rng(0).standard_normal(16000).astype(np.float32) * 0.1
    for bits in tensors[0].all_bits:
        narrow = load_model(workdir, bits if len(tensors[0].all_bits) > 1 else None)
        assert np.isfinite(narrow.embed(wave, 16000)).all()


def test_growing_leaves_the_narrow_network_as_it_is(run, narrow):
    settings, workdir, _ = run
    if not settings.get("coarse"):
        pytest.skip("not a nested run")
    before, after = load_model(narrow), at_bits(load_model(workdir), 2)
    here, there = (dict(named_leaves(quant.dequantize_params(m.variables, b))) for m, b in ((before, None), (after, 2)))
    for name, leaf in here.items():
        # Statistics are measured once more in the end, on the same crops.
        np.testing.assert_allclose(there[name], leaf, rtol=1e-5 if name.startswith("batch_stats") else 0, atol=1e-7)


def test_a_stopped_run_goes_on_bit_exactly(run, full, tmp_path, monkeypatch):
    settings, workdir, _ = run
    save = Checkpoints.save

    def stop_after_two(self, step, **parts):
        save(self, step, **parts)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Checkpoints, "save", stop_after_two)
    assert not loop.train(qat_config(full, **settings), tmp_path)["finished"]
    monkeypatch.setattr(Checkpoints, "save", save)
    assert loop.train(qat_config(full, **settings), tmp_path)["finished"]
    assert (tmp_path / "model.kmq").read_bytes() == (workdir / "model.kmq").read_bytes()
    logs = [read_runlog(d / "metrics.jsonl") for d in (workdir, tmp_path)]
    losses = [[line["loss"] for line in log if "loss" in line] for log in logs]
    assert losses[0] == losses[1]


def test_by_running_statistics_a_network_begins_as_its_own_teacher(full, tmp_path):
    config = qat_config(full, 0, fit_crops=0)
    config.optimizer.groups = (("/(bias|scale)$|classifier", 0.1, 0.0),)
    config.learning_rate.peak = 1e-12
    for batch_norm in ("running", "batch"):
        config.batch_norm = batch_norm
        loop.train(config, tmp_path / batch_norm)
    running, batch = (read_runlog(tmp_path / name / "metrics.jsonl") for name in ("running", "batch"))
    np.testing.assert_allclose([line["loss"] for line in running], 0, atol=1e-5)
    np.testing.assert_allclose([line["teacher_cosine"] for line in running], 1, atol=1e-5)
    assert min(line["loss"] for line in batch) > 0.01


def test_running_statistics_stay_as_they_were_fitted(full, tmp_path):
    config = qat_config(full, 2, rules=KEPT)
    config.update(batch_norm="running", keep_checkpoints=4)
    loop.train(config, tmp_path)
    first, last = (dict(named_leaves(load_network(Checkpoints(tmp_path / "checkpoints"), s))) for s in (1, 4))
    shipped = dict(named_leaves(load_model(tmp_path).variables["batch_stats"]))
    assert any("mean" in name for name in shipped)
    for name, leaf in shipped.items():
        np.testing.assert_array_equal(leaf, first[f"batch_stats/{name}"])
        np.testing.assert_array_equal(leaf, last[f"batch_stats/{name}"])
    moved = [name for name in first if name.startswith("params/") and not np.array_equal(first[name], last[name])]
    assert moved


@pytest.mark.slow
def test_mixed_precision(full, tmp_path):
    config = qat_config(full, 0, budget=0.1, budget_bits=(2, 3, 4), sections=4, hessian_draws=2)
    config.optimizer.groups = (("raw_scale|centroids", 0.2, 0.0), ("/(bias|scale)$|classifier", 0.1, 0.0))
    config.loss.weight = 1.0  # speaker labels beside the teacher
    summary = loop.train(config, tmp_path)
    bits = json.loads((tmp_path / "bits.json").read_text())
    params = load_model(tmp_path).variables["params"]
    tensors = dict(named_leaves(params, is_leaf=quant.is_codebook_tensor))
    assert {name: tensors[name].bits for name in bits} == bits
    kernels = {name: tensors[name] for name in bits}
    size = quant.size_bytes(kernels).total
    assert size <= 0.1 * sum(4 * t.size for t in kernels.values())
    assert summary["finished"] and "accuracy" in read_runlog(tmp_path / "metrics.jsonl")[-1]


def losses_on(devices, full, count=3):
    options = TrainOptions.from_config(qat_config(full, 2, fit_crops=0))
    utterances = source.open_sources(options.data.train)
    network = describe(options).network()
    places = mesh.make_mesh(devices)
    reference = load_model(full)
    given = reference.variables
    params, _ = steps.init_params(network, options, len(utterances.speaker_names))
    task = steps.make_task(options, epoch_steps=4)
    params = dataclasses.replace(params, network=task.init(reference, None)[0])
    objective = steps.make_objective(network, frontend_of("kiwano"), options, places, epoch_steps=4)
    recipe = steps.make_recipe(objective, task, params)
    state = steps.init_state(recipe, params, given["batch_stats"])
    shardings = mesh.tree_shardings(state, places, [])
    state, teacher = jax.device_put(state, shardings), jax.device_put(given, mesh.replicated(places))
    step = steps.jit_train_step(recipe, shardings)
    batches = pipeline.training_batches(utterances, batch_size=8, crop_samples=16000, seed=0, threads=0)
    losses = []
    for _, batch in zip(range(count), batches):
        state, metrics = step(state, mesh.shard_batch(batch, places), teacher)
        losses.append(float(metrics["loss"]))
    return losses


def test_four_devices_give_the_losses_of_one(full):
    # An index flips where sums over devices differ in their last bit, so only the first steps agree this closely.
    four, one = losses_on(jax.devices()[:4], full), losses_on(jax.devices()[:1], full)
    np.testing.assert_allclose(four[:2], one[:2], rtol=1e-5)
    np.testing.assert_allclose(four, one, rtol=1e-2)


def test_mistakes_are_told_before_any_step(full, tmp_path):
    config = qat_config(full, 2)
    config.average_last = 2
    with pytest.raises(UserError, match="average_last"):
        loop.train(config, tmp_path)
    config = qat_config(full, 2)
    config.init_from = ""
    with pytest.raises(UserError, match="distill.teacher or init_from must name"):
        loop.train(config, tmp_path)
    assert not list(tmp_path.glob("checkpoints/*"))


@pytest.mark.slow
def test_training_with_rounded_activations_and_what_both_engines_make_of_it(tmp_path):
    loop.train(tiny("resnet36"), tmp_path / "full")
    config = distilled(tiny("resnet36", init_from=str(tmp_path / "full")), 4, fit_crops=8, activations=8)
    config.quant.rules = ((r"^(stem|stage[34]|pool)/", 0),)  # each further shape takes seconds to compile
    config.epochs = 1.0
    loop.train(config, tmp_path / "run")
    ranges = json.loads((tmp_path / "run" / "ranges.json").read_text())
    trained = load_model(tmp_path / "run" / "model.kmq")
    rounds = dict(named_leaves(trained.variables["integers"]))
    places = [name for name in rounds if not name.endswith("/kernel")]
    assert 0 < len(places) < len(rounds) and not any(place.startswith("stem/conv") for place in places)
    for place in places:
        np.testing.assert_allclose(rounds[place], ranges[place], rtol=1e-6)
    tensors = dict(named_leaves(trained.variables["params"], quant.is_codebook_tensor))
    for name, found in rounds.items():
        if name.endswith("/kernel"):  # those of the codebooks as they are now, not as they were
            np.testing.assert_allclose(found * 127, np.abs(tensors[name].codebook).max(axis=1), rtol=1e-5)
    speech = source.open_source("synthetic:dev?speakers=2&utterances=1")
    waves = [speech.load(row) for row in range(2)]
    without = dataclasses.replace(trained, variables={k: v for k, v in trained.variables.items() if k != "integers"})
    ours, theirs = (trained.embed(waves, 16000, engine=name) for name in ("jax", "onnxruntime"))
    plain = without.embed(waves, 16000, engine="jax")

    def apart(a, b):
        return 1 - (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)

    # A value between two levels may fall otherwise: no further than rounding itself goes, of a barely trained network.
    assert (apart(ours, theirs) < np.minimum(apart(ours, plain), 0.01)).all()
    # A run that goes on reads its ranges, and refuses what are none.
    (tmp_path / "run" / "ranges.json").write_text(json.dumps({"stem/conv/input": [0, 3]}))
    with pytest.raises(UserError, match=r"ranges\.json: stem/conv/input"):
        loop.train(config, tmp_path / "run")
