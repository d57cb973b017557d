"""Length buckets: batches of a few fixed shapes with as little padding as those shapes allow."""

import dataclasses
from collections.abc import Iterable

import numpy as np

from kmq_jax.core.errors import UserError

MOST_SAMPLES = 16 * 160_000
"""Samples of a batch: sixteen recordings of ten seconds."""
_CANDIDATES = 128  # padded lengths considered; more hardly changes the padding


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Utterances that are padded to one length and processed together.

    Attributes:
        size: samples that every row is padded to.
        indices: `[batch]` int32 rows of the utterance table; -1 where the last batch of a bucket has nothing left.
    """

    size: int
    indices: np.ndarray


def length_buckets(
    lengths: Iterable[int] | np.ndarray,
    batch_size: int,
    *,
    max_shapes: int = 8,
    max_samples: int | None = None,
    step: int = 1600,
) -> list[Batch]:
    """Groups utterances into batches of at most `max_shapes` different padded lengths.

    Padded lengths are multiples of `step`. Dynamic programming finds those for which the fewest samples are processed,
    padding and empty rows included. The longest batches come first, so that a lack of memory shows at once.

    Args:
        lengths: `[n]` samples.
        batch_size: rows of every batch.
        max_shapes: how many different lengths may occur: each costs a compilation.
        max_samples: longer utterances count as this long (the caller cuts them).
        step: padded lengths are multiples of this many samples, or `max_samples`.

    Returns:
        Batches in which every index of `range(n)` occurs exactly once.

    Raises:
        UserError: a setting is not positive.

    >>> [(batch.size, batch.indices.tolist()) for batch in length_buckets([1500, 3100, 1600], 2)]
    [(3200, [1, -1]), (1600, [0, 2])]
    """
    lengths = np.asarray(lengths if isinstance(lengths, np.ndarray) else list(lengths), np.int64)
    _check_positive(batch_size=batch_size, max_shapes=max_shapes, max_samples=max_samples, step=step)
    if not len(lengths):
        return []
    clipped = np.maximum(lengths, 1)
    if max_samples is not None:
        clipped = np.minimum(clipped, max_samples)
    order = np.argsort(clipped, kind="stable")
    edges = padded_lengths(clipped, batch_size, max_shapes=max_shapes, max_samples=max_samples, step=step)
    bucket = np.searchsorted(edges, clipped[order])  # the shortest edge that is long enough
    batches = []
    for i in reversed(range(len(edges))):
        rows = order[bucket == i].astype(np.int32)
        for first in range(0, len(rows), batch_size):
            part = rows[first : first + batch_size]
            batches.append(Batch(int(edges[i]), np.pad(part, (0, batch_size - len(part)), constant_values=-1)))
    return batches


def _check_positive(**settings: int | None) -> None:
    for name, value in settings.items():
        if value is not None and value < 1:
            raise UserError(f"`{name}` (={value}) must be at least 1")


def tight_batches(
    lengths: Iterable[int] | np.ndarray,
    batch_size: int,
    *,
    max_shapes: int = 20,
    most_samples: int = MOST_SAMPLES,
    waste: float = 0.05,
    step: int = 800,
) -> list[Batch]:
    """Groups utterances, the longest first, into batches with little padding and no empty rows.

    Utterances that follow one another in length share a batch. Batches get smaller until the padding is below `waste`:
    a short list is worth more compilations than a long one's padding. All but the last batch of a length are full.

    Args:
        lengths: `[n]` samples.
        batch_size: rows of a batch at most.
        max_shapes: how many different lengths may occur.
        most_samples: samples of a batch at most; an utterance that is longer has one of its own.
        waste: samples of padding, as a share of the real ones, that are allowed where `max_shapes` can do it.
        step: padded lengths are multiples of this many samples.

    Returns:
        Batches in which every index of `range(n)` occurs exactly once, none is -1.

    Raises:
        UserError: a setting is not positive.

    >>> [(batch.size, batch.indices.tolist()) for batch in tight_batches([1590, 3100, 1600], 2)]
    [(3200, [1]), (1600, [2]), (1600, [0])]
    """
    _check_positive(batch_size=batch_size, max_shapes=max_shapes, step=step)
    lengths = np.maximum(np.asarray(lengths if isinstance(lengths, np.ndarray) else list(lengths), np.int64), 1)
    order = np.argsort(-lengths, kind="stable").astype(np.int32)
    rounded = -(-lengths[order] // step) * step
    least, best = np.inf, []
    # By eighths, from the whole batch down.
    for rows in sorted({max(1, batch_size * share // 8) for share in range(1, 9)}, reverse=True):
        ends = _ends(rounded, rows, most_samples)
        starts = [0, *ends[:-1]]
        edges = padded_lengths(rounded[starts], 1, max_shapes=max_shapes, step=step) if ends else np.array([])
        sizes = [int(edges[np.searchsorted(edges, rounded[start])]) for start in starts if ends]
        processed = sum(size * (end - start) for size, start, end in zip(sizes, starts, ends))
        if processed < 0.99 * least:  # smaller batches must be worth it
            least = processed
            best = [Batch(size, order[start:end]) for size, start, end in zip(sizes, starts, ends)]
        if processed <= (1 + waste) * lengths.sum():
            break
    return best


def _ends(sizes: np.ndarray, rows: int, most_samples: int) -> list[int]:
    """Where batches of descending `sizes` end: after so many rows, or as many as most_samples allows."""
    ends = [0]
    while ends[-1] < len(sizes):
        fitting = max(1, min(rows, most_samples // int(sizes[ends[-1]])))
        ends.append(min(ends[-1] + fitting, len(sizes)))
    return ends[1:]


def padded_lengths(
    lengths: np.ndarray, batch_size: int, *, max_shapes: int, max_samples: int | None = None, step: int = 1600
) -> np.ndarray:
    """Finds padded lengths that minimise the samples processed, by dynamic programming.

    Args:
        lengths: `[n]` samples, at least one.
        batch_size: rows of every batch.
        max_shapes: as in `length_buckets`, like the settings below.
        max_samples: padded lengths are at most this.
        step: padded lengths are multiples of this many samples, or `max_samples`.

    Returns:
        At most `max_shapes` lengths, ascending; the last is long enough for all.

    >>> padded_lengths(np.array([1500, 1600, 3100]), 1, max_shapes=2).tolist()
    [1600, 3200]
    """
    rounded = -(-lengths // step) * step
    if max_samples is not None:
        rounded = np.minimum(rounded, max_samples)
    sizes, counts = np.unique(rounded, return_counts=True)
    if len(sizes) > _CANDIDATES:  # merge neighbours into equally filled groups, each as long as its longest
        group = np.unique(np.searchsorted(np.cumsum(counts), np.linspace(1, counts.sum(), _CANDIDATES)))
        ends = np.unique(np.append(group, len(sizes) - 1))
        counts = np.diff(np.concatenate(([0], np.cumsum(counts)[ends])))
        sizes = sizes[ends]
    total = np.concatenate(([0], np.cumsum(counts)))
    m = len(sizes)
    # cost[j, i]: the utterances of candidates j..i-1 in one bucket as long as candidate i-1
    many = total[None, :] - total[:, None]
    cost = -(-many // batch_size) * batch_size * np.concatenate(([0], sizes))[None, :].astype(np.float64)
    cost[np.tril_indices(m + 1)] = np.inf  # no bucket is empty
    # best[i]: the least cost of the first i candidates in so many buckets; origins: where the last of these begins.
    best = np.concatenate(([0.0], np.full(m, np.inf)))
    origins = []
    answers = []
    for _ in range(min(max_shapes, m)):
        through = best[:, None] + cost
        origins.append(through.argmin(axis=0))
        best = through.min(axis=0)
        answers.append(best[m])
    # The first minimum: more shapes that save nothing would only be compiled.
    shapes = int(np.argmin(answers)) + 1
    edges = []
    at = m
    # From the longest bucket back to the shortest.
    for k in reversed(range(shapes)):
        edges.append(sizes[at - 1])
        at = int(origins[k][at])
    return np.array(edges[::-1], np.int64)
