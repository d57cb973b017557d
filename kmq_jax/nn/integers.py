"""8-bit activations and weights, emulated in floating point: what an integer engine computes, anywhere else.

Layers name the places where an engine rounds their activations, by `rounded`. A place that has a step in the collection
`COLLECTION` of the network's variables is rounded to it; the others, and all of them in a network without that
collection, cost nothing. A convolution that has steps for its channels, too, multiplies whole numbers (`levels`). Such
places are inputs of convolutions, and what residual blocks add; linear and LSTM layers have none, and stay in floating
point.

    x = step * (q - zero),  0 <= q <= 255        a tensor: one step and one zero
    w = step * k,          -127 <= k <= 127      a kernel: a step for each output channel
    b = step_x * step_w * n                      a bias, which is added to the sum of products

Both hold zero exactly, so that padding stays zero. Gradients pass straight through, except where an activation is
cut; a kernel's steps leave nothing to cut.

References:
    Jacob et al., Quantization and training of neural networks for efficient integer-arithmetic-only inference, 2018.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp

from kmq_jax.nn.channels import by_channel

COLLECTION = "integers"
LEVELS = 255
"""Steps from the least to the greatest activation."""
LARGEST = 127
"""The largest weight, in steps."""
_LEAST_STEP = 1e-30  # of a dead channel, whose step would be 0

Watcher = Callable[[str, jax.Array], jax.Array]
_watcher: contextvars.ContextVar[Watcher | None] = contextvars.ContextVar("watcher", default=None)


@contextlib.contextmanager
def watching(watch: Watcher) -> Iterator[None]:
    """A context in which `watch(place, x)` stands for the rounding at every place, such as "stage1/block0/input"."""
    token = _watcher.set(watch)
    try:
        yield
    finally:
        _watcher.reset(token)


def rounded(module: nn.Module, x: jax.Array, place: str) -> jax.Array:
    """Rounds activations where the module has a step for this place.

    Args:
        module: the Linen module that is running.
        x: any shape.
        place: a name within the module.

    Returns:
        Of the shape and dtype of `x`; `x` itself where there is no step.
    """
    watch = _watcher.get()
    if watch is not None:
        return watch("/".join((*module.path, place)), x)
    if not module.has_variable(COLLECTION, place):
        return x
    return round_activations(x, module.get_variable(COLLECTION, place))


def at_work(module: nn.Module, place: str) -> bool:
    """Whether `rounded` would do anything with activations at this place."""
    return _watcher.get() is not None or module.has_variable(COLLECTION, place)


def levels(module: nn.Module, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """What a convolution multiplies: whole numbers where the module has steps for its input and kernel.

    Sums of their products are exact in float32, up to 2^24 steps, in whatever order they are added.

    Args:
        module: the Linen module that is running.
        x: its input.
        kernel: `[..., out]`.

    Returns:
        Input and kernel in steps, and the step `[out]` of their products; or both as they are, and None.
    """
    if _watcher.get() is not None or not module.has_variable(COLLECTION, "kernel"):
        return rounded(module, x, "input"), kernel, None
    grid: jax.Array = module.get_variable(COLLECTION, "input")
    steps: jax.Array = module.get_variable(COLLECTION, "kernel")
    return activation_levels(x, grid), kernel_levels(kernel, steps), jnp.maximum(steps * grid[0], _LEAST_STEP)


def from_sums(sums: jax.Array, bias: jax.Array | None, step: jax.Array) -> jax.Array:
    """Turns sums of products in steps into values, after adding the bias rounded to whole steps.

    Args:
        sums: `[..., out]`, in steps.
        bias: `[out]`, or none.
        step: `[out]`.

    >>> from_sums(jnp.array([[3.0, -2.0]]), jnp.array([0.26, 0.0]), jnp.array([0.125, 0.5])).tolist()
    [[0.625, -1.0]]
    """
    if bias is not None:
        # A dead channel's bias is more of its steps than float32 can count, whose values are whole from 2^23 on anyway.
        # An engine gives it a larger step.
        sums = sums + by_channel(_straight_through(jnp.round(bias / step), bias / step), sums)
    return sums * by_channel(step, sums)


def round_activations(x: jax.Array, grid: jax.Array) -> jax.Array:
    """Rounds activations to 256 levels.

    Args:
        x: any shape.
        grid: `[2]`: the step, and the level of zero.

    >>> round_activations(jnp.array([-9.0, 0.2, 0.3, 9.0]), jnp.array([0.5, 2.0])).tolist()
    [-1.0, 0.0, 0.5, 9.0]
    """
    return (activation_levels(x, grid) * grid[0]).astype(x.dtype)


def activation_levels(x: jax.Array, grid: jax.Array) -> jax.Array:
    """The level of each activation less that of zero: a whole number, in float32.

    >>> activation_levels(jnp.array([-9.0, 0.2, 0.3, 9.0]), jnp.array([0.5, 2.0])).tolist()
    [-2.0, 0.0, 1.0, 18.0]
    """
    step, zero = grid[0], grid[1]
    x = x.astype(jnp.float32)
    # Away from the steps at both ends the gradient is one, beyond them zero.
    inside = jnp.clip(x / step, -zero, LEVELS - zero)
    return _straight_through(jnp.round(inside), inside)


def round_kernel(kernel: jax.Array, steps: jax.Array) -> jax.Array:
    """Rounds a kernel `[..., out]` to whole steps `[out]`, 127 at most.

    >>> round_kernel(jnp.array([[0.2, 3.0], [0.8, 4.4]]), jnp.array([0.5, 2.0])).tolist()
    [[0.0, 4.0], [1.0, 4.0]]
    """
    steps = jnp.maximum(steps, _LEAST_STEP)
    return (kernel_levels(kernel, steps) * by_channel(steps, kernel)).astype(kernel.dtype)


def kernel_levels(kernel: jax.Array, steps: jax.Array) -> jax.Array:
    """A kernel `[..., out]` in steps `[out]`: whole numbers, in float32.

    >>> kernel_levels(jnp.array([[0.2, 3.0], [0.8, 4.4]]), jnp.array([0.5, 2.0])).tolist()
    [[0.0, 2.0], [2.0, 2.0]]
    """
    whole = kernel.astype(jnp.float32) / by_channel(jnp.maximum(steps, _LEAST_STEP), kernel)
    return _straight_through(jnp.clip(jnp.round(whole), -LARGEST, LARGEST), whole)


def _straight_through(exact: jax.Array, smooth: jax.Array) -> jax.Array:
    """`exact` forwards, without an error of rounding, and the gradient of `smooth`."""
    return jax.lax.stop_gradient(exact) + (smooth - jax.lax.stop_gradient(smooth))


def grid_of(low: float, high: float) -> tuple[float, float]:
    """The step and the level of zero for activations between two values; zero is always among the levels.

    >>> grid_of(-1.0, 3.0)
    (0.01568627450980392, 64.0)
    >>> grid_of(0.0, 0.0)
    (1.0, 0.0)
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        return 1.0, 0.0
    step = (high - low) / LEVELS
    return step, float(round(-low / step))


def steps_of(codebook: jax.Array) -> jax.Array:
    """The steps `[groups]` for which the largest centroid of each codebook `[groups, K]` is 127 of them.

    >>> steps_of(jnp.array([[-127.0, 5.0], [0.0, 254.0]])).tolist()
    [1.0, 2.0]
    """
    return jnp.maximum(jnp.max(jnp.abs(codebook), axis=1) / LARGEST, _LEAST_STEP)
