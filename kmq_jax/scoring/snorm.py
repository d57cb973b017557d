"""Adaptive symmetric score normalisation (AS-norm)."""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from kmq_jax.core.errors import UserError
from kmq_jax.scoring.cosine import unit_rows

Statistics: TypeAlias = Callable[[ArrayLike, ArrayLike, int], tuple[np.ndarray, np.ndarray]]
"""See `cohort_statistics`."""

_CHUNK = 1 << 24  # cohort scores held at a time: 64 MiB


def cohort_statistics(embeddings: ArrayLike, cohort: ArrayLike, top_n: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each utterance's `top_n` highest cosine scores against a cohort.

    Args:
        embeddings: `[utterances, dim]`.
        cohort: `[members, dim]`.
        top_n: how many cohort members count for an utterance, from 2 to all of them.

    Returns:
        Means and standard deviations, each `[utterances]` float32.

    Raises:
        UserError: `top_n` is out of range, dimensions differ, or an utterance's top scores are all the same.

    >>> mean, deviation = cohort_statistics([[1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], top_n=2)
    >>> mean.tolist(), deviation.tolist()
    ([0.5], [0.5])
    """
    unit, members = checked_rows(embeddings, cohort, top_n)
    parts = [block_statistics(unit[rows], members, top_n) for rows in blocks(len(unit), len(members))]
    mean, deviation = np.concatenate([np.empty((2, 0), np.float32), *parts], axis=1)  # there may be no utterance
    check_spread(deviation, top_n)
    return mean, deviation


def blocks(utterances: int, members: int) -> list[slice]:
    """Cuts the utterances into blocks whose cohort scores fit memory.

    Blocks follow from the sizes alone. So however many processes share them, each is rounded as in one process.

    >>> blocks(5000, 6000)
    [slice(0, 2796, None), slice(2796, 5592, None)]
    """
    step = max(1, _CHUNK // members)
    return [slice(start, start + step) for start in range(0, utterances, step)]


def block_statistics(unit: np.ndarray, members: np.ndarray, top_n: int) -> np.ndarray:
    """Means and deviations `[2, utterances]` float32 of one block; both tables as `checked_rows` gives them.

    >>> block_statistics(np.float32([[1.0, 0.0]]), np.float32([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), top_n=2).tolist()
    [[0.5], [0.5]]
    """
    scores = unit @ members.T
    # The top n are needed, but not their order.
    scores.partition(len(members) - top_n, axis=1)
    top = scores[:, len(members) - top_n :]
    return np.stack([top.mean(axis=1), top.std(axis=1)])


def checked_rows(embeddings: ArrayLike, cohort: ArrayLike, top_n: int) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings and cohort as float32 rows of length one; arguments and errors as of `cohort_statistics`."""
    unit, members = unit_rows(embeddings), unit_rows(cohort)
    if unit.shape[1] != members.shape[1]:
        raise UserError(f"embeddings have {unit.shape[1]} dimensions, the cohort {members.shape[1]}")
    if not 2 <= top_n <= len(members):
        raise UserError(f"top_n (={top_n}) must lie between 2 and the cohort's size, {len(members)}")
    return unit, members


class FlatScores(UserError):
    """An utterance whose scores cannot be normalised: its top cohort scores are all the same.

    Attributes:
        row: of the utterance, in the table that the error is about.
    """

    def __init__(self, row: int, top_n: int, what: str = "embedding"):
        super().__init__(f"the top {top_n} cohort scores of {what} {row} are all the same")
        self.row = row


def check_spread(deviation: np.ndarray, top_n: int) -> None:
    """Checks deviations `[utterances]`, which scores are divided by.

    Raises:
        FlatScores: an utterance's top scores are all the same.
    """
    if deviation.size and deviation.min() < 1e-6:  # about the rounding of a float32 cosine
        raise FlatScores(int(np.argmin(deviation)), top_n)


def adaptive_snorm(
    scores: ArrayLike,
    enrol_embeddings: ArrayLike,
    test_embeddings: ArrayLike,
    enrol: ArrayLike,
    test: ArrayLike,
    cohort: ArrayLike,
    top_n: int = 300,
    statistics: Statistics = cohort_statistics,
) -> np.ndarray:
    """Normalises each score by the scores of its two sides against their nearest cohort members.

    The result is the mean of (score - mean_e) / deviation_e and (score - mean_t) / deviation_t: mean and deviation are
    those of the top cohort scores of the enrolment (e) and of the test (t).

    Args:
        scores: `[trials]`, cosine scores.
        enrol_embeddings: `[enrolments, dim]`.
        test_embeddings: `[tests, dim]`.
        enrol: `[trials]`, rows of `enrol_embeddings`.
        test: `[trials]`, rows of `test_embeddings`.
        cohort: `[members, dim]`: utterances, or speaker means (`cosine.average`), of speakers who are not evaluated.
        top_n: how many cohort members count for an utterance.
        statistics: finds means and deviations; `device_scores.cohort_statistics` does so on an accelerator.

    Returns:
        `[trials]` float32, in deviations of cohort scores: no longer between -1 and 1.

    Raises:
        UserError: as `cohort_statistics`; the message names the row of the caller's table.

    References:
        Cumani et al., "Comparison of speaker recognition approaches for real applications", Interspeech 2011. Matejka
        et al., "Analysis of score normalization in multilingual speaker recognition", Interspeech 2017.

    >>> table, cohort = np.eye(2), [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]
    >>> adaptive_snorm([1.0], table, table, enrol=[0], test=[0], cohort=cohort, top_n=2).tolist()
    [1.0]
    """
    scores = np.asarray(scores, np.float32)
    table, enrol, test = np.asarray(enrol_embeddings), np.asarray(enrol, np.int64), np.asarray(test, np.int64)
    # Two tables become one, the tests' rows behind the enrolments'.
    two_tables, enrolled = test_embeddings is not enrol_embeddings, len(table)
    if two_tables:
        test = test + enrolled
        table = np.concatenate([table, np.asarray(test_embeddings)])
    # Scores against the cohort cost the most: an utterance gets them once, however many trials it is in.
    used, place = np.unique(np.stack([enrol, test]), return_inverse=True)
    try:
        mean, deviation = statistics(table[used], cohort, top_n)
    except FlatScores as error:
        row = int(used[error.row])  # in the joined table
        if not two_tables:
            raise FlatScores(row, top_n) from None
        if row < enrolled:
            raise FlatScores(row, top_n, "enrolment embedding") from None
        raise FlatScores(row - enrolled, top_n, "test embedding") from None
    place = place.reshape(2, -1)  # `[2, trials]`, enrolment and test: NumPy versions differ in what `unique` gives
    return ((scores - mean[place]) / deviation[place]).mean(axis=0)
