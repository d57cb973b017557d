"""Writes the results tables of a Markdown file from the JSON files they come from.

A table stands between `<!-- table: FILE.json KIND -->` and `<!-- end -->`, FILE relative to the Markdown file:

| FILE is of | KIND |
|---|---|
| `study` | `bits`, one row a model; `trained`, of those the trained ones; `gains`, what of them a first page needs |
| | `differences`, with paired intervals; `recipes`, of those a row a recipe; `cascades`; `rescues`; `components` |
| `study --settings` | `settings`, one row a line of the paper |
| `conditions` | `conditions` |
| `threshold` | `threshold`, with `judged_on` added |
| `bench accelerator`, `extract --peers`, `networks`, `lazy` | `accelerator`, `extraction`, `networks`, `lazy` |
| `bench across`, `activations`, `stream` | `across`, `activations`, `stream` |
| `bench memory`, `biases` | `memory`, one row a cell of the paper's table; `biases` |
| `bench train`, `extract`, `quant`, `qat`, `diagnose`, a line of a `.jsonl` each | `speed` |
| `launch/fuzz.py`, `launch/faults.py` | `fuzz`, `faults` |
| `.ci/weigh.py`, `.ci/house.py`, `.ci/fresh.py` | `weights`, `house`, `fresh` |
| several studies, separated by commas | `architectures`, one row a model of each network; `fragile`, its components |
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kmq_jax.cascade.costs import savings
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Row, atomic_write, read_json
from kmq_jax.study.paired import changes_of, told_apart

BLOCK = re.compile(r"(<!-- table: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def study_table(summary: Row) -> str:
    """The results of a study: size, EER and minDCF, and what is known of their paired changes against full precision.

    Full precision's own EER has its 95 % interval over speakers; a change that is told apart from none is bold.
    """
    sets, rows = list(summary["rows"][0]["sets"]), summary["rows"]
    changes = {name: [changes_of(summary, row, name) for row in rows] for name in sets}
    shown = {name: any("eer_change_ci95" in one for one in changes[name]) for name in sets}
    costs = {name: any("min_dcf_change_ci95" in one for one in changes[name]) for name in sets}
    header = ["bits", "weights", "KiB"]
    for name in sets:
        header += [f"{name}, EER %", *(["against FP32"] if shown[name] else ())]
        if "min_dcf" in rows[0]["sets"][name]:
            header += ["minDCF", *(["against FP32"] if costs[name] else ())]
    lines = [header]
    for number, row in enumerate(rows):
        cells = [f"{row['bits']:g}", row["method"], f"{row['bytes'] / 1024:,.0f}"]
        for name in sets:
            found, change = row["sets"][name], changes[name][number]
            interval = found["eer_ci95"] if not number else None
            cells.append(f"{found['eer']:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""))
            cells += [_change(change, "eer_change", 2)] if shown[name] else []
            if "min_dcf" in rows[0]["sets"][name]:
                cells += [f"{found['min_dcf']:.3f}", *([_change(change, "min_dcf_change", 3)] if costs[name] else ())]
        lines.append(cells)
    return _markdown(lines) + _about_sets({name: rows[0]["sets"][name] for name in sets})


def _change(change: Row, name: str, digits: int) -> str:
    """A change with its paired interval, bold where that leaves out zero; nothing where it is not known."""
    interval = change.get(f"{name}_ci95")
    if interval is None:
        return ""
    text = f"{change[name]:+.{digits}f} [{interval[0]:+.{digits}f}, {interval[1]:+.{digits}f}]"
    return f"**{text}**" if told_apart(interval) else text


def _about_sets(sets: Row) -> str:
    """How many trials, speakers and utterances each set's figures come from, as far as a file tells."""
    parts = []
    for name, found in sets.items():
        if "trials" not in found:
            continue
        kinds = (
            ("trials", "trials"),
            ("targets", "of them targets"),
            ("speakers", "speakers"),
            ("utterances", "utterances"),
        )
        more = [f"{found[key]:,} {what}" for key, what in kinds if found.get(key) is not None]
        parts.append(f"{name}: {', '.join(more)}")
    return f"\n{'; '.join(parts)}.\n" if parts else ""


def trained_table(summary: Row) -> str:
    """The same table without the models that were quantized without training."""
    chosen = [row for row in summary["rows"] if not row["method"].startswith("without training")]
    return study_table({**summary, "rows": chosen})


