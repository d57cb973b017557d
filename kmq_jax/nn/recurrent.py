"""The part of an LSTM that sees its own past. What it sees of the input is a convolution of one tap before it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kmq_jax.nn.layers import TORCH_DEFAULT


def recur(x: jax.Array, kernel: jax.Array, window: int) -> jax.Array:
    """Runs an LSTM over windows that know nothing of one another.

    Args:
        x: `[batch, windows * window, 4 * width]`, what the input gives to the gates: input, forget, cell, output.
        kernel: `[width, 4 * width]`, from the output before to the gates.
        window: frames of each window; it starts from zeros.

    Returns:
        Float32 `[batch, windows * window, width]`.

    >>> recur(jnp.zeros((2, 6, 8)), jnp.zeros((2, 8)), 3).shape
    (2, 6, 2)
    """
    width = kernel.shape[0]
    batch, frames, gates = x.shape
    windows = x.reshape(-1, window, gates)

    def step(state: tuple[jax.Array, jax.Array], x: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        cell, output = state
        seen = x.astype(jnp.float32) + jnp.matmul(output.astype(kernel.dtype), kernel).astype(jnp.float32)
        # PyTorch's order: input, forget, cell, output.
        enters, keeps, candidate, leaves = jnp.split(seen, 4, axis=-1)
        cell = nn.sigmoid(keeps) * cell + nn.sigmoid(enters) * jnp.tanh(candidate)
        output = nn.sigmoid(leaves) * jnp.tanh(cell)
        return (cell, output), output

    zeros = jnp.zeros((len(windows), width), jnp.float32)
    _, outputs = jax.lax.scan(step, (zeros, zeros), windows.swapaxes(0, 1))
    return outputs.swapaxes(0, 1).reshape(batch, frames, width)


def before(x: jax.Array, window: int) -> jax.Array:
    """Each frame's predecessor in its window, zeros at the start: `[batch, windows * window, width]` to the same.

    >>> before(jnp.arange(1.0, 5.0).reshape(1, 4, 1), 2).ravel().tolist()
    [0.0, 1.0, 0.0, 3.0]
    """
    windows = x.reshape(-1, window, x.shape[-1])
    return jnp.pad(windows[:, :-1], ((0, 0), (1, 0), (0, 0))).reshape(x.shape)


class Recurrence(nn.Module):
    """`recur` by a kernel of its own.

    Attributes:
        window: frames of each window.
        dtype: compute dtype of the product; the cell is float32.
    """

    window: int
    dtype: DTypeLike = "float32"
    kernel_init = TORCH_DEFAULT  # no field, but looked at by `registry.initialize`

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, windows * window, 4 * width]` to `[batch, windows * window, width]`."""
        width = x.shape[-1] // 4
        kernel = self.param("kernel", TORCH_DEFAULT, (width, 4 * width))
        return recur(x, kernel.astype(self.dtype), self.window)
