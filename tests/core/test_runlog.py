import json

import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.core.runlog import RunLog, read_runlog


def test_lines_are_json_and_nan_is_null(tmp_path):
    log = RunLog(tmp_path / "m.jsonl", 0)
    log.write(1, {"loss": 2.5, "bad": float("nan")})
    log.close()
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 1, "loss": 2.5, "bad": None}


def test_resuming_drops_the_steps_that_will_come_again(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    log = RunLog(path, 2)
    log.write(3, {"loss": 1.0})
    log.close()
    assert read_runlog(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.0}]


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"m\.jsonl:2"):
        read_runlog(tmp_path / "m.jsonl")
