"""The figure of a calibration: the front of gates, the gates that were chosen, and each level alone."""

import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kmq_jax import html
from kmq_jax.cascade.policy import CascadePolicy
from kmq_jax.core.files import Row, atomic_write

# By name of a figure: the factor that makes it percent, and the label of its axis.
PANELS = {"harmful_flip_rate": (100, "Harmful flips (%)"), "eer": (1, "EER (%)")}


def draw_front(path: str | os.PathLike[str], policy: CascadePolicy) -> None:
    """Draws harmful flips and EER against bits: the front, each level alone, and the point chosen.

    Args:
        path: .png, .pdf or .svg.
        policy: from `calibrate`, whose notes hold all of them.
    """
    figure = Figure(figsize=(html.WIDTH, 6.4), layout="constrained", dpi=160)
    for axes, key in zip(figure.subplots(2, 1), PANELS):
        if any(row[key] is None for row in policy.notes["front"]):  # one class of trials has no EER
            axes.set_axis_off()
        else:
            _panel(axes, key, policy.notes, policy.seconds)
    with atomic_write(Path(path)) as temporary:
        figure.savefig(temporary)


def _panel(axes: Axes, key: str, notes: Row, seconds: Sequence[float] | None) -> None:
    """Draws one figure, `key` of `PANELS`, against the cost that gates were chosen by."""
    rows, alone = notes["front"], notes["each_level_alone"]
    scale, label = PANELS[key]
    cost = notes["cost"]
    if notes.get("nested"):  # gates were then chosen by the bits that are new
        cost = {"sequential": "incremental", "utterance": "utterance_incremental"}.get(cost, cost)
    unit = "seconds" if seconds else "bits"
    bits = [row[f"{cost}_{unit}"] for row in rows]
    values = [scale * row[key] for row in rows]
    axes.plot(bits, values, ".-", color="tab:blue", linewidth=1, markersize=4, label="cascade, the front")
    # Where each level alone stands on the axis of costs.
    places = dict(zip(alone, seconds)) if seconds else {own: int(own) for own in alone}
    # In bits a 32-bit level would lie so far right that the front shrinks to a dot.
    shown = [own for own, place in places.items() if seconds or place <= max(8, 1.5 * max(bits))]
    heights = [scale * alone[own][key] for own in shown]
    axes.plot([places[own] for own in shown], heights, "s", color="tab:gray", label="one level alone")
    for own, height in zip(shown, heights):
        axes.annotate(f"{own} bits", (places[own], height), xytext=(6, 4), textcoords="offset points", fontsize=8)
    chosen = notes.get("chosen")  # the rule `risk` takes no point of this front
    if chosen is not None:
        axes.plot(bits[chosen], values[chosen], "o", color="tab:red", markersize=8, fillstyle="none", label="chosen")
    axes.set(
        xlabel=f"mean {unit} an utterance" if notes["cost"] == "utterance" else f"mean {cost} {unit} a trial",
        ylabel=label,
    )
    axes.grid(color="0.9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", frameon=False, fontsize=8)
