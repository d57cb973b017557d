"""The benchmark of clustering on weights worked out by hand."""

import numpy as np
import pytest

from kmq_jax.benchmarks import quant


def test_inertia_is_compared_where_there_is_any():
    """As many centroids as weights leave none on either side: 0 / 0 used to end the run."""
    few = {"a": np.float32([[1, 5], [2, 6], [3, 9]])}  # two channels of three weights
    assert "inertia_over_sklearn" not in quant.clustering(few, bits=2, channels=2, repeats=1)
    found = quant.clustering(few, bits=1, channels=2, repeats=1)
    assert found["inertia_over_sklearn"] == pytest.approx(1) and found["subset_channels"] == 2
