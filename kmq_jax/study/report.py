"""The report of a study: one HTML page of results, cascades and the main figures of the diagnosis."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kmq_jax import html
from kmq_jax.core.files import Row
from kmq_jax.study.paired import changes_of
from kmq_jax.study.published import comparison

METHODS = {  # colour, marker and name of each way to quantize
    "without training": ("tab:gray", "s", "without training"),
    "trained": ("tab:blue", "o", "trained"),
    "trained, kmqat": ("tab:green", "v", "trained, KMQAT as published"),
    "trained, distilled": ("tab:green", "v", "trained, distilled"),
    "without training, nested": ("0.75", "^", "nested, without training"),
    "trained, nested": ("tab:orange", "D", "nested, trained"),
}
TICKS = (2, 3, 4, 6, 8, 16, 32)
FROM_DIAGNOSIS = ("histograms", "flips", "retention")


def bits_figure(summary: Row, sets: Sequence[str]) -> Figure:
    """EER against bits, a panel for each evaluation set, with paired 95 % intervals of the change where known."""
    rows = summary["rows"]
    figure = Figure(figsize=(html.WIDTH, 3.4 * len(sets)), layout="constrained")
    panels = figure.subplots(len(sets), 1, squeeze=False)[:, 0]
    for axes, name in zip(panels, sets):
        full = rows[0]["sets"][name]["eer"]
        axes.axhline(full, color="black", linewidth=1, label="full precision")
        for shift, (method, (colour, marker, label)) in enumerate(METHODS.items()):
            chosen = sorted((row for row in rows if row["method"] == method), key=lambda row: row["bits"])
            # A little apart, so that intervals of different methods do not cover one another.
            places = [row["bits"] + 0.09 * (shift - 1.5) for row in chosen]
            values = [row["sets"][name]["eer"] for row in chosen]
            # Paired intervals of the difference, drawn around full precision's EER: one that meets its line is no
            # difference.
            changes = [changes_of(summary, row, name).get("eer_change_ci95") for row in chosen]
            ends = [
                [full + side for side in found] if found else [value, value] for found, value in zip(changes, values)
            ]
            spans = [[max(v - low, 0) for v, (low, _) in zip(values, ends)],
                     [max(high - v, 0) for v, (_, high) in zip(values, ends)]]  # fmt: skip
            if chosen:
                look = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1}
                axes.errorbar(places, values, spans, label=label, elinewidth=0.7, capsize=2, **look)
        all_bits = sorted({row["bits"] for row in rows[1:]})
        axes.set(title=name, xlabel="bits a weight", ylabel="EER (%)", xticks=all_bits)
        axes.invert_xaxis()
        axes.grid(axis="y", color="0.9", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def cascades_figure(cascades: Sequence[Row], sets: Sequence[str]) -> Figure:
    """Harmful flips against bits a trial: every level alone and every cascade, a panel for each evaluation set."""
    figure = Figure(figsize=(html.WIDTH, 3.4 * len(sets)), layout="constrained")
    panels = figure.subplots(len(sets), 1, squeeze=False)[:, 0]
    for axes, name in zip(panels, sets):
        drawn = set()
        for number, cascade in enumerate(cascades):
            found = cascade["sets"][name]
            for bits, alone in found["each_width_alone"].items():
                if int(bits) < 16 and (cascade["family"], bits) not in drawn:
                    drawn.add((cascade["family"], bits))
                    axes.plot(int(bits), 100 * alone["harmful_flip_rate"], "s", color="tab:gray", markersize=5)
                    nested = ", nested" if cascade["family"].endswith("nested") else ""
                    axes.annotate(f"{bits} bits{nested}", (int(bits), 100 * alone["harmful_flip_rate"]), xytext=(5, 4),
                                  textcoords="offset points", fontsize=8, color="0.35")  # fmt: skip
            label = f"{cascade['name']}, {cascade['family']}"
            flips, colour = 100 * found["harmful_flip_rate"], f"C{number}"
            axes.plot(found["sequential_bits"], flips, "o", color=colour, markersize=8, label=label)
        # A cascade that ends in full precision costs ten times as many bits: equal steps are equal factors.
        axes.set_xscale("log", base=2)
        axes.set(title=name, xlabel="mean sequential bits a trial", ylabel="harmful flips (% of trials)")
        axes.set_xticks(TICKS, TICKS)
        axes.minorticks_off()
        axes.margins(0.08, 0.12)
        axes.autoscale()
        axes.set_ylim(bottom=0)
        axes.grid(color="0.9", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def resolved_figure(cascades: Sequence[Row], sets: Sequence[str]) -> Figure:
    """Which level decides how many of the trials: a bar for each cascade and evaluation set."""
    bars = [(f"{one['name']}, {one['family']}\non {name}", one["sets"][name]) for one in cascades for name in sets]
    figure = Figure(figsize=(html.WIDTH, 0.9 + 0.55 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for place, (_, found) in enumerate(bars):
        left = 0.0
        for bits, share in found["resolved"].items():
            axes.barh(place, 100 * share, left=left, color=_colour(bits), edgecolor="white", label=_named(bits))
            if share > 0.05:
                axes.text(left + 50 * share, place, f"{100 * share:.1f}", ha="center", va="center", fontsize=8)
            left += 100 * share
    axes.set(yticks=range(len(bars)), yticklabels=[label for label, _ in bars], xlabel="% of trials", xlim=(0, 100))
    axes.tick_params(axis="y", labelsize=8)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    _legend_by_bits(figure, axes)
    return figure


def remaining_figure(cascades: Sequence[Row], sets: Sequence[str]) -> Figure:
    """Where harmful flips remain: a panel for each cascade and evaluation set, bars by nearness to the threshold."""
    shown = [(cascade, name) for cascade in cascades for name in sets]
    rows = -(-len(shown) // 2)
    figure = Figure(figsize=(html.WIDTH, 0.6 + 2.3 * rows), layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False)
    for axes, (cascade, name) in zip(panels.flat, shown):
        found = cascade["sets"][name]
        bands = found["remaining_flips"]
        heights = [0.0] * len(bands)
        for bits in found["resolved"]:
            rates = [100 * band["harmful_flip_rate"][bits] for band in bands]
            axes.bar(range(len(bands)), rates, bottom=heights, color=_colour(bits), label=_named(bits))
            heights = [height + rate for height, rate in zip(heights, rates)]
        labels = ["{:g}-{:g}".format(*band["nearest"]) for band in bands]
        axes.set_xticks(range(len(bands)), labels, fontsize=7, rotation=30)
        axes.set_ylim(bottom=0)  # also where no trial flips
        axes.set_title(f"{cascade['name']}, {cascade['family']}, on {name}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels.flat[len(shown) :]:
        axes.set_axis_off()
    figure.supylabel("harmful flips (% of all trials)", fontsize=9)
    figure.supxlabel("trials nearest the threshold at full precision (%)", fontsize=9)
    _legend_by_bits(figure, *panels.flat)
    return figure


def _colour(bits: str) -> str:
    return {"2": "#9ecae1", "3": "#4292c6", "4": "#fdae6b"}.get(bits, "#e6550d" if int(bits) == 32 else "#a1d99b")


def _named(bits: str) -> str:
    return "full precision" if int(bits) == 32 else f"{bits} bits"


def _legend_by_bits(figure: Figure, *panels: Axes) -> None:
    """One legend for all panels, each number of bits once, ascending."""
    found = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}
    names = sorted(found, key=lambda label: (label == "full precision", label))
    figure.legend(
        [found[name] for name in names], names, loc="outside upper center", ncols=4, frameon=False, fontsize=8
    )


def verdict(summary: Row) -> Row | None:
    """The row of the smallest model that is not told to err more than full precision on any evaluation set.

    Of several of one size it is the one whose errors change least for the worse.

    None where there is no such model. Not told apart is not the same as equal: few speakers tell little.

    >>> def row(size, interval):
    ...     return {"method": "m", "bytes": size, "sets": {"a": {"eer_change": 0.1, "eer_change_ci95": interval}}}
    >>> verdict({"rows": [row(99, None), row(20, [-1, 1]), row(10, [-2, 1]), row(5, [0.1, 2])]})["bytes"]
    10
    """

    def is_worse(row: Row, name: str) -> bool:
        interval = changes_of(summary, row, name).get("eer_change_ci95")
        return interval is None or interval[0] > 0

    kept = [row for row in summary["rows"][1:] if not any(is_worse(row, name) for name in row["sets"])]
    changes = [sum(changes_of(summary, row, name)["eer_change"] for name in row["sets"]) for row in kept]
    ranked = sorted(zip(kept, changes), key=lambda pair: (pair[0]["bytes"], pair[1]))
    return ranked[0][0] if ranked else None


def write(workdir: Path, summary: Row, config: Row) -> None:
    """Writes `report.html` of a study, and its figures beside it.

    Args:
        workdir: of the study, which holds the diagnosis.
        summary: as in `study.json`.
        config: the study's configuration, as JSON values.
    """
    rows, sets = summary["rows"], list(summary["rows"][0]["sets"])
    pictures = {"bits": html.png(bits_figure(summary, sets))}
    if summary["cascades"]:
        for name, draw in {
            "cascades": cascades_figure,
            "resolved": resolved_figure,
            "remaining": remaining_figure,
        }.items():
            pictures[name] = html.png(draw(summary["cascades"], sets))
    for name, data in pictures.items():
        (workdir / f"figure-{name}.png").write_bytes(data)
    for cascade in summary["cascades"]:  # drawn by the calibration
        pictures[cascade["directory"]] = (workdir / cascade["directory"] / "policy.png").read_bytes()
    for found in summary["diagnosis"].values():
        for name in FROM_DIAGNOSIS:
            file = workdir / found["directory"] / f"figure-{name}.png"
            if file.exists():
                pictures[f"{found['directory']}-{name}"] = file.read_bytes()
    html.write(
        workdir / "report.html",
        "study",
        pictures,
        sets=sets,
        rows=rows,
        changes=[{name: changes_of(summary, row, name) for name in sets} for row in rows],
        full=rows[0],
        verdict=verdict(summary),
        cascades=summary["cascades"],
        diagnosis=summary["diagnosis"],
        comparison=comparison(summary),
        settings=config,
        calibrated=config["study"]["calibrate"],
    )
