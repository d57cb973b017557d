"""Timing, memory, arithmetic and profiles of programs on one device."""

import collections
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
from jax.stages import Compiled, Lowered

# Dense bfloat16 operations a second by the makers' datasheets, by a pattern of JAX's name of the device. The first that
# matches counts, so special names come first.
_PEAKS = (
    (r"H100 PCIe", 756e12),
    (r"H100|H200|GH200", 989e12),
    (r"A100", 312e12),
    (r"\bL4\b", 121e12),
    (r"TPU v5 ?(lite|e)", 197e12),
    (r"TPU v5", 459e12),
    (r"TPU v6", 918e12),
    (r"TPU v4", 275e12),
)


def peak_flops(kind: str) -> float | None:
    """Dense bfloat16 operations a second of a device, by its name; None where it is not in the table.

    >>> peak_flops("NVIDIA H100 PCIe") / 1e12, peak_flops("TPU v5 lite") / 1e12, peak_flops("cpu")
    (756.0, 197.0, None)
    """
    return next((peak for pattern, peak in _PEAKS if re.search(pattern, kind)), None)


def peak_gb() -> float | None:
    """Most memory that this process has held on the device so far, in GB; None where the device does not tell.

    So a later figure of a process is never below an earlier one: see `program_gb` for that of one program.
    """
    memory = jax.devices()[0].memory_stats() or {}
    return memory["peak_bytes_in_use"] / 1e9 if "peak_bytes_in_use" in memory else None


def program_gb(program: Compiled) -> float | None:
    """Memory that one compiled program needs by XLA's account, in GB; None where it does not tell.

    What it takes and gives counts, donated arrays once, and what it holds in between.
    """
    found = program.memory_analysis()
    if found is None:
        return None
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return float(held + found.temp_size_in_bytes) / 1e9


def seconds_of(run: Callable[[], object], budget: float, groups: int = 5) -> float:
    """Median seconds of a call that does not wait for the device, measured over groups of calls.

    Args:
        run: puts work on the device and returns arrays of it; compiled before.
        budget: seconds to spend, roughly.
        groups: how many groups of calls; each is waited for at its end only.
    """
    jax.block_until_ready(run())  # not counted
    start = time.perf_counter()
    jax.block_until_ready(run())
    once = time.perf_counter() - start
    calls = max(1, min(20, round(budget / groups / max(once, 1e-6))))
    times = []
    for _ in range(groups):
        start = time.perf_counter()
        for _ in range(calls):
            last = run()
        jax.block_until_ready(last)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def flops_of(lowered: Lowered) -> float | None:
    """XLA's own count of a lowered program's floating-point operations; None where it has none.

    It is the count before compilation: of a compiled program XLA leaves out what libraries such as cuDNN compute.
    """
    try:
        from jax._src.lib import xla_client

        count = xla_client._xla.hlo_module_cost_analysis
        program = lowered.compiler_ir("hlo")
        assert program is not None
        found = count(jax.devices("cpu")[0].client, program.as_hlo_module())
    except Exception:  # no public function gives it on every backend, and what is raised where differs
        try:
            found = lowered.cost_analysis()
        except Exception:
            return None
    return float(found["flops"]) if found and found.get("flops", 0) > 0 else None


def kernels(run: Callable[[], object], calls: int = 3) -> dict[str, tuple[float, int]]:
    """Milliseconds and launches a call of every kernel that ran on the device, by name; empty on a CPU."""
    found: dict[str, list[float]] = collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(calls):
                last = run()
            jax.block_until_ready(last)
        for path in Path(directory).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                if not plane.name.startswith("/device:"):
                    continue
                for line in plane.lines:
                    # GPUs have a line for each stream, TPUs one of operations.
                    if line.name.startswith("Stream") or line.name == "XLA Ops":
                        for event in line.events:
                            found[event.name].append(event.duration_ns / 1e6)
    return {name: (sum(times) / calls, len(times) // calls) for name, times in found.items()}


# The first pattern that a kernel's name matches counts.
_SORTS = (
    ("copies", r"memcpy|memset|^copy|transpose"),
    ("convolutions", r"conv(?!ert)|cudnn|cutlass|xmma|implicit|wgrad|dgrad|fprop"),
    ("products", r"gemm|cublas|nvjet"),
    ("fourier", r"fft"),
    ("reductions", r"reduc"),
)


def by_sort(times: dict[str, tuple[float, int]]) -> dict[str, float]:
    """Milliseconds of kernels by what they do, as their names tell; names that tell nothing count as elementwise.

    >>> by_sort({"sm90_xmma_fprop_bf16": (1.5, 2), "loop_add_fusion": (0.5, 1)})
    {'convolutions': 1.5, 'elementwise': 0.5}
    >>> by_sort({"implicit_convolve_sgemm": (1.0, 1), "loop_convert_fusion": (0.25, 1)})
    {'convolutions': 1.0, 'elementwise': 0.25}

    Args:
        times: milliseconds and launches by name, from `kernels`.
    """
    total: dict[str, float] = collections.defaultdict(float)
    for name, (milliseconds, _) in times.items():
        total[next((sort for sort, pattern in _SORTS if re.search(pattern, name, re.I)), "elementwise")] += milliseconds
    return dict(total)


def out_of_memory(error: Exception) -> bool:
    """Whether an exception says that the device's memory was too small.

    >>> out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: 2 GiB")), out_of_memory(ValueError("a shape"))
    (True, False)
    """
    return any(word in str(error) for word in ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory"))
