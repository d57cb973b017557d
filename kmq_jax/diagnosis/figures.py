"""The report's figures. Each takes what was found and gives one matplotlib figure, legible on a phone."""

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from kmq_jax import html
from kmq_jax.core.files import Row
from kmq_jax.diagnosis.diagnosis import Diagnosis
from kmq_jax.metrics.det_plot import det_figure
from kmq_jax.metrics.detection import Array

_INK, _FAINT, _REFERENCE = "#22262b", "#d5d9de", "#6b7280"
_TARGET, _NONTARGET = "#1b7f79", "#b5562b"
_LADDER = ("#2b6cb0", "#d08a1d", "#c0353a", "#7b3fa0", "#3d8f4f", "#8a5a3b")
_STYLE: Any = {
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.labelsize": 10.5,
    "axes.edgecolor": "#9aa1a9",
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
}


Panels: TypeAlias = Any
"""What `Figure.subplots` gives: one panel, or an array of them."""


def colour(bits: int, all_bits: Sequence[int]) -> str:
    """The colour of a number of bits, the same in every figure: from blue for the most to red.

    >>> colour(8, (2, 4, 8)) == colour(4, (2, 4))
    True
    """
    place = sorted(all_bits, reverse=True).index(bits)
    return _LADDER[place % len(_LADDER)]


def _new(
    height: float, rows: int = 1, columns: int = 1, sharex: bool = False, sharey: bool = False, squeeze: bool = True
) -> tuple[Figure, Panels]:
    figure = Figure(figsize=(html.WIDTH, height), dpi=160, layout=ConstrainedLayoutEngine(h_pad=0.09, w_pad=0.09))
    return figure, figure.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=squeeze)


def _percent(digits: int = 0) -> FuncFormatter:
    return FuncFormatter(lambda value, _: f"{value:.{digits}f} %")


def histograms(found: Diagnosis) -> Figure:
    """Scores of both classes at all bits above the reference's outline, with the thresholds."""
    trials = found.trials
    figure, axes = _new(1.1 + 1.45 * len(trials.bits), len(trials.bits), sharex=True, squeeze=False)
    everything = np.concatenate([trials.reference, trials.full.ravel()])
    # A handful of far outliers would squeeze the histograms into the middle.
    low, high = np.quantile(everything, [0.0005, 0.9995])
    edges = np.linspace(low, high, 70)
    middle = (edges[1:] + edges[:-1]) / 2
    own = found.flips[1].model_thresholds  # the second flips are at each model's own EER
    for m, (bits, ax) in enumerate(zip(trials.bits, axes[:, 0])):
        for mask, shade, name in ((~trials.labels, _NONTARGET, "nontarget"), (trials.labels, _TARGET, "target")):
            here, _ = np.histogram(trials.full[m][mask], edges, density=True)
            base, _ = np.histogram(trials.reference[mask], edges, density=True)
            ax.fill_between(middle, here, step="mid", color=shade, alpha=0.45, linewidth=0, label=f"{name}, quantized")
            ax.plot(middle, base, drawstyle="steps-mid", color=shade, linewidth=1.1, label=f"{name}, reference")
        ax.axvline(found.flips[0].threshold, color=_INK, linewidth=1.1, label="reference's EER threshold")
        ax.axvline(own[m], color=_INK, linewidth=1.1, linestyle=":", label="own EER threshold")
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
        ax.set_title(f"{bits} bits", loc="left", fontweight="bold", color=colour(bits, trials.bits))
    axes[-1, 0].set_xlabel("cosine score")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2)
    return figure


def det(found: Diagnosis) -> Figure:
    """DET curves of the reference and all quantized models."""
    trials = found.trials
    systems = {"reference": (trials.reference, trials.labels)}
    systems |= {f"{bits} bits": (row, trials.labels) for bits, row in zip(trials.bits, trials.full)}
    cycle = [_REFERENCE, *(colour(bits, trials.bits) for bits in trials.bits)]
    with matplotlib.rc_context({"axes.prop_cycle": cycler(color=cycle)}):
        return det_figure(systems)


