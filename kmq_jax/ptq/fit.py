"""Quantization without training: on a few crops of speech, every layer's outputs are kept near the reference's.

The full-precision and the quantized network run side by side on the same crops, layer by layer. A convolution's weights
are rounded by GPTQ, for the inputs that it gets from the quantized layers before it (see `quant.gptq`). Its channels
then get the mean and deviation that they have in the reference: that map folds into codebook and bias (see `moments`).
Every batch normalisation gets statistics that give its outputs the moments of the reference's outputs. The model keeps
its size.

The statistics of a normalisation's own inputs would not do: on these crops the reference's activations may differ in
mean and deviation from those on the speech that it was trained on, and later layers rely on the difference. With them
even 8 bits make another network. Training by statistics of batches normalises by them all the same, and begins so.

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
from kmq_jax.core.memory import require_memory
from kmq_jax.core.progress import progress
from kmq_jax.core.tree import Leaf, Params, named_leaves, replace_named
from kmq_jax.data import source
from kmq_jax.models.protocol import SpeakerNetwork
from kmq_jax.models.speaker_model import PER_BITS, SpeakerModel, frontend_of
from kmq_jax.models.walk import CONVOLUTION, LINEAR, NORMALISATION, OTHER, RECURRENCE, Layer, Run, layers, walk
from kmq_jax.nn import integers
from kmq_jax.nn.channels import by_channel, scale_and_shift
from kmq_jax.nn.conv import Window, convolve, window
from kmq_jax.nn.recurrent import before, recur
from kmq_jax.ptq.moments import coarse_bits, matching, moments, per_bits_leaves, random_features
from kmq_jax.quant import gptq
from kmq_jax.quant.codes import from_groups, lookup, to_groups
from kmq_jax.quant.levels import basis
from kmq_jax.quant.nested import split_kmeans
from kmq_jax.quant.types import CodebookTensor

_PLACES = 1 << 14  # outputs drawn at random; H is estimated from what a layer sees at them
_COPIES = 8  # of the largest activations at least, of both networks, are held at once; ResNet34 10, CAM++ 13


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
        UserError: a tensor cannot be fitted; see `fit`.
    """
    features = random_features(frontend_of(reference.frontend), utterances, crops, seconds)
    return fit(reference, quantized, features)


