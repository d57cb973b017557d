"""The one walk through a network's layers: each is shown to a visitor, in running order, with its inputs.

Counting arithmetic, measuring moments and fitting weights are visitors. The walk intercepts Linen's calls, so it works
eagerly, under `jit` and on shapes alone.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from kmq_jax.core.files import Row
from kmq_jax.core.tree import Array, Variables
from kmq_jax.models.protocol import SpeakerNetwork
from kmq_jax.nn.conv import Window
from kmq_jax.nn.layers import BatchNorm, Conv
from kmq_jax.nn.recurrent import Recurrence

CONVOLUTION, LINEAR, RECURRENCE, NORMALISATION = "convolution", "linear", "recurrence", "normalisation"
OTHER = "other"

Run = Callable[[jax.Array], jax.Array]
Visitor = Callable[["Layer", jax.Array, Run], jax.Array]
"""Called as `visit(layer, inputs, run)`. It returns the layer's output; `run(inputs)` runs the layer itself."""


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """A layer at the moment when it is called.

    Attributes:
        name: its path, such as "stage1/block0/conv1".
        kind: CONVOLUTION, LINEAR, RECURRENCE, NORMALISATION (by batch statistics or what they are folded into), or
            OTHER: any module with a kernel that is none of these.
        module: the Linen module; its parameters are read by `get`.
        window: of a convolution, how it moves over its input.
        follows: the layer whose output, unchanged, is this layer's input; None where something lies between, such as
            an activation. A normalisation can be folded into the layer that it follows.
    """

    name: str
    kind: str
    module: nn.Module
    window: Window | None
    follows: str | None

    def get(self, leaf: str, collection: str = "params") -> jax.Array:
        """The layer's parameter or statistic."""
        value: jax.Array = self.module.get_variable(collection, leaf)
        return value

    def has(self, leaf: str, collection: str = "params") -> bool:
        """Whether the layer has this parameter or statistic."""
        return self.module.has_variable(collection, leaf)

    @property
    def epsilon(self) -> float:
        """What a normalisation adds to the variance."""
        epsilon: float = self.module.epsilon
        return epsilon

    @property
    def measures(self) -> bool:
        """Whether this is a normalisation with statistics of its own."""
        return self.kind == NORMALISATION and self.has("mean", "batch_stats")


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """What can be told of a layer without running it.

    Attributes:
        name: as in `Layer`.
        kind: as in `Layer`.
        window: as in `Layer`.
        follows: as in `Layer`.
        kernel: shape of the kernel, `[..., in, out]`; None of a normalisation.
        inputs: shape of the input, `[batch, ..., in]`.
        outputs: shape of the output.
    """

    name: str
    kind: str
    window: Window | None
    follows: str | None
    kernel: tuple[int, ...] | None
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def macs(self) -> int:
        """Multiply-accumulates. Zero padding counts as input, as is usual; biases and normalisations do not count."""
        # At each place of the output every entry of the kernel is used once, in grouped convolutions too.
        return 0 if self.kernel is None else math.prod(self.kernel) * math.prod(self.outputs[:-1])


@contextlib.contextmanager
def visiting(visit: Visitor) -> Iterator[None]:
    """A context in which `visit` sees every layer of every network that runs."""
    last: tuple[str, jax.Array | None] = ("", None)

    def intercept(run: Callable[..., Array], args: tuple, kwargs: Row, context: nn.module.InterceptorContext) -> Array:
        nonlocal last
        module = context.module
        kind = _kind(module) if context.method_name == "__call__" else None
        if kind is None:
            return run(*args, **kwargs)
        x, *rest = args
        name = "/".join(module.path)
        # The very same array: anything in between, such as an activation, would have made another.
        layer = Layer(name, kind, module, _window(module, x), last[0] if x is last[1] else None)
        y = visit(layer, x, lambda x: run(x, *rest, **kwargs))
        last = name, y
        return y

    with nn.intercept_methods(intercept):
        yield


