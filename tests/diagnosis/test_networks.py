"""Experiments on networks: what is left out where there is nothing to say."""

import numpy as np
import pytest

from kmq_jax.diagnosis import networks
from kmq_jax.diagnosis.options import DiagnosisOptions

ENROL, TEST, LABELS = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 0]), np.array([True, False, True, False])


@pytest.mark.parametrize("replicates", [5, 1000])
def test_where_few_draws_have_both_kinds_of_trials_there_is_no_interval(replicates):
    """Of two speakers, half of the draws hold one alone, and so no pair of two."""
    values = np.array([0.9, 0.1, 0.8, 0.2])
    options = DiagnosisOptions(replicates=replicates, seed=3)
    rates = networks._Rates.of(values, LABELS, ENROL, TEST, options)
    assert rates.draws is None and rates.row(rates)["eer_ci95"] is None


def test_a_step_needs_a_difference_on_both_sides():
    assert networks.steps_db([np.inf, np.inf, 30.0, 25.5]) == [None, None, None, -4.5]