def patterned(params: Params, rules: quant.Rules) -> dict[str, str]:
    """The level sets of the tensors whose centroids are not free, by parameter name.

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
    batch_statistics: bool = False,
) -> SpeakerModel:
    """Fits a quantized model to the reference's activations on given features.

    Convolutions of any rank are fitted, grouped ones too, and linear layers that see every frame, as those of
    attention do. A linear layer that sees one vector a crop keeps its weights: crops are too few for second moments.

    Args:
        reference: the full-precision model.
        quantized: the same network from `quant.quantize_params`, one codebook for each output channel. Codebooks that
            are symmetric or hold a zero are scaled, but otherwise kept. Nested tensors are fitted at the fewest bits
            first, then at more bits inside the cells of fewer. Each number of bits has biases and statistics of its
            own. What is not nested is the same for all bits and stays as it is.
        features: `[batch, time, mel]`.
        keep_coarsest: at its fewest bits a nested model is a trained network and stays as it is. Inside its cells the
            centroids of more bits ascend, so that training can go on with them.
        levels: by parameter name, the level set (`QuantSpec.levels`) of those whose centroids are not free.
        batch_statistics: where a normalisation stands directly behind a convolution it gets the statistics of its own
            inputs, as training by statistics of batches will see them.

    Returns:
        The fitted model, of the same size.

    Raises:
        UserError: a quantized tensor shares one codebook among channels, or belongs to a layer of an unknown kind or
            to one that runs more than once; or this machine's memory cannot hold the activations.
    """
    _require_memory(reference.network(), *features.shape[:2])
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
        one.matching = not batch_statistics or normalises_freely(reference.network())
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


def _require_memory(network: SpeakerNetwork, crops: int, frames: int) -> None:
    """Refuses activations that do not fit, before any are there."""
    largest = max(math.prod(shape) for layer in layers(network, frames) for shape in (layer.inputs, layer.outputs))
    require_memory(_COPIES * 2 * crops * largest * 4, f"fitting on {crops:,} crops of {frames} frames")


def _leaves(tensors: Mapping[str, Leaf], found: "list[_Fit]") -> dict[str, Leaf]:
    """What was fitted, by variable name: tensors with the codebooks of all bits, and the indices at the most bits."""
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

    Both networks' activations share a batch, the reference's first, so that each layer is visited with its inputs in
    both. Nothing is traced: a layer's outputs are there before the next layer is fitted.

    Attributes:
        scaled: by parameter name, the codebooks `[out, K]` of convolutions as they are stored, with which channels have
            the reference's moments.
        books: the same before that scaling; more bits are sought inside their cells.
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
        self.matching = True
        self._done: set[str] = set()  # names of the layers that ran
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
        with integers.watching(self._rounded):
            walk(reference.network(), reference.variables, jnp.concatenate([features, features]), self._visit)
        next(self._progress, None)

    def _rounded(self, place: str, x: jax.Array) -> jax.Array:
        """Rounds the quantized network's activations where it computes with integers, not the reference's."""
        return x if place not in self._rounds else _round_own(x, self._rounds[place])

    def _visit(self, layer: Layer, x: jax.Array, run: Run) -> jax.Array:
        quantized = quant.is_codebook_tensor(self._tensors.get(f"{layer.name}/kernel"))
        if quantized and layer.name in self._done:
            raise UserError(f"{layer.name} runs more than once, so it cannot be fitted; leave it unquantized")
        self._done.add(layer.name)
        if layer.kind == CONVOLUTION:
            return self._convolution(layer, self._rounded(f"{layer.name}/input", x))
        if layer.measures:
            reference, own = jnp.split(x, 2)
            if self.matching:
                return jnp.concatenate([run(reference), self._matched_normalisation(layer, reference, own)])
            return jnp.concatenate([run(reference), self._normalisation(layer, own)])
        if layer.kind == LINEAR and quantized:
            if x.ndim > 2:
                return self._linear_of_frames(layer, x)
            reference, own = jnp.split(x, 2)
            return jnp.concatenate([run(reference), self._with_bias(layer, own @ self._values[f"{layer.name}/kernel"])])
        if layer.kind == RECURRENCE and quantized:
            return self._recurrence(layer, x)
        if layer.kind == OTHER and quantized:
            raise UserError(f"{layer.name}: a {type(layer.module).__name__} cannot be fitted; leave it unquantized")
        return run(x)

    def _with_bias(self, layer: Layer, y: jax.Array) -> jax.Array:
        """Adds the quantized network's bias, where there is any."""
        return y + by_channel(self._values[f"{layer.name}/bias"], y) if layer.has("bias") else y

    def _convolution(self, layer: Layer, x: jax.Array) -> jax.Array:
        """Fits a convolution; gives its outputs in both networks."""
        assert layer.window is not None
        key = f"{layer.name}/kernel"
        tensor, value = self._tensors[key], self._values[key]
        # What is not nested serves all bits: fitted at one number of bits, it would be wrong at the others.
        shared = self._nested and not (quant.is_codebook_tensor(tensor) and tensor.coarse)
        if quant.is_codebook_tensor(tensor):
            next(self._progress)
            if not shared:
                value = self._fit_kernel(layer, x, layer.window)
        y = _both_convolved(x, layer.get("kernel"), value, layer.window)
        return self._with_biases(layer, y, matched=not shared)

    def _linear_of_frames(self, layer: Layer, x: jax.Array) -> jax.Array:
        """Fits a linear layer over `[batch, ..., in]` as the convolution of one tap that it is; see `_convolution`."""
        key, frames = f"{layer.name}/kernel", x.reshape(len(x), -1, x.shape[-1])
        shared = self._nested and not self._tensors[key].coarse
        value = self._values[key] if shared else self._fit_kernel(layer, frames, window(1, 1))
        reference, own = jnp.split(x, 2)
        y = jnp.concatenate([reference @ layer.get("kernel"), own @ value])
        return self._with_biases(layer, y, matched=not shared)

    def _recurrence(self, layer: Layer, x: jax.Array) -> jax.Array:
        """Fits the kernel by which an LSTM sees its past, on the outputs that it gives before it is fitted."""
        kernel, key, frames = layer.get("kernel"), f"{layer.name}/kernel", layer.module.window
        reference, own = jnp.split(x, 2)
        wanted, y = recur(reference, kernel, frames), recur(own, self._values[key], frames)
        if self._nested and not self._tensors[key].coarse:
            return jnp.concatenate([wanted, y])
        past = jnp.concatenate([before(wanted, frames), before(y, frames)])
        return jnp.concatenate([wanted, recur(own, self._fit_kernel(layer, past, window(1, 1)), frames)])

    def _with_biases(self, layer: Layer, y: jax.Array, matched: bool) -> jax.Array:
        """Adds the biases of both networks, where there are any; then channels can get the reference's moments."""
        if not layer.has("bias"):
            return y
        biases = layer.get("bias"), self._values[f"{layer.name}/bias"]
        if not matched:
            return _both_biased(y, *biases)
        y, slope, shift = _both_matched(y, *biases)
        self._match(layer.name, slope, shift)
        return y

    def _steps(self, key: str, codebook: jax.Array) -> None:
        """Notes the steps of a kernel whose centroids are whole steps."""
        if key in self._rounds:
            self.leaves[f"{integers.COLLECTION}/{key}"] = np.asarray(integers.steps_of(codebook), np.float32)

    def _match(self, name: str, slope: jax.Array, shift: jax.Array) -> None:
        """Notes the map that gives a layer's channels the reference's moments, in codebook (or kernel) and bias."""
        key, tensor = f"{name}/kernel", self._tensors[f"{name}/kernel"]
        bias = self._values[f"{name}/bias"] * slope + shift
        self.leaves[f"params/{name}/bias"] = np.asarray(bias, self._tensors[f"{name}/bias"].dtype)
        if quant.is_codebook_tensor(tensor):
            self.scaled[key] = self.books[key] * slope[:, None]
            self._steps(key, self.scaled[key])
        else:
            # The last axis of a kernel is its output channels.
            value = self._values[key] * by_channel(slope, tensor)
            self.leaves[f"params/{key}"] = np.asarray(value, tensor.dtype)

    def _fit_kernel(self, layer: Layer, x: jax.Array, window: Window) -> jax.Array:
        """Rounds a kernel by GPTQ; gives the rounded values in the kernel's shape.

        Each group of a grouped convolution has its own inputs, and so its own H.
        """
        key, kernel = f"{layer.name}/kernel", layer.get("kernel")
        last, fits = kernel.ndim - 1, []
        seen = _seen(x, window)
        for rows, channels in zip(_parts(kernel.shape[-1], window.groups), _parts(x.shape[-1], window.groups)):
            H, cross = _second_moments(seen[..., channels])
            W = gptq.corrected(to_groups(kernel[..., rows], last), H, cross)
            fits.append(self._round(key, W, H, rows))
        books, indices = zip(*fits)
        self.books[key] = self.scaled[key] = books[0] if len(fits) == 1 else jnp.concatenate(books)
        self.indices[key] = indices[0] if len(fits) == 1 else jnp.concatenate(indices)
        self._steps(key, self.books[key])
        return _kernel_of(self.indices[key], self.books[key], self._tensors[key].shape)

    def _round(self, key: str, W: jax.Array, H: jax.Array, rows: slice) -> tuple[jax.Array, jax.Array]:
        """The codebooks `[out, K]` and indices `[out, n]` of the channels `rows` of a kernel."""
        tensor: CodebookTensor = self._tensors[key]
        bits = self._bits or tensor.bits
        if not self._coarser:
            given = np.asarray(tensor.codebook_of(bits), np.float32)
            # Symmetric codebooks, or ones with a zero in them, were asked for: centroids that move would lose that.
            pinned = np.all(np.any(given == 0, axis=1)) or np.array_equal(given, -given[:, ::-1])
            kept = self.levels.get(key) == "minmax" or (key not in self.levels and pinned)
            book, parents, free = jnp.asarray(given[rows, None]), None, not kept
        else:
            coarser = self._coarser[-1]
            parents, cells = coarser.indices[key][rows], coarser.books[key][rows]
            (book,) = split_kmeans(W, parents, cells, (bits,))
            book, free = book.reshape(*cells.shape, -1), True
        known = basis(self.levels.get(key, "kmeans"), bits)
        book, indices = gptq.fit(W, book, H, parents, free=free, basis=known)
        if self._ascending and len(self._coarser) > 1:
            # Parts of neighbouring cells may overlap. Clipped at the midpoints they ascend, as training needs them.
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
        statistics = layer.get("mean", "batch_stats"), layer.get("var", "batch_stats")
        return self._normalised(layer, x, *_statistics_for(wanted, x, *statistics, layer.epsilon))

    def _normalised(self, layer: Layer, x: jax.Array, mean: jax.Array, var: jax.Array) -> jax.Array:
        """Normalises by these statistics, and notes them as the layer's."""
        self.leaves[f"batch_stats/{layer.name}/mean"] = np.asarray(mean)
        self.leaves[f"batch_stats/{layer.name}/var"] = np.asarray(var)
        scale, bias = (self._values.get(f"{layer.name}/{leaf}") for leaf in ("scale", "bias"))
        return _normalised_by(x, mean, var, layer.epsilon, scale, bias)


