"""Files of figures: a line is added whole, and what JSON does not hold is a user's message."""

import json

import pytest

from kmq_jax.benchmarks.timing import write_figures
from kmq_jax.core.errors import UserError


def test_a_line_is_added_on_a_line_of_its_own(tmp_path):
    path = tmp_path / "figures.jsonl"
    path.write_text('{"a": 1}')  # without an end, as some editors leave it
    for seconds in (1, 2):
        write_figures(path, "quant", {"seconds": seconds})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row.get("seconds") for row in rows] == [None, 1, 2]


@pytest.mark.parametrize("name", ["figures.jsonl", "figures.json"])
def test_a_figure_that_is_no_number_is_one_line(tmp_path, name):
    with pytest.raises(UserError, match=rf"cannot write .*{name}: a figure is infinite or not a number"):
        write_figures(tmp_path / name, "quant", {"loss": float("nan")})
    assert not (tmp_path / name).exists()
