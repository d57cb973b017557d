import json
from pathlib import Path

import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.study import tables

ROOT = Path(__file__).parents[2]
ROWS = [
    {"bits": 32, "method": "full", "bytes": 2048000, "sets": {"a": {"eer": 2.517, "eer_ci95": [1.0, 3.456]}}},
    {"bits": 2, "method": "trained", "bytes": 1536, "sets": {"a": {"eer": 30.0, "eer_ci95": None}}},
]


def test_a_table_is_written_between_its_marks(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps({"rows": ROWS}))
    text = "before\n<!-- table: r.json bits -->\nold\n<!-- end -->\nafter\n"
    filled = tables.fill(text, tmp_path)
    assert filled.splitlines() == [
        "before",
        "<!-- table: r.json bits -->",
        "| bits | weights | KiB | a, EER % |",
        "|---|---|---|---|",
        "| 32 | full | 2,000 | 2.52 [1.00, 3.46] |",
        "| 2 | trained | 2 | 30.00 |",
        "<!-- end -->",
        "after",
    ]
    assert tables.fill(filled, tmp_path) == filled


def test_what_was_trained_can_stand_alone(tmp_path):
    untrained = {**ROWS[1], "method": "without training, nested"}
    (tmp_path / "r.json").write_text(json.dumps({"rows": [ROWS[0], untrained, ROWS[1]]}))
    filled = tables.fill("<!-- table: r.json trained -->\n<!-- end -->", tmp_path)
    assert [line[:12] for line in filled.splitlines()[3:5]] == ["| 32 | full ", "| 2 | traine"]
    assert len(filled.splitlines()) == 6


def test_cascades_have_a_row_for_each_set(tmp_path):
    figures = {
        "eer": 2.756, "reference_eer": 2.5, "harmful_flip_rate": 0.00123, "sequential_bits": 2.214,
        "incremental_bits": 2.1,
        "resolved": {"2": 0.954, "4": 0.046}, "each_width_alone": {"4": {"harmful_flip_rate": 0.0057}},
    }  # fmt: skip
    cascade = {"name": "2>4", "family": "distilled-nested", "bits": [2, 4], "sets": {"a": figures}}
    (tmp_path / "r.json").write_text(json.dumps({"cascades": [cascade]}))
    filled = tables.fill("<!-- table: r.json cascades -->\n<!-- end -->", tmp_path)
    assert filled.splitlines()[3] == "| 2>4, nested | a | 2.76 | 2.50 | 0.123 % | 0.570 % | 95.4 % | 2.21 | 2.10 |"


def test_a_difference_whose_interval_holds_zero_is_called_none(tmp_path):
    one = {"recipe": "kmqat", "bits": 2, "trained": True, "against": "control", "set": "a"}
    one |= {"eer": 1.5, "min_dcf": 0.1}
    rows = [one | {"eer_ci95": [0.5, 2.0], "min_dcf_ci95": [-0.1, 0.2]}]
    rows += [
        one
        | {"against": "distilled", "trained": False, "eer": -0.1, "eer_ci95": [-0.4, 0.3], "min_dcf_ci95": [-0.1, 0.2]}
    ]
    (tmp_path / "r.json").write_text(json.dumps({"differences": rows}))
    filled = tables.fill("<!-- table: r.json differences -->\n<!-- end -->", tmp_path).splitlines()
    minimum = "+0.100 [-0.100, +0.200]"
    assert filled[3] == f"| kmqat | 2 | full precision, trained alike | a | +1.50 [+0.50, +2.00] | {minimum} | higher |"
    assert filled[4] == f"| kmqat, without training | 2 | distilled | a | -0.10 [-0.40, +0.30] | {minimum} | none |"


def test_an_accelerator_has_a_row_for_each_speed(tmp_path):
    lines = [
        {"part": "step", "what": "whole", "card": "H200", "examples_per_second": 9.0},
        {"part": "step", "what": "whole", "card": "H200", "examples_per_second": 1386.8, "share_of_peak": 0.4043},
        {"part": "step", "what": "whole kernels", "card": "H200", "milliseconds": {}},
        {"part": "kmqat", "error": "stopped after 47 s"},
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    filled = tables.fill("<!-- table: r.jsonl accelerator -->\n<!-- end -->", tmp_path)
    assert filled.splitlines()[3:-1] == ["| step | whole | 1,387 examples/s, 40.4 % of peak | H200 |"]


def test_mistakes(tmp_path):
    with pytest.raises(
        UserError, match="'colours' of r.json must be one of bits, trained, differences, cascades, accelerator"
    ):
        tables.fill("<!-- table: r.json colours -->\n<!-- end -->", tmp_path)
    with pytest.raises(UserError, match=r"absent\.json"):
        tables.fill("<!-- table: absent.json bits -->\n<!-- end -->", tmp_path)
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(UserError, match="not a study's results: it lacks 'rows'"):
        tables.fill("<!-- table: r.json bits -->\n<!-- end -->", tmp_path)


def test_the_readme_shows_what_was_measured():
    text = (ROOT / "README.md").read_text()
    assert tables.fill(text, ROOT) == text
