"""`kmq-jax bench NAME`: measures one part of the library beside what a user would pick instead."""

import importlib
import pkgutil
import sys
from pathlib import Path

import kmq_jax
from kmq_jax.cli import command
from kmq_jax.core.errors import UserError


def benchmarks() -> list[str]:
    """The names of all benchmarks."""
    place = Path(kmq_jax.__file__).parent / "benchmarks"
    return sorted(module.name for module in pkgutil.iter_modules([str(place)]))


def main() -> None:
    """Finds the benchmark named on the command line and hands it the rest of the flags."""
    names = benchmarks()
    if sys.argv[1:2] in (["--help"], ["-h"]):
        print(f"{__doc__}\n\nNAME is one of: {', '.join(names)}. Each has its own --help.")
        return
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        raise UserError(f"name a benchmark: {', '.join(names)}")
    module = importlib.import_module(f"kmq_jax.benchmarks.{sys.argv[1]}")
    flags = command.parser(f"bench {sys.argv[1]}", module.__doc__ or "", f"kmq-jax bench {sys.argv[1]}")
    module.add_flags(flags)
    module.main(flags.parse_args(sys.argv[2:]))
