"""What every command does alike: flags from options, errors of one line with status 2, `--help` with an example."""

import _thread
import argparse
import codecs
import contextlib
import difflib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from kmq_jax.cli.flags import RENAMED, add_flags, meant_flag, name_flags
from kmq_jax.core.errors import UserError
from kmq_jax.core.options import Options


@dataclass(frozen=True)
class Command:
    """A command's flags and what its `--help` says.

    Attributes:
        name: as in `kmq-jax NAME`.
        does: what it does, shown above the flags.
        example: a command line that works, shown below them.
        options: classes whose fields become the flags.
    """

    name: str
    does: str
    example: str
    options: tuple[type[Options], ...]

    def parser(self) -> argparse.ArgumentParser:
        """The argument parser."""
        made = parser(self.name, self.does, self.example)
        for options in self.options:
            add_flags(made, options)
        return made

    def parse(self) -> argparse.Namespace:
        """The flags of this process's command line, for `flags.options_of`."""
        # Intermixed: what has no flag may stand before, between and after flags.
        return self.parser().parse_intermixed_args()


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        # argparse looks for missing flags first; where a flag is missing for being misspelt, that hides the mistake.
        renamed = RENAMED.get(self.prog.removeprefix("kmq-jax "), {})
        for word in sys.argv[1:] if args is None else args:
            name = word.partition("=")[0]
            # Only where it would be a flag: a file may be named so.
            if (meant := meant_flag(word)) and meant[0].partition("=")[0] in self._option_string_actions:
                self.error(meant[1])
            if name in renamed:
                self.error(f"{name} is now {renamed[name]}")
            if name.startswith("--") and name not in self._option_string_actions:
                near = difflib.get_close_matches(name, self._option_string_actions, n=1)
                self.error(f"unknown flag {name}" + "".join(f"; did you mean {flag}?" for flag in near))
        return super().parse_known_args(args, namespace)


_WRITTEN = "kmq_jax.written"
"""How text is written that the output's encoding does not know, by the name that `codecs` has for it."""


def _written(error: UnicodeError) -> tuple[str | bytes, int]:
    """Bytes of a file's name, which need not be UTF-8, as they are; what the encoding does not have as an escape."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.backslashreplace_errors(error)


codecs.register_error(_WRITTEN, _written)


def parser(command: str, description: str, example: str) -> argparse.ArgumentParser:
    """Makes an argument parser for `kmq-jax <command>` without flags.

    >>> parser("score", "Scores a trial list.", "kmq-jax score --trials=veri_test2.txt").prog
    'kmq-jax score'
    """
    return _Parser(
        prog=f"kmq-jax {command}",
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def run(command: str, main: Callable[[], None], options: Sequence[type[Options]] = ()) -> NoReturn:
    """Runs `main` and exits with its status.

    The status is 0 on success, 2 after one line on a user's mistake, 130 when interrupted, and 141 (as the shell has
    it for SIGPIPE) when whoever read the output has gone.

    Args:
        command: its name, for messages.
        main: what to run.
        options: classes whose fields messages may name; the flags are named instead.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_WRITTEN)
    sys.unraisablehook = _unraisable
    try:
        status = _status_of(main)
        # Here and not when Python ends: a reader who has gone must show inside this `try`.
        sys.stdout.flush()
    except KeyboardInterrupt:
        _leave(130)
    except BrokenPipeError:
        # Another pipe may have broken, such as a worker's: that is no reason to be silent.
        if not _reader_has_gone():
            raise
        sys.exit(141)
    except (
        UserError,
        OSError,
        MemoryError,
        RecursionError,
    ) as error:
        message = " ".join(name_flags(_line(error), *options).split())
        with contextlib.suppress(BrokenPipeError):
            print(f"{f'kmq-jax {command}'.strip()}: {message}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        # What XLA raises where an array does not fit; its type can be named only where JAX is loaded.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"kmq-jax {command}: not enough memory: {str(error).splitlines()[0][:300]}", file=sys.stderr)
        sys.exit(2)
    sys.exit(status)


def _status_of(main: Callable[[], None]) -> int | str | None:
    """Runs `main`, and gives the status that it asks for."""
    pressed = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        pressed.set()
        raise KeyboardInterrupt

    own = threading.current_thread() is threading.main_thread()
    if own and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        main()
    except SystemExit as asked:
        return asked.code
    except Exception:
        # A library may have made an error of its own of Ctrl-C, as an import of ONNX Runtime does.
        if pressed.is_set():
            raise KeyboardInterrupt from None
        raise
    finally:
        if signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    return 0


def _line(error: BaseException) -> str:
    """What a user is told of an error. A full disk, or a file that has gone, is no fault of the program."""
    if isinstance(error, OSError):
        place = f" {os.fsdecode(error.filename)}" if isinstance(error.filename, (str, bytes)) else ""
        return f"cannot read or write{place}: {error.strerror or error}"
    if isinstance(error, MemoryError):
        return f"not enough memory: {error}".removesuffix(": ")
    return "something given is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _unraisable(found: "sys.UnraisableHookArgs") -> None:
    """Ctrl-C within what cannot be interrupted, such as a callback of JAX to the garbage collector, comes again.

    Python would print it and go on as if nothing had been pressed.
    """
    if isinstance(found.exc_value, KeyboardInterrupt):
        again = threading.Timer(0.05, _interrupt)
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(found)


def _interrupt() -> None:
    """Interrupts the main thread, even where it waits: `interrupt_main` would let it wait to the end."""
    main = threading.main_thread().ident
    if main is not None and hasattr(signal, "pthread_kill"):
        signal.pthread_kill(main, signal.SIGINT)
    else:
        _thread.interrupt_main()  # on Windows


def _leave(status: int) -> NoReturn:
    """Ends the process at once: threads of libraries that are still at work would crash while Python winds down."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if "multiprocessing.util" in sys.modules:  # gives back what processes share
        sys.modules["multiprocessing.util"]._run_finalizers()
    if "pytest" in sys.modules:  # a test's own process must not end
        sys.exit(status)
    os._exit(status)


def _reader_has_gone() -> bool:
    """Whether what broke is our output, or our messages. If so, nothing more is written there, not even at the end."""
    poll, outputs = select.poll(), [sys.stdout.fileno(), sys.stderr.fileno()]
    for output in outputs:
        poll.register(output, select.POLLOUT)
    broken = [output for output, events in poll.poll(0) if events & select.POLLERR]
    for output in broken:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return bool(broken)
