"""ONNX operators as functions of arrays, for graphs that come from other tools.

An operator computes in numpy where all its inputs are numpy arrays, else in JAX. So what depends on shapes alone stays
known while a function is traced: it can be a shape again, and everything is static under `jit`. Operators have the form
of operator set 18: axes, pads and sizes are inputs.

Graphs may come from anyone. What can make a result larger than its inputs checks its size before it is allocated.

Reference: https://onnx.ai/onnx/operators.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kmq_jax.core.tree import Array

Attributes = Mapping[str, Any]
Operands = Sequence[Array]
"""Inputs of an operator: numpy arrays, JAX arrays, and None for those left out."""

TYPES = ("bool", "uint8", "int8", "int32", "int64", "float32", "float64")
"""Of values: smaller numbers are held as uint8 or int8, float16 and bfloat16 as float32."""


class Call:
    """A call of an operator.

    Attributes:
        x: the inputs.
        attributes: by name.
        most: elements that the result may have.
        xp: numpy or jax.numpy.
    """

    def __init__(self, x: Operands, attributes: Attributes, most: int):
        self.x, self.attributes, self.most = x, attributes, most
        self.xp: ModuleType = np if all(one is None or is_static(one) for one in x) else jnp

    def get(self, name: str, default: Any) -> Any:
        """An attribute, or what it is where left out."""
        return self.attributes.get(name, default)

    def operand(self, place: int) -> Array:
        """An input, or None where it is left out."""
        return self.x[place] if place < len(self.x) else None

    def numbers(self, place: int, what: str) -> list[int] | None:
        """An input whose values must be known from shapes; None where it is left out.

        Raises:
            ValueError: it depends on the sound.
        """
        value = self.operand(place)
        if value is None:
            return None
        if not is_static(value):
            raise ValueError(f"its {what} depends on the sound, not on its length alone")
        return [int(n) for n in np.ravel(value)]

    def allow(self, shape: Sequence[int]) -> None:
        """Refuses a result that is too large.

        Raises:
            ValueError: it is.
        """
        if any(n < 0 for n in shape) or math.prod(shape) > self.most:
            raise ValueError(f"it would give values of shape {tuple(shape)}")


Operator = Callable[[Call], Array]


def is_static(value: object) -> bool:
    """Whether a value is known while a function is traced.

    >>> is_static(np.float32(1)), is_static(jnp.zeros(1))
    (True, False)
    """
    return isinstance(value, np.ndarray | np.generic)


def compute(kind: str, x: Operands, attributes: Attributes, most: int) -> tuple[Array, ...]:
    """Computes an operator.

    Args:
        kind: one of `KINDS`.
        x: inputs.
        attributes: by name.
        most: elements that a result may have.

    Returns:
        The outputs; numpy arrays where the inputs are.

    Raises:
        ValueError: the inputs do not fit, or a result would be too large.

    >>> compute("Concat", [np.array([1]), np.array([2, 3])], {"axis": 0}, 10)[0].tolist()
    [1, 2, 3]
    """
    if kind in ELEMENTWISE:
        rank = max(np.ndim(one) for one in x if one is not None)
        x = [one if one is None else _of_rank(one, rank) for one in x]
    call = Call(x, attributes, most)
    if kind in ELEMENTWISE:
        call.allow(np.broadcast_shapes(*(np.shape(one) for one in x if one is not None)))
    with np.errstate(all="ignore"):
        made = _ALL[kind](call)
    outputs = made if isinstance(made, tuple) else (made,)
    for one in outputs:
        call.allow(np.shape(one))
    return tuple(np.asarray(one) if is_static(one) else one for one in outputs)


def _of_rank(x: Array, rank: int) -> Array:
    """Adds axes of length 1 in front, where there are any axes."""
    return x if np.ndim(x) in (0, rank) else x.reshape((1,) * (rank - x.ndim) + x.shape)


def _unary(function: Callable[..., Array], **defaults: float) -> Operator:
    """Makes an operator of `function(xp, x, attributes...)`."""

    def run(call: Call) -> Array:
        return function(call.xp, call.x[0], **{name: call.get(name, value) for name, value in defaults.items()})

    return run


def _in_jax(function: Callable[[jax.Array], jax.Array]) -> Operator:
    return lambda call: function(jnp.asarray(call.x[0]))


def _named(name: str) -> Operator:
    """An operator that numpy and JAX have under one name."""
    return lambda call: getattr(call.xp, name)(*call.x)


def _folded(name: str) -> Operator:
    """The same for any number of inputs, taken two at a time."""

    def run(call: Call) -> Array:
        total = call.x[0]
        for one in call.x[1:]:
            total = getattr(call.xp, name)(total, one)
        return total

    return run


def _is_integer(x: Array) -> bool:
    return bool(np.issubdtype(np.dtype(x.dtype), np.integer))


def _divide(call: Call) -> Array:
    x, y = call.x
    if not _is_integer(x):
        return call.xp.divide(x, y)
    # Integers are cut towards zero.
    quotient = call.xp.abs(x) // call.xp.maximum(call.xp.abs(y), 1)
    return (quotient * call.xp.sign(x) * call.xp.sign(y)).astype(x.dtype)


def _power(call: Call) -> Array:
    x, y = call.x
    if is_static(y) and np.size(y) == 1 and float(y.ravel()[0]) == 2:
        return x * x  # exact, and with a plain gradient
    return call.xp.power(x, y).astype(x.dtype)


def _modulo(call: Call) -> Array:
    # `fmod` has the sign of the first operand, `mod` that of the second.
    return (call.xp.fmod if call.get("fmod", 0) else call.xp.mod)(*call.x)


def _clip(call: Call) -> Array:
    x, low, high = call.x[0], call.operand(1), call.operand(2)
    x = x if low is None else call.xp.maximum(x, low)
    return x if high is None else call.xp.minimum(x, high)


def _cast(call: Call) -> Array:
    return call.x[0].astype(_type(call.get("to", ""), call.xp))


def _type(name: str, xp: ModuleType) -> np.dtype:
    if name not in TYPES:
        raise ValueError(f"type {name!r} is not supported")
    if xp is jnp:  # which has no 64 bits, and needs none
        name = {"float64": "float32", "int64": "int32"}.get(name, name)
    return np.dtype(name)


_UNARY: dict[str, Operator] = {
    "Relu": _unary(lambda xp, x: xp.maximum(x, 0)),
    "Sigmoid": _in_jax(jax.nn.sigmoid),
    "Tanh": _unary(lambda xp, x: xp.tanh(x)),
    "Erf": _in_jax(jax.scipy.special.erf),
    "Softplus": _in_jax(jax.nn.softplus),
    "Softsign": _in_jax(jax.nn.soft_sign),
    "Mish": _in_jax(jax.nn.mish),
    "Sqrt": _named("sqrt"),
    "Exp": _named("exp"),
    "Log": _named("log"),
    "Sin": _named("sin"),
    "Cos": _named("cos"),
    "Neg": _named("negative"),
    "Abs": _named("abs"),
    "Sign": _named("sign"),
    "Floor": _named("floor"),
    "Ceil": _named("ceil"),
    "Round": _named("round"),
    "Not": _named("logical_not"),
    "IsNaN": _named("isnan"),
    "Reciprocal": _unary(lambda xp, x: 1 / x),
    "LeakyRelu": _unary(lambda xp, x, alpha: xp.where(x < 0, alpha * x, x), alpha=0.01),
    "Elu": _unary(lambda xp, x, alpha: xp.where(x < 0, alpha * xp.expm1(xp.minimum(x, 0)), x), alpha=1.0),
    "HardSigmoid": _unary(lambda xp, x, alpha, beta: xp.clip(alpha * x + beta, 0, 1), alpha=0.2, beta=0.5),
    "HardSwish": _unary(lambda xp, x: x * xp.clip(x / 6 + 0.5, 0, 1)),
    "Cast": _cast,
}
_BROADCAST: dict[str, Operator] = {
    "Add": _named("add"),
    "Sub": _named("subtract"),
    "Mul": _named("multiply"),
    "Div": _divide,
    "Pow": _power,
    "Mod": _modulo,
    "Max": _folded("maximum"),
    "Min": _folded("minimum"),
    "Sum": _folded("add"),
    "Equal": _named("equal"),
    "Less": _named("less"),
    "LessOrEqual": _named("less_equal"),
    "Greater": _named("greater"),
    "GreaterOrEqual": _named("greater_equal"),
    "And": _named("logical_and"),
    "Or": _named("logical_or"),
    "Xor": _named("logical_xor"),
    "Where": _named("where"),
    "PRelu": lambda call: call.xp.where(call.x[0] < 0, call.x[1] * call.x[0], call.x[0]),
    "Clip": _clip,
}
ELEMENTWISE = frozenset(_UNARY) | frozenset(_BROADCAST)
"""Operators that do the same to every element, whatever the order of the axes."""


def _reduction(function: Callable[[ModuleType, Array, tuple[int, ...], bool], Array]) -> Operator:
    def run(call: Call) -> Array:
        x, axes = call.x[0], call.numbers(1, "axes")
        if not axes:
            # Over no axis a sum of squares is a square, and so on.
            axes = [] if call.get("noop_with_empty_axes", 0) else list(range(x.ndim))
        y = function(call.xp, x, tuple(_axis(a, x.ndim) for a in axes), bool(call.get("keepdims", 1)))
        return y.astype(x.dtype) if _is_integer(x) else y

    return run


def _axis(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise ValueError(f"axis {axis} is outside {rank} axes")
    return axis % rank


def _logarithm_of_sum(xp: ModuleType, x: Array, axes: tuple[int, ...], keep: bool) -> Array:
    return jax.nn.logsumexp(jnp.asarray(x), axes, keepdims=keep)


REDUCTIONS: dict[str, Operator] = {
    "ReduceMean": _reduction(lambda xp, x, axes, keep: xp.mean(x, axes, keepdims=keep)),
    "ReduceSum": _reduction(lambda xp, x, axes, keep: xp.sum(x, axes, keepdims=keep)),
    "ReduceMax": _reduction(lambda xp, x, axes, keep: xp.max(x, axes, keepdims=keep)),
    "ReduceMin": _reduction(lambda xp, x, axes, keep: xp.min(x, axes, keepdims=keep)),
    "ReduceProd": _reduction(lambda xp, x, axes, keep: xp.prod(x, axes, keepdims=keep)),
    "ReduceL1": _reduction(lambda xp, x, axes, keep: xp.sum(xp.abs(x), axes, keepdims=keep)),
    "ReduceL2": _reduction(lambda xp, x, axes, keep: xp.sqrt(xp.sum(x * x, axes, keepdims=keep))),
    "ReduceSumSquare": _reduction(lambda xp, x, axes, keep: xp.sum(x * x, axes, keepdims=keep)),
    "ReduceLogSum": _reduction(lambda xp, x, axes, keep: xp.log(xp.sum(x, axes, keepdims=keep))),
    "ReduceLogSumExp": _reduction(_logarithm_of_sum),
}


def _concat(call: Call) -> Array:
    return call.xp.concatenate(list(call.x), axis=call.get("axis", 0))


def _shape(call: Call) -> np.ndarray:
    return np.array(np.shape(call.x[0])[call.get("start", 0) : call.get("end", None)], np.int64)


def _gather(call: Call) -> Array:
    x, indices = call.x
    axis = _axis(call.get("axis", 0), x.ndim)
    call.allow((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))
    return call.xp.take(x, _within(indices, x.shape[axis], call.xp), axis=axis)


def _gather_elements(call: Call) -> Array:
    x, indices = call.x
    axis = _axis(call.get("axis", 0), x.ndim)
    if indices.ndim != x.ndim:
        raise ValueError(f"indices of {indices.ndim} axes do not fit {x.ndim}")
    x = x[tuple(slice(None) if n == axis else slice(size) for n, size in enumerate(indices.shape))]
    return call.xp.take_along_axis(x, _within(indices, x.shape[axis], call.xp), axis=axis)


def _within(indices: Array, size: int, xp: ModuleType) -> Array:
    if is_static(indices) and indices.size and not (-size <= indices.min() and indices.max() < size):
        raise ValueError(f"its indices lie outside an axis of {size}")
    return xp.clip(xp.where(indices < 0, indices + size, indices), 0, max(size - 1, 0))


def _slice(call: Call) -> Array:
    x, starts, ends = call.x[0], call.numbers(1, "start") or [], call.numbers(2, "end") or []
    axes, steps = call.numbers(3, "axes"), call.numbers(4, "step")
    index = [slice(None)] * x.ndim
    for start, end, axis, step in zip(
        starts, ends, range(len(starts)) if axes is None else axes, steps or [1] * len(starts), strict=True
    ):
        axis = _axis(axis, x.ndim)
        size, back = x.shape[axis], step < 0
        # Negative numbers count from the end. Backwards, an end in front of the first value is -1 here, None to Python.
        start, end = (n + size if n < 0 else n for n in (start, end))
        low, high = (-1, size - 1) if back else (0, size)
        start, end = min(max(start, 0), high), min(max(end, low), high)
        index[axis] = slice(start, None if end < 0 else end, step)
    return x[tuple(index)]


def _split(call: Call) -> tuple[Array, ...]:
    x, sizes, axis = call.x[0], call.numbers(1, "sizes"), _axis(call.get("axis", 0), call.x[0].ndim)
    if sizes is None:
        parts = call.get("num_outputs", 1)
        one = -(-x.shape[axis] // parts)
        sizes = [min(one, x.shape[axis] - n * one) for n in range(parts)]
    if sum(sizes) != x.shape[axis] or any(n < 0 for n in sizes):
        raise ValueError(f"parts of {sizes} do not make {x.shape[axis]}")
    return tuple(call.xp.split(x, np.cumsum(sizes)[:-1].tolist(), axis=axis))


def _squeeze(call: Call) -> Array:
    axes = call.numbers(1, "axes")
    return call.xp.squeeze(call.x[0], None if axes is None else tuple(axes))


def _unsqueeze(call: Call) -> Array:
    axes = call.numbers(1, "axes") or []
    rank = call.x[0].ndim + len(axes)
    places = {_axis(axis, rank) for axis in axes}
    sizes = iter(call.x[0].shape)
    return call.x[0].reshape([1 if axis in places else next(sizes) for axis in range(rank)])


def _reshape(call: Call) -> Array:
    x, shape = call.x[0], call.numbers(1, "shape") or []
    if not call.get("allowzero", 0):
        shape = [x.shape[axis] if n == 0 else n for axis, n in enumerate(shape)]
    return x.reshape(shape)


def _flatten(call: Call) -> Array:
    x, axis = call.x[0], call.get("axis", 1)
    axis = axis if axis == x.ndim else _axis(axis, x.ndim)
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _expand(call: Call) -> Array:
    shape = np.broadcast_shapes(call.x[0].shape, tuple(call.numbers(1, "shape") or []))
    call.allow(shape)
    return call.xp.broadcast_to(call.x[0], shape)


def _tile(call: Call) -> Array:
    repeats = call.numbers(1, "repeats") or []
    call.allow([n * size for n, size in zip(repeats, call.x[0].shape, strict=True)])
    return call.xp.tile(call.x[0], repeats)


def _range(call: Call) -> np.ndarray:
    if call.xp is jnp:
        raise ValueError("its length depends on the sound, not on its length alone")
    start, limit, step = (one.ravel()[0] for one in call.x)
    call.allow((max(math.ceil((float(limit) - float(start)) / float(step)), 0),))
    return np.arange(start, limit, step, dtype=start.dtype)


def _pad(call: Call) -> Array:
    x, pads, value, axes = call.x[0], call.numbers(1, "pads") or [], call.operand(2), call.numbers(3, "axes")
    axes = list(range(x.ndim)) if axes is None else axes
    pairs = [(0, 0)] * x.ndim
    for axis, before, after in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        pairs[_axis(axis, x.ndim)] = before, after
    # Negative pads cut values away; then the others are padded.
    if any(max(-low, 0) + max(-high, 0) > size for (low, high), size in zip(pairs, x.shape)):
        raise ValueError(f"pads {pairs} cut away more than there is of {x.shape}")
    x = x[tuple(slice(max(-low, 0), size - max(-high, 0)) for (low, high), size in zip(pairs, x.shape))]
    pairs = [(max(low, 0), max(high, 0)) for low, high in pairs]
    call.allow([size + low + high for size, (low, high) in zip(x.shape, pairs)])
    mode = call.get("mode", "constant")
    if mode != "constant":
        if mode not in ("reflect", "edge", "wrap") or any(
            max(pair) >= size for pair, size in zip(pairs, x.shape) if mode == "reflect" and max(pair)
        ):
            raise ValueError(f"padding {pairs} by {mode} does not fit {x.shape}")
        return call.xp.pad(x, pairs, mode)
    filled = np.zeros(()) if value is None else value
    return call.xp.pad(x, pairs, constant_values=filled.reshape(()).astype(x.dtype))


def _matmul(call: Call) -> Array:
    x, y = call.x
    if x.ndim < 1 or y.ndim < 1:
        raise ValueError("it multiplies a number")
    if min(x.ndim, y.ndim) > 1:
        call.allow((*np.broadcast_shapes(x.shape[:-2], y.shape[:-2]), x.shape[-2], y.shape[-1]))
    return call.xp.matmul(x, y)


def _gemm(call: Call) -> Array:
    a, b, c = call.x[0], call.x[1], call.operand(2)
    a, b = a.T if call.get("transA", 0) else a, b.T if call.get("transB", 0) else b
    call.allow((a.shape[0], b.shape[1]))
    y = call.get("alpha", 1.0) * (a @ b)
    return (y if c is None else y + call.get("beta", 1.0) * _of_rank(c, 2)).astype(a.dtype)


def _einsum(call: Call) -> Array:
    shapes = [jax.ShapeDtypeStruct(one.shape, np.float32) for one in call.x]
    call.allow(jax.eval_shape(lambda *x: jnp.einsum(call.get("equation", ""), *x), *shapes).shape)
    return call.xp.einsum(call.get("equation", ""), *call.x)


def _cumulative_sum(call: Call) -> Array:
    if call.get("exclusive", 0) or call.get("reverse", 0):
        raise ValueError("a reverse or exclusive sum is not supported")
    (axis,) = call.numbers(1, "axis") or [0]
    return call.xp.cumsum(call.x[0], axis=_axis(axis, call.x[0].ndim), dtype=call.x[0].dtype)


def _along_one(call: Call) -> tuple[jax.Array, int]:
    """What a softmax is of, and along which axis."""
    x, axis = jnp.asarray(call.x[0]), _axis(call.get("axis", -1), call.x[0].ndim)
    if call.get("flat", 0) and axis != x.ndim - 1:
        raise ValueError("a softmax over several axes, as before operator set 13, is not supported")
    return x, axis


def _softmax(call: Call) -> Array:
    x, axis = _along_one(call)
    return jax.nn.softmax(x, axis)


def _log_softmax(call: Call) -> Array:
    x, axis = _along_one(call)
    return jax.nn.log_softmax(x, axis)


def _normalised(x: Array, axes: tuple[int, ...], epsilon: float) -> jax.Array:
    mean = jnp.mean(x, axes, keepdims=True)
    centred = x - mean
    return centred * lax.rsqrt(jnp.mean(centred * centred, axes, keepdims=True) + epsilon)


def _instance_norm(call: Call) -> Array:
    x, *affine = call.x
    slope, shift = (one.reshape(1, -1, *[1] * (x.ndim - 2)) for one in affine)
    return _normalised(x, tuple(range(2, x.ndim)), call.get("epsilon", 1e-5)) * slope + shift


def _layer_norm(call: Call) -> Array:
    x, slope, shift = call.x[0], call.x[1], call.operand(2)
    axes = tuple(range(_axis(call.get("axis", -1), x.ndim), x.ndim))
    y = _normalised(x, axes, call.get("epsilon", 1e-5)) * _of_rank(slope, x.ndim)
    return y if shift is None else y + _of_rank(shift, x.ndim)


def _lp_norm(call: Call) -> Array:
    x, axis = jnp.asarray(call.x[0]), call.get("axis", -1)
    norm = jnp.sum(jnp.abs(x) if call.get("p", 2) == 1 else x * x, axis, keepdims=True)
    # Zeros, as of digital silence, stay zeros.
    some = jnp.where(norm > 0, norm, 1)
    return x / some if call.get("p", 2) == 1 else x * lax.rsqrt(some)


def _along(value: Array, x: Array, axis: int) -> Array:
    """Lays a scale or level of zero along an axis of `x`."""
    if value.size == 1:
        return value.reshape(())
    if value.ndim != 1:
        raise ValueError("scales of blocks are not supported")
    return value.reshape([-1 if n == _axis(axis, x.ndim) else 1 for n in range(x.ndim)])


def _dequantize(call: Call) -> Array:
    x, scale, zero, axis = call.x[0], call.x[1], call.operand(2), call.get("axis", 1)
    y = x.astype(np.float32)
    y = y if zero is None else y - _along(zero, x, axis).astype(np.float32)
    return y * _along(scale, x, axis)


def _quantize(call: Call) -> Array:
    x, scale, zero, axis = call.x[0], call.x[1], call.operand(2), call.get("axis", 1)
    zero = np.zeros((), np.uint8) if zero is None else zero
    if not is_static(zero) or zero.dtype not in (np.uint8, np.int8):
        raise ValueError("only 8-bit levels that the file holds are supported")
    ends = np.iinfo(zero.dtype)
    y = call.xp.round(x / _along(scale, x, axis)) + _along(zero, x, axis).astype(np.float32)
    return call.xp.clip(y, ends.min, ends.max).astype(np.int32)


def _pooling(call: Call) -> tuple[Array, list[tuple[int, ...]], list[np.ndarray]]:
    """What both poolings have: the window's taps, steps, pads and dilations, and how many inputs each output has."""
    x, taps = call.x[0], list(call.get("kernel_shape", []))
    rank = len(taps)
    if call.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or rank != x.ndim - 2 or rank < 1:
        raise ValueError("this padding or rank of a pooling is not supported")
    steps, dilations = call.get("strides", [1] * rank), call.get("dilations", [1] * rank)
    pads = call.get("pads", [0] * 2 * rank)
    if min(*taps, *steps, *dilations) < 1 or min(pads) < 0:
        raise ValueError("a window must move")
    pairs, counts = [], []
    include = call.get("count_include_pad", 0)
    for axis, (tap, step, dilation) in enumerate(zip(taps, steps, dilations, strict=True)):
        size, low, high = x.shape[axis + 2], pads[axis], pads[axis + rank]
        span = (tap - 1) * dilation + 1
        room = size + low + high - span
        outputs = (-(-room // step) if call.get("ceil_mode", 0) else room // step) + 1
        if call.get("ceil_mode", 0) and (outputs - 1) * step >= size + low:
            outputs -= 1  # a window that would begin in the padding
        if outputs < 1:
            raise ValueError(f"{size} values are too few")
        # As much behind as the last window needs, which with `ceil_mode` may be more than `high`.
        pairs.append((low, max((outputs - 1) * step + span - size - low, 0)))
        call.allow((outputs, tap))
        seen = np.arange(outputs)[:, None] * step + np.arange(tap) * dilation - low
        # Padding that is asked for may count as input; what `ceil_mode` adds never does.
        first, last = (-low, size + high) if include else (0, size)
        counts.append(((seen >= first) & (seen < last)).sum(1))
    windows = [(1, 1, *taps), (1, 1, *steps), (1, 1, *dilations)]
    return [(0, 0), (0, 0), *pairs], windows, counts


def _average_pool(call: Call) -> Array:
    pairs, (taps, steps, dilations), counts = _pooling(call)
    x = jnp.asarray(call.x[0])
    sums = lax.reduce_window(x, np.zeros((), x.dtype), lax.add, taps, steps, pairs, window_dilation=dilations)
    divisor = np.ones((1, 1, *(len(one) for one in counts)), np.float32)
    for axis, one in enumerate(counts):
        divisor *= one.reshape([-1 if n == axis + 2 else 1 for n in range(x.ndim)])
    return sums / divisor


def _max_pool(call: Call) -> Array:
    pairs, (taps, steps, dilations), _ = _pooling(call)
    x = jnp.asarray(call.x[0])
    return lax.reduce_window(x, -np.inf, lax.max, taps, steps, pairs, window_dilation=dilations)


def _global(function: str) -> Operator:
    return lambda call: getattr(call.xp, function)(call.x[0], tuple(range(2, call.x[0].ndim)), keepdims=True)


_OTHERS: dict[str, Operator] = {
    "Concat": _concat,
    "Shape": _shape,
    "Size": lambda call: np.array(np.size(call.x[0]), np.int64),
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": lambda call: call.xp.transpose(call.x[0], call.get("perm", None)),
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Expand": _expand,
    "Tile": _tile,
    "Range": _range,
    "Pad": _pad,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Einsum": _einsum,
    "CumSum": _cumulative_sum,
    "Softmax": _softmax,
    "LogSoftmax": _log_softmax,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "LpNormalization": _lp_norm,
    "DequantizeLinear": _dequantize,
    "QuantizeLinear": _quantize,
    "AveragePool": _average_pool,
    "MaxPool": _max_pool,
    "GlobalAveragePool": _global("mean"),
    "GlobalMaxPool": _global("max"),
}
_ALL = {**_UNARY, **_BROADCAST, **REDUCTIONS, **_OTHERS}
KINDS = frozenset(_ALL)
"""The operators that `compute` knows."""
