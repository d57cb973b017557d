"""The lazy benchmark's thinned list."""

import numpy as np
import pytest

from kmq_jax.benchmarks import lazy
from kmq_jax.benchmarks.lazy import thin
from kmq_jax.core.errors import UserError
from kmq_jax.data import trials
from kmq_jax.data.table import Utterances


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


def test_a_list_of_which_nothing_is_left_is_named(monkeypatch):
    beside_itself = np.array([0, 1])
    assert thin(beside_itself, beside_itself, 1).dtype == int
    table = Utterances(("a", "b"), ("a", "b"), ("a", "b"))
    pairs = trials.Trials(beside_itself, beside_itself, np.array([True, True]), table.ids, beside_itself, beside_itself)
    monkeypatch.setattr(lazy.source, "open_source", lambda data: table)
    monkeypatch.setattr(lazy.trials, "open_trials", lambda listed, table: pairs)
    with pytest.raises(UserError, match=r"`trials` \(=list\): no target or no nontarget trials are left with `uses`"):
        lazy.open_task("d", "list", 1, "kiwano")
