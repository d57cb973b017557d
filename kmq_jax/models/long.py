"""Recordings too long for one run: through a network chunk by chunk, with the statistics of the whole utterance.

Chunks overlap by as many frames as convolutions reach, so each frame comes out as in one run. What looks at all frames
(`nn.whole`) is added up over the chunks. Where the pooling alone does so, that is exact, in one pass. Where layers
before it do (squeeze-and-excitation, a mask by context), passes are repeated, each with the statistics of the one
before, until the embedding no longer moves; as many passes as there are such layers would make it exact in any case.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from kmq_jax import frontend
from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import Array, Variables
from kmq_jax.data import source
from kmq_jax.models import walk
from kmq_jax.models.protocol import SpeakerNetwork
from kmq_jax.nn import whole
from kmq_jax.nn.whole import Moments

LONG = 60.0
"""Seconds from which on a recording is embedded in chunks."""
CHUNK = 1600  # frames
_STILL = 1e-9  # cosine distance of two passes' embeddings, from which on nothing moves
_TINY = 1e-30  # in place of a divisor of zero

Own: TypeAlias = Mapping[str, tuple[int, int]]
"""By place: which frames there are the chunk's own, from the first to behind the last; the others are overlap."""

Given: TypeAlias = Mapping[str, Moments]
"""By place: statistics of the whole utterance."""


class Pieces(Protocol):
    """A model as an engine runs it, in pieces."""

    def features(self, wave: np.ndarray) -> np.ndarray:
        """The filterbank of a part of a recording, the mean not removed: `[frames, features]`."""

    def moments(self, features: np.ndarray, own: Own, given: Given) -> dict[str, Moments]:
        """The moments of a chunk's own frames at each place. A place not in `given` goes on with these alone."""

    def embed(self, given: Given) -> np.ndarray:
        """The embedding `[size]` of an utterance of these statistics."""


@dataclass(frozen=True)
class Place:
    """Where a network looks at all frames.

    Attributes:
        stride: frames of the network's input for one frame there.
        lost: frames it is short of, because convolutions before it have no padding.
    """

    stride: int
    lost: int

    def own(self, low: int, start: int, stop: int, frames: int) -> tuple[int, int]:
        """Which frames of a chunk that begins with frame `low` belong to `start` up to `stop` of `frames`.

        >>> Place(stride=2, lost=0).own(low=8, start=10, stop=15, frames=15), Place(1, lost=4).own(0, 0, 9, 9)
        ((1, 4), (0, 5))
        """
        # In frames of the place: neighbouring chunks share none, and the last goes no further than the place does.
        first, end = start // self.stride, min(-(-stop // self.stride), -(-(frames - self.lost) // self.stride))
        return first - low // self.stride, max(end, first) - low // self.stride


@functools.lru_cache(maxsize=32)
def places(network: SpeakerNetwork) -> dict[str, Place]:
    """The places where a network looks at all frames, in running order; none of one that cannot be cut.

    Raises:
        UserError: it says that it can be cut, but looks at all frames without `nn.whole`.
    """
    if not network.chunk_step():
        return {}
    found: dict[str, Place] = {}
    frames = 8 * CHUNK // network.chunk_step() * network.chunk_step()

    def collect(place: str, x: jax.Array, mask: jax.Array | None, logits: jax.Array | None) -> Moments:
        # So many frames that the few lost for want of padding do not change the quotient.
        stride = frames // x.shape[1]
        found[place] = Place(stride, frames - x.shape[1] * stride)
        return whole.moments(x, mask, logits)

    def run(variables: Variables, features: jax.Array) -> Array:
        with whole.collecting(collect):
            return network.without_remat().apply(variables, features, train=False)

    given = jax.ShapeDtypeStruct((1, frames, network.features), jnp.float32)
    jax.eval_shape(run, walk.shapes(network), given)
    if not found:
        raise UserError(
            f"{type(network).__name__} has a chunk_step ({network.chunk_step()}), but asks nn.whole for no statistics: "
            "a long recording cannot be embedded in chunks"
        )
    return found


