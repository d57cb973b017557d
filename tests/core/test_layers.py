"""Imports only go down the layers, and the other contracts of pyproject.toml."""

import subprocess
import sys
from pathlib import Path

import pytest


def test_every_contract_is_kept():
    pytest.importorskip("importlinter", reason="needs import-linter")
    # In a process of its own: import-linter changes the path and the output of the one it runs in.
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