def gains_table(summary: Row) -> str:
    """The first table of a page: full precision and its trained networks, bytes and EER alone."""
    sets = list(summary["rows"][0]["sets"])
    heads = [head for name in sets for head in (f"EER %, {name}", "against full precision")]
    rows, full = [["bits", "MB", "times smaller", *heads]], summary["rows"][0]["bytes"]
    for row in summary["rows"]:
        if row["method"] not in ("full precision", "trained"):
            continue
        cells = [f"{row['bits']:g}", f"{row['bytes'] / 1e6:.1f}", f"{full / row['bytes']:.1f}"]
        for name in sets:
            cells += [f"{row['sets'][name]['eer']:.2f}", _change(changes_of(summary, row, name), "eer_change", 2)]
        rows.append(cells)
    return _markdown(rows)


def difference_table(summary: Row) -> str:
    """What networks differ by on each evaluation set; "none" where the paired 95 % interval of the EER's holds zero."""
    rows = [["network", "bits", "less", "on", "EER, points", "minDCF", "EER apart"]]
    for one in summary["differences"]:
        interval = one["eer_change_ci95"]
        apart = ("lower" if one["eer_change"] < 0 else "higher") if interval and told_apart(interval) else "none"
        against = {"control": "full precision, trained alike"}.get(one["against"], one["against"])
        name = one["recipe"] + ("" if one["trained"] else ", without training")
        cells = [_change(one, "eer_change", 2), _change(one, "min_dcf_change", 3), apart if interval else ""]
        rows.append([name, str(one["bits"]), against, one["set"], *cells])
    return _markdown(rows)


def recipes_table(summary: Row) -> str:
    """One row a recipe and number of bits: EER, and its paired changes against full precision, the control and ours.

    EERs are means over seeds. Ours is this project's recipe with levels by k-means, trained or not as the row's is.
    """
    found: dict[tuple[str, int, bool], dict[str, dict[str, Row]]] = {}
    for one in summary["differences"]:
        rows = found.setdefault((one["recipe"], one["bits"], one["trained"]), {})
        rows.setdefault(one["set"], {})[one["against"]] = one
    names = list(dict.fromkeys(one["set"] for one in summary["differences"]))
    against = {"full precision": "full precision", "control": "trained alike", "distilled": "ours"}
    heads = [f"{name}, {what}" for name in names for what in ("EER %", *(f"less {text}" for text in against.values()))]
    lines = [["network", "bits", "seeds", *heads]]
    for (recipe, bits, trained), sets in sorted(found.items(), key=lambda item: (not item[0][2], -item[0][1])):
        first = next(iter(sets.values()))["full precision"]
        cells = [_recipe_name(recipe, bits, trained), str(bits), str(first["seeds"])]
        for name in names:
            compared = sets[name]
            eers: list[float] = compared["full precision"]["eer_by_seed"]
            cells.append(f"{sum(eers) / len(eers):.2f}")
            cells += [_change(compared[one], "eer_change", 2) if one in compared else "" for one in against]
        lines.append(cells)
    return _markdown(lines)


def _recipe_name(recipe: str, bits: int, trained: bool) -> str:
    """How a recipe is called beside others: by its levels where nothing is trained."""
    if not trained:
        return f"{'k-means' if recipe == 'distilled' else recipe}, without training"
    return f"{recipe}'s loss in full precision" if bits == 32 else recipe


def cascade_table(summary: Row) -> str:
    """The cascades of a study on each evaluation set: errors, flips against full precision, and costs in bits.

    The cost by trial stands beside the cost by utterance, each embedded once at every level that some trial needs; new
    bits alone are counted only where codebooks nest. The last column says what the last level alone would cost.
    """
    rows = [["cascade", "on", "EER %", "FP32", "harmful flips", "last level's own", "decided first", "bits a trial",
             "new bits a trial", "bits an utterance", "new bits an utterance", "by utterance"]]  # fmt: skip
    for cascade in summary["cascades"]:
        first, last, nested = str(cascade["bits"][0]), cascade["bits"][-1], "nested" in cascade["family"]
        for name, found in cascade["sets"].items():
            saved = savings(found, last, nested)["utterance"]
            rows.append(
                [
                    cascade["name"] + (", nested" if nested else "") + _gates(cascade),
                    name,
                    f"{found['eer']:.2f}",
                    f"{found['reference_eer']:.2f}",
                    f"{100 * found['harmful_flip_rate']:.3f} %",
                    f"{100 * found['each_width_alone'][str(last)]['harmful_flip_rate']:.3f} %",
                    f"{100 * found['resolved'][first]:.1f} %",
                    f"{found['sequential_bits']:.2f}",
                    f"{found['incremental_bits']:.2f}" if nested else "",
                    f"{found['utterance_bits']:.2f}",
                    f"{found['utterance_incremental_bits']:.2f}" if nested else "",
                    _gain(saved, last, nested),
                ]
            )
    return _markdown(rows)


