"""The benchmarks of quantization: a quantized training step beside full precision, and k-means beside its peers."""

import jax
import numpy as np
import pytest

from kmq_jax.benchmarks import quant, steps
from kmq_jax.cli import bench
from kmq_jax.core import mesh
from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import named_leaves
from kmq_jax.models import registry
from kmq_jax.training.config import default_config, smoke
from kmq_jax.training.options import TrainOptions


def test_a_step_starts_from_even_codebooks():
    config = default_config("resnet36")
    config.quant.bits = 2
    start = steps.start(TrainOptions.from_config(smoke(config)), 10, mesh.make_mesh(jax.devices()[:1]))
    params = start.state.params.network
    assert params.codebooks and all(name.endswith("/kernel") for name in params.codebooks)
    book = next(iter(params.codebooks.values()))
    np.testing.assert_allclose(book.centroids[0], [-2, -2 / 3, 2 / 3, 2], rtol=1e-6)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(start.state))  # the second step would compile again


def test_weights_have_the_shapes_of_a_networks_kernels():
    weights = quant.kernels("resnet18", layers=2)
    shapes = registry.shapes(registry.build("resnet18"))["params"]
    assert len(weights) == 2
    assert all(dict(named_leaves(shapes))[name].shape == kernel.shape for name, kernel in weights.items())


@pytest.mark.parametrize("flag", ["--bits=9", "--bits=two", "--dtype=float64"])
def test_mistakes_are_named(flag):
    with pytest.raises(UserError, match=flag.split("=")[0]):
        bench.run("qat", [flag])
