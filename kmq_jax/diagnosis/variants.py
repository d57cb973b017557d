"""Many variants of one network over the same recordings: some of their weights quantized, the others in full precision.

A variant is a tree of arrays that it shares with the networks it is mixed from, so a hundred variants take no more
memory than two. Weights are arguments of one compiled program, so no variant is compiled anew. Features are computed
once a batch, and every variant embeds them before the next batch is read.

Where a network rounds activations to 8 bits, the steps of its activations are leaves as well (`nn.integers`). They go
with the layer or component that they belong to; a step of 0, which all others have, rounds nothing. Kernels are put on
their steps beforehand. What is then multiplied is what an integer engine multiplies, in floating point.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from kmq_jax import frontend, quant
from kmq_jax.core import mesh
from kmq_jax.core.progress import progress
from kmq_jax.core.tree import Array, Variables, map_named, named_leaves
from kmq_jax.data import source
from kmq_jax.models.batches import padded_batches, plan_batches, usable_lengths
from kmq_jax.models.protocol import Part, SpeakerNetwork
from kmq_jax.models.speaker_model import BATCH_SIZE, SPEECH_A_PROGRAM_OF_CPU, normalized_features
from kmq_jax.nn import integers
from kmq_jax.nn.frames import expand_mask


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


_features = jax.jit(normalized_features, static_argnums=(0, 3))


def feature_batches(
    network: SpeakerNetwork,
    fbank: frontend.FrontEnd,
    utterances: source.Utterances,
    *,
    max_seconds: float = 0.0,
    max_frames: int = 0,
    batch_size: int = BATCH_SIZE,
    seen: Callable[[int, np.ndarray], None] | None = None,
    desc: str = "",
) -> Iterator[FeatureBatch]:
    """Reads recordings and computes their features, batch by batch.

    Args:
        network: what embeds them.
        fbank: its filterbank.
        utterances: the table.
        max_seconds: only so much from the start of each recording; 0 takes all.
        max_frames: networks see only so many frames, less the mean over all frames; 0: all.
        batch_size: recordings in a batch.
        seen: called with each utterance's number and its samples `[samples]`, as they are read.
        desc: what the progress bar says.

    Raises:
        UserError: a recording cannot be read or is too short; the message names it.
    """
    lengths = usable_lengths(network, fbank, utterances, max_seconds, max_frames)
    devices = mesh.make_mesh(jax.local_devices())
    shapes = int(np.clip(lengths.sum() / SPEECH_A_PROGRAM_OF_CPU, 1, 4))
    plan = plan_batches(network, fbank, lengths, min(batch_size, len(lengths)), max_shapes=shapes)
    shown = progress(plan, desc=desc, unit="batch")
    for batch in padded_batches(shown, lengths, utterances.load, devices, seen=seen):
        yield FeatureBatch(batch.members, *_features(fbank, batch.wave, batch.samples, max_frames))


def on_devices(variables: Variables, bits: int | None = None) -> Variables:
    """The variables as arrays on every local device: quantized tensors turned into their values.

    Where activations are rounded, kernels lie on their 8-bit steps, and only the steps of activations are left.
    """
    whole = dict(quant.dequantize_params(variables, bits))
    steps = dict(named_leaves(whole.pop(integers.COLLECTION, {})))
    places = {name: leaf for name, leaf in steps.items() if not name.endswith("/kernel")}

    def on_steps(name: str, leaf: Array) -> Array:
        return integers.round_kernel(leaf, steps[name]) if name in steps else leaf

    if places:
        whole = {**whole, "params": map_named(on_steps, whole["params"]), integers.COLLECTION: places}
    return jax.device_put(whole, mesh.replicated(mesh.make_mesh(jax.local_devices())))


def alike(trees: Sequence[Variables]) -> list[Variables]:
    """The variables of `on_devices` with the same places of rounding in each: a step of 0 where one rounds nothing.

    >>> one, two = alike([{"params": {}}, {"params": {}, "integers": {"conv/input": jnp.array([0.5, 3.0])}}])
    >>> one["integers"]["conv/input"].tolist(), two["integers"]["conv/input"].tolist()
    ([0.0, 0.0], [0.5, 3.0])
    """
    places = {
        place: jnp.zeros_like(grid) for tree in trees for place, grid in tree.get(integers.COLLECTION, {}).items()
    }
    if not places:
        return list(trees)
    return [{**tree, integers.COLLECTION: places | tree.get(integers.COLLECTION, {})} for tree in trees]


def mix(reference: Variables, quantized: Variables, low: Callable[[str], bool]) -> Variables:
    """A tree with the leaves that `low` chooses by name from `quantized`, and all others from `reference`.

    Args:
        reference: variables of the reference network, `{"params": tree, "batch_stats": tree}`, and steps as in `alike`.
        quantized: those of the quantized one, the same tree.
        low: decides on the name below `params`, `batch_stats` or `integers`.

    >>> mix({"params": {"a": 1, "b": 2}}, {"params": {"a": 3, "b": 4}}, lambda name: name == "a")
    {'params': {'a': 3, 'b': 2}}
    """
    return map_named(lambda name, full, few: few if low(_below(name)) else full, reference, quantized)


def component_mixes(
    network: SpeakerNetwork, reference: Variables, quantized: Variables
) -> Iterator[tuple[str, str, Variables]]:
    """The variants of retention by component and of its mirror: `(experiment, component, variables)`.

    "retention" keeps one component at full precision in the quantized network; "mirror" quantizes one component of the
    full-precision network. Components without parameters, such as plain statistics pooling, make no variant.
    """
    component_of = {name: network.component_of(name) for name in (_below(n) for n, _ in named_leaves(reference))}
    present = set(component_of.values())
    for component in network.components():
        if component not in present:
            continue

        # Bound as a default: a closure would see the next component.
        def inside(name: str, component: str = component) -> bool:
            return component_of[name] == component

        yield "retention", component, mix(quantized, reference, inside)
        yield "mirror", component, mix(reference, quantized, inside)


def _below(name: str) -> str:
    """A variable's name without its collection."""
    return name.split("/", 1)[1]


