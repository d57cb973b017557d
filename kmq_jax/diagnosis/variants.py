"""Many variants of one network over the same recordings, with their weights partly full, partly low precision.

A variant is a tree of the same arrays as the networks it is mixed from, so a hundred of them take no more memory than
two; and since weights are arguments of one compiled program, none of them is compiled anew. Features are computed
once a batch and shown to every variant before the next batch is read.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kmq_jax import frontend, quant
from kmq_jax.core import mesh
from kmq_jax.core.errors import UserError
from kmq_jax.core.progress import progress
from kmq_jax.core.tree import map_named, named_leaves
from kmq_jax.data import buckets, source
from kmq_jax.models import registry
from kmq_jax.models.resnet import STRIDES, ResNet
from kmq_jax.models.speaker_model import BATCH_SIZE
from kmq_jax.nn.layers import Block, ConvNorm, expand_mask

_STEM, _POOL, _HEAD = "stem", "pool", "head"
_STRIDE = math.prod(STRIDES)


@dataclass(frozen=True, eq=False)
class FeatureBatch:
    """A padded batch on the devices.

    Attributes:
        members: `[real rows]` utterances of the table; rows beyond are padding.
        features: `[rows, time, mel]`, mean-normalised.
        frames: `[rows]` real frames.
    """

    members: np.ndarray
    features: jax.Array
    frames: jax.Array


@functools.partial(jax.jit, static_argnums=0)
def _features(fbank: frontend.FbankConfig, wave: jax.Array, samples: jax.Array) -> tuple[jax.Array, jax.Array]:
    frames = frontend.num_frames(samples, fbank)
    return frontend.mean_normalize(frontend.fbank(wave, fbank), frames), frames


def feature_batches(
    fbank: frontend.FbankConfig,
    utterances: source.Utterances,
    *,
    max_seconds: float = 0.0,
    batch_size: int = BATCH_SIZE,
    seen: Callable[[int, np.ndarray], None] | None = None,
    desc: str = "",
) -> Iterator[FeatureBatch]:
    """Reads recordings and computes their features, batch by batch.

    Args:
        fbank: the filterbank.
        utterances: the table.
        max_seconds: only so much from the start of each recording; 0 takes all.
        batch_size: recordings in a batch.
        seen: called with each utterance's number and its samples `[samples]`, as they are read.
        desc: what the progress bar says.

    Raises:
        UserError: a recording cannot be read or is too short; the message names it.
    """
    lengths = utterances.lengths()
    if max_seconds:
        lengths = np.minimum(lengths, int(max_seconds * source.SAMPLE_RATE))
    short = np.flatnonzero(frontend.num_frames(lengths, fbank) < 1)
    if short.size:
        raise UserError(f"{utterances.where(short[0])}: shorter than one analysis frame")
    devices = mesh.make_mesh(jax.local_devices())
    plan = buckets.length_buckets(lengths, min(batch_size, len(lengths)), max_shapes=4)
    for batch in progress(plan, desc=desc, unit="batch"):
        members = batch.indices[batch.indices >= 0]
        rows = -(-len(batch.indices) // devices.size) * devices.size
        wave, samples = np.zeros((rows, batch.size), np.float32), np.full(rows, batch.size, np.int32)
        for row, i in enumerate(members):
            recording = utterances.load(int(i))[: lengths[i]]
            wave[row, : len(recording)], samples[row] = recording, len(recording)
            if seen is not None:
                seen(int(i), recording)
        on_devices = mesh.shard_batch({"wave": wave, "samples": samples}, devices)
        yield FeatureBatch(members, *_features(fbank, **on_devices))


def on_devices(variables: Any, bits: int | None = None) -> Any:
    """The variables as arrays on every local device, quantized tensors turned into their values."""
    return jax.device_put(
        quant.dequantize_params(variables, bits), mesh.replicated(mesh.make_mesh(jax.local_devices()))
    )


def mix(reference: Any, quantized: Any, low: Callable[[str], bool]) -> Any:
    """Takes the leaves whose name `low` says yes to from `quantized`, all others from `reference`.

    Args:
        reference: variables of the reference network, `{"params": tree, "batch_stats": tree}`.
        quantized: those of the quantized one, the same tree.
        low: decides on the name below `params` or `batch_stats`, such as `stage1/block0/conv1/kernel`.
    """
    return map_named(lambda name, full, few: few if low(name.split("/", 1)[1]) else full, reference, quantized)


def component_mixes(reference: Any, quantized: Any) -> Iterator[tuple[str, str, Any]]:
    """The variants of stage-wise retention and of its mirror: `(experiment, component, variables)`.

    "retention" keeps one component at full precision in the quantized network; "mirror" makes one component low in the
    full-precision network. Components without parameters, such as plain statistics pooling, make no variant.
    """
    names = [name.split("/", 1)[1] for name, _ in named_leaves(reference)]
    present = set(registry.components(names).values())
    for component in registry.COMPONENTS:
        if component not in present:
            continue

        def inside(name: str, component: str = component) -> bool:
            return registry.component(name) == component

        yield "retention", component, mix(quantized, reference, inside)
        yield "mirror", component, mix(reference, quantized, inside)


def layer_mixes(reference: Any, quantized: Any, kernels: Iterable[str]) -> Iterator[Any]:
    """For each kernel, the reference network with that layer (its kernel and bias) from the quantized one."""
    for kernel in kernels:
        layer = kernel.removesuffix("kernel")

        def inside(name: str, layer: str = layer) -> bool:
            return name in (f"{layer}kernel", f"{layer}bias")

        yield mix(reference, quantized, inside)


@functools.partial(jax.jit, static_argnums=0)
def _embed(network: ResNet, variables: Any, features: jax.Array, frames: jax.Array) -> jax.Array:
    embeddings: Any = network.apply(variables, features, frames, train=False)
    return embeddings


def embed_variants(network: ResNet, batches: Iterable[FeatureBatch], variants: Sequence[Any], count: int) -> np.ndarray:
    """Embeds the same recordings with every variant.

    Args:
        network: the network they share.
        batches: of `feature_batches`.
        variants: variables on the devices.
        count: number of utterances.

    Returns:
        float32 `[variants, utterances, dim]`.
    """
    embeddings = np.zeros((len(variants), count, network.embedding_size), np.float32)
    for batch in batches:
        # All are started before the first is waited for: the next batch's decoding is all that the devices wait for.
        values = [_embed(network, variables, batch.features, batch.frames) for variables in variants]
        for row, value in zip(embeddings, values):
            row[batch.members] = np.asarray(value)[: len(batch.members)]
    return embeddings


def _is_measured(module: nn.Module, method: str) -> bool:
    if method != "__call__":
        return False
    return isinstance(module, Block) or (module.name == _STEM and isinstance(module, ConvNorm)) or module.name == _POOL


@functools.partial(jax.jit, static_argnums=0)
def _activations(network: ResNet, variables: Any, features: jax.Array, frames: jax.Array) -> dict[str, jax.Array]:
    """Outputs of stem, blocks, pooling and head. A program of its own, so that equal weights give equal outputs."""
    embedding, state = network.apply(
        variables, features, frames, train=False, capture_intermediates=_is_measured, mutable=["intermediates"]
    )
    captured = {name.removesuffix("/__call__/0"): leaf for name, leaf in named_leaves(state["intermediates"])}
    return captured | {_HEAD: embedding}


@jax.jit
def _powers(own: dict[str, jax.Array], other: dict[str, jax.Array] | None, mask: jax.Array) -> dict[str, jax.Array]:
    """Sums of squares of `own`, or of its difference from `other`, over the real frames of `mask` `[batch, time]`."""

    def power(x: jax.Array, y: jax.Array | None) -> jax.Array:
        squares = jnp.square(x.astype(jnp.float32) - (0 if y is None else y.astype(jnp.float32)))
        step = 1 if x.ndim == 2 else mask.shape[1] // x.shape[1]
        real = mask[:, :1] if x.ndim == 2 else expand_mask(mask[:, ::step], squares)
        return jnp.sum(jnp.where(real, squares, 0))

    return {name: power(x, None if other is None else other[name]) for name, x in own.items()}


def activation_sqnr(
    network: ResNet, batches: Iterable[FeatureBatch], reference: Any, variants: Sequence[Any]
) -> list[dict[str, float]]:
    """Signal-to-quantization-noise ratio (dB) of the outputs of stem, blocks, pooling and head.

    The signal is the reference network's output, the noise the variant's difference from it; both powers are summed
    over all recordings, real frames, frequencies and channels.

    Returns:
        For each variant `{name: dB}` in network order; infinite where nothing differs.
    """
    signal: dict[str, float] = {}
    noise: list[dict[str, float]] = [{} for _ in variants]
    for batch in batches:
        # Whole numbers of the network's stride, so that every stride-th frame of the mask is an output's frame.
        features = jnp.pad(batch.features, ((0, 0), (0, -batch.features.shape[1] % _STRIDE), (0, 0)))
        real = jnp.arange(len(features)) < len(batch.members)
        mask = jnp.arange(features.shape[1])[None, :] < jnp.where(real, batch.frames, 0)[:, None]
        own = _activations(network, reference, features, batch.frames)
        for total, other in zip((signal, *noise), (None, *variants)):
            others = None if other is None else _activations(network, other, features, batch.frames)
            for name, value in jax.device_get(_powers(own, others, mask)).items():
                total[name] = total.get(name, 0.0) + float(value)
    order = sorted(signal, key=depth_order)
    with np.errstate(divide="ignore"):
        return [{n: float(10 * np.log10(np.float64(signal[n]) / np.float64(one[n]))) for n in order} for one in noise]


def depth_order(name: str) -> tuple[int, int]:
    """Sorts stem, blocks, pooling and head as they run."""
    first, _, rest = name.partition("/")
    place = {_STEM: 0, _POOL: 98, _HEAD: 99}.get(first)
    if place is not None:
        return place, 0
    return int(first.removeprefix("stage")), int(rest.removeprefix("block"))


def spread_over_speakers(utterances: source.Utterances, count: int, least: int = 4, seed: int = 0) -> np.ndarray:
    """Chooses a subset on which all pairs make a trial list with enough target trials.

    Speakers are taken in random order, as many as leave `least` utterances for each, and their utterances in turns.

    Args:
        utterances: the table.
        count: how many to choose; 0, or as many as there are, takes all.
        least: utterances of each speaker, where the speaker has them.
        seed: of the draw.

    Returns:
        Ascending rows of the table.
    """
    if not 0 < count < len(utterances):
        return np.arange(len(utterances))
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(utterances))
    labels = utterances.labels[order]
    by_speaker = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[by_speaker], prepend=-1))
    turn = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    sizes = np.diff(np.append(starts, len(order)))
    # Speakers with enough utterances come first, in random order.
    rank = np.empty(len(sizes), int)
    rank[np.lexsort((rng.random(len(sizes)), sizes < least))] = np.arange(len(sizes))
    rank = np.repeat(rank, sizes)
    chosen = rank < max(2, -(-count // least))
    keys = np.lexsort((rank, turn, ~chosen))[:count]
    return np.sort(order[by_speaker[keys]])
