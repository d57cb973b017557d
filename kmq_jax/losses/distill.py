"""Distillation: a network (the student) learns to answer as another (the teacher) does, without speaker labels."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def cosine_distance(embeddings: jax.Array, teacher: jax.Array) -> jax.Array:
    """Mean of 1 - cosine between embeddings `[batch, dim]` and the teacher's, a scalar.

    >>> float(cosine_distance(jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([[3.0, 0.0], [1.0, 0.0]])))
    0.5
    """
    product = jnp.sum(embeddings * teacher, axis=-1)
    norms = jnp.sum(embeddings**2, axis=-1) * jnp.sum(teacher**2, axis=-1)
    # The floor keeps an all-zero embedding finite: its cosine is 0.
    return 1.0 - jnp.mean(product * jax.lax.rsqrt(jnp.maximum(norms, 1e-12)))


def relative_error(values: jax.Array, teacher: jax.Array) -> jax.Array:
    """Squared error over the teacher's energy, both summed over the whole batch, a float32 scalar.

    It is relative, so that layers of any magnitude and size weigh alike.

    >>> float(relative_error(jnp.array([1.0, 2.0]), jnp.array([2.0, 2.0])))
    0.125
    """
    teacher = teacher.astype(jnp.float32)
    error = jnp.sum((values.astype(jnp.float32) - teacher) ** 2)
    return error / jnp.maximum(jnp.sum(teacher**2), 1e-12)


def distillation(
    embeddings: jax.Array,
    stages: Sequence[jax.Array],
    teacher_embeddings: jax.Array,
    teacher_stages: Sequence[jax.Array],
    cosine: float = 1.0,
    embedding: float = 0.5,
    stage: float = 1.0,
) -> jax.Array:
    """The weighted sum of a student's errors against its teacher, a scalar.

    Args:
        embeddings: `[batch, dim]`.
        stages: outputs of the stages, `[batch, time, freq, channel]` each; may be none.
        teacher_embeddings: the teacher's on the same input.
        teacher_stages: the teacher's outputs of the same stages.
        cosine: weight of `cosine_distance` of the embeddings.
        embedding: weight of their `relative_error`.
        stage: weight of the mean `relative_error` of the stages, which guides early layers long before the embedding
            does.

    >>> x, y = jnp.array([[2.0, 0.0]]), jnp.array([[1.0, 0.0]])
    >>> float(distillation(x, [y], y, [y], cosine=1.0, embedding=0.5, stage=1.0))  # twice as long, same direction
    0.5
    """
    errors = [relative_error(s, t) for s, t in zip(stages, teacher_stages, strict=True)]
    return (
        cosine * cosine_distance(embeddings, teacher_embeddings)
        + embedding * relative_error(embeddings, teacher_embeddings)
        + (stage * jnp.stack(errors).mean() if errors else 0.0)
    )
