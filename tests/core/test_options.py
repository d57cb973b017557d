import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.core.options import Options, draws, option


@dataclass(frozen=True, kw_only=True)
class Example(Options):
    bits: int = option("bits a weight", at_least=1, at_most=8)
    method: str = option("how", "lloyd", choices=("lloyd", "quantile"))
    rule: Literal["pareto", "risk"] = option("which", "pareto")
    share: float = option("of speakers", 0.5, above=0, below=1)
    edges: tuple[float, ...] = option("of bins", (0.1, 0.2), above=0)
    skip: tuple[str, ...] = option("parameters to keep", ())
    top: int | None = option("nearest", None, at_least=2)
    out: Path | None = option("file", None)
    quick: bool = option("hurry", False)
    replicates: int = draws()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"bits": 0}, "`bits` (=0) must be at least 1"),
        ({"bits": 9}, "`bits` (=9) must be at most 8"),
        ({"bits": 2.5}, "`bits` (=2.5) must be a whole number"),
        ({"bits": True}, "`bits` (=True) must be a whole number"),
        ({"method": "best"}, "`method` (=best) must be one of lloyd, quantile"),
        ({"rule": "none"}, "`rule` (=none) must be one of pareto, risk"),
        ({"share": 0}, "`share` (=0) must be above 0"),
        ({"share": 1.0}, "`share` (=1) must be below 1"),
        ({"share": float("nan")}, "`share` (=nan) must be a finite number"),
        ({"share": "half"}, "`share` (=half) must be a number"),
        ({"edges": (0.1, -1)}, "`edges` (=0.1,-1) must be above 0"),
        ({"edges": 0.1}, "`edges` (=0.1) must be a list"),
        ({"skip": "stem"}, "`skip` (=stem) must be a list"),
        ({"top": 1}, "`top` (=1) must be at least 2"),
        ({"quick": 1}, "`quick` (=1) must be true or false"),
        ({"replicates": 1}, "`replicates` (=1) must be 0 or at least 20"),  # an interval of no width
        ({"replicates": -1}, "`replicates` (=-1) must be 0 or at least 20"),
        ({"replicates": 100_001}, "`replicates` (=100001) must be at most 100000"),
    ],
)
def test_a_wrong_value_is_told_in_one_line(values, message):
    with pytest.raises(UserError) as error:
        Example(**{"bits": 2, **values})
    assert str(error.value) == message


def test_values_take_the_annotated_types():
    made = Example(bits=np.int64(2), share=1e-3, edges=[1, 2], out="a/b", top=None)
    assert made == Example(bits=2, share=0.001, edges=(1.0, 2.0), out=Path("a/b"))
    assert Example(bits=2, replicates=0).replicates == 0
    assert type(made.bits) is int and all(type(edge) is float for edge in made.edges)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.bits = 3


def test_a_mapping_becomes_options():
    assert Example.of({"bits": 2, "edges": [0.5]}) == Example(bits=2, edges=(0.5,))
    for values, message in (
        ({"bit": 2}, "study.x: there is no option `bit`; did you mean `bits`?"),
        ({}, "study.x: `bits` must be given"),
        ({"bits": 9}, "study.x: `bits` (=9) must be at most 8"),
    ):
        with pytest.raises(UserError) as error:
            Example.of(values, "study.x")
        assert str(error.value) == message


@pytest.mark.parametrize("value", [np.int64(1), np.int8(1), np.float32(1), np.array(1)])
def test_numbers_of_numpy_are_numbers(value):
    made = Example(bits=2, edges=(value,))
    assert made.edges == (1.0,) and type(made.edges[0]) is float
    with pytest.raises(UserError, match="must be a number"):
        Example(bits=2, share=np.bool_(True))


def test_a_name_that_is_no_text():
    with pytest.raises(UserError, match="there is no option `1`; there are bits"):
        Example.of({1: 2})
