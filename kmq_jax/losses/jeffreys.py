"""Jeffreys loss: cross entropy with label smoothing and a spread of the wrong classes."""

import jax
import jax.numpy as jnp


def jeffreys(logits: jax.Array, labels: jax.Array, smoothing: float = 0.1, spread: float = 0.025) -> jax.Array:
    """Jeffreys loss of each example, in nats.

    `-sum_k t_k log p_k + c2 [sum_{k != y} p_k log p_k] / (1 - p_y)`, with `t_y = 1 - c1 - c2` and
    `t_k = c1 / (classes - 1)`.

    Args:
        logits: `[batch, classes]`, at least two classes.
        labels: int `[batch]`.
        smoothing: c1, the share of the target mass on the wrong classes.
        spread: c2, the weight of the wrong classes' negative entropy, which spreads their probability evenly.

    Returns:
        `[batch]`.

    References:
        Kiwano, the public code of the first author of the paper (`configs/PAPER.md`).

    >>> loss = jeffreys(jnp.array([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]]), jnp.array([0, 0]))
    >>> bool(loss[0] < 1.0 < loss[1])
    True
    """
    classes = logits.shape[-1]
    log_p = jax.nn.log_softmax(logits)
    is_true = jax.nn.one_hot(labels, classes, dtype=logits.dtype)
    targets = (1 - smoothing - spread) * is_true + smoothing / (classes - 1) * (1 - is_true)
    fit = -jnp.sum(targets * log_p, axis=-1)
    # Renormalised over the wrong classes in the log domain: p_k / (1 - p_y) would be 0 / 0 for a sure example.
    wrong = jax.nn.softmax(jnp.where(is_true > 0, -jnp.inf, logits))
    negative_entropy = jnp.sum(jnp.where(is_true > 0, 0.0, wrong * log_p), axis=-1)
    return fit + spread * negative_entropy
