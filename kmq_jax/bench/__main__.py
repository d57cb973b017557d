"""`python -m kmq_jax.bench NAME`: measures one part of the library beside what a user would pick instead."""

import importlib
import pkgutil
import sys

from kmq_jax import bench
from kmq_jax.core import cli
from kmq_jax.core.errors import UserError


def main() -> None:
    """Finds the benchmark named on the command line and hands it the rest of the flags."""
    names = sorted(m.name for m in pkgutil.iter_modules(bench.__path__) if m.name != "__main__")
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        if sys.argv[1:2] in (["--help"], ["-h"]):
            print(f"{__doc__}\n\nNAME is one of: {', '.join(names)}. Each has its own --help.")
            return
        raise UserError(f"name a benchmark: {', '.join(names)}")
    module = importlib.import_module(f"kmq_jax.bench.{sys.argv[1]}")
    flags = cli.parser(f"bench {sys.argv[1]}", module.__doc__ or "", f"python -m kmq_jax.bench {sys.argv[1]}")
    module.add_flags(flags)
    module.main(flags.parse_args(sys.argv[2:]))


if __name__ == "__main__":
    cli.run("bench", main)
