"""Convolution over time, `[batch, time, channel]`, and over time and frequency, `[batch, time, freq, channel]`.

On a GPU, a TPU, or several devices this is XLA's convolution with XLA's gradients. On a single CPU device XLA's weight
gradient is many times slower than the machine allows; there the kernels of nn/cpu compute plain 2-D convolutions. The
choice is made when a function is traced, from `jax.default_backend()`. All kernels serve training: a step needs the
convolution, both of its gradients and the sums of batch normalisation. ONNX Runtime, which embeds on a CPU by default,
so leaves none without use; where JAX embeds there, it takes the convolution.

A convolution is bilinear, and so are its two gradients. The transposes of each are the other two, so three primitives
with these rules differentiate to any order, forwards and backwards:

    y  = convolution(x, k)          x' = input_gradient(y', k)      k' = kernel_gradient(x, y')
    dx = input_gradient(dy, k)      dy' = convolution(dx', k)       k' = kernel_gradient(dx', dy)
    dk = kernel_gradient(x, dy)     x' = input_gradient(dy, dk')    dy' = convolution(x, dk')
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import DTypeLike

from kmq_jax.nn.cpu import library

Pair = tuple[int, int]
Shaped = tuple[tuple[int, ...], DTypeLike]
_LAYOUTS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC")}


class Window(NamedTuple):
    """How a convolution moves over its input: one entry for time, and in two dimensions one for frequency.

    Attributes:
        taps: kernel size.
        strides: steps between outputs.
        padding: zeros `(before, after)` the input.
        dilations: distances between taps.
        groups: parts of the channels that do not see each other; as many as channels is a depthwise convolution.
    """

    taps: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[Pair, ...]
    dilations: tuple[int, ...]
    groups: int = 1

    def sizes(self, inputs: tuple[int, ...]) -> tuple[int, ...]:
        """How many outputs there are for so many inputs.

        >>> window(1, 3, stride=2).sizes((9,))
        (5,)
        >>> window(2, (5, 3), padding="valid").sizes((100, 80))
        (96, 78)
        """
        return tuple(
            (size + sum(padding) - dilation * (taps - 1) - 1) // stride + 1
            for size, taps, stride, padding, dilation in zip(
                inputs, self.taps, self.strides, self.padding, self.dilations, strict=True
            )
        )


def window(
    rank: int,
    taps: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    padding: str | tuple[Pair, ...] = "same",
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Window:
    """Makes a `Window`; one number stands for all axes.

    Args:
        rank: 1, over time, or 2, over time and frequency.
        taps: kernel size.
        stride: step between outputs.
        padding: "same", half the kernel on each side as `padding=k//2` in PyTorch; "valid", none; or for each axis the
            zeros before and after.
        dilation: distance between taps.
        groups: parts of the channels that do not see each other.

    >>> window(1, 5, padding="valid", dilation=2)
    Window(taps=(5,), strides=(1,), padding=((0, 0),), dilations=(2,), groups=1)
    """
    sizes, strides, dilations = (
        (value,) * rank if isinstance(value, int) else tuple(value) for value in (taps, stride, dilation)
    )
    if isinstance(padding, str):
        half = [size // 2 * step if padding == "same" else 0 for size, step in zip(sizes, dilations)]
        padding = tuple((n, n) for n in half)
    return Window(sizes, strides, padding, dilations, groups)


def convolve(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """Convolves over one or two axes.

    Args:
        x: `[batch, time, in channels]` or `[batch, time, freq, in channels]`.
        kernel: `[*taps, in channels / groups, out channels]`, of the dtype of `x`.
        window: how the kernel moves.

    Returns:
        `[batch, *window.sizes(...), out channels]`, of the dtype of `x`.

    >>> convolve(jnp.ones((1, 4, 1)), jnp.ones((3, 1, 1)), window(1, 3)).ravel().tolist()
    [2.0, 3.0, 3.0, 2.0]
    """
    plain = window.groups == 1 and set(window.dilations) == {1}
    if len(window.taps) == 2 and plain and window.padding == tuple((taps // 2, taps // 2) for taps in window.taps):
        return conv2d(x, kernel, (window.strides[0], window.strides[1]))
    return lax.conv_general_dilated(
        x,
        kernel,
        window.strides,
        window.padding,
        rhs_dilation=window.dilations,
        dimension_numbers=_LAYOUTS[len(window.taps)],
        feature_group_count=window.groups,
    )


def conv2d(x: jax.Array, kernel: jax.Array, strides: Pair = (1, 1)) -> jax.Array:
    """Convolves with zero padding of half the kernel on each side, as `padding=k//2` in PyTorch.

    Args:
        x: `[batch, time, freq, in channels]`.
        kernel: `[time taps, freq taps, in channels, out channels]`, of the dtype of `x`.
        strides: steps along time and frequency.

    Returns:
        `[batch, ceil(time / stride), ceil(freq / stride), out channels]` for odd kernels, of the dtype of `x`.

    >>> conv2d(jnp.ones((1, 9, 8, 2)), jnp.ones((3, 3, 2, 5)), strides=(2, 2)).shape
    (1, 5, 4, 5)
    """
    if _use_native(x, kernel):
        return convolution(x, kernel, strides)
    padding = [(taps // 2, taps // 2) for taps in kernel.shape[:2]]
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _use_native(x: jax.Array, kernel: jax.Array) -> bool:
    # The kernels take one dtype, nothing empty, and odd taps: half of them is the same on both sides.
    fits = x.dtype == kernel.dtype and min(x.shape + kernel.shape) > 0 and all(taps % 2 for taps in kernel.shape[:2])
    return fits and library.usable(x.dtype)


def convolution(x: jax.Array, kernel: jax.Array, strides: Pair) -> jax.Array:
    """`conv2d` by the native kernel."""
    return _convolution.bind(x, kernel, strides=tuple(strides))


def input_gradient(gradient: jax.Array, kernel: jax.Array, strides: Pair, size: Pair) -> jax.Array:
    """Transposes `convolution` in its input, `[batch, *size, in channels]`."""
    return _input_gradient.bind(gradient, kernel, strides=tuple(strides), size=tuple(size))


def kernel_gradient(x: jax.Array, gradient: jax.Array, strides: Pair, taps: Pair) -> jax.Array:
    """Transposes `convolution` in its kernel, `[*taps, in channels, out channels]`, which comes in float32."""
    return _kernel_gradient.bind(x, gradient, strides=tuple(strides), taps=tuple(taps))


def _convolution_shape(x: jax.Array, kernel: jax.Array, *, strides: Pair) -> Shaped:
    size = tuple(-(-length // stride) for length, stride in zip(x.shape[1:3], strides))
    return (x.shape[0], *size, kernel.shape[3]), x.dtype


def _input_gradient_shape(gradient: jax.Array, kernel: jax.Array, *, strides: Pair, size: Pair) -> Shaped:
    return (gradient.shape[0], *size, kernel.shape[2]), gradient.dtype


def _kernel_gradient_shape(x: jax.Array, gradient: jax.Array, *, strides: Pair, taps: Pair) -> Shaped:
    return (*taps, x.shape[3], gradient.shape[3]), jnp.float32


def _primitive(
    name: str, target: str, shape: Callable[..., Shaped], batched: tuple[bool, bool], **attributes: bool
) -> Primitive:
    """Makes a primitive that calls a kernel of nn/cpu.

    Args:
        name: of the primitive.
        target: of the kernel in `library.TARGETS`.
        shape: gives shape and dtype of the result.
        batched: which operands may carry a vmapped axis inside their batch axis; other cases become a loop.
        attributes: further ones of the kernel.
    """
    primitive = Primitive(name)

    def call(a: jax.Array, b: jax.Array, **params: Pair) -> jax.Array:
        # The kernels' attributes are 64-bit integers (nn/cpu/convolution.cc).
        time, freq = (np.int64(stride) for stride in params["strides"])
        result = jax.ShapeDtypeStruct(*shape(a, b, **params))
        return jax.ffi.ffi_call(target, result)(a, b, time_stride=time, freq_stride=freq, **attributes)

    def batch(operands: tuple, axes: tuple, **params: Pair) -> tuple[jax.Array, int]:
        if tuple(axis is not None for axis in axes) == batched:
            # The mapped axis joins the batch: still one call of the kernel.
            a = jnp.moveaxis(operands[0], axes[0], 0)
            y = primitive.bind(a.reshape(-1, *a.shape[2:]), operands[1], **params)
            return y.reshape(*a.shape[:2], *y.shape[1:]), 0
        # Kernels that differ from slice to slice cannot share a call.
        mapped = [jnp.moveaxis(x, axis, 0) for x, axis in zip(operands, axes) if axis is not None]

        def one(slices: list[jax.Array]) -> jax.Array:
            rest = iter(slices)
            return primitive.bind(*(x if axis is None else next(rest) for x, axis in zip(operands, axes)), **params)

        return lax.map(one, mapped), 0

    # Called outside `jit`, the primitive is compiled by itself: there is no other code for it.
    primitive.def_impl(lambda a, b, **params: jax.jit(partial(primitive.bind, **params))(a, b))
    primitive.def_abstract_eval(lambda a, b, **params: jax.core.ShapedArray(*shape(a, b, **params)))
    mlir.register_lowering(primitive, mlir.lower_fun(call, multiple_results=False), platform="cpu")
    batching.primitive_batchers[primitive] = batch
    return primitive


_convolution = _primitive("kmq_convolution", "kmq_convolution", _convolution_shape, (True, False), transposed=False)
_input_gradient = _primitive(
    "kmq_input_gradient", "kmq_convolution", _input_gradient_shape, (True, False), transposed=True
)
# A kernel gradient sums over the batch, which a mapped axis must not join: it always becomes a loop.
_kernel_gradient = _primitive("kmq_kernel_gradient", "kmq_kernel_gradient", _kernel_gradient_shape, (False, False))

# For each primitive its transposes in the first and in the second operand: the table at the top.
ad.defbilinear(
    _convolution,
    lambda ct, x, k, strides: input_gradient(ct, k, strides, x.aval.shape[1:3]),
    lambda ct, x, k, strides: kernel_gradient(x, ct, strides, k.aval.shape[:2]).astype(k.aval.dtype),
)
ad.defbilinear(
    _input_gradient,
    lambda ct, dy, k, strides, size: convolution(ct, k, strides),
    lambda ct, dy, k, strides, size: kernel_gradient(ct, dy, strides, k.aval.shape[:2]).astype(k.aval.dtype),
)
ad.defbilinear(
    _kernel_gradient,
    lambda ct, x, dy, strides, taps: input_gradient(dy, ct.astype(dy.dtype), strides, x.aval.shape[1:3]),
    lambda ct, x, dy, strides, taps: convolution(x, ct.astype(x.dtype), strides),
)
