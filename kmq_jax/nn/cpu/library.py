"""Builds the kernels of this directory for this machine's processor, once, and gives them to XLA.

The first use of a convolution on a CPU compiles (some ten seconds) and keeps the library under the user's cache
directory. Where that cannot be, a library that came with the package is taken (prebuilt.py). Nothing depends on either:
without both, or with `KMQ_JAX_NATIVE=0` in the environment, `library` says no, and nn/conv.py and nn/channels.py stay
with XLA. A line of the log says why, unless the environment asked for it.

`KMQ_JAX_NATIVE_FLAGS` adds compiler flags, such as those of sanitizers (launch/sanitize_kernels.sh).
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import stat
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import atomic_write, cache_directory
from kmq_jax.nn.cpu import prebuilt

logger = logging.getLogger(__name__)

DIRECTORY = prebuilt.DIRECTORY
FLAGS = (*prebuilt.FLAGS, "-march=native")
TARGETS = {
    "kmq_convolution": "Convolution",
    "kmq_kernel_gradient": "KernelGradient",
    "kmq_channel_sums": "ChannelSums",
}


class Unavailable(Exception):
    """Why there is no native library; never leaves this module."""


def usable(dtype: jnp.dtype) -> bool:
    """Whether a function that is traced now may call the kernels on arrays of this dtype."""
    if jax.default_backend() != "cpu" or jax.device_count() > 1:
        return False  # XLA partitions its own operations over devices, but no foreign ones
    return dtype in (jnp.float32, jnp.bfloat16) and library()


@functools.cache
def library() -> bool:
    """Whether the kernels are registered with XLA; the first call compiles and registers them."""
    if os.environ.get("KMQ_JAX_NATIVE", "1") == "0":
        return False
    try:
        loaded = ctypes.CDLL(str(_file()))
        for target, symbol in TARGETS.items():
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(loaded, symbol)), platform="cpu")
    except (Unavailable, OSError) as error:
        logger.warning("no native convolutions, XLA's own are used instead: %s", error)
        return False
    return True


def _file() -> Path:
    """The library: compiled for this machine, else one that came with the package."""
    try:
        return _build(_private_cache())
    except (Unavailable, UserError, OSError, subprocess.SubprocessError) as error:
        found = prebuilt.best(DIRECTORY, prebuilt.architecture(), prebuilt.processor())
        if found is None:
            raise Unavailable(str(error)) from error
        logger.info("native kernels are those that came with the package (%s): %s", found.name, error)
        return found


def _private_cache() -> Path:
    """The directory of compiled libraries. What lies there gets loaded, so nobody else may be able to write to it."""
    directory = cache_directory()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if hasattr(os, "getuid") and status.st_uid != os.getuid():
        raise Unavailable(f"{directory} belongs to another user")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Unavailable(f"{directory} can be written by others")
    return directory


def _build(directory: Path) -> Path:
    """The library for this source, processor, compiler and jaxlib, compiled where it is not there yet."""
    compiler = prebuilt.compiler()
    if compiler is None:
        raise Unavailable("there is no C++ compiler")
    sources = sorted(DIRECTORY.glob("*.cc"))
    flags = [*FLAGS, *os.environ.get("KMQ_JAX_NATIVE_FLAGS", "").split()]
    texts = [path.read_bytes() for path in (*sources, *sorted(DIRECTORY.glob("*.h")))]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    # A new source, compiler, flag, jaxlib or processor gets a library of its own: old ones are never loaded.
    identity = b"\0".join(
        [*texts, version, " ".join(flags).encode(), jaxlib.__version__.encode(), _processor().encode()]
    )
    path = directory / f"kernels-{hashlib.sha256(identity).hexdigest()[:20]}.so"
    if not path.exists():
        logger.info("compiling %s for this machine, once", ", ".join(source.name for source in sources))
        with atomic_write(path) as output:
            command = [compiler, *flags, "-isystem", jax.ffi.include_dir(), *map(str, sources), "-o", str(output)]
            result = subprocess.run(command, capture_output=True, text=True, timeout=600)
            if result.returncode:
                raise Unavailable(f"{compiler} failed: {(result.stderr.strip().splitlines() or ['?'])[-1]}")
    return path


def _processor() -> str:
    """What `-march=native` depends on; a home directory may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    kinds = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(kinds)}))
