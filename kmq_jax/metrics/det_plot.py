"""DET curves as a figure."""

import os
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from scipy.special import ndtri

from kmq_jax.metrics.detection import det_curve, equal_error_point, operating_points

_TICKS = [0.0001, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9]


def det_figure(systems: Mapping[str, tuple[ArrayLike, ArrayLike]], title: str = "") -> Figure:
    """Draws DET curves on normal-deviate axes, on which normally distributed scores give straight lines.

    The EER of each is marked where its curve crosses the diagonal.

    Args:
        systems: scores `[trials]` and labels `[trials]` of each system, by its name.
        title: above the axes.

    Returns:
        The figure, not yet drawn.

    Raises:
        UserError: as `detection.eer`.
    """
    figure = Figure(figsize=(5.2, 5.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    lowest, highest = 0.5, 0.02
    for name, (scores, labels) in systems.items():
        p_fa, p_miss, _ = det_curve(scores, labels)
        # Rates of 0 and 1 lie at infinity on these axes.
        inside = (p_fa > 0) & (p_fa < 1) & (p_miss > 0) & (p_miss < 1)
        # The EER comes from all points: on the thinned curve it could lie a little elsewhere.
        _, every_miss, every_fa = operating_points(scores, labels)
        rate = float(equal_error_point(every_miss, every_fa)[0])
        (line,) = axes.plot(
            ndtri(p_fa[inside]), ndtri(p_miss[inside]), linewidth=1.4, label=f"{name}  EER {100 * rate:.2f} %"
        )
        if 0 < rate < 1:
            axes.plot(ndtri(rate), ndtri(rate), "o", markersize=5, color=line.get_color())
            lowest, highest = min(lowest, rate), max(highest, rate)
        if inside.any():
            lowest = min(lowest, p_fa[inside].min(), p_miss[inside].min())
    low, high = max(lowest, _TICKS[0]) * 0.8, min(max(0.6, 1.5 * highest), 0.95)
    axes.axline((0, 0), slope=1, color="0.7", linewidth=0.8, linestyle=":")
    ticks = np.array([tick for tick in _TICKS if low <= tick <= high])
    names = [f"{100 * tick:g}" for tick in ticks]
    axes.set(
        xlim=(ndtri(low), ndtri(high)),
        ylim=(ndtri(low), ndtri(high)),
        xlabel="False alarms (%)",
        ylabel="Misses (%)",
        aspect="equal",
        title=title,
    )
    axes.set_xticks(ndtri(ticks), names)
    axes.set_yticks(ndtri(ticks), names)
    axes.grid(color="0.9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    # Where the curves are not: ordinary ones bend around the lower left, those of bad systems around the upper right.
    axes.legend(loc="lower left" if highest > 0.25 else "upper right", frameon=False)
    return figure


def save_det(path: str | os.PathLike[str], systems: Mapping[str, tuple[ArrayLike, ArrayLike]], title: str = "") -> None:
    """Draws DET curves (`det_figure`) into a file; its suffix chooses the format."""
    det_figure(systems, title).savefig(path)
