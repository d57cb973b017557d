"""Freed memory stays with the process, also what threads of XLA's own allocate."""

import ctypes
import os
import subprocess
import sys

import pytest

from kmq_jax.core import memory

STEPS = """
import resource, statistics
from kmq_jax.core.memory import keep_freed_memory
if {keep}: keep_freed_memory()
import jax, jax.numpy as jnp
@jax.jit
def step(x):  # the cumulative sums are used twice, so they need a working memory of some 100 MB
    y = jnp.cumsum(x + jnp.arange(25_000_000.0))
    return y[::-1][0] / jnp.sum(jnp.sin(y))
faults = []
for _ in range(15):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(step(1.0))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(statistics.median(faults))
"""


def page_faults(keep):
    """Those of the median step."""
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    command = [sys.executable, "-c", STEPS.format(keep=keep)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return float(result.stdout)


HAS_MALLOPT = sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "mallopt")


@pytest.mark.slow
@pytest.mark.skipif(not HAS_MALLOPT, reason="the C library has no mallopt")
def test_steps_take_no_fresh_pages():
    assert page_faults(True) * 10 < page_faults(False)


def test_host_and_device_are_counted_in_one_unit(monkeypatch):
    class Device:
        def memory_stats(self):
            return {"peak_bytes_in_use": 3 << 20}

    class Usage:
        ru_maxrss = 3 << (20 if sys.platform == "darwin" else 10)

    monkeypatch.setattr("jax.local_devices", lambda: [Device()])
    monkeypatch.setattr("resource.getrusage", lambda who: Usage)
    assert memory.peak_device_mb() == memory.peak_memory_mb() == 3.0


def test_nothing_is_changed_where_an_accelerator_is_at_hand(monkeypatch):
    def no_library(name):
        raise AssertionError("malloc's settings were changed")

    monkeypatch.setattr(memory, "accelerator_at_hand", lambda: True)
    monkeypatch.setattr(memory.ctypes, "CDLL", no_library)
    memory.keep_freed_memory()


def test_an_accelerator_is_known_by_its_device_file(monkeypatch):
    monkeypatch.setattr(memory.Path, "glob", lambda self, pattern: [self / "nvidia0"] if "nvidia" in pattern else [])
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert memory.accelerator_at_hand()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not memory.accelerator_at_hand()
