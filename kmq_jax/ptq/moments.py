"""Moments of a network's activations, channel by channel, and how a quantized network gets those of the reference.

Rounding weights shifts and stretches every channel, and the errors add up with depth. The repair walks through the
layers in running order. Each layer gets its inputs from quantized and repaired layers, and each channel of a
convolution gets the mean and deviation that it has in the reference. The map folds into codebook and bias, or into the
statistics of the batch normalisation that follows, so the repaired network costs nothing more.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from kmq_jax import frontend, quant
from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import Leaf, Params, Variables, map_named, named_leaves
from kmq_jax.data import pipeline, source
from kmq_jax.models.protocol import SpeakerNetwork
from kmq_jax.models.speaker_model import PER_BITS, SpeakerModel, at_bits
from kmq_jax.models.walk import CONVOLUTION, Layer, Run, walk
from kmq_jax.nn.channels import by_channel

Moments = tuple[jax.Array, jax.Array]
_FLAT = 1e-4  # a channel with less than this share of the wanted deviation counts as constant


def random_features(fbank: frontend.FrontEnd, utterances: source.Utterances, crops: int, seconds: float) -> jax.Array:
    """Features `[crops, time, mel]` of random clean crops."""
    waves = pipeline.clean_crops(utterances, crops, round(seconds * source.SAMPLE_RATE))
    return frontend.features_of(jnp.asarray(waves), fbank)


def coarse_bits(variables: Variables) -> tuple[int, ...]:
    """The fewer bits at which nested tensors of a tree can also be read, ascending."""
    return tuple(sorted({bits for tensor in quant.codebook_tensors(variables) for bits in tensor.all_bits[:-1]}))


def per_bits_leaves(variables: Variables) -> dict[str, np.ndarray]:
    """The biases and statistics of a tree, by name: what each number of bits of a nested model has to itself.

    >>> list(per_bits_leaves({"conv": {"kernel": np.ones((2, 2)), "bias": np.ones(2)}, "norm": {"scale": np.ones(2)}}))
    ['conv/bias']
    """
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
        quantized: the quantized model, read at its `bits`.
        features: `[batch, time, mel]`.

    Returns:
        What `apply` folds into the quantized network.
    """
    wanted = output_moments(reference, features)
    seen, statistics = _moments_of(quantized.network(), quantized.bits, quantized.variables, features, wanted)
    kernels = _kernels(quantized.variables)
    return Repair({name: _repaired(kernels[name], seen[name], wanted[name]) for name in wanted}, statistics)


def output_moments(model: SpeakerModel, features: jax.Array) -> dict[str, Moments]:
    """Mean and deviation of the outputs of each convolution that has a bias, `[channels]` each, by its name."""
    return _moments_of(model.network(), model.bits, model.variables, features, {})[0]


def own_statistics(quantized: SpeakerModel, features: jax.Array) -> SpeakerModel:
    """Gives a network's batch normalisations the statistics of their inputs, at all its bits.

    Args:
        quantized: the model; its convolutions stay as they are.
        features: `[batch, time, mel]`.

    Returns:
        The model with these statistics.
    """
    per_bits = {}
    # The most bits last: their statistics are the model's own, those of fewer bits stand beside them.
    for bits in (*coarse_bits(quantized.variables), None):
        at = at_bits(quantized, bits)
        _, statistics = _moments_of(at.network(), at.bits, at.variables, features, {})
        measured = apply(Repair({}, statistics), at.variables, lambda name, leaf, slope: leaf)
        if bits is not None:
            own = quantized.variables.get(PER_BITS, {}).get(str(bits), {})
            per_bits[str(bits)] = {**own, **per_bits_leaves({"batch_stats": measured["batch_stats"]})}
    more = {PER_BITS: per_bits} if per_bits else {}
    return dataclasses.replace(quantized, variables={**quantized.variables, **measured, **more})


def averaged_statistics(quantized: SpeakerModel, batches: Iterable[jax.Array]) -> Params:
    """The statistics of a network's batch normalisations, as means over batches of features `[batch, time, mel]`.

    Returns:
        The tree `batch_stats`.

    Raises:
        UserError: there is no batch.
    """
    total: dict[str, Moments] = {}
    count = 0
    for features in batches:
        _, found = _moments_of(quantized.network(), quantized.bits, quantized.variables, features, {})
        found = jax.device_get(found)  # waits, so that several devices' sums of one batch do not meet those of the next
        total = jax.tree.map(np.add, total, found) if total else found
        count += 1
    if not count:
        raise UserError("there is no batch of features to measure batch normalisation on")
    mean = jax.tree.map(lambda sums: sums / count, total)
    measured = apply(Repair({}, mean), quantized.variables, lambda name, leaf, slope: leaf)
    return dict(measured["batch_stats"])


