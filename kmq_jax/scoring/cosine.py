"""Cosine scores of trials."""

from collections.abc import Callable, Iterable
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from kmq_jax.core.errors import UserError

_CHUNK = 1024  # rows worked on at a time: they stay in the cache
_SHORTEST, _LONGEST = 1e-15, 1e15  # lengths: the product of two of them then fits float32, 1e-38 to 3e38


def lengths(embeddings: np.ndarray) -> np.ndarray:
    """Euclidean lengths `[utterances]` float64 of embeddings `[utterances, dim]`.

    >>> lengths(np.array([[3.0, 4.0]])).tolist()
    [5.0]
    """
    squares = np.empty(len(embeddings))
    for start in range(0, len(embeddings), _CHUNK):
        rows = embeddings[start : start + _CHUNK].astype(np.float64)  # the square of a large float32 overflows
        np.vecdot(rows, rows, out=squares[start : start + _CHUNK])
    return np.sqrt(squares)


def unusable(length: np.ndarray) -> np.ndarray:
    """Which lengths `[utterances]` belong to embeddings that cannot be scored: about zero, not finite, or over 1e15.

    >>> unusable(np.array([1.0, 0.0, np.nan])).tolist()
    [False, True, True]
    """
    # Not `length <= _SHORTEST`: NaN compares false, and must count as unusable.
    return ~((length > _SHORTEST) & (length < _LONGEST))


def _checked(embeddings: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings as float32 `[utterances, dim]`, and their lengths as float32 `[utterances]`."""
    rows = np.asarray(embeddings, np.float32)
    if rows.ndim != 2:
        raise UserError(f"embeddings must be [utterances, dim], got shape {rows.shape}")
    length = lengths(rows)
    bad = unusable(length)
    if bad.any():
        more = f", and {int(bad.sum()) - 1} more" if bad.sum() > 1 else ""
        raise UserError(f"embedding {int(np.argmax(bad))} is zero or not finite{more}")
    return rows, length.astype(np.float32)


def unit_rows(embeddings: ArrayLike) -> np.ndarray:
    """Scales embeddings `[utterances, dim]` to length one, as float32.

    Raises:
        UserError: an embedding is zero or not finite; the message names its row.

    >>> unit_rows([[3.0, 4.0]]).round(2).tolist() == np.float32([[0.6, 0.8]]).tolist()
    True
    """
    rows, length = _checked(embeddings)
    return rows / length[:, None]


def check_rows(rows: np.ndarray, size: int) -> None:
    """Checks rows `[trials]` of a table of so many embeddings; NumPy would count those below zero from its end.

    Raises:
        UserError: one is out of range.
    """
    if rows.size and not 0 <= rows.min() <= rows.max() < size:
        wrong = rows[(rows < 0) | (rows >= size)]
        raise UserError(f"a trial names embedding {int(wrong[0])} of {size}")


Scorer: TypeAlias = Callable[[ArrayLike, ArrayLike], np.ndarray]
"""Scores `[trials]` float32 of rows of enrolments and rows of tests, each `[trials]`."""


def cosine_scorer(enrol_embeddings: ArrayLike, test_embeddings: ArrayLike) -> Scorer:
    """Makes a function that scores trials between two tables. The tables are checked, and their lengths taken, once.

    Args:
        enrol_embeddings: `[enrolments, dim]`, not necessarily length-normalised.
        test_embeddings: `[tests, dim]`, likewise; the same object where both sides are of one table.

    Returns:
        A function from rows of enrolments and of tests, each `[trials]`, to scores `[trials]` float32 in [-1, 1].

    Raises:
        UserError: the two tables differ in dimension, or an embedding is zero or not finite.

    >>> cosine_scorer(np.eye(2), np.eye(2))([0, 0], [0, 1]).tolist()
    [1.0, 0.0]
    """
    one, one_length = _checked(enrol_embeddings)
    two, two_length = (one, one_length) if test_embeddings is enrol_embeddings else _checked(test_embeddings)
    if one.shape[1] != two.shape[1]:
        raise UserError(f"enrolment embeddings have {one.shape[1]} dimensions, test embeddings {two.shape[1]}")

    def score(enrol: ArrayLike, test: ArrayLike) -> np.ndarray:
        enrol, test = np.asarray(enrol, np.int64), np.asarray(test, np.int64)
        check_rows(enrol, len(one))
        check_rows(test, len(two))
        scores = np.empty(len(enrol), np.float32)
        for start in range(0, len(enrol), _CHUNK):
            part = slice(start, start + _CHUNK)
            np.vecdot(one.take(enrol[part], axis=0), two.take(test[part], axis=0), out=scores[part])
        # Lengths are divided out at the end: no second table of unit rows is made.
        scores /= one_length[enrol] * two_length[test]
        # Rounding may give slightly more than 1.
        return np.clip(scores, -1, 1, out=scores)

    return score


def cosine_scores(
    enrol_embeddings: ArrayLike, test_embeddings: ArrayLike, enrol: ArrayLike, test: ArrayLike
) -> np.ndarray:
    """Cosine of the two embeddings of each trial.

    Args:
        enrol_embeddings: `[enrolments, dim]`, not necessarily length-normalised.
        test_embeddings: `[tests, dim]`, likewise.
        enrol: `[trials]`, rows of `enrol_embeddings`.
        test: `[trials]`, rows of `test_embeddings`.

    Returns:
        `[trials]` float32, between -1 and 1.

    Raises:
        UserError: the two tables differ in dimension, a row is out of range, or an embedding is zero or not finite.

    >>> table = np.array([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    >>> cosine_scores(table, table, enrol=[0, 0, 0], test=[0, 1, 2]).tolist()
    [1.0, 0.0, -1.0]
    """
    return cosine_scorer(enrol_embeddings, test_embeddings)(enrol, test)


def average(embeddings: ArrayLike, groups: Iterable[ArrayLike]) -> np.ndarray:
    """Averages the embeddings of each group of utterances, each scaled to length one first.

    This makes enrolment models of several utterances, and cohorts of speaker means. The mean itself is not scaled to
    length one again: cosine scoring does not need it.

    Args:
        embeddings: `[utterances, dim]`.
        groups: for each group, the rows of its utterances.

    Returns:
        `[groups, dim]` float32.

    Raises:
        UserError: a group is empty, there is none, or an embedding is zero or not finite.

    >>> average([[2.0, 0.0], [0.0, 4.0], [5.0, 0.0]], [[0, 1], [2]]).tolist()
    [[0.5, 0.5], [1.0, 0.0]]
    """
    unit = unit_rows(embeddings)
    rows = [np.asarray(group, np.int64) for group in groups]
    if not rows or min(map(len, rows)) == 0:
        raise UserError("an average of embeddings needs at least one utterance in each group")
    starts = np.concatenate([[0], np.cumsum([len(group) for group in rows])[:-1]])
    sizes = np.array([len(group) for group in rows], np.float32)
    # The groups lie end to end; each sum runs from one group's start to the next.
    return np.add.reduceat(unit[np.concatenate(rows)], starts, axis=0) / sizes[:, None]
