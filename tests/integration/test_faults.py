"""The short forms of launch/fuzz.py and launch/faults.py."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _run(script, tmp_path, *flags):
    out = tmp_path / "found.json"
    command = [sys.executable, f"launch/{script}.py", f"--json={out}", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(out.read_text())


def test_inputs_of_every_class_are_clean(tmp_path):
    found = _run("fuzz", tmp_path, "--inputs=15", "--seconds=200")
    assert found["tried"] == found["clean"] == 15 and found["violations"] == 0


@pytest.mark.slow
def test_disturbed_commands_end_as_undisturbed_ones(tmp_path):
    faults = "kill,twice,pipe" + (",writes" if shutil.which("cc") else "")
    found = _run("faults", tmp_path, "--commands=calibrate", "--times=1", "--writes=2", f"--faults={faults}")
    assert [row["fault"] for row in found["rows"]] == faults.split(",")
    assert all(row["times"] >= 1 and not row["violations"] for row in found["rows"])