def apply(repair: Repair, variables: Variables, scaled: Callable[[str, Leaf, jax.Array], Leaf]) -> Variables:
    """Folds a repair into a network's variables.

    Args:
        repair: from `measure`.
        variables: with `params` and `batch_stats`.
        scaled: `scaled(name, leaf, slope)` gives a kernel, or its codebook, the slope `[channels]` of its outputs.

    Returns:
        `{"params": tree, "batch_stats": tree}`.
    """

    def rewrite(name: str, leaf: Leaf) -> Leaf:
        layer, _, kind = name.rpartition("/")
        if layer not in repair.maps:
            return leaf
        slope, shift = repair.maps[layer]
        return np.asarray(leaf * slope + shift) if kind == "bias" else scaled(name, leaf, slope)

    def measured(name: str, leaf: Leaf) -> Leaf:
        layer, _, kind = name.rpartition("/")
        # (mean, variance): False is 0, and True is 1.
        return np.asarray(repair.statistics[layer][kind == "var"]) if layer in repair.statistics else leaf

    return {
        "params": map_named(rewrite, variables["params"], is_leaf=quant.is_codebook_tensor),
        "batch_stats": map_named(measured, variables.get("batch_stats", {})),
    }


@jax.jit
def moments(y: jax.Array) -> Moments:
    """Mean and deviation of each channel of `[..., channels]`.

    >>> mean, deviation = moments(jnp.array([[0.0, 2.0], [2.0, 2.0]]))
    >>> mean.tolist(), deviation.tolist()
    ([1.0, 2.0], [1.0, 0.0])
    """
    axes = tuple(range(y.ndim - 1))
    return jnp.mean(y, axes), jnp.std(y, axes)


def matching(seen: Moments, wanted: Moments) -> Moments:
    """The slope and shift that turn outputs with the moments `seen` into ones with the moments `wanted`.

    Outputs that do not vary keep their slope, and get the mean alone.

    >>> slope, shift = matching((jnp.array([1.0]), jnp.array([2.0])), (jnp.array([3.0]), jnp.array([4.0])))
    >>> slope.tolist(), shift.tolist()
    ([2.0], [1.0])
    """
    # A constant channel cannot be stretched: its deviation is only rounding, and the slope would overflow codebooks.
    flat = seen[1] < _FLAT * wanted[1]
    slope = jnp.where(flat, 1.0, wanted[1] / jnp.maximum(seen[1], 1e-12))
    return slope, wanted[0] - slope * seen[0]


def _kernels(variables: Variables) -> dict[str, Leaf]:
    """The kernels of a tree, packed or not, by layer."""
    leaves = named_leaves(variables["params"], is_leaf=quant.is_codebook_tensor)
    return {name.removesuffix("/kernel"): leaf for name, leaf in leaves if name.endswith("/kernel")}


def _repaired(kernel: Leaf, seen: Moments, wanted: Moments) -> Moments:
    """As `matching`; where channels share a codebook none can be stretched alone, and each gets the mean alone."""
    slope, shift = matching(seen, wanted)
    shared = quant.is_codebook_tensor(kernel) and kernel.axis is None
    return (jnp.ones_like(slope), wanted[0] - seen[0]) if shared else (slope, shift)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _moments_of(
    network: SpeakerNetwork, bits: int | None, variables: Variables, features: jax.Array, wanted: dict[str, Moments]
) -> tuple[dict[str, Moments], dict[str, Moments]]:
    """Runs a network whose layers are repaired one after the other, each on the outputs of the repaired ones before it.

    Args:
        network: to run.
        bits: at which nested tensors are read; None is the most.
        variables: with packed tensors, or without.
        features: `[batch, time, mel]`.
        wanted: the moments that convolutions get, by name; others are left as they are.

    Returns:
        By convolution with a bias: the moments of its outputs before they are repaired. By batch normalisation: mean
        and variance of its inputs, by which it normalises.
    """
    seen: dict[str, Moments] = {}
    statistics: dict[str, Moments] = {}
    kernels = _kernels(variables)

    def visit(layer: Layer, x: jax.Array, run: Run) -> jax.Array:
        if layer.kind == CONVOLUTION and layer.has("bias"):
            y = run(x)
            seen[layer.name] = moments(y)
            if layer.name not in wanted:
                return y
            slope, shift = _repaired(kernels[layer.name], seen[layer.name], wanted[layer.name])
            return y * by_channel(slope, y) + by_channel(shift, y)
        if layer.measures:
            mean, deviation = moments(x.astype(jnp.float32))
            statistics[layer.name] = mean, deviation**2
            root = jnp.sqrt(deviation**2 + layer.epsilon)
            slope = layer.get("scale") / root if layer.has("scale") else 1 / root
            y = (x - by_channel(mean, x)) * by_channel(slope, x)
            return y + by_channel(layer.get("bias"), x) if layer.has("bias") else y
        return run(x)

    walk(network, quant.dequantize_params(variables, bits), features, visit)
    return seen, statistics
