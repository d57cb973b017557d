"""Runs a command in this process, as `python -m kmq_jax.COMMAND` would."""

import importlib
import sys

import pytest

import kmq_jax
from kmq_jax.core import cli


def run(monkeypatch, command, *flags):
    """The command's exit status."""
    monkeypatch.setattr(sys, "argv", [command, *map(str, flags)])
    main = importlib.import_module(f"kmq_jax.{command}").main
    vars(kmq_jax).pop(command, None)  # importing the command hid the function: `kmq_jax.quantize`
    with pytest.raises(SystemExit) as done:
        cli.run(command, main)
    return done.value.code
