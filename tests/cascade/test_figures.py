"""The figure of a calibration: its axis is the cost that gates were chosen by."""

import pytest
from matplotlib.figure import Figure

from kmq_jax.cascade import figures


@pytest.mark.parametrize(
    ("cost", "nested", "key", "label"),
    [
        ("sequential", False, "sequential_bits", "mean sequential bits a trial"),
        ("sequential", True, "incremental_bits", "mean incremental bits a trial"),
        ("incremental", True, "incremental_bits", "mean incremental bits a trial"),
        ("utterance", False, "utterance_bits", "mean bits an utterance"),
        ("utterance", True, "utterance_incremental_bits", "mean bits an utterance"),
    ],
)
def test_the_axis_is_the_cost_that_gates_were_chosen_by(cost, nested, key, label):
    names = ("sequential_bits", "incremental_bits", "utterance_bits", "utterance_incremental_bits")
    # Each cost has numbers of its own: no other column can pass for the wanted one.
    front = [{"eer": 2.0 - i, **{name: 10.0 * n + i for n, name in enumerate(names)}} for i in range(2)]
    notes = {"cost": cost, "nested": nested, "front": front, "each_level_alone": {"4": {"eer": 1.0}}, "chosen": 1}
    axes = Figure().subplots()
    figures._panel(axes, "eer", notes, None)
    place = 10.0 * names.index(key)
    assert axes.lines[0].get_xdata().tolist() == [place, place + 1] and axes.get_xlabel() == label
    assert axes.lines[2].get_xdata().tolist() == [place + 1]
