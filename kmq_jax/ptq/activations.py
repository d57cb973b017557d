"""Ranges of activations, measured on training speech, so that a network can run on integers.

The places that are rounded, and what rounding is, stand in `nn.integers`. Here each place gets its range: of the least
and greatest value seen and some percentiles, the one whose rounding to 8 bits has the least squared error.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from kmq_jax import quant
from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import Array, Variables, named_leaves
from kmq_jax.models.speaker_model import SpeakerModel
from kmq_jax.nn import integers

_CUT = (0.0, 1e-5, 1e-4, 1e-3)
"""Shares of the values that may lie beyond either end of a range."""
_VALUES = 1 << 18  # of a place, by which the ends are compared

Ranges = Mapping[str, tuple[float, float]]
"""By place: the step and the level of zero."""


def measure(reference: SpeakerModel, features: jax.Array) -> dict[str, tuple[float, float]]:
    """The range of every place where a network's activations can be rounded.

    Args:
        reference: the full-precision model.
        features: `[batch, time, mel]`.

    Returns:
        By place, such as "stage1/block0/conv1/input": the step and the level of zero.
    """
    found: dict[str, tuple[float, float]] = {}

    def watch(place: str, x: jax.Array) -> jax.Array:
        found[place] = range_of(np.asarray(x, np.float32))
        return x

    with integers.watching(watch):
        reference.network().without_remat().apply(reference.variables, features, train=False)
    return found


def range_of(values: np.ndarray) -> tuple[float, float]:
    """The step and the level of zero that round values, of any shape, with the least squared error.

    >>> step, zero = range_of(np.array([-1.0, 0.0, 1.55]))
    >>> round(step, 6), zero
    (0.01, 100.0)
    """
    flat = values.ravel()
    sample = flat[:: max(1, flat.size // _VALUES)]
    ordered = np.sort(sample)
    best = (np.inf, (1.0, 0.0))
    for cut in _CUT:
        low, high = (float(flat.min()), float(flat.max())) if not cut else map(float, _ends(ordered, cut))
        step, zero = integers.grid_of(low, high)
        level = np.clip(np.round(sample / step) + zero, 0, integers.LEVELS)
        error = float(np.mean(np.square((level - zero) * step - sample, dtype=np.float64)))
        best = min(best, (error, (step, zero)))
    return best[1]


def _ends(ordered: np.ndarray, cut: float) -> tuple[float, float]:
    beyond = int(cut * ordered.size)
    return ordered[beyond], ordered[-1 - beyond]


def with_ranges(quantized: SpeakerModel, ranges: Ranges) -> SpeakerModel:
    """Gives a quantized model 8-bit activations: its quantized convolutions then compute with integers alone.

    Args:
        quantized: from `quant.quantize_params`, one codebook for each output channel.
        ranges: from `measure`.

    Raises:
        UserError: no convolution is quantized.
    """
    kernels = {
        name: (leaf.shape[-1], np.asarray(leaf.codebook, np.float32) if quant.is_codebook_tensor(leaf) else None)
        for name, leaf in named_leaves(quantized.variables["params"], quant.is_codebook_tensor)
    }
    tree = jax.tree.map(np.asarray, steps_of(ranges, kernels))
    return dataclasses.replace(quantized, variables={**quantized.variables, integers.COLLECTION: tree})


def steps_of(ranges: Ranges, kernels: Mapping[str, tuple[int, Array | None]]) -> Variables:
    """The collection `nn.integers.COLLECTION` of a network: steps of its activations and of its quantized kernels.

    Args:
        ranges: from `measure`.
        kernels: by name of a parameter, its output channels and codebooks `[groups, K]`; None is full precision.

    Raises:
        UserError: no convolution is quantized.
    """
    tree: Variables = {}
    quantized = 0
    for place, grid in ranges.items():
        module, _, _ = place.rpartition("/")
        channels, codebook = kernels.get(f"{module}/kernel", (0, None))
        if channels and codebook is None:
            continue  # a convolution in full precision
        _put(tree, place, jnp.asarray(grid, jnp.float32))
        if codebook is not None:
            steps = integers.steps_of(jnp.asarray(codebook, jnp.float32))
            _put(tree, f"{module}/kernel", jnp.broadcast_to(steps, (channels,)))
            quantized += 1
    if not quantized:
        raise UserError("activations are rounded where convolutions are quantized, and none is")
    return tree


def _put(tree: Variables, name: str, value: Array) -> None:
    *folders, last = name.split("/")
    for folder in folders:
        tree = tree.setdefault(folder, {})
    tree[last] = value
