"""`kmq-jax bench NAME`: measures one part of the library beside what a user would pick instead."""

import dataclasses
import importlib
import inspect
import sys
from collections.abc import Sequence

from kmq_jax.benchmarks.options import BENCHMARKS
from kmq_jax.cli.command import Command
from kmq_jax.cli.flags import name_flags, options_of
from kmq_jax.core.errors import UserError
from kmq_jax.core.options import Options, limits_of


def benchmarks() -> list[str]:
    """The names of all benchmarks."""
    return list(BENCHMARKS)


def usage() -> str:
    """What `kmq-jax bench --help` prints."""
    width = max(map(len, BENCHMARKS))
    lines = [f"  {name:{width}}  {_about(options).splitlines()[0]}" for name, options in BENCHMARKS.items()]
    return "\n".join(
        [
            "usage: kmq-jax bench NAME [--FLAG=VALUE ...]",
            "",
            "Measures one part of the library beside what a user would pick instead.",
            "",
            *lines,
            "",
            "`kmq-jax bench NAME --help` shows a benchmark's flags and an example.",
        ]
    )


def _about(options: type[Options]) -> str:
    return inspect.getdoc(options) or ""


def command_of(name: str) -> Command:
    """The command `kmq-jax bench NAME`."""
    options = BENCHMARKS[name]
    required = [field for field in dataclasses.fields(options) if field.default is dataclasses.MISSING]
    words = [f"--{field.name}={limits_of(field).metavar or 'FILE'}" for field in required]
    example = " ".join(["kmq-jax bench", name, *words])
    return Command(f"bench {name}", _about(options), example, (options,))


def run(name: str, words: Sequence[str]) -> None:
    """Runs a benchmark with these flags.

    Raises:
        UserError: a flag or a file is at fault.
    """
    options = options_of(BENCHMARKS[name], command_of(name).parser().parse_args(words))
    try:
        importlib.import_module(f"kmq_jax.benchmarks.{name}").main(options)
    except UserError as error:
        raise UserError(name_flags(str(error), BENCHMARKS[name])) from error


def main() -> None:
    """Runs the command."""
    words = sys.argv[1:]
    if words[:1] in (["--help"], ["-h"]):
        print(usage())
    elif not words or words[0] not in BENCHMARKS:
        raise UserError(f"name a benchmark: {', '.join(BENCHMARKS)}")
    else:
        run(words[0], words[1:])