def drift_bands(x: Array, drift: Array, bins: int = 24) -> tuple[Array, Array]:
    """Medians and the central 90 % of drift `[trials]` in bins of equally many trials along `x` `[trials]`.

    Returns:
        Mean of `x` `[bins]`, and the 5 %, 50 % and 95 % quantiles `[3, bins]`.

    >>> x, quantiles = drift_bands(np.arange(4.0), np.array([0.0, 0.0, 2.0, 2.0]), bins=2)
    >>> x.tolist(), quantiles[1].tolist()
    ([0.5, 2.5], [0.0, 2.0])
    """
    order = np.argsort(x, kind="stable")
    parts = [part for part in np.array_split(order, min(bins, len(order))) if len(part)]
    return (
        np.array([x[part].mean() for part in parts]),
        np.array([np.quantile(drift[part], [0.05, 0.5, 0.95]) for part in parts]).T,
    )


def drift_by_margin(found: Diagnosis) -> Figure:
    """Drift against the reference's signed margin; beyond the diagonal a decision flips."""
    trials = found.trials
    threshold = found.flips[0].threshold
    signed = trials.reference - threshold
    figure, axes = _new(1.0 + 1.75 * len(trials.bits), len(trials.bits), sharex=True, sharey=True, squeeze=False)
    limit = 0.0
    for m, (bits, ax) in enumerate(zip(trials.bits, axes[:, 0])):
        shade = colour(bits, trials.bits)
        x, (low, mid, high) = drift_bands(signed, trials.full[m] - trials.reference)
        limit = max(limit, float(np.abs([low, high]).max()))
        ax.fill_between(x, low, high, color=shade, alpha=0.25, linewidth=0, label="central 90 %")
        ax.plot(x, mid, color=shade, linewidth=1.8, label="median drift")
        ax.axhline(0, color=_FAINT, linewidth=0.8, zorder=0)
        ax.axline((0, 0), slope=-1, color=_INK, linewidth=1.0, linestyle="--", label="beyond this line decisions flip")
        ax.set_title(f"{bits} bits", loc="left", fontweight="bold", color=shade)
        ax.set_ylabel("score drift")
    # Flips lie near the threshold; far trials would take most of the axis.
    span = np.quantile(np.abs(signed), 0.995)
    axes[-1, 0].set(xlim=(-span, span), ylim=(-1.15 * limit - 1e-6, 1.15 * limit + 1e-6))
    axes[-1, 0].set_xlabel("reference score above (+) or below (−) the threshold")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, handlelength=1.6, columnspacing=1.2)
    return figure


