"""Every example in the docstrings of kmq_jax gives what it says."""

import doctest
import importlib
from pathlib import Path

import pytest

import kmq_jax

ROOT = Path(kmq_jax.__file__).parent


def modules():
    """The names of all modules with an example. The others are not imported: some take seconds."""
    for path in sorted(ROOT.rglob("*.py")):
        if ">>> " in path.read_text():
            parts = path.relative_to(ROOT.parent).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def examples():
    for name in modules():
        tests = doctest.DocTestFinder().find(importlib.import_module(name))
        yield from (test for test in tests if test.examples)


@pytest.mark.parametrize("example", [pytest.param(test, id=test.name) for test in examples()])
def test_example(example):
    failures, _ = doctest.DocTestRunner().run(example)
    assert not failures


def test_every_package_has_examples():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages - {name.split(".")[1] for name in modules()} <= {"training", "benchmarks"}
