"""KMQAT as published from end to end, on a tiny network and synthetic voices."""

import json

import jax
import numpy as np
import own_network  # noqa: F401  # registers the network
import pytest

from kmq_jax import quant
from kmq_jax.core.tree import named_leaves
from kmq_jax.models.checkpoint import Checkpoints
from kmq_jax.models.speaker_model import load_model
from kmq_jax.training import loop
from kmq_jax.training.config import paper_config, published_kmqat, smoke
from kmq_jax.training.runlog import read_runlog


def full_precision(network="own_tdnn"):
    config = smoke(paper_config(network))
    config.validation.data = ""
    config.update(average_last=0, dtype="float32")
    return config


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A full-precision run, by the paper's recipe: the mean is removed before the crop."""
    workdir = tmp_path_factory.mktemp("full")
    assert loop.train(full_precision(), workdir)["finished"]
    return workdir


def published(full, bits, network="own_tdnn", **settings):
    config = published_kmqat(full_precision(network), bits, **settings)
    config.init_from = str(full)
    return config


def tensors(workdir):
    params = load_model(workdir).variables["params"]
    return dict(named_leaves(params, is_leaf=quant.is_codebook_tensor))


def test_two_bits_on_labels(full, tmp_path):
    config = published(full, 2, thaw_epochs=1.0)
    config.optimizer.groups = (
        (r"/raw_scale$", {"peak": 0.5, "momentum": 0.0, "clip": 1.5, "decay": 0.0}),
        *config.optimizer.groups[1:],
    )
    assert loop.train(config, tmp_path)["finished"]
    log = [line for line in read_runlog(tmp_path / "metrics.jsonl") if "loss" in line]
    assert all("teacher_cosine" not in line and line["margin"] == pytest.approx(0.3) for line in log)
    assert log[0]["learning_rate"] == pytest.approx(1e-4) and log[-1]["learning_rate"] < log[0]["learning_rate"]
    leaves = tensors(tmp_path)
    kernels = {name: leaf for name, leaf in leaves.items() if name.endswith("kernel")}
    assert all(quant.is_codebook_tensor(leaf) and leaf.bits == 2 for leaf in kernels.values())
    for name, leaf in leaves.items():
        half = name.endswith("/bias") and name.removesuffix("bias") + "kernel" in leaves
        assert name in kernels or str(leaf.dtype) == ("float16" if half else "float32")
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        one, two = (checkpoints.load(step, "training")["codebooks"] for step in (2, 4))
        statistics = checkpoints.load(4, "network")["batch_stats"]
    moved = [float(np.abs(two[name]["raw_scale"] - one[name]["raw_scale"]).max()) for name in two]
    assert max(moved) > 0  # thawed after the first epoch
    assert all(np.abs(book["centroids"]).max() <= 1 + 1e-6 for book in two.values())
    shipped = load_model(tmp_path).variables["batch_stats"]
    change = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), shipped, statistics)
    assert min(jax.tree.leaves(change)) > 0  # measured afresh over the training data
    wave = np.random.default_rng(0).standard_normal(16000).astype(np.float32) * 0.1
    assert np.isfinite(load_model(tmp_path).embed(wave, 16000)).all()


@pytest.mark.slow
def test_mixed_precision_in_phases(tmp_path):
    loop.train(full_precision(), tmp_path / "full")
    config = published(tmp_path / "full", 0, average_bits=3.144, multi_stage=True, hessian_draws=1, bn_passes=1)
    tmp_path = tmp_path / "run"
    summary = loop.train(config, tmp_path)
    bits = json.loads((tmp_path / "bits.json").read_text())
    leaves = tensors(tmp_path)
    assert {name: leaves[name].bits for name in bits} == bits and len(set(bits.values())) > 1
    sizes = {name: leaves[name].size for name in bits}
    assert sum(bits[name] * sizes[name] for name in bits) / sum(sizes.values()) <= 3.144
    assert summary["finished"]
    rates = [line["learning_rate"] for line in read_runlog(tmp_path / "metrics.jsonl") if "loss" in line]
    phases = len(set(bits.values()))
    assert rates.count(pytest.approx(1e-4)) == phases  # every phase begins at the peak
    assert summary["steps"] == phases * config.epochs * config.epoch_steps
