"""Runs a command in this process, as `kmq-jax COMMAND` would."""

import sys

import pytest

from kmq_jax.cli import main


def run(monkeypatch, command, *flags):
    """The command's exit status."""
    monkeypatch.setattr(sys, "argv", [command, *map(str, flags)])
    with pytest.raises(SystemExit) as done:
        main.run(command)
    return done.value.code
