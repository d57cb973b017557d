"""Every example in the docstrings of these packages gives what it says."""

import doctest
import importlib
import pkgutil

import pytest

PACKAGES = (
    "benchmarks",
    "core.tree",
    "quant",
    "losses",
    "metrics",
    "frontend",
    "models.speaker_model",
    "models.batches",
)


def examples():
    for name in PACKAGES:
        module = importlib.import_module(f"kmq_jax.{name}")
        inside = pkgutil.iter_modules(getattr(module, "__path__", []), f"{module.__name__}.")
        for found in (module, *(importlib.import_module(info.name) for info in inside)):
            tests = doctest.DocTestFinder().find(found)
            yield from (test for test in tests if test.examples)


@pytest.mark.parametrize("example", [pytest.param(test, id=test.name) for test in examples()])
def test_example(example):
    failures, _ = doctest.DocTestRunner().run(example)
    assert not failures
