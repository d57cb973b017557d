"""Scores of trials on an accelerator: those of `cosine` and `snorm` within float32 rounding, many times faster there.

Embeddings are put on the device once. Trials and utterances are worked on in chunks of one static shape, so that each
function compiles once however long the list is.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from kmq_jax.core.errors import UserError
from kmq_jax.scoring.cosine import check_rows, unit_rows
from kmq_jax.scoring.snorm import check_spread, checked_rows

_TRIALS = 1 << 18  # trials at a time
_COHORT_SCORES = 1 << 26  # cohort scores at a time


@jax.jit
def _pairs(one: jax.Array, two: jax.Array, enrol: jax.Array, test: jax.Array) -> jax.Array:
    """Products `[trials]` of rows, clipped to what a cosine can be."""
    return jnp.clip(jnp.sum(one[enrol] * two[test], axis=-1), -1, 1)


def cosine_scores(
    enrol_embeddings: ArrayLike, test_embeddings: ArrayLike, enrol: ArrayLike, test: ArrayLike
) -> np.ndarray:
    """Cosine of the two embeddings of each trial; see `cosine.cosine_scores`.

    Args:
        enrol_embeddings: `[enrolments, dim]`.
        test_embeddings: `[tests, dim]`.
        enrol: `[trials]`, rows of `enrol_embeddings`.
        test: `[trials]`, rows of `test_embeddings`.

    Returns:
        `[trials]` float32.

    Raises:
        UserError: dimensions differ, a row is out of range, or an embedding is zero or not finite.

    >>> cosine_scores(np.eye(2), np.eye(2), enrol=[0, 0], test=[0, 1]).tolist()
    [1.0, 0.0]
    """
    one = unit_rows(enrol_embeddings)
    two = one if test_embeddings is enrol_embeddings else unit_rows(test_embeddings)
    if one.shape[1] != two.shape[1]:
        raise UserError(f"enrolment embeddings have {one.shape[1]} dimensions, test embeddings {two.shape[1]}")
    # JAX clamps rows that are out of range without a word, so they are checked here.
    rows = [np.asarray(enrol, np.int32), np.asarray(test, np.int32)]
    for side, table in zip(rows, (one, two)):
        check_rows(side, len(table))
    count = len(rows[0])
    # A power of two for a short list, so that lists of like length share a compilation.
    chunk = min(_TRIALS, 1 << max(count - 1, 0).bit_length())
    padded = [np.pad(side, (0, -count % chunk)) for side in rows]  # with row 0, whose scores are cut off below
    held = jnp.asarray(one)
    other = held if two is one else jnp.asarray(two)
    parts = [_pairs(held, other, *(side[i : i + chunk] for side in padded)) for i in range(0, len(padded[0]), chunk)]
    return np.concatenate([np.asarray(part) for part in parts])[:count] if parts else np.zeros(0, np.float32)


@functools.partial(jax.jit, static_argnames="top_n")
def _statistics(unit: jax.Array, members: jax.Array, top_n: int) -> jax.Array:
    """Mean and deviation `[2, rows]` of the `top_n` highest products of each row with the cohort."""
    # By default an accelerator would multiply in bfloat16 or TF32.
    scores = jnp.matmul(unit, members.T, precision=jax.lax.Precision.HIGHEST)
    top = jax.lax.top_k(scores, top_n)[0]
    return jnp.stack([top.mean(-1), top.std(-1)])


def cohort_statistics(embeddings: ArrayLike, cohort: ArrayLike, top_n: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each utterance's `top_n` highest cohort scores; see `snorm.cohort_statistics`.

    Args:
        embeddings: `[utterances, dim]`.
        cohort: `[members, dim]`.
        top_n: how many cohort members count, from 2 to all of them.

    Returns:
        Means and standard deviations, each `[utterances]` float32.

    Raises:
        UserError: `top_n` is out of range, dimensions differ, or an utterance's top scores are all the same.

    >>> mean, deviation = cohort_statistics([[1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], top_n=2)
    >>> mean.tolist(), deviation.tolist()
    ([0.5], [0.5])
    """
    unit, members = checked_rows(embeddings, cohort, top_n)
    count = len(unit)
    if not count:
        return np.zeros(0, np.float32), np.zeros(0, np.float32)
    step = min(max(1, _COHORT_SCORES // len(members)), 1 << max(count - 1, 0).bit_length())
    held = jnp.asarray(members)
    padded = np.pad(unit, ((0, -count % step), (0, 0)), mode="edge")  # copies of the last row, cut off below
    parts = [_statistics(padded[i : i + step], held, top_n) for i in range(0, len(padded), step)]
    mean, deviation = np.concatenate([np.asarray(part) for part in parts], axis=1)[:, :count]
    check_spread(deviation, top_n)
    return mean, deviation