def walk(network: SpeakerNetwork, variables: Variables, features: jax.Array, visit: Visitor) -> jax.Array:
    """Runs a network in evaluation, every layer by a visitor.

    Args:
        network: to run.
        variables: `{"params": tree, "batch_stats": tree}`, nothing packed.
        features: `[batch, time, features]`, no frame padded.
        visit: called for every layer.

    Returns:
        The embeddings.
    """
    with visiting(visit):
        # Rematerialized blocks are traced apart: what a visitor keeps of them would be a leaked tracer.
        embeddings: Array = network.without_remat().apply(variables, features, train=False)
    return embeddings


def shapes(network: SpeakerNetwork) -> Variables:
    """The variables of a network as `jax.ShapeDtypeStruct`, without drawing any. A network is traced once."""
    return jax.tree.map(lambda leaf: leaf, _shapes(network))  # a tree of the caller's own


@functools.lru_cache(maxsize=64)
def _shapes(network: SpeakerNetwork) -> Variables:
    return traced(network)


def traced(network: SpeakerNetwork) -> Variables:
    """The same, traced anew: visitors are shown the layers."""
    # Seven frames more than the least: of eight, three strides of 2 leave one.
    return jax.eval_shape(network.init, jax.random.key(0), _features(network, 7 + network.least_frames()))


def layers(network: SpeakerNetwork, frames: int = 300) -> list[LayerShape]:
    """All layers in running order, for one utterance of so many frames; no arithmetic runs. Traced once as well."""
    return list(_layers(network, frames))


@functools.lru_cache(maxsize=64)
def _layers(network: SpeakerNetwork, frames: int) -> tuple[LayerShape, ...]:
    found: list[LayerShape] = []

    def record(layer: Layer, x: jax.Array, run: Run) -> jax.Array:
        y = run(x)
        kernel = layer.get("kernel").shape if layer.has("kernel") else None
        found.append(LayerShape(layer.name, layer.kind, layer.window, layer.follows, kernel, x.shape, y.shape))
        return y

    jax.eval_shape(lambda v, x: walk(network, v, x, record), shapes(network), _features(network, frames))
    return tuple(found)


def _features(network: SpeakerNetwork, frames: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, frames, network.features), jnp.float32)


def _kind(module: nn.Module) -> str | None:
    # A convolution of Flax that no `Window` describes falls through to OTHER: it has a kernel.
    if isinstance(module, Conv) or isinstance(module, nn.Conv) and _is_plain(module):
        return CONVOLUTION
    if isinstance(module, nn.Dense):
        return LINEAR
    if isinstance(module, Recurrence):
        return RECURRENCE
    if isinstance(module, BatchNorm | nn.BatchNorm):
        return NORMALISATION
    return OTHER if module.has_variable("params", "kernel") else None


def _is_plain(module: nn.Conv) -> bool:
    """Whether a `Window` tells all of Flax's convolution: neither mirrored or circular padding nor a spread input."""
    spread = module.input_dilation if isinstance(module.input_dilation, Sequence) else [module.input_dilation]
    padding = module.padding
    return set(spread) <= {None, 1} and (not isinstance(padding, str) or padding.upper() in ("SAME", "VALID"))


def _window(module: nn.Module, x: jax.Array) -> Window | None:
    """How a convolution, ours or Flax's own, moves over `x` `[batch, ..., channels]`."""
    if isinstance(module, Conv):
        return module.window(x)
    if not isinstance(module, nn.Conv) or not _is_plain(module):
        return None
    taps = (module.kernel_size,) if isinstance(module.kernel_size, int) else tuple(module.kernel_size)

    def each(value: int | Sequence[int] | None) -> tuple[int, ...]:
        return (value or 1,) * len(taps) if isinstance(value, int | None) else tuple(value)

    strides, dilations, padding = each(module.strides), each(module.kernel_dilation), module.padding
    if isinstance(padding, int):
        padding = [padding] * len(taps)
    if isinstance(padding, str):
        # Flax pads by the size of the input where we pad by that of the kernel, so it is worked out for this x.
        spans = [(size - 1) * step + 1 for size, step in zip(taps, dilations)]
        padding = jax.lax.padtype_to_pads(x.shape[1:-1], spans, strides, padding)
    pairs = tuple((n, n) if isinstance(n, int) else (int(n[0]), int(n[1])) for n in padding)
    return Window(taps, strides, pairs, dilations, module.feature_group_count)