def rescue_table(summary: Row) -> str:
    """What a cascade gains back of what its first level loses, on every set whose trials did not calibrate it.

    Changes are paired, on the same draws of speakers, and bold where they are told apart from none.
    """
    rows = [["on", "what decides", "EER %", "against full precision", "against the first level", "harmful flips",
             "bits a trial"]]  # fmt: skip
    for cascade in summary["cascades"]:
        first, kind = str(cascade["bits"][0]), ", nested" if "nested" in cascade["family"] else ""
        row = next(row for row in summary["rows"] if _is_level(row, cascade, first))
        for name, found in cascade["sets"].items():
            if not found.get("changes"):
                continue
            alone, change = found["each_width_alone"][first], changes_of(summary, row, name)
            level = [
                f"{first} bits, {row['method']}",
                f"{row['sets'][name]['eer']:.2f}",
                _change(change, "eer_change", 2),
                "",
            ]
            rows.append([name, *level, f"{100 * alone['harmful_flip_rate']:.2f} %", first])
            gained = [_change(found["changes"][kind_of], "eer_change", 2) for kind_of in ("reference", "first")]
            cells = [f"{cascade['name']}{kind}", f"{found['eer']:.2f}", *gained]
            rows.append([name, *cells, f"{100 * found['harmful_flip_rate']:.2f} %", f"{found['sequential_bits']:.2f}"])
    return _markdown(list(map(list, dict.fromkeys(map(tuple, rows)))))


def _is_level(row: Row, cascade: Row, bits: str) -> bool:
    """Whether a row is of the network that a cascade's level of so many bits is."""
    untrained = cascade["family"].startswith("ptq")
    return (
        f"{row['bits']:g}" == bits
        and row["method"].startswith("without training") == untrained
        and ("nested" in row["method"]) == ("nested" in cascade["family"])
    )


def _gates(cascade: Row) -> str:
    return ", gates as published" if cascade.get("gates") == "published" else ""


def _gain(saved: float, last: int, nested: bool) -> str:
    """What a cascade saves by utterance of the bits of its last level, or that it gains nothing."""
    if saved <= 0:
        return f"gains nothing: {last} bits alone cost less"
    return f"saves {100 * saved:.0f} % of {last}" + (", in new bits" if nested else "")


def components_table(summary: Row) -> str:
    """What each component does alone at the fewest bits, all others in full precision: its share of the whole drift."""
    found = {
        name: [row for row in one["retention"] if row["experiment"] == "mirror"]
        for name, one in summary["diagnosis"].items()
    }
    bits = min(row["bits"] for rows in found.values() for row in rows)
    chosen = {name: {row["component"]: row for row in rows if row["bits"] == bits} for name, rows in found.items()}
    names = list(dict.fromkeys(component for rows in chosen.values() for component in rows))
    lines = [[f"alone at {bits} bits", "weights", *(f"{name}, drift it makes" for name in chosen)]]
    for component in names:
        share = next(rows[component]["parameters"] for rows in chosen.values() if component in rows)
        cells = [component, f"{100 * share:.1f} %"]
        for rows in chosen.values():
            drift = rows[component]["drift_recovery"] if component in rows else None
            cells.append("" if drift is None else f"{drift:.0f} %")
        lines.append(cells)
    first = {name: next(iter(rows.values())) for name, rows in chosen.items()}
    return _markdown(lines) + _about_sets(first)


def conditions_table(found: Row) -> str:
    """What few bits lose by condition, and by how much more than on whole recordings; bold where beyond chance."""
    header = ["recordings", "seconds", "FP32, EER %", "bits", "EER %", "loss", "grows by", "harmful flips", "grow by",
              "drift", "grows by"]  # fmt: skip
    lines, full = [header], 0.0
    for row in found["rows"]:
        if row["bits"] == 32:
            full = row["eer"]
            continue
        cells = [row["title"], f"{row['seconds']:.1f}", f"{full:.2f}", str(row["bits"]), f"{row['eer']:.2f}"]
        cells += [_change(row, "eer_loss", 2), _change(row, "eer_growth", 2)]
        cells += [f"{row['harmful_flip_rate_loss']:.2f} %", _change(row, "harmful_flip_rate_growth", 2)]
        cells += [f"{row['mean_abs_drift_loss']:.3f}", _change(row, "mean_abs_drift_growth", 3)]
        lines.append(cells)
    return _markdown(lines) + _about_sets({found["notes"]["data"]: found["notes"]})