def layer_mixes(reference: Variables, quantized: Variables, kernels: Iterable[str]) -> Iterator[Variables]:
    """For each kernel, the reference network with that layer from the quantized one: kernel, bias, input's step."""
    for kernel in kernels:
        layer = kernel.removesuffix("kernel")

        def inside(name: str, layer: str = layer) -> bool:
            return name in (f"{layer}kernel", f"{layer}bias", f"{layer}input")

        yield mix(reference, quantized, inside)


@contextlib.contextmanager
def _rounding(variables: Variables) -> Iterator[Variables]:
    """A context in which activations are rounded by the steps among the variables; gives the others."""
    grids = variables.get(integers.COLLECTION, {})

    def round_them(place: str, x: jax.Array) -> jax.Array:
        if place not in grids:
            return x
        return jnp.where(grids[place][0] > 0, integers.round_activations(x, grids[place]), x)

    with integers.watching(round_them):
        yield {name: tree for name, tree in variables.items() if name != integers.COLLECTION}


@functools.partial(jax.jit, static_argnums=0)
def _embed(network: SpeakerNetwork, variables: Variables, features: jax.Array, frames: jax.Array) -> jax.Array:
    with _rounding(variables) as weights:
        embeddings: Array = network.apply(weights, features, frames, train=False)
    return embeddings


def embed_variants(
    network: SpeakerNetwork, batches: Iterable[FeatureBatch], variants: Sequence[Variables], count: int
) -> np.ndarray:
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
        # All are started before the first is waited for, so that devices wait only while the next batch is decoded.
        values = [_embed(network, variables, batch.features, batch.frames) for variables in variants]
        for row, value in zip(embeddings, values):
            row[batch.members] = np.asarray(value)[: len(batch.members)]
    return embeddings


@functools.partial(jax.jit, static_argnums=0)
def _activations(
    network: SpeakerNetwork, variables: Variables, features: jax.Array, frames: jax.Array
) -> dict[str, jax.Array]:
    """Outputs of all parts. A program of its own, so that equal weights give equal outputs."""
    with _rounding(variables) as weights:
        return network.taps(weights, features, frames)[1]


@functools.partial(jax.jit, static_argnums=0)
def _powers(
    parts: tuple[Part, ...], own: dict[str, jax.Array], other: dict[str, jax.Array] | None, frames: jax.Array
) -> dict[str, jax.Array]:
    """Sums of squares of `own`, or of its difference from `other`, over real frames.

    Args:
        parts: the network's.
        own: outputs by part, `[batch, time, ...]` or `[batch, values]`.
        other: the same, or None.
        frames: `[batch]` real frames of the features; 0 of rows that do not count.
    """

    def power(part: Part, x: jax.Array, y: jax.Array | None) -> jax.Array:
        squares = jnp.square(x.astype(jnp.float32) - (0 if y is None else y.astype(jnp.float32)))
        if x.ndim == 2 or part.whole:
            real = expand_mask((frames > 0)[:, None], squares)
        else:
            real = expand_mask(jnp.arange(x.shape[1])[None] < part.frames(frames)[:, None], squares)
        return jnp.sum(jnp.where(real, squares, 0))

    return {
        part.name: power(part, own[part.name], None if other is None else other[part.name])
        for part in parts
        if part.name in own
    }


def activation_sqnr(
    network: SpeakerNetwork, batches: Iterable[FeatureBatch], reference: Variables, variants: Sequence[Variables]
) -> list[dict[str, float]]:
    """Signal-to-quantization-noise ratio (dB) of the outputs of the network's parts.

    The signal is the reference network's output, the noise the variant's difference from it; both powers are summed
    over all recordings, real frames, frequencies and channels.

    Returns:
        For each variant `{name of the part: dB}` in running order; infinite where nothing differs.
    """
    parts = network.parts()
    signal: dict[str, float] = {}
    noise: list[dict[str, float]] = [{} for _ in variants]
    for batch in batches:
        # Rows without a recording hold padding, whose outputs must not count.
        frames = jnp.where(jnp.arange(len(batch.features)) < len(batch.members), batch.frames, 0)
        own = _activations(network, reference, batch.features, batch.frames)
        for total, other in zip((signal, *noise), (None, *variants)):
            others = None if other is None else _activations(network, other, batch.features, batch.frames)
            for name, value in jax.device_get(_powers(parts, own, others, frames)).items():
                total[name] = total.get(name, 0.0) + float(value)
    order = [part.name for part in parts if part.name in signal]
    with np.errstate(divide="ignore"):
        return [{n: float(10 * np.log10(np.float64(signal[n]) / np.float64(one[n]))) for n in order} for one in noise]


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
    # An utterance's place among its speaker's: everybody gives a first one before anybody gives a second.
    turn = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    sizes = np.diff(np.append(starts, len(order)))
    # Speakers with enough utterances come first, in random order.
    rank = np.empty(len(sizes), int)
    rank[np.lexsort((rng.random(len(sizes)), sizes < least))] = np.arange(len(sizes))
    rank = np.repeat(rank, sizes)
    chosen = rank < max(2, -(-count // least))
    # By the last key first: utterances of chosen speakers, by turn, then by speaker; others only fill up.
    keys = np.lexsort((rank, turn, ~chosen))[:count]
    return np.sort(order[by_speaker[keys]])
