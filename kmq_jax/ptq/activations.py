"""Ranges of activations, measured on training speech, so that a network can run on integers.

`nn.integers` says which places are rounded, and how: those of convolutions, not of linear and LSTM layers. Here each
place gets its range: from the least to the greatest value seen. A narrower range can have less squared error on these
crops. But it cuts off the strongest activations, and other speech may have more of them.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from kmq_jax import quant
from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import Array, Variables, named_leaves
from kmq_jax.models.speaker_model import SpeakerModel
from kmq_jax.nn import integers

Ranges = Mapping[str, tuple[float, float]]
"""By place: the step and the level of zero."""


def measure(reference: SpeakerModel, features: jax.Array) -> dict[str, tuple[float, float]]:
    """The range of every place where a network's activations can be rounded.

    Args:
        reference: the full-precision model.
        features: `[batch, time, mel]`.

    Returns:
        By place, such as "stage1/block0/conv1/input": the step and the level of zero.

    Raises:
        UserError: activations of a place are not finite.
    """
    seen: dict[str, tuple[float, float]] = {}

    def watch(place: str, x: jax.Array) -> jax.Array:
        low, high = float(x.min()), float(x.max())
        if not math.isfinite(low) or not math.isfinite(high):
            raise UserError(f"activations of {place} are not finite: their range cannot be measured")
        # A module may run more than once: its place holds what all its runs saw.
        before = seen.get(place, (low, high))
        seen[place] = min(low, before[0]), max(high, before[1])
        return x

    with integers.watching(watch):
        reference.network().without_remat().apply(reference.variables, features, train=False)
    return {place: integers.grid_of(low, high) for place, (low, high) in seen.items()}


def with_ranges(quantized: SpeakerModel, ranges: Ranges) -> SpeakerModel:
    """Gives a quantized model 8-bit activations: its quantized convolutions then compute with integers alone.

    Linear and LSTM layers compute in floating point as before.

    Args:
        quantized: from `quant.quantize_params`, one codebook for each output channel.
        ranges: from `measure`.

    Returns:
        The model, with the collection `nn.integers.COLLECTION` among its variables.

    Raises:
        UserError: no convolution is quantized.
    """
    # Only kernels are looked up: a parameter without axes has no channels.
    kernels = {
        name: (leaf.shape[-1], np.asarray(leaf.codebook, np.float32) if quant.is_codebook_tensor(leaf) else None)
        for name, leaf in named_leaves(quantized.variables["params"], quant.is_codebook_tensor)
        if leaf.ndim
    }
    tree = jax.tree.map(np.asarray, rounding_steps(ranges, kernels))
    return dataclasses.replace(quantized, variables={**quantized.variables, integers.COLLECTION: tree})


def places_of(model: SpeakerModel) -> list[str]:
    """The places where a network's activations can be rounded; nothing is computed."""
    places: dict[str, None] = {}

    def watch(place: str, x: jax.Array) -> jax.Array:
        places[place] = None
        return x

    network = model.network().without_remat()
    # Seven frames more than the least: of eight, three strides of 2 leave one.
    features = jax.ShapeDtypeStruct((1, 7 + network.least_frames(), network.features), jnp.float32)
    with integers.watching(watch):
        jax.eval_shape(lambda variables, x: network.apply(variables, x, train=False), model.variables, features)
    return list(places)


def rounding_steps(ranges: Ranges, kernels: Mapping[str, tuple[int, Array | None]]) -> Variables:
    """The collection `nn.integers.COLLECTION` of a network: steps of its activations and of its quantized kernels.

    Args:
        ranges: from `measure`.
        kernels: by name of a parameter, its output channels and codebooks `[groups, K]`; None is full precision.

    Returns:
        By module: a grid `[2]` (step, level of zero) for each place, and steps `[out]` for the kernel.

    Raises:
        UserError: no convolution is quantized.
    """
    tree: Variables = {}
    quantized = 0
    for place, grid in ranges.items():
        module, _, _ = place.rpartition("/")
        # No channels: the place is not the input of a kernel, but a residual branch, say.
        channels, codebook = kernels.get(f"{module}/kernel", (0, None))
        if channels and codebook is None:
            continue  # a convolution in full precision
        _put(tree, place, jnp.asarray(grid, jnp.float32))
        if codebook is not None:
            steps = integers.steps_of(jnp.asarray(codebook, jnp.float32))
            # One codebook for the whole tensor has one step, which all channels take.
            _put(tree, f"{module}/kernel", jnp.broadcast_to(steps, (channels,)))
            quantized += 1
    if not quantized:
        raise UserError("activations are rounded where convolutions are quantized, and none is")
    return tree


def _put(tree: Variables, name: str, value: Array) -> None:
    """Sets the leaf with this "/"-joined name, and makes the dicts above it."""
    *folders, last = name.split("/")
    for folder in folders:
        tree = tree.setdefault(folder, {})
    tree[last] = value
