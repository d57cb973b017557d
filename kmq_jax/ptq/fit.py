"""Quantization with a few crops of speech and no training: every layer's outputs stay as near as they can.

The full-precision and the quantized network run side by side on the same crops, layer by layer. A convolution's
weights are rounded with error feedback for the inputs that it is given by the layers quantized before it (see
`quant.feedback`); its channels are then given the mean and deviation of the reference's, which folds into codebook and
bias, or into the statistics of the batch normalisation that follows (see `moments`). The model keeps its size.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kmq_jax import quant
from kmq_jax.core.errors import UserError
from kmq_jax.core.progress import progress
from kmq_jax.core.tree import named_leaves, replace_named
from kmq_jax.data import source
from kmq_jax.models.speaker_model import PER_BITS, SpeakerModel, frontend_of
from kmq_jax.nn.channels import scale_and_shift
from kmq_jax.nn.conv import conv2d
from kmq_jax.nn.layers import BatchNorm, Conv
from kmq_jax.ptq.moments import matching, moments, narrow_widths, random_features, small_leaves
from kmq_jax.quant import gptq
from kmq_jax.quant.codes import along, from_groups, lookup, to_groups
from kmq_jax.quant.nested import split_kmeans
from kmq_jax.quant.types import CodebookTensor

_PATCHES = 1 << 14  # places of an input whose second moments are taken


def fit_on(
    reference: SpeakerModel,
    quantized: SpeakerModel,
    utterances: source.Utterances,
    crops: int = 100,
    seconds: float = 2.0,
) -> SpeakerModel:
    """Fits a quantized model to the reference's activations on random crops; see the module's docstring.

    Args:
        reference: the full-precision model.
        quantized: as `fit` takes it.
        utterances: where crops are taken from; speaker names are not used.
        crops: how many crops.
        seconds: length of each.

    Returns:
        The fitted model, of the same size.

    Raises:
        UserError: a quantized tensor shares one codebook among channels.
    """
    features = random_features(frontend_of(reference.frontend), utterances, crops, seconds)
    return fit(reference, quantized, features)


def fit(
    reference: SpeakerModel, quantized: SpeakerModel, features: jax.Array, keep_narrowest: bool = False
) -> SpeakerModel:
    """Fits a quantized model to the reference's activations on given features.

    Linear layers keep their weights: they have one input a crop, which is too few to tell correlations.

    Args:
        reference: the full-precision model.
        quantized: the same network from `quant.quantize_params`, one codebook for each output channel. Codebooks that
            are symmetric or hold a zero are scaled, but otherwise kept. Nested tensors are fitted at one width after
            the other, the wider inside the cells of the narrower. Each width has biases and statistics of its own;
            what is not nested is the same for all and stays as it is.
        features: `[batch, time, mel]`.
        keep_narrowest: the smallest of nested widths is a trained network and stays as it is; inside its cells the
            centroids of wider widths ascend, so that training can go on with them.

    Returns:
        The fitted model, of the same size.

    Raises:
        UserError: a quantized tensor shares one codebook among channels.
    """
    tensors = dict(named_leaves(quantized.variables["params"], quant.is_codebook_tensor))
    for name, tensor in tensors.items():
        if quant.is_codebook_tensor(tensor) and tensor.axis != tensor.ndim - 1:
            raise UserError(f"{name}: recalibration needs one codebook for each output channel")
    widths = narrow_widths(quantized.variables)
    walks: list[_Walk] = []
    for bits in (*widths, None):
        walk = _Walk(quantized.variables["params"], bits, bool(widths), tuple(walks), ascending=keep_narrowest)
        if keep_narrowest and not walks:
            walk.keep(quantized.variables[PER_BITS][str(bits)])
        else:
            walk.run(reference, features)
        walks.append(walk)

    fitted = dict(walks[-1].leaves)
    for name, indices in walks[-1].indices.items():
        books = [np.asarray(walk.scaled[name], tensors[name].codebook.dtype) for walk in walks]
        packed = np.asarray(quant.pack_bits(indices, tensors[name].bits))
        fitted[f"params/{name}"] = dataclasses.replace(
            tensors[name], codebook=books[-1], coarse=tuple(books[:-1]), packed=packed
        )
    shared = {part: tree for part, tree in quantized.variables.items() if part != PER_BITS}
    variables = replace_named(shared, fitted, quant.is_codebook_tensor)
    if widths:
        narrow = {str(w): small_leaves(replace_named(shared, walk.leaves)) for w, walk in zip(widths, walks)}
        variables = {**variables, PER_BITS: narrow}
    return dataclasses.replace(quantized, variables=variables)


class _Walk:
    """A pass through the reference's layers that fits the quantized network's at one width.

    Both networks' activations share a batch, the reference's first, so that each layer is at hand with what both give
    it. Nothing is traced: a layer's outputs are there before the next layer is fitted.

    Attributes:
        scaled: by parameter name, the codebooks `[groups, K]` of convolutions in use: their channels have the
            reference's moments.
        books: the same before the scaling, in which wider widths are sought.
        indices: by parameter name, uint8 `[groups, group_size]`.
        leaves: by variable name, what else was fitted: biases, statistics, kernels that are not quantized.
    """

    def __init__(self, params: Any, bits: int | None, nested: bool, narrower: "tuple[_Walk, ...]", ascending: bool):
        """Takes the quantized network's parameters, the width to fit (None: the widest) and the walks before."""
        self._bits, self._nested, self._narrower, self._ascending = bits, nested, narrower, ascending
        self._tensors = tensors = dict(named_leaves(params, quant.is_codebook_tensor))
        self._values = dict(named_leaves(quant.dequantize_params(params, bits)))
        self.scaled: dict[str, jax.Array] = {}
        self.books: dict[str, jax.Array] = {}
        self.indices: dict[str, jax.Array] = {}
        self.leaves: dict[str, np.ndarray] = {}
        convolutions = sum(quant.is_codebook_tensor(leaf) and leaf.ndim == 4 for leaf in tensors.values())
        at = f" at {bits} bits" if bits else ""
        self._progress = progress(range(convolutions), desc=f"fitting{at}", unit="layer")

    def keep(self, leaves: dict[str, np.ndarray]) -> None:
        """Takes the width as it is, with biases and statistics of its own, in place of fitting it."""
        self.leaves = dict(leaves)
        for name, tensor in self._tensors.items():
            if quant.is_codebook_tensor(tensor) and tensor.coarse:
                self.indices[name] = to_groups(quant.indices_of(tensor, self._bits), tensor.axis)
                self.books[name] = self.scaled[name] = jnp.asarray(tensor.codebook_of(self._bits), jnp.float32)

    def run(self, reference: SpeakerModel, features: jax.Array) -> None:
        """Fits all layers on features `[batch, time, mel]`."""
        # Without rematerialization, which traces the blocks.
        network = reference.network().clone(remat=False)
        with nn.intercept_methods(self._intercept):
            network.apply(reference.variables, jnp.concatenate([features, features]), train=False)
        next(self._progress, None)

    def _intercept(self, run: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        layer, name = context.module, "/".join(context.module.path)
        if context.method_name != "__call__":
            return run(*args, **kwargs)
        if isinstance(layer, Conv):
            return jnp.concatenate(self._convolution(layer, name, *jnp.split(args[0], 2)))
        if isinstance(layer, BatchNorm) and layer.use_statistics:
            reference, own = jnp.split(args[0], 2)
            return jnp.concatenate([run(reference, *args[1:], **kwargs), self._normalization(layer, name, own)])
        if isinstance(layer, nn.Dense) and quant.is_codebook_tensor(self._tensors[f"{name}/kernel"]):
            reference, own = jnp.split(args[0], 2)
            y = own @ self._values[f"{name}/kernel"]
            return jnp.concatenate([run(reference), y + along(self._values[f"{name}/bias"], y.ndim, y.ndim - 1)])
        return run(*args, **kwargs)

    def _convolution(self, layer: Conv, name: str, x: jax.Array, own: jax.Array) -> tuple[jax.Array, jax.Array]:
        kernel: jax.Array = layer.get_variable("params", "kernel")
        key, strides = f"{name}/kernel", (layer.stride, layer.stride)
        tensor, value = self._tensors[key], self._values[key]
        shared = self._nested and not (quant.is_codebook_tensor(tensor) and tensor.coarse)
        if quant.is_codebook_tensor(tensor):
            next(self._progress)
            if not shared:
                second, cross = _second_moments(x, own, layer.taps, layer.stride)
                self._round(key, gptq.corrected(to_groups(kernel, 3), second, cross), second)
                self.scaled[key] = self.books[key]
                value = from_groups(lookup(self.indices[key], self.books[key], 0), tensor.shape, 3)
        wanted, y = conv2d(x, kernel, strides), conv2d(own, value, strides)
        if not layer.use_bias:
            return wanted, y
        bias: jax.Array = layer.get_variable("params", "bias")
        wanted, y = (z + along(b, 4, 3) for z, b in ((wanted, bias), (y, self._values[f"{name}/bias"])))
        if shared:
            return wanted, y
        slope, shift = matching(moments(y), moments(wanted))
        own_bias = self._values[f"{name}/bias"] * slope + shift
        self.leaves[f"params/{name}/bias"] = np.asarray(own_bias, self._tensors[f"{name}/bias"].dtype)
        if quant.is_codebook_tensor(tensor):
            self.scaled[key] = self.books[key] * slope[:, None]
        else:
            self.leaves[f"params/{key}"] = np.asarray(value * along(slope, 4, 3), tensor.dtype)
        return wanted, scale_and_shift(y, slope, shift)

    def _round(self, name: str, rows: jax.Array, second: jax.Array) -> None:
        tensor: CodebookTensor = self._tensors[name]
        if not self._narrower:
            given = jnp.asarray(tensor.codebook_of(self._bits or tensor.bits), jnp.float32)
            pinned = jnp.all(jnp.any(given == 0, axis=1)) | jnp.all(given == -given[:, ::-1])
            book, parents, free = given[:, None], None, not pinned
        else:
            parents, cells = self._narrower[-1].indices[name], self._narrower[-1].books[name]
            (book,) = split_kmeans(rows, parents, cells, (self._bits or tensor.bits,))
            book, free = book.reshape(*cells.shape, -1), True
        book, self.indices[name] = gptq.fit(rows, book, second, parents, free=free)
        if self._ascending and len(self._narrower) > 1:
            book = _between(book, cells, self._narrower[0].books[name].shape[1])
            book, self.indices[name] = gptq.fit(rows, book, second, parents, free=False)
        stored = book.reshape(len(rows), -1).astype(tensor.codebook.dtype)
        self.books[name] = stored.astype(jnp.float32)

    def _normalization(self, layer: BatchNorm, name: str, x: jax.Array) -> jax.Array:
        mean, deviation = moments(x)
        self.leaves[f"batch_stats/{name}/mean"] = np.asarray(mean)
        self.leaves[f"batch_stats/{name}/var"] = np.asarray(deviation**2)
        slope = self._values[f"{name}/scale"] / jnp.sqrt(deviation**2 + layer.epsilon)
        return scale_and_shift(x, slope, self._values[f"{name}/bias"] - mean * slope)


def _between(book: jax.Array, cells: jax.Array, roots: int) -> jax.Array:
    """Keeps the parts of each cell between the midpoints to its neighbours that split the same one of `roots` cells.

    Args:
        book: `[groups, cells, parts]`.
        cells: their centroids `[groups, cells]`, ascending inside each root.
        roots: how many cells the narrowest width has.
    """
    split = cells.reshape(len(cells), roots, -1)
    borders, ends = 0.5 * (split[..., 1:] + split[..., :-1]), jnp.full((len(cells), roots, 1), jnp.inf)
    low = jnp.concatenate([-ends, borders], axis=-1).reshape(*cells.shape, 1)
    high = jnp.concatenate([borders, ends], axis=-1).reshape(*cells.shape, 1)
    return jnp.clip(book, low, high)


def _second_moments(x: jax.Array, own: jax.Array, taps: int, stride: int) -> tuple[jax.Array, jax.Array]:
    """Second moments over random places of a convolution's inputs, as `gptq.corrected` takes them.

    Args:
        x: the reference's activations `[batch, time, freq, channels]`.
        own: the quantized network's.
        taps: of the kernel, in time and in frequency.
        stride: of the convolution.

    Returns:
        Mean of x' x'^T and of x' (x - x')^T, both `[taps * taps * channels] * 2`.
    """
    places = (x.shape[0], -(-x.shape[1] // stride), -(-x.shape[2] // stride))
    return _moments_at(_random_places(*places), x, own, taps, stride)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _random_places(*shape: int) -> tuple[jax.Array, ...]:
    """Different places of an array `[batch, time, freq]`: an index for each axis, `[places]` each."""
    count = math.prod(shape)
    return jnp.unravel_index(jax.random.choice(jax.random.key(0), count, (min(_PATCHES, count),), replace=False), shape)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _moments_at(
    places: tuple[jax.Array, ...], x: jax.Array, own: jax.Array, taps: int, stride: int
) -> tuple[jax.Array, jax.Array]:
    batch, time, freq = (place[:, None, None] for place in places)
    tap = jnp.arange(taps)

    def patches(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (taps // 2, taps // 2), (taps // 2, taps // 2), (0, 0)))
        return x[batch, time * stride + tap[None, :, None], freq * stride + tap[None, None]].reshape(len(batch), -1)

    x, own = patches(x), patches(own)
    return own.T @ own / len(batch), own.T @ (x - own) / len(batch)
