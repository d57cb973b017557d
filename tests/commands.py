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


def replaced(usual, given):
    """The usual flags with those that are given in their places: a flag of one value is not taken twice."""
    names = {flag.partition("=")[0] for flag in given}
    return [*(flag for flag in usual if flag.partition("=")[0] not in names), *given]
