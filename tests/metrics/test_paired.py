"""Differences between systems on the same draws."""

import dataclasses

import numpy as np
import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.metrics.paired import Errors, told_apart


def test_systems_drawn_another_number_of_times_are_refused():
    drawn = Errors(5.0, 0.5, np.full(50, 5.0), np.full(50, 0.5), 50)
    none = Errors(4.0, 0.25, np.empty(0), np.empty(0), 0)
    with pytest.raises(UserError, match="as many draws of both systems, got 50 and 0"):
        drawn.minus(none)
    assert none.minus(drawn)["eer_change_ci95"] is None
    assert drawn.minus(dataclasses.replace(drawn, eer=4.0))["eer_change"] == 1.0


def test_nothing_is_told_apart_by_what_is_no_number():
    assert not told_apart([np.nan, np.nan])
    assert told_apart([0.1, 0.2]) and told_apart([-0.2, -0.1])
    assert not told_apart([0.0, 0.2]) and not told_apart([-0.2, 0.0])
