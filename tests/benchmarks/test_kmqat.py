"""The benchmarks of quantization: a quantized training step beside full precision, and k-means beside its peers."""

import json

import jax
import numpy as np
import pytest

from kmq_jax.benchmarks import steps
from kmq_jax.cli import bench
from kmq_jax.core import mesh
from kmq_jax.core.errors import UserError
from kmq_jax.training.config import default_config, smoke
from kmq_jax.training.options import TrainOptions


def test_a_step_starts_from_even_codebooks():
    config = smoke(default_config("resnet36"))
    config.quant.bits = 2
    start = steps.start(TrainOptions.from_config(config), 10, mesh.make_mesh(jax.devices()[:1]))
    params = start.state.params.network
    assert params.codebooks and all(name.endswith("/kernel") for name in params.codebooks)
    book = next(iter(params.codebooks.values()))
    np.testing.assert_allclose(book.centroids[0], [-2, -2 / 3, 2 / 3, 2], rtol=1e-6)
    assert not jax.tree.leaves(params.per_bits)


def test_quant_on_two_layers(tmp_path, capsys):
    pytest.importorskip("sklearn")
    words = ["--network=resnet18", "--layers=2", "--channels=1", "--repeats=1", f"--json={tmp_path / 'b.json'}"]
    bench.run("quant", words)
    figures = json.loads((tmp_path / "b.json").read_text())
    assert 0.9 < figures["inertia_over_sklearn"] < 1.01 and figures["dequantize_gb_per_second"] > 0
    assert "GB/s" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--bits=9", "--bits=two", "--dtype=float64"])
def test_mistakes_are_named(flag):
    with pytest.raises(UserError, match=flag.split("=")[0]):
        bench.run("kmqat", [flag])
