"""The kernels of this directory compiled beforehand, so that a machine without a compiler has them, too.

A wheel that is built with `KMQ_JAX_PREBUILT=1` in the environment (setup.py) holds a library for each level of its
processors' instructions. library.py takes the best that the machine at hand can run. Nothing but Python's own library
is imported here: setup.py reads this file by its path, before anything is installed.
"""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

DIRECTORY = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-Wall", "-Wextra")


class Level(NamedTuple):
    """Instructions that a library is compiled for.

    Attributes:
        name: stands in the library's file name.
        flags: of the compiler.
        needs: what the processor must have, as /proc/cpuinfo names it.
    """

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]


_V3 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_BF16 = ("-march=x86-64-v4", "-mavx512bf16")
LEVELS: Mapping[str, tuple[Level, ...]] = {
    "x86_64": (
        Level("v4-amx", (*_BF16, "-mamx-tile", "-mamx-bf16"), _V4 | {"avx512_bf16", "amx_tile", "amx_bf16"}),
        Level("v4-bf16", _BF16, _V4 | {"avx512_bf16"}),
        Level("v4", ("-march=x86-64-v4",), _V4),
        Level("v3", ("-march=x86-64-v3",), _V3),
        Level("v1", ("-march=x86-64",), frozenset()),
    ),
    "arm64": (Level("v8", (), frozenset()),),
}
"""By architecture, the best first."""


def architecture(machine: str = "") -> str:
    """The name in `LEVELS` of a machine, this one where left out.

    >>> architecture("AMD64"), architecture("aarch64"), architecture("riscv64")
    ('x86_64', 'arm64', 'riscv64')
    """
    machine = (machine or platform.machine()).lower()
    return {"amd64": "x86_64", "aarch64": "arm64"}.get(machine, machine)


def compiler() -> str | None:
    """The C++ compiler to use: `CXX` in the environment, else the first that is found; None: there is none."""
    return os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)


def build(directory: Path, compiler: str, include: str) -> list[Path]:
    """Compiles the libraries of this machine's architecture.

    Args:
        directory: where they go.
        compiler: GCC 11 or Clang 12, or newer.
        include: directory of jaxlib's headers. Libraries run with this jaxlib and with newer ones.

    Returns:
        Their files; none for an architecture that is not in `LEVELS`.

    Raises:
        subprocess.CalledProcessError: the compiler failed.
    """
    sources = [str(path) for path in sorted(DIRECTORY.glob("*.cc"))]
    made = []
    for level in LEVELS.get(architecture(), ()):
        made.append(directory / file_name(level))
        command = [compiler, *FLAGS, *level.flags, "-isystem", include, *sources, "-o", str(made[-1])]
        subprocess.run(command, check=True)
    return made


def file_name(level: Level) -> str:
    """What a level's library is called.

    >>> file_name(LEVELS["x86_64"][2])
    'kernels-x86_64-v4.so'
    """
    kind = next(kind for kind, levels in LEVELS.items() if level in levels)
    return f"kernels-{kind}-{level.name}.so"


def best(directory: Path, machine: str, instructions: frozenset[str]) -> Path | None:
    """The best library in a directory that a machine can run; None: there is none.

    Args:
        directory: of libraries, from `build`.
        machine: from `architecture`.
        instructions: of its processor, from `processor`.
    """
    for level in LEVELS.get(machine, ()):
        path = directory / file_name(level)
        if level.needs <= instructions and path.is_file():
            return path
    return None


def processor() -> frozenset[str]:
    """The instructions of this machine's processor as /proc/cpuinfo names them; none where that is not there."""
    if not sys.platform.startswith("linux"):
        return frozenset()
    try:
        text = Path(os.sep, "proc", "cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = (line.partition(":") for line in text.splitlines())
    return frozenset(next((value.split() for name, _, value in lines if name.strip() == "flags"), []))
