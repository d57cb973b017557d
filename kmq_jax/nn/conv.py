"""Two-dimensional convolution in the `[batch, time, freq, channel]` layout."""

import jax
from jax import lax


def conv2d(x: jax.Array, kernel: jax.Array, strides: tuple[int, int] = (1, 1)) -> jax.Array:
    """Convolves with zero padding of half the kernel on each side, as `padding=k//2` in PyTorch.

    Args:
        x: `[batch, time, freq, in channels]`.
        kernel: `[time taps, freq taps, in channels, out channels]`, of the dtype of `x`.
        strides: steps along time and frequency.

    Returns:
        `[batch, ceil(time / stride), ceil(freq / stride), out channels]` for odd kernels.
    """
    padding = [(taps // 2, taps // 2) for taps in kernel.shape[:2]]
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
