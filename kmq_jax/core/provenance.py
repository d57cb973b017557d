"""What a result was made with: the command, the revision of the source, the versions of libraries, the machine."""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from kmq_jax.core.files import Json
from kmq_jax.core.memory import total_memory

LIBRARIES = ("kmq_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
SOURCE = Path(__file__).resolve()


def provenance() -> Json:
    """Returns `revision`, `dirty`, `python` and the version of each of `LIBRARIES`; None where one cannot be known."""
    revision, dirty = revision_of(SOURCE)
    if revision is None:
        revision = _installed_revision()
    return {
        "revision": revision,
        "dirty": dirty,
        "python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
    }


def start() -> Json:
    """This process as a record: `command`, `began`, `machine`, `cores`, `memory_gb`, `devices`, and `provenance`."""
    import jax

    devices, memory = jax.devices(), total_memory()
    return {
        "command": command_line(sys.orig_argv),
        "began": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": processor(),
        "cores": os.cpu_count(),
        "memory_gb": None if memory is None else round(memory / 1e9, 1),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        **provenance(),
    }


def command_line(words: Sequence[str]) -> str:
    """A process's command line as it was typed: programs by their names, not their places.

    >>> command_line(["/opt/venv/bin/python3", "/opt/venv/bin/kmq-jax", "study", "--workdir=my runs"])
    "kmq-jax study '--workdir=my runs'"
    >>> command_line([".venv/bin/python", "-m", "kmq_jax.study", "--config=quickstart"])
    'python -m kmq_jax.study --config=quickstart'
    """
    program, *rest = words or [""]
    if rest and not rest[0].startswith("-") and not rest[0].endswith(".py"):  # a script that Python runs
        program, *rest = rest
    return shlex.join([Path(program).name, *rest])


def processor() -> str:
    """The name of this machine's processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # no Linux
        pass
    return platform.processor() or platform.machine()


def revision_of(file: Path) -> tuple[str | None, bool | None]:
    """The git revision that a source file belongs to, and whether tracked files were changed since.

    Both are None where there is no git, or where the file merely lies in a checkout of something else, as an installed
    package does in a project's virtual environment.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout

    try:
        # Fails unless git tracks this very file.
        git("ls-files", "--error-unmatch", file.name)
        return git("rev-parse", "HEAD").strip(), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _installed_revision() -> str | None:
    """The revision of a package that pip installed from a repository's address."""
    try:
        origin = json.loads(importlib.metadata.distribution("kmq_jax").read_text("direct_url.json") or "{}")
    except importlib.metadata.PackageNotFoundError:
        return None
    revision: str | None = origin.get("vcs_info", {}).get("commit_id")
    return revision


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
