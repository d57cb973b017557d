"""The moments of a network's activations, channel by channel, and giving a quantized network the reference's.

Rounding weights shifts and stretches every channel, and the errors add up with depth. Walking the layers in network
order, each on inputs that are already quantized and repaired, a convolution's channel is given the mean and the
deviation it has in the reference network. The map folds into codebook and bias, or into the statistics of the
batch normalisation that follows, so the repaired network costs nothing more.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kmq_jax import frontend, quant
from kmq_jax.core.tree import map_named, named_leaves
from kmq_jax.data import pipeline, source
from kmq_jax.models.resnet import ResNet
from kmq_jax.models.speaker_model import PER_BITS, SpeakerModel, at_bits
from kmq_jax.nn.layers import BatchNorm, Conv

Moments = tuple[jax.Array, jax.Array]


def random_features(
    fbank: frontend.FbankConfig, utterances: source.Utterances, crops: int, seconds: float
) -> jax.Array:
    """Mean-normalised features `[crops, time, mel]` of random clean crops."""
    batches = pipeline.training_batches(
        utterances, batch_size=crops, crop_samples=int(seconds * source.SAMPLE_RATE), seed=0, augment=False, threads=0
    )
    return frontend.mean_normalize(frontend.fbank(jnp.asarray(next(iter(batches))["wave"]), fbank), None)


def narrow_widths(variables: Any) -> tuple[int, ...]:
    """The smaller widths that nested tensors of a tree can be read at."""
    leaves = jax.tree.leaves(variables, is_leaf=quant.is_codebook_tensor)
    return tuple(sorted({bits for leaf in leaves if quant.is_codebook_tensor(leaf) for bits in leaf.all_bits[:-1]}))


def small_leaves(variables: Any) -> dict[str, Any]:
    """The biases and statistics of a tree, by name within it: what one width of a nested model has to itself."""
    leaves = named_leaves(variables, is_leaf=quant.is_codebook_tensor)
    return {name: np.asarray(leaf) for name, leaf in leaves if leaf.ndim < 2 and not name.endswith("/scale")}


@dataclasses.dataclass(frozen=True)
class Repair:
    """What repairs a network.

    Attributes:
        maps: by convolution with a bias: the slope and shift of its outputs, `[channels]` each.
        statistics: by batch normalisation: the mean and variance of its inputs, `[channels]` each.
    """

    maps: dict[str, Moments]
    statistics: dict[str, Moments]


def measure(reference: SpeakerModel, quantized: SpeakerModel, features: jax.Array) -> Repair:
    """Finds what gives the quantized network's layers the reference's moments.

    Args:
        reference: the full-precision model.
        quantized: the other, read at its `bits`.
        features: `[batch, time, mel]`.
    """
    wanted, _ = _walk(reference.network(), None, reference.variables, features, {})
    seen, statistics = _walk(quantized.network(), quantized.bits, quantized.variables, features, wanted)
    return Repair({name: matching(seen[name], wanted[name]) for name in wanted}, statistics)


def own_statistics(quantized: SpeakerModel, features: jax.Array) -> SpeakerModel:
    """Measures a network's own batch normalisations afresh, at each of its widths; convolutions stay as they are."""
    narrow = {}
    for bits in (*narrow_widths(quantized.variables), None):
        at = at_bits(quantized, bits)
        _, statistics = _walk(at.network(), at.bits, at.variables, features, {})
        measured = apply(Repair({}, statistics), at.variables, lambda name, leaf, slope: leaf)
        if bits is not None:
            own = quantized.variables.get(PER_BITS, {}).get(str(bits), {})
            narrow[str(bits)] = {**own, **small_leaves({"batch_stats": measured["batch_stats"]})}
    return dataclasses.replace(quantized, variables={**measured, **({PER_BITS: narrow} if narrow else {})})


def apply(repair: Repair, variables: Any, scaled: Callable[[str, Any, jax.Array], Any]) -> dict[str, Any]:
    """Folds a repair into `{"params", "batch_stats"}`; `scaled(name, leaf, slope)` gives a kernel its slope."""

    def rewrite(name: str, leaf: Any) -> Any:
        layer, _, kind = name.rpartition("/")
        if layer not in repair.maps:
            return leaf
        slope, shift = repair.maps[layer]
        return np.asarray(leaf * slope + shift) if kind == "bias" else scaled(name, leaf, slope)

    def measured(name: str, leaf: Any) -> Any:
        layer, _, kind = name.rpartition("/")
        return np.asarray(repair.statistics[layer][kind == "var"]) if layer in repair.statistics else leaf

    return {
        "params": map_named(rewrite, variables["params"], is_leaf=quant.is_codebook_tensor),
        "batch_stats": map_named(measured, variables.get("batch_stats", {})),
    }


def moments(y: jax.Array) -> Moments:
    """Mean and deviation of each channel of `[..., channels]`."""
    axes = tuple(range(y.ndim - 1))
    return jnp.mean(y, axes), jnp.std(y, axes)


def matching(seen: Moments, wanted: Moments) -> Moments:
    """The slope and shift that give outputs with some moments other ones."""
    slope = wanted[1] / jnp.maximum(seen[1], 1e-12)
    return slope, wanted[0] - slope * seen[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _walk(
    network: ResNet, bits: int | None, variables: Any, features: jax.Array, wanted: dict[str, Moments]
) -> tuple[dict[str, Moments], dict[str, Moments]]:
    """Runs a network whose layers are repaired one after the other, each on what the repaired ones before it give.

    Args:
        network: to run.
        bits: the width at which nested tensors are read.
        variables: with packed tensors, or without.
        features: `[batch, time, mel]`.
        wanted: the moments that convolutions are given, by name; others are left as they are.

    Returns:
        By convolution that no normalisation follows: the moments of its outputs before they are repaired. By batch
        normalisation, which uses the moments of what it is given: those (mean and variance).
    """
    seen: dict[str, Moments] = {}
    statistics: dict[str, Moments] = {}

    def intercept(run: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        layer, name = context.module, "/".join(context.module.path)
        if context.method_name == "__call__" and isinstance(layer, Conv) and layer.use_bias:
            y = run(*args, **kwargs)
            seen[name] = moments(y)
            if name not in wanted:
                return y
            slope, shift = matching(seen[name], wanted[name])
            return y * slope.reshape(1, 1, 1, -1) + shift.reshape(1, 1, 1, -1)
        if context.method_name == "__call__" and isinstance(layer, BatchNorm) and layer.use_statistics:
            mean, deviation = moments(args[0].astype(jnp.float32))
            statistics[name] = mean, deviation**2
            slope = layer.get_variable("params", "scale") / jnp.sqrt(deviation**2 + layer.epsilon)
            shape = (1,) * (args[0].ndim - 1) + (-1,)
            y = (args[0] - mean.reshape(shape)) * slope.reshape(shape)
            return y + layer.get_variable("params", "bias").reshape(shape)
        return run(*args, **kwargs)

    with nn.intercept_methods(intercept):
        # Without rematerialization, which runs a block in a trace of its own that nothing may be taken out of.
        network.clone(remat=False).apply(quant.dequantize_params(variables, bits), features, train=False)
    return seen, statistics
