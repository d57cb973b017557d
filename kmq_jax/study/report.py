"""The report of a study: one HTML page of results, cascades, the diagnosis, and how all of it was made."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kmq_jax import html
from kmq_jax.core.files import Json, Row, atomic_write, read_json
from kmq_jax.models.runner import AVERAGED, PACKED
from kmq_jax.study.options import FULL
from kmq_jax.study.paired import changes_of
from kmq_jax.study.plan import TRAINING
from kmq_jax.study.published import comparison
from kmq_jax.study.steps import duration
from kmq_jax.training.runlog import read_runlog

METHODS = {  # colour, marker and name of each way to quantize
    "without training": ("tab:gray", "s", "without training"),
    "trained": ("tab:blue", "o", "trained"),
    "trained, kmqat": ("tab:green", "v", "trained, KMQAT as published"),
    "trained, distilled": ("tab:green", "v", "trained, distilled"),
    "without training, nested": ("0.75", "^", "nested, without training"),
    "trained, nested": ("tab:orange", "D", "nested, trained"),
    "trained, mixed": ("tab:purple", "P", "mixed precision, trained"),
}
TICKS = (2, 3, 4, 6, 8, 16, 32)
EER_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
KINDS = {  # kinds of steps as the report groups them: the first words of their names
    "training": TRAINING,
    "quantizing without training": ("ptq",),
    "embedding": ("embed",),
    "scoring": ("score", "compare", "det"),
    "diagnosis": ("diagnose",),
    "cascades": ("halves", "calibrate", "cascade"),
}
FROM_DIAGNOSIS = ("histograms", "flips", "retention")


def bits_figure(summary: Row, sets: Sequence[str]) -> Figure:
    """EER against bits, a panel for each evaluation set, with paired 95 % intervals of the change where known."""
    rows = summary["rows"]
    # Ticks only for what is drawn: controls, further seeds and some recipes have no curve here.
    all_bits = sorted({row["bits"] for row in rows[1:] if row["method"] in METHODS}, reverse=True)
    figure = Figure(figsize=(html.WIDTH, 3.4 * len(sets)), layout="constrained")
    panels = figure.subplots(len(sets), 1, squeeze=False)[:, 0]
    for axes, name in zip(panels, sets):
        full = rows[0]["sets"][name]["eer"]
        axes.axhline(full, color="black", linewidth=1, label="full precision")
        for shift, (method, (colour, marker, label)) in enumerate(METHODS.items()):
            chosen = sorted((row for row in rows if row["method"] == method), key=lambda row: row["bits"])
            # A little apart, so that intervals of different methods do not cover one another.
            places = [all_bits.index(row["bits"]) + 0.07 * (shift - (len(METHODS) - 1) / 2) for row in chosen]
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
        axes.set(title=name, xlabel="bits a weight", ylabel="EER (%)", xlim=(-0.5, len(all_bits) - 0.5))
        axes.set_xticks(range(len(all_bits)), [f"{bits:g}" for bits in all_bits])
        _log_where_wide(axes, [row["sets"][name]["eer"] for row in rows])
        axes.grid(axis="y", color="0.9", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def _log_where_wide(axes: Axes, eers: Sequence[float]) -> None:
    """A logarithmic axis where one network errs so much more that the others would lie on one another."""
    # An EER of zero has no place on a logarithmic axis.
    if 0 < 8 * min(eers) < max(eers):
        low, high = min(eers) / 1.5, min(1.3 * max(eers), 100)
        axes.set_yscale("log")
        axes.set_ylim(low, high)
        ticks = [tick for tick in EER_TICKS if low <= tick <= high]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()


def learning_figure(workdir: Path, rows: Sequence[Row]) -> Figure | None:
    """Loss against epochs of every network that was trained here, a panel for each recipe; below it any validation.

    None where none was trained.
    """
    # A model from elsewhere may have a log as well, but was not trained here.
    here = [row["model"] for row in rows if not Path(row["model"]).is_absolute()]
    logs = {model: _log_of(workdir / model) for model in here}
    panels: dict[str, dict[str, list[Row]]] = {}
    for model, lines in logs.items():
        if any("loss" in line for line in lines):
            kind, _, rest = model.partition("-")  # "distilled-2-seed1": the recipe, and what of it
            panels.setdefault(kind, {})[rest] = lines
    validated = [lines for lines in logs.values() if any("validation_eer" in line for line in lines)]
    count = len(panels) + bool(validated)
    if not panels:
        return None
    figure = Figure(figsize=(html.WIDTH, 0.3 + 2.1 * count), layout="constrained")
    drawn = figure.subplots(count, 1, squeeze=False)[:, 0]
    for axes, (kind, made) in zip(drawn, panels.items()):
        for rest, lines in made.items():
            told = [line for line in lines if "loss" in line]
            axes.plot([line["epoch"] for line in told], [line["loss"] for line in told], label=_trained_name(rest))
        title = "full precision" if kind == "fp32" else f"trained at few bits: {kind}"
        axes.set(title=title, xlabel="epoch", ylabel="loss")
        if kind != "fp32":
            axes.legend(frameon=False, fontsize=8)
    for lines in validated:
        told = [line for line in lines if line.get("validation_eer") is not None]
        # Lines of validations have no epoch, only a step.
        scale = next(line["epoch"] / line["step"] for line in lines if "epoch" in line)
        epochs = [line["step"] * scale for line in told]
        drawn[-1].plot(epochs, [line["validation_eer"] for line in told], "o-", markersize=4)
        drawn[-1].set(title="full precision on validation trials", xlabel="epoch", ylabel="EER (%)")
    for axes in drawn:
        axes.grid(axis="y", color="0.9", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _log_of(run: Path) -> list[Row]:
    file = run / "metrics.jsonl"
    return list(read_runlog(file)) if file.is_file() else []


def _trained_name(rest: str) -> str:
    """What a network is called after the recipe in its step's name.

    >>> _trained_name("2"), _trained_name("nested"), _trained_name("32"), _trained_name("4-seed1")
    ('2 bits', 'nested', 'full precision', '4 bits, seed 1')
    """
    bits, _, seed = rest.partition("-seed")
    name = "full precision" if bits == str(FULL) else f"{bits} bits" if bits.isdigit() else bits
    return f"{name}, seed {seed}" if seed else name


def cascades_figure(cascades: Sequence[Row], sets: Sequence[str]) -> Figure:
    """Harmful flips against bits a trial: every level alone and every cascade, a panel for each evaluation set.

    Levels of 16 bits and more are not drawn alone.
    """
    figure = Figure(figsize=(html.WIDTH, 3.4 * len(sets)), layout="constrained")
    panels = figure.subplots(len(sets), 1, squeeze=False)[:, 0]
    for axes, name in zip(panels, sets):
        drawn = set()  # levels that several cascades share are drawn once
        for number, cascade in enumerate(cascades):
            found = cascade["sets"][name]
            for bits, alone in found["each_level_alone"].items():
                if int(bits) < 16 and (cascade["family"], bits) not in drawn:
                    drawn.add((cascade["family"], bits))
                    axes.plot(int(bits), 100 * alone["harmful_flip_rate"], "s", color="tab:gray", markersize=5)
                    nested = ", nested" if cascade["family"].endswith("nested") else ""
                    # Nested ones lie near the others: their names go below.
                    place = (5, -11) if nested else (5, 4)
                    axes.annotate(f"{bits} bits{nested}", (int(bits), 100 * alone["harmful_flip_rate"]), xytext=place,
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
            if share > 0.05:  # a narrower bar has no room for its number
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


NEAR = 1.02
"""Files that differ by no more than this factor count as of one size."""


def verdict(summary: Row) -> Row | None:
    """The row of the smallest model whose EER is not told to be higher than full precision's on any evaluation set.

    Of several of one size (`NEAR`) it is the one whose EER rises least, in the sum over sets.

    None where there is no such model. Not told apart is not the same as equal: few speakers tell little.

    >>> def row(size, interval, change=0.1):
    ...     return {"method": "m", "bytes": size, "sets": {"a": {"eer_change": change, "eer_change_ci95": interval}}}
    >>> verdict({"rows": [row(990, None), row(200, [-1, 1]), row(100, [-2, 1]), row(50, [0.1, 2])]})["bytes"]
    100
    >>> verdict({"rows": [row(990, None), row(101, [-2, 1], -0.5), row(100, [-2, 2], 0.7)]})["bytes"]
    101
    """

    def is_worse(row: Row, name: str) -> bool:
        interval = changes_of(summary, row, name).get("eer_change_ci95")
        return interval is None or interval[0] > 0  # without an interval, it may be

    def change(row: Row) -> float:
        return sum(changes_of(summary, row, name)["eer_change"] for name in row["sets"])

    kept = [row for row in summary["rows"][1:] if not any(is_worse(row, name) for name in row["sets"])]
    least = min((row["bytes"] for row in kept), default=0)
    return min((row for row in kept if row["bytes"] <= NEAR * least), key=change, default=None)


def level_as_good(found: Row) -> str | None:
    """The bits of a cascade's level that alone costs no more an utterance and makes no more harmful flips, if any does.

    >>> alone = {"2": {"harmful_flip_rate": 0.04}, "4": {"harmful_flip_rate": 0.01}}
    >>> level_as_good({"saved": {"utterance": 0.25}, "harmful_flip_rate": 0.01, "each_level_alone": alone})
    >>> level_as_good({"saved": {"utterance": -0.5}, "harmful_flip_rate": 0.01, "each_level_alone": alone})
    '4'
    """
    levels = found["each_level_alone"]
    # Bits an utterance that the cascade costs: `saved` is a share of its last level's.
    cost = (1 - found["saved"]["utterance"]) * max(map(int, levels))
    fit = [bits for bits in levels if int(bits) <= cost]
    return next((bits for bits in fit if levels[bits]["harmful_flip_rate"] <= found["harmful_flip_rate"]), None)


def headlined(cascades: Sequence[Row], name: str) -> Row | None:
    """The cascade that saves most bits by utterance on a set, of those that gain something over each of their levels.

    None where none does.
    """
    gaining = [
        one for one in cascades if one["sets"][name]["saved"]["utterance"] > 0 and not level_as_good(one["sets"][name])
    ]
    return max(gaining, key=lambda one: one["sets"][name]["saved"]["utterance"], default=None)


def files_of(workdir: Path, rows: Sequence[Row]) -> list[Json]:
    """The model files, most bits first: `file`, `method`, `bits`, `bytes`, and `models`, as rows name them.

    A run's packed file stands for its directory, and a nested file once for all of its bits. Places are relative to the
    report where they lie in the study.
    """
    found: dict[str, Json] = {}
    for row in rows:
        place = workdir / row["model"]
        packed = [name for name in (PACKED, AVERAGED) if (place / name).is_file()]
        file = f"{row['model']}/{packed[0]}" if packed else row["model"]
        one = found.setdefault(row["model"], {key: row[key] for key in ("model", "method", "bytes")})
        one |= {"file": file, "bits": [*one.get("bits", ()), row["bits"]]}
    return list(found.values())


def rules_of(workdir: Path, summary: Row, model: str, data: str) -> list[Json]:
    """The rules that diagnoses propose, as `quantize --rules` reads them: `file`, `bits`, `text`, and the `command`.

    The command is to be run in the directory in which the study was: its places are relative to that, as DATA is.

    Args:
        workdir: of the study.
        summary: as in `study.json`.
        model: the full-precision network, as its row names it.
        data: DATA that the quantized network is fitted on.
    """
    found = []
    network = str(workdir / model) if (workdir / model).exists() else model
    for one in summary["diagnosis"].values():
        for path in sorted((workdir / one["directory"]).glob("rules-*.json")):
            file, bits = str(path.relative_to(workdir)), path.stem.removeprefix("rules-")
            text = "[\n" + ",\n".join(f"  {json.dumps(rule)}" for rule in read_json(path)) + "\n]"
            words = [
                f"--model={network}",
                f"--bits={bits}",
                f"--rules={workdir / file}",
                f"--data={data}",
                f"--out=mixed-{bits}.kmq",
            ]
            found.append(
                {"file": file, "bits": bits, "text": text, "command": shlex.join(["kmq-jax", "quantize", *words])}
            )
    return found


def by_kind(costs: Mapping[str, Row]) -> list[Json]:
    """What steps took, by kind: `kind`, `steps`, the sum of `seconds`, the most `memory_mb` and `device_mb`.

    Steps whose seconds are not known are left out.

    >>> by_kind({"embed-a": {"seconds": 2.0, "memory_mb": 9.0, "device_mb": None}, "embed-b": {"seconds": None}})
    [{'kind': 'embedding', 'steps': 1, 'seconds': 2.0, 'memory_mb': 9.0, 'device_mb': None}]
    """
    rows = []
    for kind, words in KINDS.items():
        known = [
            cost for name, cost in costs.items() if name.partition("-")[0] in words and cost["seconds"] is not None
        ]
        if known:
            most = {
                key: max((one[key] for one in known if one[key]), default=None) for key in ("memory_mb", "device_mb")
            }
            rows.append({"kind": kind, "steps": len(known), "seconds": sum(one["seconds"] for one in known), **most})
    return rows


def data_of(workdir: Path, config: Row, full: Row) -> list[Json]:
    """What the study read: `use`, `data`, `trials` and `about`, how much there is of it."""
    summary = workdir / "fp32" / "summary.json"
    trained = read_json(summary) if summary.is_file() else {}
    about = f"{trained['utterances']:,} utterances, {trained['classes']:,} classes" if trained else ""
    rows = [{"use": "training", "data": config["data"]["train"], "trials": "", "about": about}]
    for name, one in config["study"]["evaluate"].items():
        found = full["sets"][name]
        about = ", ".join(f"{found[key]:,} {key}" for key in ("trials", "speakers", "utterances") if found.get(key))
        rows.append({"use": name, "data": one["data"], "trials": one["trials"], "about": about})
    return rows


def write(workdir: Path, summary: Row, config: Row, costs: Mapping[str, Row]) -> None:
    """Writes `report.html` of a study, and its figures beside it.

    Args:
        workdir: of the study, which holds the diagnosis.
        summary: as in `study.json`.
        config: the study's configuration, as JSON values.
        costs: what each step took (`Steps.costs`).
    """
    rows, sets = summary["rows"], list(summary["rows"][0]["sets"])
    figures = {"bits": bits_figure(summary, sets), "learning": learning_figure(workdir, rows)}
    if summary["cascades"]:
        for name, draw in {
            "cascades": cascades_figure,
            "resolved": resolved_figure,
            "remaining": remaining_figure,
        }.items():
            figures[name] = draw(summary["cascades"], sets)
    pictures = {name: html.png(figure) for name, figure in figures.items() if figure}
    for name, data in pictures.items():
        with atomic_write(workdir / f"figure-{name}.png") as temporary:
            temporary.write_bytes(data)
    drawn = {f"det-{name}": workdir / f"figure-det-{name}.png" for name in sets}  # by steps of their own
    drawn |= {one["directory"]: workdir / one["directory"] / "policy.png" for one in summary["cascades"]}
    for found in summary["diagnosis"].values():
        for name in FROM_DIAGNOSIS:
            drawn[f"{found['directory']}-{name}"] = workdir / found["directory"] / f"figure-{name}.png"
    pictures |= {name: file.read_bytes() for name, file in drawn.items() if file.is_file()}
    starts, files = workdir / "starts.json", files_of(workdir, rows)
    html.write(
        workdir / "report.html",
        "study",
        pictures,
        sets=sets,
        rows=rows,
        files=files,
        changes=[{name: changes_of(summary, row, name) for name in sets} for row in rows],
        full=rows[0],
        verdict=verdict(summary),
        cascades=summary["cascades"],
        compared={name: any(one["sets"][name].get("changes") for one in summary["cascades"]) for name in sets},
        headlined=headlined(summary["cascades"], config["study"]["calibrate"]),
        diagnosis=summary["diagnosis"],
        rules=rules_of(workdir, summary, files[0]["file"], config["data"]["train"]),
        comparison=comparison(summary),
        settings=config,
        calibrated=config["study"]["calibrate"],
        costs={name: cost for name, cost in costs.items() if cost["seconds"] is not None},
        kinds=by_kind(costs),
        starts=read_json(starts) if starts.is_file() else [],
        data=data_of(workdir, config, rows[0]),
        duration=duration,
        level_as_good=level_as_good,
    )
