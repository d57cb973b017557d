"""The study command on a tiny network and synthetic voices."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kmq_jax import study, tables
from kmq_jax.core.errors import UserError
from kmq_jax.train_config import default_config, smoke

ROOT = Path(__file__).parents[2]


def test_a_study_without_evaluation_sets_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match=r"study\.evaluate"):
        study.study(default_config("resnet18"), tmp_path)


@pytest.mark.slow
def test_every_model_is_measured_and_nothing_is_done_twice(tmp_path, capfd):
    config = smoke(default_config("resnet18"))
    config.validation.data = ""
    config.average_last = 0
    config.study.update(widths=(2,), nested=False)
    summary = study.study(config, tmp_path)
    assert json.loads((tmp_path / "study.json").read_text()) == summary
    rows = {(row["method"], row["bits"]): row for row in summary["rows"]}
    assert set(rows) == {("full precision", 32), ("without training", 2), ("trained", 2)}
    assert all(0 <= row["sets"]["voices"]["eer"] <= 100 for row in rows.values())
    assert rows["trained", 2]["bytes"] < rows["full precision", 32]["bytes"]
    lines = tables.study_table(summary).splitlines()
    assert len(lines) == 2 + len(rows) and lines[0].startswith("| bits | weights | KiB | voices")

    capfd.readouterr()
    assert study.study(config, tmp_path) == summary
    assert "begins" not in capfd.readouterr().err
    config.study.epochs["2"] = 0.5
    study.study(config, tmp_path)
    begun = {line.split(":")[0] for line in capfd.readouterr().err.splitlines() if line.endswith("begins")}
    assert begun == {"kmqat-2", "embed-kmqat-2-2-voices", "score-kmqat-2-2-voices"}


@pytest.mark.slow
def test_help_and_mistakes():
    def run(*flags):
        return subprocess.run([sys.executable, "-m", "kmq_jax.study", *flags], cwd=ROOT, capture_output=True, text=True)

    shown = run("--help")
    assert shown.returncode == 0 and "example:" in shown.stdout
    wrong = run("--config=configs/nowhere.py", "--workdir=x")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "nowhere" in wrong.stderr
