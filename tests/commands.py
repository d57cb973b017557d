"""Runs a command in this process, as `kmq-jax COMMAND` would."""

import importlib
import sys

import pytest

from kmq_jax.cli import command as commands


def run(monkeypatch, command, *flags):
    """The command's exit status."""
    monkeypatch.setattr(sys, "argv", [command, *map(str, flags)])
    with pytest.raises(SystemExit) as done:
        commands.run(command, importlib.import_module(f"kmq_jax.cli.{command}").main)
    return done.value.code
