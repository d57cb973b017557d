"""`kmq-jax bench NAME`: measures one part of the library beside what a user would pick instead."""

import importlib
import pkgutil
import sys

from kmq_jax import benchmarks
from kmq_jax.cli import command
from kmq_jax.core.errors import UserError


def main() -> None:
    """Finds the benchmark named on the command line and hands it the rest of the flags."""
    names = sorted(m.name for m in pkgutil.iter_modules(benchmarks.__path__))
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        if sys.argv[1:2] in (["--help"], ["-h"]):
            print(f"{__doc__}\n\nNAME is one of: {', '.join(names)}. Each has its own --help.")
            return
        raise UserError(f"name a benchmark: {', '.join(names)}")
    module = importlib.import_module(f"kmq_jax.benchmarks.{sys.argv[1]}")
    flags = command.parser(f"bench {sys.argv[1]}", module.__doc__ or "", f"kmq-jax bench {sys.argv[1]}")
    module.add_flags(flags)
    module.main(flags.parse_args(sys.argv[2:]))