SPEEDS = (
    ("examples_per_second", "{:,.0f} examples/s", 1),
    ("times_real_time", "{:,.0f} times real time", 1),
    ("ratio", "{:.3f} of the time of the step in full precision", 1),
    ("slowdown_by_input", "{:.3f} of the time of the step without input", 1),
    ("times_one_sort", "{:.2f} of the time of one sort", 1),
    ("seconds", "{:.3f} s", 1),
    ("trials", "{:,.0f} trials", 1),
    ("share_of_peak", "{:.1f} % of peak", 100),
    ("peak_memory_gb", "{:.1f} GB", 1),
)
"""The figures of `bench accelerator` that a table shows: key, words around it, and what it is multiplied by."""


def accelerator_table(lines: list[Row]) -> str:
    """What an accelerator did: one row for each thing measured, by the last line that tells of it."""
    newest = {(line["part"], line["what"]): line for line in lines if "what" in line}
    rows = [["part", "what", "figures", "card"]]
    for (part, what), line in newest.items():
        known = [form.format(line[name] * factor) for name, form, factor in SPEEDS if line.get(name) is not None]
        if known:
            rows.append([part, what, ", ".join(known), line["card"]])
    return _markdown(rows)


def _read(path: Path) -> Any:
    """A JSON file, or the list of the lines of one that ends in `.jsonl`."""
    if path.suffix != ".jsonl":
        return read_json(path)
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _markdown(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |\n" for cells in rows]
    return "".join([lines[0], "|---" * len(rows[0]) + "|\n", *lines[1:]])


def extraction_table(found: Row) -> str:
    """Runtimes and models side by side: size, speed relative to the first, and nearness to full precision."""
    rows = [["side", "MB", "times as fast", "one file of 2.5 s, ms", "cosine to full precision"]]
    for side in found["sides"]:
        rows.append(
            [
                side["side"],
                f"{side['bytes'] / 1e6:.2f}",
                f"{side['speedup']:.2f}",
                f"{side['milliseconds_alone']:.0f}",
                f"{side['mean_cosine']:.4f}",
            ]
        )
    return _markdown(rows)


def networks_table(found: Row) -> str:
    """All networks: parameters, whether these are the source's, arithmetic, and time as a ratio to the reference's."""
    head = ["network", "features", "embedding", "parameters", "as in", "GMAC", f"time, {found['reference']} = 1"]
    rows, notes = [head], dict[str, int]()
    for row in found["rows"]:
        mark = f" ({notes.setdefault(row['why'], len(notes) + 1)})" if row.get("why") else ""
        source = f"{row['source']}{mark}" if row.get("parameters_as_source") else ""
        cells = [row["network"], str(row["features"]), str(row["embedding_size"]), f"{row['parameters']:,}", source]
        time = f"{row['time_of_reference']:.2f}" if "time_of_reference" in row else ""
        rows.append([*cells, f"{row['macs'] / 1e9:.2f}", time])
    listed = "; ".join(f"({number}) {why}" for why, number in notes.items())
    return _markdown(rows) + (f"\nBut for {listed}.\n" if listed else "")


def lazy_table(found: Row) -> str:
    """Cascades beside single models on each list: time, multiplications, bytes and errors; where none wins, says so."""
    head = ["on", "system", "escalated", "detector, us a trial", "ms a trial", "ms a recording", "of full precision",
            "G multiplications a trial", "a recording", "MB held", "EER %", "harmful flips"]  # fmt: skip
    rows, verdicts = [head], []
    for one in found["sets"]:
        for row in one["rows"]:
            # Files of before had one cascade, whose figures stood beside the rows.
            own = row if "escalated" in row else one if row["system"] == "cascade" else {}
            rows.append(
                [
                    _corpus(one["data"]),
                    row["system"].rpartition("/")[2],
                    f"{100 * own['escalated']:.1f} %" if own else "",
                    f"{own['detector_microseconds_a_trial']:.2f}" if own else "",
                    f"{1e3 * row['seconds_a_trial']:.1f}",
                    f"{1e3 * row['seconds_a_recording']:.1f}",
                    f"{row['ratio']:.2f}",
                    f"{row['macs_a_trial'] / 1e9:.2f}",
                    f"{row['macs_a_recording'] / 1e9:.2f}",
                    f"{row['bytes'] / 1e6:.1f}",
                    f"{row['eer']:.2f}",
                    "" if row["harmful_flips"] is None else str(row["harmful_flips"]),
                ]
            )
            if row.get("beaten_by"):
                better = ", ".join(name.rpartition("/")[2] for name in row["beaten_by"])
                verdicts.append(f"On {_corpus(one['data'])}, {row['system']} does not win: {better} takes no longer")
    about = {_corpus(one["data"]): {**one, "utterances": one["recordings"]} for one in found["sets"]}
    return _markdown(rows) + _about_sets(about) + "".join(f"\n{line} and flips no more trials.\n" for line in verdicts)


def activations_table(found: Row) -> str:
    """Models with 8-bit activations beside the same with floating-point ones; bold where beyond chance."""
    rows = [
        ["on", "model", "MB", "EER %", "with float activations", "change", "against FP32", "minDCF, change", "cosine"]
    ]
    for one in found["sets"]:
        for row in one["rows"]:
            whole = {key.removeprefix("full_"): value for key, value in row.items() if key.startswith("full_")}
            cells = [f"{row['eer']:.2f}", f"{row['float_eer']:.2f}", _change(row, "eer_change", 2)]
            cells += [_change(whole, "eer_change", 2), _change(row, "min_dcf_change", 3), f"{row['cosine']:.4f}"]
            rows.append([_corpus(one["data"]), row["name"], f"{row['bytes'] / 1e6:.2f}", *cells])
    return _markdown(rows) + _about_sets({_corpus(one["data"]): one for one in found["sets"]})


def across_table(found: Row) -> str:
    """Cascades of different networks beside single models on each list: errors, flips, time and bytes."""
    head = ["on", "system", "flips allowed", "EER %", "against the last", "minDCF", "against the last", "harmful flips",
            "go on", "time by trial", "by recording", "MB"]  # fmt: skip
    rows = [head]
    for one in found["sets"]:
        for row in one["rows"]:
            gated = row["alpha"] is not None
            rows.append(
                [
                    _corpus(one["data"]),
                    row["system"],
                    f"{100 * row['alpha']:g} %" if gated else "",
                    f"{row['eer']:.2f}",
                    _change(row, "eer_change", 2),
                    f"{row['min_dcf']:.3f}",
                    _change(row, "min_dcf_change", 3),
                    f"{100 * row['harmful_flip_rate']:.2f} %",
                    f"{100 * row['escalated']:.1f} %" if gated else "",
                    f"{row['trial_ratio']:.2f}",
                    f"{row['recording_ratio']:.2f}",
                    f"{row['bytes'] / 1e6:.2f}",
                ]
            )
    about = {_corpus(one["data"]): {**one, "utterances": one["recordings"]} for one in found["sets"]}
    return _markdown(rows) + _about_sets(about)


def architectures_table(studies: Sequence[Row]) -> str:
    """Several networks at each number of bits: size, errors, and paired changes against their own full precision.

    Below it, for each network the fewest bits at which no set shows a loss of EER beyond chance: its knee.
    """
    sets = list(studies[0]["rows"][0]["sets"])
    heads = [head for name in sets for head in (f"{name}, EER %", "against FP32", "minDCF", "against FP32")]
    rows, knees = [["network", "bits", "weights", "MB", *heads]], []
    for study in studies:
        for row in study["rows"]:
            cells = [study["network"], f"{row['bits']:g}", row["method"], f"{row['bytes'] / 1e6:.2f}"]
            for name in sets:
                found, change = row["sets"][name], changes_of(study, row, name)
                cells += [f"{found['eer']:.2f}", _change(change, "eer_change", 2)]
                cells += [f"{found['min_dcf']:.3f}", _change(change, "min_dcf_change", 3)]
            rows.append(cells)
        for method in dict.fromkeys(row["method"] for row in study["rows"][1:]):
            bits = _knee(study, [row for row in study["rows"] if row["method"] == method])
            knees.append(f"{study['network']}, {method}: {f'{bits:g}' if bits else 'none'}")
    about = _about_sets({name: studies[0]["rows"][0]["sets"][name] for name in sets})
    return f"{_markdown(rows)}\nFewest bits without a loss of EER beyond chance: {'; '.join(knees)}.\n{about}"


def _knee(study: Row, rows: Sequence[Row]) -> float | None:
    """The fewest bits down to which no row's EER rises beyond chance on any set; None where the most bits do."""
    knee = None
    for row in sorted(rows, key=lambda row: -row["bits"]):
        found = [changes_of(study, row, name) for name in row["sets"]]
        if any(one["eer_change"] > 0 and told_apart(one["eer_change_ci95"]) for one in found):
            break
        knee = row["bits"]
    return knee


def fragile_table(studies: Sequence[Row]) -> str:
    """The components of each network that do most harm alone at the fewest bits, by their mean over the sets."""
    rows = [["network", f"the {_MOST} components that do most harm alone: share of the drift, of the weights"]]
    for study in studies:
        mirrored = [
            row for one in study["diagnosis"].values() for row in one["retention"] if row["experiment"] == "mirror"
        ]
        if not mirrored:
            continue  # it was not diagnosed
        bits = min(row["bits"] for row in mirrored)
        found: dict[str, list[float]] = {}
        for row in mirrored:
            if row["bits"] == bits and row["drift_recovery"] is not None:
                found.setdefault(row["component"], []).append(row["drift_recovery"])
        weights = {row["component"]: 100 * row["parameters"] for row in mirrored}
        worst = sorted(found, key=lambda name: -sum(found[name]) / len(found[name]))[:_MOST]
        shown = [f"{name} {sum(found[name]) / len(found[name]):.0f} %, {weights[name]:.1f} %" for name in worst]
        rows.append([f"{study['network']}, {bits} bits", "; ".join(shown)])
    return _markdown(rows)


def _corpus(data: str) -> str:
    """The name of DATA without the place where it lies, nor its part: "words" of "/data/words/dev"."""
    return "/".join(data.rstrip("/").split("/")[-2:-1]) or data


def threshold_table(found: Row) -> str:
    """A threshold from own recordings: what it was found to do there, with intervals, and on other speakers."""

    def rate(name: str) -> str:
        low, high = (100 * end for end in found[f"{name}_ci95"])
        return f"{100 * found[name]:.3g} % [{low:.2g}, {high:.3g}]"

    other = found["judged_on"]
    head = ["threshold", "speakers, recordings", "false accepts", "false rejects"]
    own = [f"{found['threshold']:.4f}", f"{found['speakers']}, {found['recordings']}"]
    judged = [f"the same, on {other['set']}", f"{other['speakers']}, {other['trials']:,} trials"]
    rates = [f"{100 * other[name]:.3g} %" for name in ("false_accept", "false_reject")]
    return _markdown([head, [*own, rate("false_accept"), rate("false_reject")], [*judged, *rates]])


def stream_table(found: Row) -> str:
    """Long trial lists by the commands that stream them: seconds, memory, and whether shares give the same."""
    rows = [["command", "trials", "processes", "seconds", "most memory of one, MB", "EER %, within", "as one process"]]
    for row in found["rows"]:
        low, high = row["eer_bounds"]
        same = "equal" if not row["unlike_one_process"] else f"differs: {', '.join(row['unlike_one_process'])}"
        cells = [row["command"], f"{row['trials']:,}", str(row["processes"]), f"{row['seconds']:,.0f}"]
        cells += [f"{row['peak_memory_mb']:,.0f}", f"{low:.5f} to {high:.5f}", same if row["processes"] > 1 else ""]
        rows.append(cells)
    about = f"{found['utterances']:,} utterances of {found['dim']} dimensions, {found['cores']} cores"
    return _markdown(rows) + f"\n{about}, a list of {found['list_bytes'] / 1e9:.1f} GB.\n"


def speed_table(lines: list[Row]) -> str:
    """What benchmarks found beside others, each by its newest line; ratios were measured in turns in one run."""
    newest = {(line["bench"], line.get("dtype")): line for line in lines}
    rows = [["what", "beside", "found"]]
    for (bench, _), line in newest.items():
        rows += [list(cells) for cells in SPEED_ROWS[bench](line)]
    found = sorted({line["processors"] for line in newest.values()})
    return _markdown(rows) + f"\nOn {' or '.join(map(str, found))} processors.\n"


Cells = tuple[str, str, str]


def _train_speed(line: Row) -> list[Cells]:
    what = f"training step, ResNet34, {line['batch']} x {line['frames']} frames, {line['dtype']}"
    return [(what, "PyTorch, the faster of its two layouts", f"{line['ratio']:.2f} of its time")]


def _extract_speed(line: Row) -> list[Cells]:
    what = f"extraction, {line['audio_seconds']:,.0f} s of speech in {line['utterances']:,} files"
    beside = f"ONNX Runtime, {line['threads']} threads, kaldi-native-fbank"
    return [(what, beside, f"{line['speedup']:.2f} times as fast")]


def _quant_speed(line: Row) -> list[Cells]:
    what = f"k-means, {line['weights'] / 1e6:.1f} M weights, {line['channels']:,} channels"
    return [
        (what, "scikit-learn, `n_init=10`, on a part of them", f"{line['speedup_over_sklearn']:.0f} times as fast"),
        (what, "one `jnp.sort` of the same weights", f"{line['times_jnp_sort']:.2f} of its time"),
    ]


def _qat_speed(line: Row) -> list[Cells]:
    what = f"training step, {line['model']}, {line['batch']} x {line['frames']} frames, {line['dtype']}"
    steps = [(name, one["ratio"]) for name, one in line.items() if isinstance(one, dict) and name != "full precision"]
    return [(f"{what}, {name}", "the same in full precision", f"{ratio:.2f} of its time") for name, ratio in steps]


def _diagnose_speed(line: Row) -> list[Cells]:
    what = f"statistics of a diagnosis, {line['trials']:,} trials, {line['models']} models"
    return [(what, f"{line['replicates']:,} draws for intervals with them", f"{line['per_trial_seconds']:.1f} s")]


SPEED_ROWS: dict[str, Callable[[Row], list[Cells]]] = {
    "train": _train_speed,
    "extract": _extract_speed,
    "quant": _quant_speed,
    "qat": _qat_speed,
    "diagnose": _diagnose_speed,
}
"""The rows of each benchmark's line in `speed_table`."""


def weights_table(found: Row) -> str:
    """What each form of installation weighs, and which packages most of it is."""
    names = {
        "whole": "everything",
        "light": "the light install",
        "example": "numpy and ONNX Runtime for an exported model",
    }
    rows = [["installed", "MB", "most of it"]]
    for form, name in names.items():
        heaviest = ", ".join(f"{package} {size}" for package, size in list(found[form]["heaviest"].items())[:4])
        rows.append([name, f"{found[form]['megabytes']:,}", heaviest])
    return _markdown(rows) + f"\nPython {found['python']} on {found['platform']}, without an accelerator's libraries.\n"


def fuzz_table(found: Row) -> str:
    """How many inputs of each class were tried, and how many were clean."""
    rows = [["class", "tried", "clean", "violations"]]
    for row in [*found["classes"], {**found, "class": "all"}]:
        rows.append([row["class"], *(f"{row[key]:,}" for key in ("tried", "clean", "violations"))])
    return _markdown(rows) + f"\n`{found['command']}`, {found['seconds'] / 60:.0f} minutes.\n"


def faults_table(found: Row) -> str:
    """How often each command was disturbed by each fault, and how often that ended otherwise than it should."""
    rows = [["fault", "commands, and how often each was disturbed", "violations"]]
    made: dict[str, list[Row]] = {}
    for row in found["rows"]:
        made.setdefault(row["fault"], []).append(row)
    for fault, own in made.items():
        listed = ", ".join(f"{row['command']} {row['times']:,}" for row in own)
        rows.append([fault, listed, str(sum(len(row["violations"]) for row in own))])
    asked = "; ".join(f"`python {command}`" for command in dict.fromkeys(row["made_by"] for row in found["rows"]))
    return _markdown(rows) + f"\n{asked}.\n"


def house_table(found: Row) -> str:
    """What can be counted of the structure of several revisions of this project, side by side."""
    columns = found["columns"]
    rows = [["", *(column["name"] for column in columns)]]
    rows += [[name, *(f"{column['figures'][name]:,}" for column in columns)] for name in columns[0]["figures"]]
    at = ", ".join(f"{column['name']}: revision {column['revision']}" for column in columns)
    return _markdown(rows) + f"\n{at[0].upper()}{at[1:]}.\n"


def settings_table(found: Row) -> str:
    """What is published of a training beside its settings: equal, or chosen and why; and the test that holds it.

    Args:
        found: as `paper.settings_beside` gives it.
    """
    rows = [["published", "by", "setting", "there", "here", "", "held by"]]
    for row in found["rows"]:
        there, here = ("" if value is None else f"`{_plainly(value)}`" for value in (row["published"], row["here"]))
        verdict = {True: "equal", False: "**differs**", None: "chosen"}[row["equal"]]
        setting, test = (f"`{name}`" if name else "" for name in (row["setting"], row["test"].rpartition("::")[2]))
        verdict += f": {row['why']}" if row["why"] else ""
        rows.append([row["says"], row["source"], setting, there, here, verdict, test])
    return _markdown(rows)


def _plainly(value: Any) -> str:
    """A setting as a reader writes it."""
    if isinstance(value, list):
        return f"({', '.join(map(_plainly, value))})"
    return f"{value:g}" if isinstance(value, float) else str(value)


def memory_table(found: Row) -> str:
    """The paper's memory table, cell by cell: what is published, and what is counted here, in MiB."""
    rows = [["network", "bits", "what", "published", "here", ""]]
    for row in found["rows"]:
        digits = len(row["published"].partition(".")[2])
        here = f"{row['mib']:.{digits}f}"
        verdict = "equal" if here == row["published"] else "**differs**"
        rows.append([row["network"], f"{row['bits']}", row["what"], row["published"], here, verdict])
    return _markdown(rows)


def biases_table(found: Row) -> str:
    """What biases in half precision save and change, by bits, on each list; the least cosine is of all embeddings."""
    names = list(found["rows"][0]["sets"])
    heads = [head for name in names for head in (f"{_corpus(name)}, EER %", "in FP16", "change", "minDCF", "cosine")]
    rows = [["bits", "bytes", "in FP16", *heads]]
    for row in found["rows"]:
        cells = [str(row["bits"]), f"{row['bytes']:,}", f"{row['bytes_half']:,}"]
        for name in names:
            one = row["sets"][name]
            cells += [f"{one['eer']:.3f}", f"{one['eer_half']:.3f}", _change(one, "eer_change", 3)]
            cells += [_change(one, "min_dcf_change", 4), f"{one['min_cosine']:.6f}"]
        rows.append(cells)
    return _markdown(rows) + _about_sets({_corpus(name): found["rows"][0]["sets"][name] for name in names})


def fresh_table(found: Row) -> str:
    """Processor time of commands in processes of their own: the least and the median of several."""
    rows = [["command", "least, s", "median, s"]]
    for one in found["rows"]:
        rows.append([f"`{one['command']}`", f"{one['least']:.2f}", f"{one['median']:.2f}"])
    about = f"{found['repeats']} runs each; Python {found['python']}, {found['processor']}, {found['cores']} cores."
    return _markdown(rows) + f"\n{about}\n"


TABLES: dict[str, Callable[[Any], str]] = {
    "bits": study_table,
    "gains": gains_table,
    "trained": trained_table,
    "differences": difference_table,
    "recipes": recipes_table,
    "cascades": cascade_table,
    "rescues": rescue_table,
    "components": components_table,
    "conditions": conditions_table,
    "accelerator": accelerator_table,
    "speed": speed_table,
    "extraction": extraction_table,
    "networks": networks_table,
    "threshold": threshold_table,
    "lazy": lazy_table,
    "activations": activations_table,
    "across": across_table,
    "stream": stream_table,
    "weights": weights_table,
    "fuzz": fuzz_table,
    "faults": faults_table,
    "house": house_table,
    "settings": settings_table,
    "memory": memory_table,
    "biases": biases_table,
    "fresh": fresh_table,
}

TABLES_OF_SEVERAL: dict[str, Callable[[Sequence[Any]], str]] = {
    "architectures": architectures_table,
    "fragile": fragile_table,
}
"""Tables of one or more files, whose names are separated by commas."""

_MOST = 5  # components that a table of fragile ones shows of a network


def fill(text: str, directory: Path) -> str:
    """The Markdown `text` with its tables written afresh.

    Raises:
        UserError: a JSON file is missing, or is none of a study.
    """

    def table(match: re.Match[str]) -> str:
        known = [*TABLES, *TABLES_OF_SEVERAL]
        if match[3] not in known:
            raise UserError(f"the table {match[3]!r} of {match[2]} must be one of {', '.join(known)}")
        try:
            if match[3] in TABLES:
                return match[1] + TABLES[match[3]](_read(directory / match[2])) + match[4]
            # Studies from before they told their network's name go by that of their file.
            studies = [{"network": Path(file).stem, **_read(directory / file)} for file in match[2].split(",")]
            return match[1] + TABLES_OF_SEVERAL[match[3]](studies) + match[4]
        except (KeyError, TypeError, IndexError) as error:
            raise UserError(f"{directory / match[2]} is not a study's results: it lacks {error}") from error

    return BLOCK.sub(table, text)


def fill_file(path: Path) -> None:
    """Writes the tables of a Markdown file afresh.

    Raises:
        UserError: the file cannot be read, or a JSON file is at fault.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    with atomic_write(path) as temporary:
        temporary.write_text(fill(text, path.parent))
