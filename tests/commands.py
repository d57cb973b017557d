"""Runs a command in this process, as `python -m kmq_jax.COMMAND` would."""

import importlib
import sys

import pytest

from kmq_jax.core import cli


def run(monkeypatch, command, *flags):
    """The command's exit status."""
    monkeypatch.setattr(sys, "argv", [command, *map(str, flags)])
    with pytest.raises(SystemExit) as done:
        cli.run(command, importlib.import_module(f"kmq_jax.{command}").main)
    return done.value.code