def flip_rates(found: Diagnosis) -> Figure:
    """Harmful flip rate by bin of margin, with intervals; both ways of binning."""
    rows = [row for row in found.tables["flips"] if row["threshold_name"] == "reference EER"]
    figure, axes = _new(6.2, 2, 1, squeeze=False)
    for ax, binning, title in zip(
        axes[:, 0], ("equal-mass", "fixed"), ("equally many trials in each bin", "fixed bins of margin")
    ):
        some = [row for row in rows if row["binning"] == binning and row["trials"]]
        bins = sorted({row["bin"] for row in some})
        all_bits = found.trials.bits
        step = 0.8 / len(all_bits)
        for i, bits in enumerate(all_bits):
            for row in (r for r in some if r["bits"] == bits):
                # The bars of a bin stand side by side about its tick.
                x = bins.index(row["bin"]) + (i - (len(all_bits) - 1) / 2) * step
                rate = 100 * row["harmful_rate"]
                label = f"{bits} bits" if row["bin"] == bins[0] else None
                ax.bar(x, rate, 0.92 * step, color=colour(bits, all_bits), label=label)
                top = rate
                if row["harmful_rate_ci95"]:
                    low, high = (100 * v for v in row["harmful_rate_ci95"])
                    ax.plot([x, x], [low, high], color=_INK, linewidth=1)
                    top = max(top, high)
                ax.annotate(
                    _short(rate), (x, top), (0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=8
                )
        first = {row["bin"]: row for row in some}
        ax.set_xticks(range(len(bins)), [_span(first[b]) for b in bins])
        ax.yaxis.set_major_formatter(_percent())
        ax.margins(y=0.15)
        ax.set_ylabel("harmful flips")
        ax.set_title(title, loc="left")
    axes[-1, 0].set_xlabel("distance of the reference's score from the threshold")
    axes[0, 0].legend(loc="upper right")
    return figure


def _short(rate: float) -> str:
    return "0" if rate == 0 else f"{rate:.1f}" if rate >= 0.1 else f"{rate:.2f}" if rate >= 0.01 else "<.01"


def _span(row: Row) -> str:
    if row["high"] is None:
        return f"from {row['low']:.3g}"
    return f"{row['low']:.3g} to {row['high']:.3g}"


def retention(found: Diagnosis) -> Figure:
    """Recovery by keeping one component at full precision, and damage by quantizing it alone."""
    rows = found.tables["retention"]
    all_bits = sorted({row["bits"] for row in rows if row["component"]}, reverse=True)
    names = [row["component"] for row in rows if row["experiment"] == "retention" and row["bits"] == all_bits[0]]
    figure, axes = _new(1.0 + 2 * 0.34 * len(names) * (0.5 + 0.5 * len(all_bits)) + 1.2, 2, 1, squeeze=False)
    titles = {
        "retention": "recovered by keeping this part at full precision",
        "mirror": "damage done by quantizing this part alone",
    }
    for ax, (experiment, title) in zip(axes[:, 0], titles.items()):
        bars = []
        for i, bits in enumerate(all_bits):
            some = [row for row in rows if row["experiment"] == experiment and row["bits"] == bits]
            shade = colour(bits, found.trials.bits)
            step = 0.8 / (2 * len(all_bits))
            for row in some:
                y = names.index(row["component"]) + (2 * i - len(all_bits) + 0.5) * step
                for key, place, alpha in (("recovery", y, 1.0), ("drift_recovery", y + step, 0.45)):
                    if row[key] is not None:
                        bars.append(row[key])
                        ax.barh(place, row[key], 0.9 * step, color=shade, alpha=alpha, linewidth=0)
                interval = row["recovery_ci95"]
                if interval and row["recovery"] is not None:
                    ax.plot(interval, [y, y], color=_INK, linewidth=1)
        low, high = min([0.0, *bars]), max([10.0, *bars])
        ax.set_xlim(max(1.3 * low, low - 20) if low < 0 else 0, 1.15 * high)
        ax.set_yticks(range(len(names)), names)
        ax.invert_yaxis()
        ax.axvline(0, color="#9aa1a9", linewidth=0.8)
        ax.xaxis.set_major_formatter(_percent())
        ax.set_title(title, loc="left")
    shades = [(colour(bits, found.trials.bits), f"{bits} bits: ") for bits in all_bits]
    parts = [("recovery", 1.0, "of the EER's rise"), ("drift_recovery", 0.45, "of mean |drift|")]
    handles = [
        Patch(color=shade, alpha=alpha, linewidth=0, label=f"{name if len(all_bits) > 1 else ''}{what}")
        for shade, name in shades
        for key, alpha, what in parts
        if any(row.get(key) is not None for row in rows)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def layer_map(found: Diagnosis) -> Figure:
    """Weight SQNR and damage of every layer at all bits."""
    rows = found.tables["layers"]
    all_bits = found.trials.bits
    names = list(dict.fromkeys(row["layer"] for row in rows))
    place = {(row["layer"], row["bits"]): row for row in rows}
    keys = [("sqnr_db", "weight SQNR, dB", "viridis", 1.0)]
    if any(row["damage"] is not None for row in rows):
        keys.append(("damage", "damage alone, 10⁻³", "inferno_r", 1e3))
    height = 1.2 + max(0.155 * len(names), 1.2) if len(names) <= 80 else 9.0
    figure, axes = _new(height, 1, len(keys), sharey=True, squeeze=False)
    for ax, (key, title, palette, scale) in zip(axes[0], keys):
        values = np.array([[place[n, b][key] for b in all_bits] for n in names], float) * scale
        shown = np.where(np.isfinite(values), values, np.nan)
        # Damage spans decades, decibels are logarithms already.
        positive = shown[shown > 0]
        norm = LogNorm(positive.min(), positive.max()) if key == "damage" and len(set(positive)) > 1 else None
        image = ax.imshow(shown, aspect="auto", cmap=palette, interpolation="nearest", norm=norm)
        ax.set_xticks(range(len(all_bits)), [f"{b} bits" for b in all_bits])
        ax.set_title(title)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        figure.colorbar(image, ax=ax, orientation="horizontal", shrink=0.85, aspect=18, pad=0.02)
    if len(names) <= 80:
        axes[0, 0].set_yticks(range(len(names)), [_brief(n) for n in names], fontsize=8)
    else:
        axes[0, 0].set_ylabel("layers, from input to output")
    return figure


def _brief(layer: str) -> str:
    """A layer's path with numbered folders cut short: "encoder2/unit0/conv1" becomes "e2/u0/conv1"."""
    return re.sub(r"([a-z])[a-z]*(\d+)/", r"\1\2/", layer)


def activations(found: Diagnosis) -> Figure:
    """Activation SQNR with depth."""
    rows = found.tables["blocks"]
    figure, ax = _new(3.6)
    parts = [row["component"] for row in rows if row["bits"] == found.trials.bits[0]]
    for bits in found.trials.bits:
        values = [row["sqnr_db"] for row in rows if row["bits"] == bits]
        ax.plot(range(len(values)), values, "o-", color=colour(bits, found.trials.bits), markersize=3.5,
                linewidth=1.5, label=f"{bits} bits")  # fmt: skip
    starts = [i for i, name in enumerate(parts) if i == 0 or name != parts[i - 1]]
    for i in starts:
        ax.axvline(i, color=_FAINT, linewidth=0.8, zorder=0)
    ax.set_xticks(starts, [parts[i] for i in starts], rotation=40, ha="right", rotation_mode="anchor")
    ax.set_ylabel("activation SQNR, dB")
    ax.legend(loc="best")
    return figure


def distortion_damage(found: Diagnosis) -> Figure:
    """Each layer's relative weight error against the score damage it does alone."""
    rows = [row for row in found.tables["layers"] if row["damage"] is not None]
    figure, ax = _new(4.4)
    correlations = {row["bits"]: row for row in found.tables["correlations"] if row["predictor"] == "relative_error"}
    for bits in found.trials.bits:
        some = [row for row in rows if row["bits"] == bits and row["damage"] > 0]
        some = [row for row in some if 0 < row["relative_error"] < np.inf]
        if not some:
            continue
        rank = correlations[bits]["spearman"]
        name = f"{bits} bits" if rank is None else f"{bits} bits: ρ = {rank:.2f}".replace("-", "−")
        x, y = ([row[key] for row in some] for key in ("relative_error", "damage"))
        ax.scatter(x, y, 22, color=colour(bits, found.trials.bits), alpha=0.8, linewidth=0, label=name)
        worst = sorted(some, key=lambda row: -row["damage"])[:2] if bits == min(found.trials.bits) else []
        for i, row in enumerate(worst):
            ax.annotate(_brief(row["layer"]), (row["relative_error"], row["damage"]), (-6, -3 - 9 * i),
                        textcoords="offset points", fontsize=8, ha="right")  # fmt: skip
    if ax.has_data():
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        ax.xaxis.set_minor_formatter(FuncFormatter(lambda v, _: ""))
        ax.legend(loc="upper left", title="rank correlation")
    ax.set(xlabel="relative weight error of the layer", ylabel="mean |score drift|, this layer alone")
    return figure


FIGURES: dict[str, tuple[Callable[[Diagnosis], Figure], tuple[str, ...]]] = {
    "histograms": (histograms, ()),
    "det": (det, ()),
    "drift": (drift_by_margin, ()),
    "flips": (flip_rates, ("flips",)),
    "retention": (retention, ("retention",)),
    "layers": (layer_map, ("layers",)),
    "activations": (activations, ("blocks",)),
    "distortion": (distortion_damage, ("layers", "correlations")),
}
"""Every figure by name, and the tables without which it is left out."""


def draw_all(found: Diagnosis) -> dict[str, Figure]:
    """Every figure that the tables allow."""
    drawn = {}
    with matplotlib.rc_context(_STYLE):
        for name, (draw, needs) in FIGURES.items():
            if all(found.tables.get(table) for table in needs):
                drawn[name] = draw(found)
    return drawn
