"""Speed on an accelerator, in one run of bounded time: each figure is written as a JSON line once it is known.

Each part runs in a process of its own, with a time limit of its own. A part that takes longer is killed; the figures
that it has written stay.
"""

import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from kmq_jax.benchmarks.accelerator import lines, report
from kmq_jax.benchmarks.options import AcceleratorBench
from kmq_jax.core.errors import UserError
from kmq_jax.core.signals import handled

MODULES = {
    "step": "steps",
    "qat": "steps",
    "torch": "peer",
    "input": "feeding",
    "extract": "extraction",
    "trials": "scores",
    "kmeans": "scores",
    "step200": "steps",
    "remat": "steps",
}
"""The module of this package that runs a part, as its `run_NAME`."""

_LEAST = 5.0  # a part is not begun with fewer seconds left
_NOT_BEGUN, _STOPPED = "not begun: no time left", "stopped after"


def environment() -> dict[str, str]:
    """What the parts run under: they share what they compile, and may take nearly all of the device's memory."""
    ours = {
        "JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir()) / "kmq_jax_accelerator"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.94",
        "JAX_TRACEBACK_FILTERING": "off",  # so that the last thing said is what went wrong
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    return {**ours, **os.environ}  # what the user has set wins


def command_of(name: str, options: AcceleratorBench) -> list[str]:
    """The command that runs one part in a process of its own."""
    command = [sys.executable, "-m", "kmq_jax", "bench", "accelerator", f"--part={name}", f"--out={options.out}"]
    command += [f"--batch={options.batch}", *(["--tiny"] if options.tiny else [])]
    return command + ([f"--programs={options.programs}"] if options.programs else [])


def said_in(out: Path) -> Path:
    """The file for what parts say: beside that of their figures, and never the same.

    >>> said_in(Path("a.jsonl")).name, said_in(Path("a.log")).name
    ('a.log', 'a.log.log')
    """
    return out.with_suffix(".log") if out.suffix != ".log" else out.with_name(f"{out.name}.log")


def run_part(name: str, seconds: float, options: AcceleratorBench) -> str:
    """Runs a part in a process group of its own; returns what went wrong, or an empty text."""
    with said_in(options.out).open("a+b") as log:
        log.seek(0, os.SEEK_END)
        start = log.tell()
        child = subprocess.Popen(
            command_of(name, options), stdout=log, stderr=log, env=environment(), start_new_session=True
        )
        try:
            status = child.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"{_STOPPED} {seconds:.0f} s"
        finally:
            if child.poll() is None:
                # The whole group: a part may have started processes, too.
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        log.seek(start)
        said = log.read().decode(errors="replace").strip().splitlines()
    return f"ended with status {status}: {said[-1][:300] if said else 'nothing said'}" if status else ""


def run_all(options: AcceleratorBench) -> None:
    """Runs the parts in turn, as long as there is time, and prints the table of what they found."""
    plan, unfinished = options.plan, list[str]()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    known = len(lines.read(options.out)) if options.out.exists() else 0  # lines of earlier runs: not in the table
    end = time.monotonic() + options.limit
    for name, limit in plan:
        begin = time.monotonic()
        left = min(limit, end - begin)
        error = run_part(name, left, options) if left >= min(_LEAST, limit) else _NOT_BEGUN
        if error:
            lines.append(options.out, {"part": name, "error": error})
            unfinished += [name] if error == _NOT_BEGUN or error.startswith(_STOPPED) else []
        print(f"{name}: {time.monotonic() - begin:.0f} s{', ' + error if error else ''}", file=sys.stderr, flush=True)
    print(report.table(lines.read(options.out)[known:]))
    if unfinished:
        print(f"not finished; the same command adds them with --parts={','.join(unfinished)}")


def _end(number: int, frame: FrameType | None) -> None:
    """Ends as Ctrl-C does: by an exception, so that `run_part` kills its part."""
    sys.exit(128 + number)


def main(options: AcceleratorBench) -> None:
    """Runs the benchmark, or one part of it, or prints a table."""
    if options.table:
        rows = lines.read(options.table)
        if not rows:
            raise UserError(f"`table` (={options.table}) holds no figures of this benchmark")
        print(report.table(rows))
    elif options.part:
        module = importlib.import_module(f"kmq_jax.benchmarks.accelerator.{MODULES[options.part]}")
        getattr(module, f"run_{options.part}")(lines.Log(options.out, options.part, options.tiny), options)
    else:
        with handled((signal.SIGTERM, signal.SIGHUP), _end):
            run_all(options)
