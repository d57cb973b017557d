"""Quantization without training: on a few crops of speech, every layer's outputs are kept near the reference's.

The full-precision and the quantized network run side by side on the same crops, layer by layer. A convolution's weights
are rounded by GPTQ, for the inputs that the layers quantized before it give (see `quant.gptq`). Its channels then get
the mean and deviation that they have in the reference: that map folds into codebook and bias, or into the statistics of
the batch normalisation that follows (see `moments`). The model keeps its size.

Where normalisations stand before convolutions, or behind activations, they cannot be folded backwards, and no
convolution has a bias. There every normalisation gets the statistics by which its outputs have the moments of the
reference's. It must not simply take those of its inputs: what the reference gives on these crops need not have the
mean and deviation of the speech that it was trained on, and layers behind it rely on the difference.

Symbols are GPTQ's: W weights `[out, n]`, Q what they are rounded to, H second moments of the inputs `[n, n]`.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from kmq_jax import quant
from kmq_jax.core.errors import UserError
from kmq_jax.core.progress import progress
from kmq_jax.core.tree import Leaf, Params, named_leaves, replace_named
from kmq_jax.data import source
from kmq_jax.models.protocol import SpeakerNetwork
from kmq_jax.models.speaker_model import PER_BITS, SpeakerModel, frontend_of
from kmq_jax.models.walk import CONVOLUTION, LINEAR, NORMALISATION, OTHER, RECURRENCE, Layer, Run, layers, walk
from kmq_jax.nn import integers
from kmq_jax.nn.channels import scale_and_shift
from kmq_jax.nn.conv import Window, convolve, window
from kmq_jax.nn.recurrent import before, recur
from kmq_jax.ptq.moments import coarse_bits, matching, moments, per_bits_leaves, random_features
from kmq_jax.quant import gptq
from kmq_jax.quant.codes import along, from_groups, lookup, to_groups
from kmq_jax.quant.levels import basis
from kmq_jax.quant.nested import split_kmeans
from kmq_jax.quant.types import CodebookTensor

_PLACES = 1 << 14  # of an input, from which H is estimated


def fit_on(
    reference: SpeakerModel,
    quantized: SpeakerModel,
    utterances: source.Utterances,
    crops: int = 100,
    seconds: float = 2.0,
    levels: Mapping[str, str] | None = None,
) -> SpeakerModel:
    """Fits a quantized model to the reference's activations on random crops; see the module's docstring.

    Args:
        reference: the full-precision model.
        quantized: as `fit` takes it.
        utterances: where crops are taken from; speaker names are not used.
        crops: how many crops.
        seconds: length of each.
        levels: see `fit`.

    Returns:
        The fitted model, of the same size.

    Raises:
        UserError: a tensor cannot be fitted; see `fit`.
    """
    features = random_features(frontend_of(reference.frontend), utterances, crops, seconds)
    return fit(reference, quantized, features, levels=levels)


def patterned(params: Params, rules: quant.Rules) -> dict[str, str]:
    """The level sets, by parameter name, of the tensors whose centroids are not free.

    >>> patterned({"a": np.ones((2, 2)), "b": np.ones((2, 2))}, {"a": quant.QuantSpec(2, levels="powers"), "b": 2})
    {'a': 'powers'}
    """
    levels = {name: spec.levels for name, spec in quant.decide(params, rules).items()}
    return {name: one for name, one in levels.items() if one != "kmeans"}


def fit(
    reference: SpeakerModel,
    quantized: SpeakerModel,
    features: jax.Array,
    keep_coarsest: bool = False,
    levels: Mapping[str, str] | None = None,
) -> SpeakerModel:
    """Fits a quantized model to the reference's activations on given features.

    Convolutions of any rank are fitted, grouped ones too, and linear layers that see every frame, as those of
    attention do. A linear layer that sees one vector a crop keeps its weights: crops are too few for second moments.

    Args:
        reference: the full-precision model.
        quantized: the same network from `quant.quantize_params`, one codebook for each output channel. Codebooks that
            are symmetric or hold a zero are scaled, but otherwise kept. Nested tensors are fitted at the fewest bits
            first, then at more bits inside the cells of fewer. Each number of bits has biases and statistics of its
            own; what is not nested is the same for all and stays as it is.
        features: `[batch, time, mel]`.
        keep_coarsest: at its fewest bits a nested model is a trained network and stays as it is. Inside its cells the
            centroids of more bits ascend, so that training can go on with them.
        levels: by parameter name, the level set (`QuantSpec.levels`) of those whose centroids are not free.

    Returns:
        The fitted model, of the same size.

    Raises:
        UserError: a quantized tensor shares one codebook among channels, or belongs to a layer of an unknown kind.
    """
    tensors = dict(named_leaves(quantized.variables["params"], quant.is_codebook_tensor))
    for name, tensor in tensors.items():
        if quant.is_codebook_tensor(tensor) and tensor.axis != tensor.ndim - 1:
            raise UserError(f"{name}: fitting needs one codebook for each output channel")
    nested = coarse_bits(quantized.variables)
    found: list[_Fit] = []
    rounds = dict(named_leaves(quantized.variables.get(integers.COLLECTION, {})))
    for bits in (*nested, None):
        # From the fewest bits on: each number of bits is sought inside the cells of the one before.
        one = _Fit(quantized.variables["params"], bits, bool(nested), tuple(found), keep_coarsest, rounds)
        one.levels = levels or {}
        if keep_coarsest and not found:
            one.keep(quantized.variables[PER_BITS][str(bits)])
        else:
            one.run(reference, features)
        found.append(one)
    shared = {part: tree for part, tree in quantized.variables.items() if part != PER_BITS}
    variables = replace_named(shared, _leaves(tensors, found), quant.is_codebook_tensor)
    if nested:
        per_bits = {str(b): per_bits_leaves(replace_named(shared, one.leaves)) for b, one in zip(nested, found)}
        variables = {**variables, PER_BITS: per_bits}
    return dataclasses.replace(quantized, variables=variables)


def _leaves(tensors: Mapping[str, Leaf], found: "list[_Fit]") -> dict[str, Leaf]:
    """What was fitted, by variable name: tensors with the codebooks of all bits and the indices of the most."""
    most = found[-1]
    leaves: dict[str, Leaf] = dict(most.leaves)
    for name, indices in most.indices.items():
        books = [np.asarray(one.scaled[name], tensors[name].codebook.dtype) for one in found]
        packed = np.asarray(quant.pack_bits(indices, tensors[name].bits))
        leaves[f"params/{name}"] = dataclasses.replace(
            tensors[name], codebook=books[-1], coarse=tuple(books[:-1]), packed=packed
        )
    return leaves


class _Fit:
    """A walk through the reference's layers that fits the quantized network's at one number of bits.

    Both networks' activations share a batch, the reference's first, so that each layer is at hand with what both give
    it. Nothing is traced: a layer's outputs are there before the next layer is fitted.

    Attributes:
        scaled: by parameter name, the codebooks `[out, K]` of convolutions as they are stored: their channels have the
            reference's moments.
        books: the same before the scaling; in their cells more bits are sought.
        indices: by parameter name, uint8 `[out, n]`.
        leaves: by variable name, what else was fitted: biases, statistics, kernels that are not quantized.
        levels: as `fit` takes them.
    """

    def __init__(
        self,
        params: Params,
        bits: int | None,
        nested: bool,
        coarser: "tuple[_Fit, ...]",
        ascending: bool,
        rounds: Mapping[str, Leaf],
    ):
        """Takes the quantized network's parameters, the bits to fit (None: the most) and the fits at fewer bits.

        `rounds` are the steps of the network's activations and kernels, by place, where it computes with integers.
        """
        self._bits, self._nested, self._coarser, self._ascending = bits, nested, coarser, ascending
        self._rounds = rounds
        self._tensors = tensors = dict(named_leaves(params, quant.is_codebook_tensor))
        self._values = dict(named_leaves(quant.dequantize_params(params, bits)))
        self.scaled: dict[str, jax.Array] = {}
        self.books: dict[str, jax.Array] = {}
        self.indices: dict[str, jax.Array] = {}
        self.leaves: dict[str, np.ndarray] = {}
        self.levels: Mapping[str, str] = {}
        self._matching = False
        convolutions = sum(quant.is_codebook_tensor(leaf) and leaf.ndim > 2 for leaf in tensors.values())
        at = f" at {bits} bits" if bits else ""
        self._progress = progress(range(convolutions), desc=f"fitting{at}", unit="layer")

    def keep(self, leaves: Mapping[str, np.ndarray]) -> None:
        """Takes the network at these bits as it is, with its own biases and statistics, in place of fitting it."""
        self.leaves = dict(leaves)
        for name, tensor in self._tensors.items():
            if quant.is_codebook_tensor(tensor) and tensor.coarse:
                self.indices[name] = to_groups(quant.indices_of(tensor, self._bits), tensor.axis)
                self.books[name] = self.scaled[name] = jnp.asarray(tensor.codebook_of(self._bits), jnp.float32)

    def run(self, reference: SpeakerModel, features: jax.Array) -> None:
        """Fits all layers on features `[batch, time, mel]`."""
        self._matching = normalises_freely(reference.network())
        with integers.watching(self._rounded):
            walk(reference.network(), reference.variables, jnp.concatenate([features, features]), self._visit)
        next(self._progress, None)

    def _rounded(self, place: str, x: jax.Array) -> jax.Array:
        """Rounds the quantized network's activations where it computes with integers, not the reference's."""
        if place not in self._rounds:
            return x
        reference, own = jnp.split(x, 2)
        return jnp.concatenate([reference, integers.round_activations(own, self._rounds[place])])

    def _visit(self, layer: Layer, x: jax.Array, run: Run) -> jax.Array:
        quantized = quant.is_codebook_tensor(self._tensors.get(f"{layer.name}/kernel"))
        if layer.kind == CONVOLUTION:
            x = self._rounded(f"{layer.name}/input", x)
            return jnp.concatenate(self._convolution(layer, *jnp.split(x, 2)))
        if layer.measures:
            reference, own = jnp.split(x, 2)
            if self._matching:
                return jnp.concatenate([run(reference), self._matched_normalisation(layer, reference, own)])
            return jnp.concatenate([run(reference), self._normalisation(layer, own)])
        if layer.kind == LINEAR and quantized:
            reference, own = jnp.split(x, 2)
            if x.ndim > 2:
                return jnp.concatenate(self._linear_of_frames(layer, reference, own, run))
            return jnp.concatenate([run(reference), self._with_bias(layer, own @ self._values[f"{layer.name}/kernel"])])
        if layer.kind == RECURRENCE and quantized:
            return jnp.concatenate(self._recurrence(layer, *jnp.split(x, 2)))
        if layer.kind == OTHER and quantized:
            raise UserError(f"{layer.name}: a {type(layer.module).__name__} cannot be fitted; leave it unquantized")
        return run(x)

    def _with_bias(self, layer: Layer, y: jax.Array) -> jax.Array:
        """Adds the quantized network's bias, where there is any."""
        return y + along(self._values[f"{layer.name}/bias"], y.ndim, y.ndim - 1) if layer.has("bias") else y

    def _convolution(self, layer: Layer, x: jax.Array, own: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Fits a convolution; gives its outputs in the reference, on `x`, and in the quantized network, on `own`."""
        assert layer.window is not None
        kernel, key = layer.get("kernel"), f"{layer.name}/kernel"
        tensor, value = self._tensors[key], self._values[key]
        # What is not nested serves all bits: fitted at one number of bits, it would be wrong at the others.
        shared = self._nested and not (quant.is_codebook_tensor(tensor) and tensor.coarse)
        if quant.is_codebook_tensor(tensor):
            next(self._progress)
            if not shared:
                self._fit_kernel(key, kernel, x, own, layer.window)
                self.scaled[key] = self.books[key]
                self._steps(key, self.books[key])
                last = kernel.ndim - 1
                value = from_groups(lookup(self.indices[key], self.books[key], 0), tensor.shape, last)
        wanted, y = convolve(x, kernel, layer.window), convolve(own, value, layer.window)
        if not layer.has("bias"):
            return wanted, y
        wanted, y = wanted + along(layer.get("bias"), y.ndim, y.ndim - 1), self._with_bias(layer, y)
        return (wanted, y) if shared else (wanted, self._matched(layer, wanted, y))

    def _linear_of_frames(self, layer: Layer, x: jax.Array, own: jax.Array, run: Run) -> tuple[jax.Array, jax.Array]:
        """Fits a linear layer over `[batch, ..., in]` as the convolution of one tap that it is; see `_convolution`."""
        wanted, key = run(x), f"{layer.name}/kernel"
        tensor = self._tensors[key]
        if self._nested and not tensor.coarse:
            return wanted, self._with_bias(layer, own @ self._values[key])
        flat, own_flat = (side.reshape(len(side), -1, side.shape[-1]) for side in (x, own))
        self._fit_kernel(key, layer.get("kernel"), flat, own_flat, window(1, 1))
        self.scaled[key] = self.books[key]
        y = self._with_bias(layer, own @ from_groups(lookup(self.indices[key], self.books[key], 0), tensor.shape, 1))
        return wanted, self._matched(layer, wanted, y) if layer.has("bias") else y

    def _recurrence(self, layer: Layer, x: jax.Array, own: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Fits what an LSTM sees of its past, on the outputs that its kernel gives before it is fitted."""
        kernel, key, frames = layer.get("kernel"), f"{layer.name}/kernel", layer.module.window
        wanted, y = recur(x, kernel, frames), recur(own, self._values[key], frames)
        tensor = self._tensors[key]
        if self._nested and not tensor.coarse:
            return wanted, y
        self._fit_kernel(key, kernel, before(wanted, frames), before(y, frames), window(1, 1))
        self.scaled[key] = self.books[key]
        value = from_groups(lookup(self.indices[key], self.books[key], 0), tensor.shape, 1)
        return wanted, recur(own, value, frames)

    def _steps(self, key: str, codebook: jax.Array) -> None:
        """Notes the steps of a kernel whose centroids are whole steps."""
        if key in self._rounds:
            self.leaves[f"{integers.COLLECTION}/{key}"] = np.asarray(integers.steps_of(codebook), np.float32)

    def _matched(self, layer: Layer, wanted: jax.Array, y: jax.Array) -> jax.Array:
        """Gives the channels of `y` the moments of those of `wanted`, by codebook (or kernel) and bias."""
        key, tensor = f"{layer.name}/kernel", self._tensors[f"{layer.name}/kernel"]
        slope, shift = matching(moments(y), moments(wanted))
        bias = self._values[f"{layer.name}/bias"] * slope + shift
        self.leaves[f"params/{layer.name}/bias"] = np.asarray(bias, self._tensors[f"{layer.name}/bias"].dtype)
        if quant.is_codebook_tensor(tensor):
            self.scaled[key] = self.books[key] * slope[:, None]
            self._steps(key, self.scaled[key])
        else:
            value = self._values[key] * along(slope, tensor.ndim, tensor.ndim - 1)
            self.leaves[f"params/{key}"] = np.asarray(value, tensor.dtype)
        return scale_and_shift(y, slope, shift)

    def _fit_kernel(self, key: str, kernel: jax.Array, x: jax.Array, own: jax.Array, window: Window) -> None:
        """Rounds a kernel by GPTQ. The groups of a grouped convolution have inputs, and so an H, of their own."""
        fits = []
        for kernels, inputs, owns, rows in _groups(kernel, x, own, window.groups):
            H, cross = _second_moments(inputs, owns, window)
            W = gptq.corrected(to_groups(kernels, kernel.ndim - 1), H, cross)
            fits.append(self._round(key, W, H, rows))
        books, indices = zip(*fits)
        self.books[key] = books[0] if len(fits) == 1 else jnp.concatenate(books)
        self.indices[key] = indices[0] if len(fits) == 1 else jnp.concatenate(indices)

    def _round(self, key: str, W: jax.Array, H: jax.Array, rows: slice) -> tuple[jax.Array, jax.Array]:
        """The codebooks `[out, K]` and indices `[out, n]` of the channels `rows` of a kernel."""
        tensor: CodebookTensor = self._tensors[key]
        bits = self._bits or tensor.bits
        if not self._coarser:
            given = jnp.asarray(tensor.codebook_of(bits), jnp.float32)
            # A codebook with a zero in it, or symmetric, was asked for: centroids that move would lose that.
            pinned = jnp.all(jnp.any(given == 0, axis=1)) | jnp.all(given == -given[:, ::-1])
            kept = self.levels.get(key) == "minmax" or (key not in self.levels and pinned)
            book, parents, free = given[rows, None], None, not kept
        else:
            coarser = self._coarser[-1]
            parents, cells = coarser.indices[key][rows], coarser.books[key][rows]
            (book,) = split_kmeans(W, parents, cells, (bits,))
            book, free = book.reshape(*cells.shape, -1), True
        known = basis(self.levels.get(key, "kmeans"), bits)
        book, indices = gptq.fit(W, book, H, parents, free=free, basis=known)
        if self._ascending and len(self._coarser) > 1:
            # Parts of neighbouring cells may overlap. Cut at the midpoints they ascend, as training needs them.
            book = _between(book, cells, self._coarser[0].books[key].shape[1])
            book, indices = gptq.fit(W, book, H, parents, free=False)
        if key in self._rounds:
            # Whole steps before the weights are rounded to them: error feedback then makes up for this rounding too.
            flat = book.reshape(len(W), -1)
            book = integers.round_kernel(flat.T, integers.steps_of(flat)).T.reshape(book.shape)
            book, indices = gptq.fit(W, book, H, parents, free=False)
        # Rounded as it will be stored: the layers after this one are fitted on what the file will give.
        stored = book.reshape(len(W), -1).astype(tensor.codebook.dtype)
        return stored.astype(jnp.float32), indices

    def _normalisation(self, layer: Layer, x: jax.Array) -> jax.Array:
        """Normalises by the mean and deviation that the inputs have, and notes these as the layer's statistics."""
        mean, deviation = moments(x)
        return self._normalised(layer, x, mean, deviation**2)

    def _matched_normalisation(self, layer: Layer, wanted: jax.Array, x: jax.Array) -> jax.Array:
        """Normalises so that outputs have the moments that the reference's have, on `wanted`."""
        (mean, deviation), (seen, spread) = moments(wanted), moments(x)
        root = jnp.sqrt(layer.get("var", "batch_stats") + layer.epsilon)
        # A channel that is dead in the reference tells nothing of its scale; one that is dead here cannot be stretched.
        stretch = jnp.where(deviation > 1e-6 * root, spread / jnp.maximum(deviation, 1e-12), 1.0)
        var = jnp.maximum((root * stretch) ** 2 - layer.epsilon, 0.0)
        centre = layer.get("mean", "batch_stats")
        return self._normalised(layer, x, seen - (mean - centre) * jnp.sqrt(var + layer.epsilon) / root, var)

    def _normalised(self, layer: Layer, x: jax.Array, mean: jax.Array, var: jax.Array) -> jax.Array:
        """Normalises by these statistics, and notes them as the layer's."""
        self.leaves[f"batch_stats/{layer.name}/mean"] = np.asarray(mean)
        self.leaves[f"batch_stats/{layer.name}/var"] = np.asarray(var)
        scale, bias = (self._values.get(f"{layer.name}/{leaf}") for leaf in ("scale", "bias"))
        root = jnp.sqrt(var + layer.epsilon)
        slope = 1 / root if scale is None else scale / root
        return scale_and_shift(x, slope, (0 if bias is None else bias) - mean * slope)


def normalises_freely(network: SpeakerNetwork) -> bool:
    """Whether frames are normalised anywhere but directly behind a convolution: in pre-activation and dense networks.

    >>> from kmq_jax.models import registry
    >>> normalises_freely(registry.build("resnet18")), normalises_freely(registry.build("resnet50"))
    (False, True)
    """
    return any(
        layer.kind == NORMALISATION and layer.follows is None and len(layer.inputs) > 2 for layer in layers(network)
    )


def _groups(
    kernel: jax.Array, x: jax.Array, own: jax.Array, groups: int
) -> list[tuple[jax.Array, jax.Array, jax.Array, slice]]:
    """The kernel, inputs and output channels of each group of a convolution."""
    if groups == 1:
        return [(kernel, x, own, slice(None))]
    ends = np.arange(groups + 1) * (kernel.shape[-1] // groups)
    slices = [slice(int(low), int(high)) for low, high in zip(ends, ends[1:])]
    inputs = zip(jnp.split(x, groups, axis=-1), jnp.split(own, groups, axis=-1))
    return [(kernel[..., rows], *both, rows) for rows, both in zip(slices, inputs)]


def _between(book: jax.Array, cells: jax.Array, roots: int) -> jax.Array:
    """Keeps the parts of each cell between the midpoints to its neighbours that split the same one of `roots` cells.

    Args:
        book: `[out, cells, parts]`.
        cells: their centroids `[out, cells]`, ascending inside each root.
        roots: how many cells there are at the fewest bits.
    """
    split = cells.reshape(len(cells), roots, -1)
    borders, ends = 0.5 * (split[..., 1:] + split[..., :-1]), jnp.full((len(cells), roots, 1), jnp.inf)
    low = jnp.concatenate([-ends, borders], axis=-1).reshape(*cells.shape, 1)
    high = jnp.concatenate([borders, ends], axis=-1).reshape(*cells.shape, 1)
    return jnp.clip(book, low, high)


def _second_moments(x: jax.Array, own: jax.Array, window: Window) -> tuple[jax.Array, jax.Array]:
    """Second moments of a convolution's inputs over random places, as `gptq.corrected` takes them.

    Args:
        x: the reference's activations `[batch, time, (freq,) channels]`.
        own: the quantized network's, x'.
        window: how the convolution moves.

    Returns:
        H, the mean of x' x'^T, and the mean of x' (x - x')^T, both `[n, n]` with n = taps x channels.
    """
    return _moments_at(_random_places(x.shape[0], *window.sizes(x.shape[1:-1])), x, own, window)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _random_places(*shape: int) -> tuple[jax.Array, ...]:
    """Different places of an array `[batch, time, (freq)]`: an index for each axis, `[places]` each."""
    count = math.prod(shape)
    return jnp.unravel_index(jax.random.choice(jax.random.key(0), count, (min(_PLACES, count),), replace=False), shape)


@functools.partial(jax.jit, static_argnums=3)
def _moments_at(
    places: tuple[jax.Array, ...], x: jax.Array, own: jax.Array, window: Window
) -> tuple[jax.Array, jax.Array]:
    rank = len(window.taps)
    batch, *starts = (place.reshape(-1, *[1] * rank) for place in places)
    index = [batch]
    for axis, (start, taps) in enumerate(zip(starts, window.taps)):
        tap = jnp.arange(taps).reshape([1, *(-1 if a == axis else 1 for a in range(rank))])
        index.append(start * window.strides[axis] + tap * window.dilations[axis])

    def patches(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), *window.padding, (0, 0)))
        return x[tuple(index)].reshape(len(batch), -1)

    x, own = patches(x), patches(own)
    # The second moment tells GPTQ how far x' has drifted from x: see `gptq.corrected`.
    return own.T @ own / len(batch), own.T @ (x - own) / len(batch)
