"""Cosine scores of trials."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

from kmq_jax.core.errors import UserError

_CHUNK = 1024  # trials scored at a time: their embeddings stay in the cache


def unit_rows(embeddings: ArrayLike) -> np.ndarray:
    """Scales embeddings to length one.

    Args:
        embeddings: `[utterances, dim]`.

    Returns:
        `[utterances, dim]` float32.

    Raises:
        UserError: an embedding is zero or not finite; the message names its row.
    """
    rows = np.asarray(embeddings, np.float32)
    if rows.ndim != 2:
        raise UserError(f"embeddings must be [utterances, dim], got shape {rows.shape}")
    length = np.sqrt(np.vecdot(rows, rows, dtype=np.float64))  # in float64, squares do not overflow
    bad = ~(np.isfinite(length) & (length > 0))
    if bad.any():
        raise UserError(f"embedding {int(bad.argmax())} is zero or not finite, and so are {int(bad.sum()) - 1} others")
    return (rows / length[:, None]).astype(np.float32)


def cosine_scores(
    enrol_embeddings: ArrayLike, test_embeddings: ArrayLike, enrol: ArrayLike, test: ArrayLike
) -> np.ndarray:
    """Cosine of the two embeddings of each trial.

    Args:
        enrol_embeddings: `[enrolments, dim]`, of any length.
        test_embeddings: `[tests, dim]`.
        enrol: `[trials]`, rows of `enrol_embeddings`.
        test: `[trials]`, rows of `test_embeddings`.

    Returns:
        `[trials]` float32, between -1 and 1.

    Raises:
        UserError: the two tables differ in dimension, or an embedding is zero or not finite.
    """
    one = unit_rows(enrol_embeddings)
    two = one if test_embeddings is enrol_embeddings else unit_rows(test_embeddings)
    if one.shape[1] != two.shape[1]:
        raise UserError(f"enrolment embeddings have {one.shape[1]} dimensions, test embeddings {two.shape[1]}")
    return np.clip(_dots(one, two, np.asarray(enrol), np.asarray(test)), -1, 1)


def _dots(one: np.ndarray, two: np.ndarray, enrol: np.ndarray, test: np.ndarray) -> np.ndarray:
    scores = np.empty(len(enrol), np.float32)
    for start in range(0, len(enrol), _CHUNK):
        part = slice(start, start + _CHUNK)
        np.vecdot(one.take(enrol[part], axis=0), two.take(test[part], axis=0), out=scores[part])
    return scores


def average(embeddings: ArrayLike, groups: Iterable[ArrayLike]) -> np.ndarray:
    """One embedding for each group of utterances: the mean of theirs, each scaled to length one before.

    This makes enrolment models of several utterances, and cohorts of speaker means.

    Args:
        embeddings: `[utterances, dim]`.
        groups: for each group, the rows of its utterances.

    Returns:
        `[groups, dim]` float32.
    """
    unit = unit_rows(embeddings)
    rows = [np.asarray(group, np.int64) for group in groups]
    if not rows or min(map(len, rows)) == 0:
        raise UserError("an average of embeddings needs at least one utterance in each group")
    starts = np.concatenate([[0], np.cumsum([len(group) for group in rows])[:-1]])
    sizes = np.array([len(group) for group in rows], np.float32)
    return np.add.reduceat(unit[np.concatenate(rows)], starts, axis=0) / sizes[:, None]
