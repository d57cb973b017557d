"""Margin softmax objectives: softmax, AM, AAM and sub-centre, with a scheduled margin."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax

from kmq_jax.core.errors import UserError

KINDS = ("softmax", "am", "aam")


@dataclasses.dataclass(frozen=True)
class MarginSchedule:
    """A margin that is zero, then rises, then stays.

    Attributes:
        final: the margin reached (AM: subtracted from the cosine; AAM: added to the angle, radians).
        start: step at which it begins to rise.
        end: step at which `final` is reached; `start` and `end` equal: constant from `start` on.

    >>> margin = MarginSchedule(0.2, start=100, end=200)
    >>> [round(float(margin(step)), 3) for step in (50, 150, 300)]
    [0.0, 0.1, 0.2]
    """

    final: float
    start: float = 0.0
    end: float = 0.0

    def __call__(self, step: jax.Array) -> jax.Array:
        """Returns the margin at `step`, a float32 scalar."""
        if self.end <= self.start:
            return jnp.where(step >= self.start, self.final, 0.0)
        return self.final * jnp.clip((step - self.start) / (self.end - self.start), 0.0, 1.0)


def class_cosines(embeddings: jax.Array, centres: jax.Array) -> jax.Array:
    """Cosine of each embedding to each class: to the nearest of its sub-centres (Deng et al. 2020).

    Args:
        embeddings: `[batch, dim]`.
        centres: `[classes, sub-centres, dim]`; one sub-centre is the usual classifier.

    Returns:
        `[batch, classes]`, float32.

    >>> class_cosines(jnp.array([[2.0, 0.0]]), jnp.array([[[1.0, 0.0]], [[0.0, 5.0]]])).tolist()
    [[1.0, 0.0]]
    """
    embeddings = _unit(embeddings.astype(jnp.float32))
    cosines = jnp.einsum("bd,ckd->bck", embeddings, _unit(centres.astype(jnp.float32)))
    return cosines.max(axis=-1)


def margin_logits(
    cosines: jax.Array, labels: jax.Array, margin: jax.Array | float, scale: float, kind: str
) -> jax.Array:
    """Makes the true class harder by a margin, and scales.

    Args:
        cosines: `[batch, classes]`.
        labels: int `[batch]`.
        margin: scalar; see `MarginSchedule`.
        scale: inverse temperature.
        kind: "softmax" (no margin), "am": cos - m (Wang et al. 2018), or "aam": cos(angle + m) (Deng et al. 2019).
            Past angle + m = pi, where the cosine would rise again, AAM goes on as cos - m sin(pi - m).

    Returns:
        Logits `[batch, classes]`.

    Raises:
        UserError: `kind` is not one of these.

    >>> margin_logits(jnp.array([[0.75, 0.5]]), jnp.array([0]), margin=0.25, scale=8.0, kind="am").tolist()
    [[4.0, 4.0]]
    """
    if kind not in KINDS:
        raise UserError(f"loss.kind {kind!r} must be one of {', '.join(KINDS)}")
    true = jnp.take_along_axis(cosines, labels[:, None], axis=1)
    if kind == "am":
        hard = true - margin
    elif kind == "aam":
        # The clip keeps the square root's gradient finite where an embedding meets its centre.
        sine = jnp.sqrt(jnp.clip(1.0 - true**2, 1e-7, 1.0))
        rotated = true * jnp.cos(margin) - sine * jnp.sin(margin)
        # cos(angle) > cos(pi - m): the angle plus the margin still lies below pi.
        hard = jnp.where(true > -jnp.cos(margin), rotated, true - margin * jnp.sin(margin))
    else:
        hard = true
    is_true = jax.nn.one_hot(labels, cosines.shape[1], dtype=bool)
    return scale * jnp.where(is_true, hard, cosines)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross entropy of each example, `[batch]`, in nats.

    >>> bool(jnp.allclose(cross_entropy(jnp.zeros((1, 4)), jnp.array([2])), jnp.log(4.0)))
    True
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def init_centres(key: jax.Array, classes: int, sub_centres: int, dim: int) -> jax.Array:
    """Glorot-uniform class centres `[classes, sub-centres, dim]`.

    >>> init_centres(jax.random.key(0), classes=10, sub_centres=3, dim=16).shape
    (10, 3, 16)
    """
    limit = math.sqrt(6.0 / (classes * sub_centres + dim))
    return jax.random.uniform(key, (classes, sub_centres, dim), minval=-limit, maxval=limit)


def _unit(x: jax.Array) -> jax.Array:
    # rsqrt of a floored square: a zero vector stays zero, and its gradient is 1e6 times the incoming one, not NaN.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-12))
