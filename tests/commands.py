"""Runs a command in this process, as `kmq-jax COMMAND` would, or in two that work together; reads what it wrote."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kmq_jax.cli import main


def run(monkeypatch, command, *flags):
    """The command's exit status."""
    monkeypatch.setattr(sys, "argv", [command, *map(str, flags)])
    with pytest.raises(SystemExit) as done:
        main.run(command)
    return done.value.code


def arrays_of(path):
    """The arrays of a `.npz`, by name, from a file that is closed again.

    What is left open is closed whenever the collector comes by: its warning then fails the test that happens to run.
    """
    with np.load(path) as file:
        return dict(file)


def parity_of(told):
    """The least cosine and the largest difference that an export tells of itself beside our own network."""
    return tuple(map(float, re.search(r"cosine (\S+), largest difference (\S+) of", told).groups()))


def replaced(usual, given):
    """The usual flags with those that are given in their places: a flag of one value is not taken twice."""
    names = {flag.partition("=")[0] for flag in given}
    return [*(flag for flag in usual if flag.partition("=")[0] not in names), *given]


def pair(command, *flags):
    """Runs a command in two processes of two simulated devices that find one another; their status, what they said."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    about = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
    # Compiled as in the tests' own process, where both are compared to the last bit.
    about["XLA_FLAGS"] = re.sub(r"(device_count)=\d+", r"\1=2", os.environ["XLA_FLAGS"])
    words = [sys.executable, "-m", "kmq_jax", command, *flags]
    started = {"cwd": Path(__file__).parents[1], "stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen(words, env={**os.environ, **about, "JAX_PROCESS_ID": str(i)}, **started) for i in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in processes]
    return [process.returncode for process in processes], said
