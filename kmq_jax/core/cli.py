"""What every command does alike: one-line errors with status 2, `--help` with an example, progress."""

import argparse
import difflib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

from kmq_jax.core.errors import UserError

T = TypeVar("T")


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
    """Makes the argument parser of `python -m kmq_jax.<command>`.

    Args:
        command: the module's name below `kmq_jax`.
        description: what the command does.
        example: a command line that works, shown at the end of `--help`.
    """
    return _Parser(
        prog=f"kmq_jax.{command}",
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
        print(f"kmq_jax.{command}: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def progress(
    items: Iterable[T], total: int | None = None, desc: str = "", unit: str = "it", interval: float = 10.0
) -> Iterator[T]:
    """Iterates with a progress bar on a terminal, and with a plain line every `interval` seconds elsewhere."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, total=total, desc=desc, unit=unit, dynamic_ncols=True)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= interval or (done == total and now - start >= interval):
            last = now
            rate = done / (now - start)
            of = f"/{total} ({100 * done / total:.0f} %), {(total - done) / rate:.0f} s left" if total else ""
            print(f"{desc}: {done}{of}, {rate:.1f} {unit}/s", file=sys.stderr, flush=True)