def normalises_freely(network: SpeakerNetwork) -> bool:
    """Whether frames are normalised anywhere but directly behind a convolution: in pre-activation and dense networks.

    >>> from kmq_jax.models import registry
    >>> normalises_freely(registry.build("resnet18")), normalises_freely(registry.build("resnet50"))
    (False, True)
    """
    return any(
        layer.kind == NORMALISATION and layer.follows is None and len(layer.inputs) > 2 for layer in layers(network)
    )


def _parts(count: int, groups: int) -> list[slice]:
    """Slices of equal length.

    >>> _parts(6, 2)
    [slice(0, 3, None), slice(3, 6, None)]
    """
    # Each slice by its end, so that `count` itself is the last.
    return [slice(end - count // groups, end) for end in range(count // groups, count + 1, count // groups)]


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


@jax.jit
def _statistics_for(
    wanted: jax.Array, x: jax.Array, centre: jax.Array, var: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array]:
    """Mean and variance for `x`: normalised by them it has the moments of `wanted` normalised by `centre` and `var`."""
    (mean, deviation), (seen, spread) = moments(wanted), moments(x)
    root = jnp.sqrt(var + epsilon)
    # A channel that is dead in the reference tells nothing of its scale; one that is dead here cannot be stretched.
    stretch = jnp.where(deviation > 1e-6 * root, spread / jnp.maximum(deviation, 1e-12), 1.0)
    new = jnp.maximum((root * stretch) ** 2 - epsilon, 0.0)
    return seen - (mean - centre) * jnp.sqrt(new + epsilon) / root, new


@jax.jit
def _normalised_by(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    epsilon: float,
    scale: jax.Array | None,
    bias: jax.Array | None,
) -> jax.Array:
    """Normalises `x` `[..., channels]` by statistics, scale and bias `[channels]`."""
    slope = (1.0 if scale is None else scale) / jnp.sqrt(var + epsilon)
    return scale_and_shift(x, slope, (0.0 if bias is None else bias) - mean * slope)


@functools.partial(jax.jit, static_argnames="shape")
def _kernel_of(indices: jax.Array, books: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The kernel that indices `[out, n]` and codebooks `[out, K]` stand for."""
    return from_groups(lookup(indices, books, 0), shape, len(shape) - 1)


@jax.jit
def _round_own(x: jax.Array, steps: jax.Array) -> jax.Array:
    """Rounds the quantized network's half of a batch as it computes with integers."""
    reference, own = jnp.split(x, 2)
    return jnp.concatenate([reference, integers.round_activations(own, steps)])


@functools.partial(jax.jit, static_argnames="window")
def _both_convolved(x: jax.Array, kernel: jax.Array, own: jax.Array, window: Window) -> jax.Array:
    """A convolution's outputs in both networks, without bias."""
    reference, quantized = jnp.split(x, 2)
    return jnp.concatenate([convolve(reference, kernel, window), convolve(quantized, own, window)])


@jax.jit
def _both_biased(y: jax.Array, bias: jax.Array, own: jax.Array) -> jax.Array:
    """Adds a bias to each half of a batch."""
    sides = zip(jnp.split(y, 2), (bias, own))
    return jnp.concatenate([side + by_channel(one, y) for side, one in sides])


@jax.jit
def _both_matched(y: jax.Array, bias: jax.Array, own: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adds biases and gives the quantized network's channels the reference's moments; returns slope and shift too."""
    reference, quantized = jnp.split(_both_biased(y, bias, own), 2)
    slope, shift = matching(moments(quantized), moments(reference))
    return jnp.concatenate([reference, scale_and_shift(quantized, slope, shift)]), slope, shift


def _seen(x: jax.Array, window: Window) -> jax.Array:
    """What a convolution sees at random outputs, in either half of a batch: `[2, places, taps, channels]`."""
    shape = len(x) // 2, *window.sizes(x.shape[1:-1])
    count = math.prod(shape)
    # Drawn by numpy: for JAX to sort so many, once a shape, would take longer to compile than all the rest.
    drawn = np.random.default_rng(0).choice(count, min(_PLACES, count), replace=False)
    return _seen_at(np.stack(np.unravel_index(drawn, shape)).astype(np.int32), x, window)


@functools.partial(jax.jit, static_argnames="window")
def _seen_at(places: jax.Array, x: jax.Array, window: Window) -> jax.Array:
    """See `_seen`. `places` `[1 + rank, count]` are outputs: an index in half a batch, then one for each axis."""
    rank = len(window.taps)
    batch, *starts = (place.reshape(-1, *[1] * rank) for place in places)
    # index[axis] broadcasts to [count, *taps]; what is not `inside` is padding, hence zero.
    index, inside = [], jnp.ones((len(batch), *window.taps), bool)
    for axis, (start, taps) in enumerate(zip(starts, window.taps)):
        tap = jnp.arange(taps).reshape([1, *(-1 if a == axis else 1 for a in range(rank))])
        at = start * window.strides[axis] + tap * window.dilations[axis] - window.padding[axis][0]
        inside &= (at >= 0) & (at < x.shape[1 + axis])
        index.append(jnp.clip(at, 0, x.shape[1 + axis] - 1))

    def half(first: int) -> jax.Array:
        values = x[(batch + first, *index)]
        return jnp.where(inside[..., None], values, 0).reshape(len(batch), -1, x.shape[-1])

    return jnp.stack([half(0), half(len(x) // 2)])


@jax.jit
def _second_moments(seen: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Second moments of a convolution's inputs, as `gptq.corrected` takes them.

    Args:
        seen: by `_seen`: inputs x in the reference, then x' in the quantized network.

    Returns:
        H, the mean of x' x'^T, and the mean of x' (x - x')^T, both `[n, n]` with n = taps x channels.
    """
    x, own = seen.reshape(2, seen.shape[1], -1)
    # The second result tells how far x' has drifted from x: see `gptq.corrected`.
    return own.T @ own / len(own), own.T @ (x - own) / len(own)
