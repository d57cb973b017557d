"""Scores of trials on an accelerator: as `cosine` and `snorm`, within float32 rounding, many times faster there.

Embeddings are put on the device once; what is computed of a chunk of trials or utterances has one static shape, so that
each function compiles once whatever the list's length.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from kmq_jax.core.errors import UserError
from kmq_jax.scoring.cosine import unit_rows

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
    """
    one = unit_rows(enrol_embeddings)
    two = one if test_embeddings is enrol_embeddings else unit_rows(test_embeddings)
    if one.shape[1] != two.shape[1]:
        raise UserError(f"enrolment embeddings have {one.shape[1]} dimensions, test embeddings {two.shape[1]}")
    rows = [np.asarray(enrol, np.int32), np.asarray(test, np.int32)]
    for side, table in zip(rows, (one, two)):
        if side.size and not 0 <= side.min() <= side.max() < len(table):
            raise UserError(f"a trial names embedding {int(side.max())} of {len(table)}")
    count = len(rows[0])
    chunk = min(_TRIALS, 1 << max(count - 1, 0).bit_length())
    padded = [np.pad(side, (0, -count % chunk)) for side in rows]
    held = jnp.asarray(one)
    other = held if two is one else jnp.asarray(two)
    parts = [_pairs(held, other, *(side[i : i + chunk] for side in padded)) for i in range(0, len(padded[0]), chunk)]
    return np.concatenate([np.asarray(part) for part in parts])[:count] if parts else np.zeros(0, np.float32)


@functools.partial(jax.jit, static_argnames="top_n")
def _statistics(unit: jax.Array, members: jax.Array, top_n: int) -> jax.Array:
    """Mean and deviation `[2, rows]` of the `top_n` highest products of each row with the cohort."""
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
    """
    unit, members = unit_rows(embeddings), unit_rows(cohort)
    if unit.shape[1] != members.shape[1]:
        raise UserError(f"embeddings have {unit.shape[1]} dimensions, the cohort {members.shape[1]}")
    if not 2 <= top_n <= len(members):
        raise UserError(f"top_n (={top_n}) must lie between 2 and the cohort's size, {len(members)}")
    count = len(unit)
    step = min(max(1, _COHORT_SCORES // len(members)), 1 << max(count - 1, 0).bit_length())
    held = jnp.asarray(members)
    padded = np.pad(unit, ((0, -count % step), (0, 0)), mode="edge")
    parts = [_statistics(padded[i : i + step], held, top_n) for i in range(0, len(padded), step)]
    mean, deviation = np.concatenate([np.asarray(part) for part in parts], axis=1)[:, :count]
    if deviation.min() < 1e-6:
        raise UserError(f"the top {top_n} cohort scores of embedding {int(deviation.argmin())} are all the same")
    return mean, deviation


def adaptive_snorm(
    scores: ArrayLike,
    enrol_embeddings: ArrayLike,
    test_embeddings: ArrayLike,
    enrol: ArrayLike,
    test: ArrayLike,
    cohort: ArrayLike,
    top_n: int = 300,
) -> np.ndarray:
    """AS-norm with the cohort's statistics from the device; arguments and result as of `snorm.adaptive_snorm`."""
    scores = np.asarray(scores, np.float32)
    table, enrol, test = np.asarray(enrol_embeddings), np.asarray(enrol, np.int64), np.asarray(test, np.int64)
    if test_embeddings is not enrol_embeddings:
        test = test + len(table)
        table = np.concatenate([table, np.asarray(test_embeddings)])
    used, place = np.unique(np.stack([enrol, test]), return_inverse=True)
    mean, deviation = cohort_statistics(table[used], cohort, top_n)
    place = place.reshape(2, -1)
    return ((scores - mean[place]) / deviation[place]).mean(axis=0)
