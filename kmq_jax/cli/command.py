"""What every command does alike: one-line errors with status 2, and `--help` with an example."""

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from kmq_jax.core.errors import UserError


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        # argparse looks for missing flags first; where a flag is missing for being misspelt, that hides the mistake.
        for word in sys.argv[1:] if args is None else args:
            name = word.partition("=")[0]
            if name.startswith("--") and name not in self._option_string_actions:
                near = difflib.get_close_matches(name, self._option_string_actions, n=1)
                self.error(f"unknown flag {name}" + "".join(f"; did you mean {flag}?" for flag in near))
        return super().parse_known_args(args, namespace)


def parser(command: str, description: str, example: str) -> argparse.ArgumentParser:
    """Makes the argument parser of `kmq-jax <command>`.

    Args:
        command: the module's name below `kmq_jax`.
        description: what the command does.
        example: a command line that works, shown at the end of `--help`.
    """
    return _Parser(
        prog=f"kmq-jax {command}",
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def run(command: str, main: Callable[[], None]) -> NoReturn:
    """Runs `main` and exits: 0 on success, 2 after one line on a user's mistake, 130 when interrupted."""
    try:
        main()
    except UserError as error:
        message = " ".join(str(error).split())
        print(f"kmq-jax {command}: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
