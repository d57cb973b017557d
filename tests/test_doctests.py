"""Every example in the docstrings of kmq_jax gives what it says."""

import doctest
import importlib
import inspect
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


def exported():
    """What kmq_jax and its packages offer by name: functions and classes of ours."""
    for place in (ROOT, *(path.parent for path in sorted(ROOT.glob("*/__init__.py")))):
        package = importlib.import_module(".".join(place.relative_to(ROOT.parent).parts))
        for name in getattr(package, "__all__", vars(package)):
            value = getattr(package, name)
            if not name.startswith("_") and getattr(value, "__module__", "").startswith("kmq_jax"):
                yield value


def test_every_exported_function_and_class_has_an_example():
    without = {value.__name__ for value in exported() if inspect.isroutine(value) or inspect.isclass(value)
               if ">>> " not in (value.__doc__ or "")}  # fmt: skip
    assert without == {"load_cascade", "write"}  # they need files: README's blocks and a report's test run them
