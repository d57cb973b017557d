"""What every command does alike: flags from options, errors of one line with status 2, `--help` with an example."""

import _thread
import argparse
import codecs
import contextlib
import difflib
import functools
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
from kmq_jax.core.errors import UserError, reason_of
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
        """Parses this process's command line, for `flags.options_of`. A mistake ends the process with status 2."""
        words, made = sys.argv[1:], self.parser()
        # Intermixed: values without a flag may stand before, between and after flags. That way argparse loses a `--`,
        # after which a file's name may begin with a hyphen.
        return made.parse_args(words) if "--" in words else made.parse_intermixed_args(words)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        self._check_flags(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def parse_known_intermixed_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        # Not in every version of Python does this call the method above.
        self._check_flags(sys.argv[1:] if args is None else args)
        return super().parse_known_intermixed_args(args, namespace)

    def _check_flags(self, words: Sequence[str]) -> None:
        """Ends the process where a flag is unknown: argparse would rather report a flag that is missing."""
        renamed = RENAMED.get(self.prog.removeprefix("kmq-jax "), {})
        for word in words:
            if word == "--":  # only values follow
                return
            name = word.partition("=")[0]
            # Only if the corrected word is a flag of this command: a file's name may begin with such a dash.
            if (meant := meant_flag(word)) and meant[0].partition("=")[0] in self._option_string_actions:
                self.error(meant[1])
            if name in renamed:
                self.error(f"{name} is now {renamed[name]}")
            if name.startswith("--") and name not in self._option_string_actions:
                near = difflib.get_close_matches(name, self._option_string_actions, n=1)
                self.error(f"unknown flag {name}" + "".join(f"; did you mean {flag}?" for flag in near))


_WRITTEN = "kmq_jax.written"
"""The name, to `codecs`, of the error handler for text that the output's encoding cannot represent."""


def _written(error: UnicodeError) -> tuple[str | bytes, int]:
    """Keeps bytes of a file's name that are not UTF-8, and escapes characters that the encoding lacks."""
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

    The status is 0 on success, 2 after one line on a user's mistake, 130 when interrupted, and 141 (the shell's status
    for SIGPIPE) when the reader of the output has closed it.

    Args:
        command: its name, for messages.
        main: what to run.
        options: classes whose fields messages may name in backticks; the message is printed with their flags instead.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_WRITTEN)
    _hear_interrupts()
    try:
        status = _status_of(main)
        # Flushed here and not when Python ends, so that a closed pipe raises inside this `try`.
        sys.stdout.flush()
    except KeyboardInterrupt:
        _leave(130)
    except BrokenPipeError:
        # Another pipe may have broken, such as a worker's: that is a fault and must be seen.
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
        # XLA's error where an array does not fit in memory. To catch it by its class would need an import of JAX.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"kmq-jax {command}: not enough memory: {str(error).splitlines()[0][:300]}", file=sys.stderr)
        sys.exit(2)
    sys.exit(status)


def _status_of(main: Callable[[], None]) -> int | str | None:
    """Runs `main`; returns the exit status that it asks for."""
    pressed = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        pressed.set()
        raise KeyboardInterrupt

    # Only the main thread may set a handler. One that somebody else has set stays.
    own = threading.current_thread() is threading.main_thread()
    if own and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        main()
    except SystemExit as asked:
        return asked.code
    except Exception:
        # A library may turn Ctrl-C into an error of its own, as importing ONNX Runtime does.
        if pressed.is_set():
            raise KeyboardInterrupt from None
        raise
    finally:
        if signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    return 0


def _line(error: BaseException) -> str:
    """The message of an error for the user. A full disk or a missing file is no fault of the program."""
    if isinstance(error, OSError):
        place = f" {os.fsdecode(error.filename)}" if isinstance(error.filename, (str, bytes)) else ""
        return f"cannot read or write{place}: {reason_of(error)}"
    if isinstance(error, MemoryError):
        return f"not enough memory: {error}".removesuffix(": ")
    return "something given is nested too deeply" if isinstance(error, RecursionError) else str(error)


@functools.cache
def _hear_interrupts() -> None:
    """Puts `_unraisable` before the hook that is there, once in a process."""
    sys.unraisablehook = functools.partial(_unraisable, sys.unraisablehook)


def _unraisable(before: "Callable[[sys.UnraisableHookArgs], object]", found: "sys.UnraisableHookArgs") -> None:
    """Repeats a Ctrl-C that was raised where no exception can leave, such as in JAX's garbage-collector callback.

    Python would only print it and continue.
    """
    if isinstance(found.exc_value, KeyboardInterrupt):
        again = threading.Timer(0.05, _interrupt)  # by then the callback has returned
        again.daemon = True
        again.start()
    else:
        before(found)


def _interrupt() -> None:
    """Interrupts the main thread, even in a blocking call: `interrupt_main` would let that call finish first."""
    main = threading.main_thread().ident
    if main is not None and hasattr(signal, "pthread_kill"):
        signal.pthread_kill(main, signal.SIGINT)
    else:
        _thread.interrupt_main()  # on Windows


def _leave(status: int) -> NoReturn:
    """Ends the process at once: library threads that still run would crash while Python shuts down."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if "multiprocessing.util" in sys.modules:  # frees shared memory and semaphores
        sys.modules["multiprocessing.util"]._run_finalizers()
    if "pytest" in sys.modules:  # a test's own process must not end
        sys.exit(status)
    os._exit(status)


def _reader_has_gone() -> bool:
    """Whether stdout or stderr has lost its reader. If so, the null device replaces it: Python still flushes it."""
    poll, outputs = select.poll(), [sys.stdout.fileno(), sys.stderr.fileno()]
    for output in outputs:
        poll.register(output, select.POLLOUT)
    # On the writing end of a pipe, POLLERR says that the reading end is closed.
    broken = [output for output, events in poll.poll(0) if events & select.POLLERR]
    for output in broken:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return bool(broken)