@functools.lru_cache(maxsize=32)
def reach(network: SpeakerNetwork) -> int:
    """Frames on either side by which chunks overlap: what convolutions reach, and a step more."""
    frames = 0
    for layer in walk.layers(network):
        if layer.window is not None:
            # A part's stride is that of its output; taps reach over frames of the input.
            stride = max(network.part_of(f"{layer.name}/kernel").stride // layer.window.strides[0], 1)
            span, before = layer.window.dilations[0] * (layer.window.taps[0] - 1), layer.window.padding[0][0]
            frames += stride * max(before, span - before)
    step = network.chunk_step()
    return -(-frames // step) * step + step


def embed(
    pieces: Pieces,
    network: SpeakerNetwork,
    fbank: frontend.FbankConfig,
    read: Callable[[], np.ndarray],
    most: int = 0,
) -> np.ndarray:
    """Embeds a recording in chunks.

    Args:
        pieces: the model.
        network: its module, with a `chunk_step`.
        fbank: its filterbank.
        read: gives the recording `[samples]`, which is let go once its features are there.
        most: the network sees only the first so many frames, less the mean over all; 0: all.

    Returns:
        `[size]`.
    """
    features = features_of(pieces.features, fbank, read())
    features = features[:most] if most else features
    frames, step, overlap, found = len(features), network.chunk_step(), reach(network), places(network)
    core = max(CHUNK // step, 1) * step

    def own(low: int, start: int, stop: int) -> dict[str, tuple[int, int]]:
        return {name: place.own(low, start, stop, frames) for name, place in found.items()}

    def all_chunks(given: Given) -> dict[str, Moments]:
        total: dict[str, Moments] = {}
        for start in range(0, frames, core):
            # With as much before and behind as the network reaches, a chunk's own frames come out as in one run.
            low, stop = max(0, start - overlap), min(start + core, frames)
            new = pieces.moments(features[low : stop + overlap], own(low, start, stop), given)
            total = {name: merge(total[name], one) for name, one in new.items()} if total else new
        return total

    # The pooling alone looks at all frames: one pass is exact.
    if len(found) == 1:
        return pieces.embed(all_chunks({}))
    # Passes begin with the statistics of the first chunk.
    end = min(core, frames)
    head = {name: place.own(0, 0, end, end) for name, place in found.items()}
    given: Given = pieces.moments(features[:end], head, {})
    embedding = pieces.embed(given)
    # A place depends on those before it alone: each pass makes one more of them exact.
    for _ in found:
        given = all_chunks(given)
        before, embedding = embedding, pieces.embed(given)
        if _distance(before, embedding) < _STILL:
            break
    return embedding


def can_be_cut(network: SpeakerNetwork, fbank: frontend.FrontEnd) -> bool:
    """Whether recordings are embedded in chunks: neither the network nor its features need an utterance as a whole."""
    return bool(network.chunk_step()) and isinstance(fbank, frontend.FbankConfig)


def is_long(samples: Any) -> Any:
    """Whether recordings of so many samples at 16 kHz, a number or an array, are embedded in chunks.

    >>> is_long(np.array([16_000, 61 * 16_000])).tolist()
    [False, True]
    """
    return samples > LONG * source.SAMPLE_RATE


def mean_of_parts(embed_all: Callable[[list[np.ndarray]], np.ndarray], read: Callable[[], np.ndarray]) -> np.ndarray:
    """A substitute for the embedding of a long recording, where its network cannot be run in chunks.

    Args:
        embed_all: embeds recordings, none of them long.
        read: gives the recording `[samples]`.

    Returns:
        `[size]`: the mean of the length-normalised embeddings of equal parts, times their average length.
    """
    wave = read()
    parts = np.array_split(wave, -(-len(wave) // int(LONG * source.SAMPLE_RATE)))
    each = np.concatenate([embed_all([part]) for part in parts])  # one at a time: memory is what this is for
    sizes = np.maximum(np.linalg.norm(each, axis=1, keepdims=True), _TINY)
    mean: np.ndarray = (each / sizes).mean(axis=0) * sizes.mean()
    return mean.astype(np.float32)


def features_of(
    filterbank: Callable[[np.ndarray], np.ndarray], fbank: frontend.FbankConfig, wave: np.ndarray
) -> np.ndarray:
    """The features `[frames, features]` of a recording, part by part, less their mean over all frames."""
    frames = int(frontend.num_frames(len(wave), fbank))
    features = np.empty((frames, fbank.num_features), np.float32)
    total = np.zeros(fbank.num_features)
    for start in range(0, frames, CHUNK):
        stop = min(start + CHUNK, frames)
        features[start:stop] = filterbank(wave[start * fbank.shift : (stop - 1) * fbank.shift + fbank.length])
        total += features[start:stop].sum(axis=0, dtype=np.float64)
    features -= (total / frames).astype(np.float32)
    return features


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of both together (Chan et al., 1979), in float64.

    >>> one, two = Moments(0.0, 2.0, 1.0, 0.0), Moments(0.0, 1.0, 4.0, 0.0)
    >>> [float(value) for value in merge(one, two)]
    [0.0, 3.0, 2.0, 6.0]
    """
    a, b = (Moments(*(np.asarray(value, np.float64) for value in one)) for one in (a, b))
    # Weights are in units of exp(top): both sides are brought to the larger top.
    top = np.maximum(a.top, b.top)
    scale_a, scale_b = np.exp(a.top - top), np.exp(b.top - top)
    weight_a, weight_b = a.weight * scale_a, b.weight * scale_b
    weight = weight_a + weight_b
    share, apart = weight_b / np.maximum(weight, _TINY), b.mean - a.mean
    squares = a.squares * scale_a + b.squares * scale_b + np.square(apart) * weight_a * share
    return Moments(top, weight, a.mean + apart * share, squares)


def moments_of(frames: np.ndarray, logits: np.ndarray | None = None) -> Moments:
    """The moments of frames `[time, values]`, perhaps none, in float64; logits are those of their weights.

    >>> [value.tolist() for value in moments_of(np.array([[1.0], [3.0]]))]
    [[0.0], [2.0], [2.0], [2.0]]
    """
    frames = frames.astype(np.float64)
    values = frames.shape[1]
    if not len(frames):
        return Moments(np.full(values, 0.0 if logits is None else whole.LOWEST), *np.zeros((3, values)))
    if logits is None:
        mean = frames.mean(axis=0)
        weight = np.full(values, float(len(frames)))
        return Moments(np.zeros(values), weight, mean, np.square(frames - mean).sum(axis=0))
    top = logits.max(axis=0).astype(np.float64)
    weights = np.exp(logits - top)
    weight = weights.sum(axis=0)
    mean = (weights * frames).sum(axis=0) / weight
    return Moments(top, weight, mean, (weights * np.square(frames - mean)).sum(axis=0))


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(1 - a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), _TINY))


class JaxPieces:
    """A model in JAX, whose programs are compiled once for all long recordings."""

    def __init__(self, network: SpeakerNetwork, variables: Variables, fbank: frontend.FbankConfig):
        """Takes a model whose weights are not packed."""
        self._network, self._variables, self._fbank = network.without_remat(), variables, fbank
        step = network.chunk_step()
        # Frames that every chunk is padded to, so that one program serves all.
        self._window = max(CHUNK // step, 1) * step + 2 * reach(network)

    def features(self, wave: np.ndarray) -> np.ndarray:
        """See `Pieces`."""
        frames = int(frontend.num_frames(len(wave), self._fbank))
        longest = (CHUNK - 1) * self._fbank.shift + self._fbank.length
        padded = np.pad(wave[:longest], (0, longest - len(wave)))
        return np.asarray(frontend.fbank(jnp.asarray(padded), self._fbank))[:frames]

    def moments(self, features: np.ndarray, own: Own, given: Given) -> dict[str, Moments]:
        """See `Pieces`."""
        padded = np.pad(features, ((0, self._window - len(features)), (0, 0)))
        length, ends = jnp.array([len(features)]), {name: jnp.array(ends) for name, ends in own.items()}
        found = _chunk_moments(self._network, self._variables, padded[None], length, ends, _single(given))
        return {name: Moments(*(np.asarray(value[0]) for value in one)) for name, one in found.items()}

    def embed(self, given: Given) -> np.ndarray:
        """See `Pieces`."""
        return np.asarray(_embed_moments(self._network, self._variables, _single(given))[0])


def _single(given: Given) -> dict[str, Moments]:
    return {name: Moments(*(np.asarray(value, np.float32)[None] for value in one)) for name, one in given.items()}


@functools.partial(jax.jit, static_argnums=0)
def _chunk_moments(
    network: SpeakerNetwork,
    variables: Variables,
    features: jax.Array,
    length: jax.Array,
    own: dict[str, jax.Array],
    given: dict[str, Moments],
) -> dict[str, Moments]:
    found: dict[str, Moments] = {}

    def collect(place: str, frames: jax.Array, mask: jax.Array | None, logits: jax.Array | None) -> Moments:
        time = jnp.arange(frames.shape[1])
        mine = (time >= own[place][0]) & (time < own[place][1])
        found[place] = whole.moments(frames, mine[None], logits)
        return given.get(place, found[place])

    with whole.collecting(collect):
        network.apply(variables, features, length, train=False)
    return found


@functools.partial(jax.jit, static_argnums=0)
def _embed_moments(network: SpeakerNetwork, variables: Variables, given: dict[str, Moments]) -> Array:
    # Frames of nothing: whatever comes before the last statistics is not computed, for nothing depends on it.
    nothing = jnp.zeros((1, network.least_frames() + 7, network.features))
    with whole.collecting(lambda place, frames, mask, logits: given[place]):
        return network.apply(variables, nothing, train=False)
