"""The lazy benchmark's thinned list."""

import numpy as np
import pytest

from kmq_jax.benchmarks.lazy import thin


@pytest.mark.parametrize("uses", [1, 3])
def test_no_recording_is_used_more_often_and_none_more_would_fit(uses):
    enrol, test = np.random.default_rng(1).integers(40, size=(2, 900))
    rows = thin(enrol, test, uses)
    count = np.bincount(np.concatenate([enrol[rows], test[rows]]), minlength=40)
    assert count.max() <= uses and len(np.unique(rows)) == len(rows)
    left = np.setdiff1d(np.flatnonzero(enrol != test), rows)
    assert ((count[enrol[left]] >= uses) | (count[test[left]] >= uses)).all()


def test_zero_takes_the_list_as_it_is():
    assert thin(np.array([0, 0, 1]), np.array([1, 1, 2]), 0).tolist() == [0, 1, 2]
