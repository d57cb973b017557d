import json
from pathlib import Path

import pytest

from kmq_jax import tables
from kmq_jax.core.errors import UserError

ROOT = Path(__file__).parents[1]
ROWS = [
    {"bits": 32, "method": "full", "bytes": 2048000, "sets": {"a": {"eer": 2.517, "eer_ci95": [1.0, 3.456]}}},
    {"bits": 2, "method": "trained", "bytes": 1536, "sets": {"a": {"eer": 30.0, "eer_ci95": None}}},
]


def test_a_table_is_written_between_its_marks(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps({"rows": ROWS}))
    text = "before\n<!-- table: r.json -->\nold\n<!-- end -->\nafter\n"
    filled = tables.fill(text, tmp_path)
    assert filled.splitlines() == [
        "before",
        "<!-- table: r.json -->",
        "| bits | weights | KiB | a, EER % |",
        "|---|---|---|---|",
        "| 32 | full | 2,000 | 2.52 [1.00, 3.46] |",
        "| 2 | trained | 2 | 30.00 |",
        "<!-- end -->",
        "after",
    ]
    assert tables.fill(filled, tmp_path) == filled


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match=r"absent\.json"):
        tables.fill("<!-- table: absent.json -->\n<!-- end -->", tmp_path)
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(UserError, match="not a study's results: it lacks 'rows'"):
        tables.fill("<!-- table: r.json -->\n<!-- end -->", tmp_path)


def test_the_readme_shows_what_was_measured():
    text = (ROOT / "README.md").read_text()
    assert tables.fill(text, ROOT) == text
