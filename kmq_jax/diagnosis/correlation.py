"""Pearson's and Spearman's correlation, of many pairs of rows at once."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from kmq_jax.metrics.detection import Array


def pearson(x: ArrayLike, y: ArrayLike) -> Array:
    """Pearson's correlation along the last axis; NaN where one side does not vary.

    >>> round(float(pearson([1, 2, 4], [1, 2, 3])), 4)
    0.982
    """
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    a, b = (side - side.mean(-1, keepdims=True) for side in (a, b))
    scale = np.sqrt(np.vecdot(a, a) * np.vecdot(b, b))
    with np.errstate(invalid="ignore", divide="ignore"):
        # Clipped, as rounding may exceed 1.
        return np.where(scale > 0, np.clip(np.vecdot(a, b) / scale, -1, 1), np.nan)


def ranks(x: ArrayLike) -> Array:
    """Ranks along the last axis; tied values share their mean rank.

    >>> ranks([0.2, 0.1, 0.2]).tolist()
    [2.5, 1.0, 2.5]
    """
    return np.asarray(rankdata(x, axis=-1))


def spearman(x: ArrayLike, y: ArrayLike) -> Array:
    """Spearman's correlation along the last axis; NaN where one side does not vary.

    >>> float(spearman([1, 2, 4], [1, 4, 9]))
    1.0
    """
    return pearson(ranks(x), ranks(y))


def known(value: Array | float) -> float | None:
    """A number for a table: None in place of NaN.

    >>> known(0.5), known(float("nan"))
    (0.5, None)
    """
    return None if np.isnan(value) else float(value)
