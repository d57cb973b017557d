"""The tables of what benchmarks, drills and counts found, from their JSON."""

from collections.abc import Callable

from kmq_jax.core.files import Row
from kmq_jax.study.markdown import about_sets, change_of, corpus_of, markdown


def conditions_table(found: Row) -> str:
    """What few bits lose by condition, and by how much more than on whole recordings; bold where beyond chance.

    Rows of `found` come condition by condition, full precision first.
    """
    costs = all("min_dcf_loss" in row for row in found["rows"] if row["bits"] != 32)
    header = ["recordings", "seconds", "FP32, EER %", "bits", "EER %", "loss", "grows by",
              *(("minDCF", "loss", "grows by") if costs else ()), "harmful flips", "grow by", "drift",
              "grows by"]  # fmt: skip
    lines, full = [header], 0.0
    for row in found["rows"]:
        if row["bits"] == 32:
            full = row["eer"]
            continue
        cells = [row["title"], f"{row['seconds']:.1f}", f"{full:.2f}", str(row["bits"]), f"{row['eer']:.2f}"]
        cells += [change_of(row, "eer_loss", 2), change_of(row, "eer_growth", 2)]
        if costs:
            cells += [f"{row['min_dcf']:.3f}", change_of(row, "min_dcf_loss", 3), change_of(row, "min_dcf_growth", 3)]
        cells += [f"{row['harmful_flip_rate_loss']:.2f} %", change_of(row, "harmful_flip_rate_growth", 2)]
        cells += [f"{row['mean_abs_drift_loss']:.3f}", change_of(row, "mean_abs_drift_growth", 3)]
        lines.append(cells)
    return markdown(lines) + about_sets({found["notes"]["data"]: found["notes"]})


SPEEDS = (
    ("examples_per_second", "{:,.0f} examples/s", 1),
    ("our_speed_over_it", "ours {:.3f} times as fast", 1),
    ("times_real_time", "{:,.0f} times real time", 1),
    ("ratio", "{:.3f} of the time of the step in full precision", 1),
    ("slowdown_by_input", "{:.3f} of the time of the step without input", 1),
    ("times_one_sort", "{:.2f} of the time of one sort", 1),
    ("seconds", "{:.3f} s", 1),
    ("trials", "{:,.0f} trials", 1),
    ("share_of_peak", "{:.1f} % of peak", 100),
    ("share_of_peak_by_xla", "{:.1f} % by XLA's count", 100),
    ("program_memory_gb", "{:.1f} GB the program", 1),
    ("peak_memory_gb", "{:.1f} GB so far", 1),
)
"""The figures of `bench accelerator` that a table shows: key, words around it, and what it is multiplied by."""

_ACCELERATOR_NOTE = (
    "Share of peak: by the network's own multiplications; by XLA's count, of all arithmetic of the program, so also of "
    "what is computed a second time in the backward pass. GB the program: by XLA's account of it; so far: the most "
    "that the part's process had held on the device by then, earlier rows of the part included. Ours beside PyTorch's: "
    "the row `network` of the part `step`."
)
_OLDER_RECOMPUTATION = "blocks kept nothing, before `remat_keeps`: neither policy that is timed now"


def accelerator_table(lines: list[Row]) -> str:
    """What an accelerator did: one row for each thing measured, from its last line."""
    newest = {(line["part"], line["what"]): line for line in lines if "what" in line}
    rows = [["part", "what", "figures", "card"]]
    for (part, what), line in newest.items():
        whole = {**line, **_derived(line, newest.get(("step", "network")))}
        known = [form.format(whole[name] * factor) for name, form, factor in SPEEDS if whole.get(name) is not None]
        # Lines from before that setting have no word of it.
        known += [_OLDER_RECOMPUTATION] if line.get("remat") and "remat_keeps" not in line else []
        if known:
            rows.append([part, what, ", ".join(known), line["card"]])
    tiny = " Sizes are tiny: that every part runs is shown, nothing of speed."
    return markdown(rows) + f"\n{_ACCELERATOR_NOTE}{tiny if any(line.get('tiny') for line in lines) else ''}\n"


def _derived(line: Row, ours: Row | None) -> Row:
    """What follows from a line, and for PyTorch's from `ours` of the same file; None where something is missing.

    >>> _derived({"part": "torch", "card": "c", "examples_per_second": 4.0}, {"card": "c", "examples_per_second": 5.0})
    {'our_speed_over_it': 1.25, 'share_of_peak_by_xla': None}
    """
    beside = ours if line["part"] == "torch" and ours and ours["card"] == line["card"] else None
    work, peak = line.get("xla_tflop_per_step"), line.get("peak_tflop_per_second")
    theirs = line.get("examples_per_second")
    return {
        "our_speed_over_it": beside["examples_per_second"] / theirs if beside and theirs else None,
        "share_of_peak_by_xla": work / line["step_seconds"] / peak if work and peak else None,
    }


def pods_table(lines: list[Row]) -> str:
    """Training on paper, by `bench pods`: a row for each network and system, by the newest line of its kind."""
    newest = {tuple(line[key] for key in ("model", "bits", "remat", "sharding")): line for line in lines}
    rows = [["network", "system", "examples a chip", "ms a step", "arithmetic", "memory", "sending", "MB sent, by kind",
             "examples/s", "input, MB/s"]]  # fmt: skip
    for line in newest.values():
        kind = [f"{line['bits']} bits" if line["bits"] else "", "blocks recomputed" if line["remat"] else ""]
        kind += [f"{line['sharding']} split" if line["sharding"] else "", "tiny" if line["tiny"] else ""]
        name = ", ".join(filter(None, [line["model"], *kind]))
        sent = ", ".join(f"{kind} {size / 1e6:.1f}" for kind, size in line["sent_bytes"].items())
        for one in line["systems"]:
            low, high = (f"{1e3 * bound:,.0f}" for bound in one["step_bounds"])
            held = f"{one['batch']}" if line["held"] else f"{one['batch']}, if its memory holds them"
            times = [f"{1e3 * one[key]:,.1f}" for key in ("compute", "passes", "send")]
            cells = [name, one["system"], held, low if low == high else f"{low} to {high}", *times, sent]
            rows.append([*cells, f"{one['examples_per_second']:,.0f}", f"{one['input_bytes_per_second'] / 1e6:,.0f}"])
    any_line = next(iter(newest.values()))
    simulated = ", ".join(sorted({str(line["simulated"]) for line in newest.values()}))
    about = (
        f"By XLA's programs for {simulated} simulated devices. Nothing was timed on these systems. Input: "
        f"{any_line['records_an_example']:.1f} whole records of {any_line['record_bytes'] / 1e3:.0f} kB an example."
    )
    return markdown(rows) + f"\n{about}\n"


def extraction_table(found: Row) -> str:
    """Runtimes and models side by side: size, speed relative to the first, and nearness to full precision."""
    speeds = ["times as fast", "in one round", "recordings run before"]
    rows = [["side", "MB", *speeds, "one file of 2.5 s, ms", "cosine to full precision"]]
    for side in found["sides"]:
        least, most = side["speedup_range"]
        rows.append(
            [
                side["side"],
                f"{side['bytes'] / 1e6:.2f}",
                f"{side['speedup']:.2f}",
                f"{least:.2f} to {most:.2f}",
                f"{side['speedup_again']:.2f}",
                f"{side['milliseconds_alone']:.0f}",
                f"{side['mean_cosine']:.4f}",
            ]
        )
    last = f"{found['utterances']:,} recordings, {found['audio_seconds']:,.0f} s of speech"
    return markdown(rows) + f"\n{found['rounds']} rounds, each of recordings that none before had; the last: {last}.\n"


def networks_table(found: Row) -> str:
    """All networks: parameters, whether these are the source's, arithmetic beside the source's, and time.

    What a README or paper prints, and seconds, are columns where a row has them. A file from before
    `reference_seconds` holds seconds of other moments than the ratios, which the text below the table says.
    """
    printed, timed = (any(key in row for row in found["rows"]) for key in ("printed_gmacs", "seconds"))
    head = ["network", "features", "embedding", "parameters", "as in", "GMAC", "GMAC there"]
    head += [*(["printed: M, GMAC", "ours"] if printed else []), f"time, {found['reference']} = 1"]
    rows, notes = [[*head, *(["seconds"] if timed else [])]], dict[str, int]()
    for row in found["rows"]:
        # Notes are numbered as they first occur; the same reason keeps its number.
        mark = f" ({notes.setdefault(row['why'], len(notes) + 1)})" if row.get("why") else ""
        source = f"{row['source']}{mark}" if row.get("parameters_as_source") else ""
        cells = [row["network"], str(row["features"]), str(row["embedding_size"]), f"{row['parameters']:,}", source]
        cells += [f"{row['macs'] / 1e9:.2f}", _gmacs_there(row, found.get("frames"))]
        if printed:
            cells.append(f"{row['printed_parameters']}, {row['printed_gmacs']}" if "printed_gmacs" in row else "")
            cells.append(f"{row['macs_of_printed_frames'] / 1e9:.2f}" if "printed_gmacs" in row else "")
        cells.append(f"{row['time_of_reference']:.2f}" if "time_of_reference" in row else "")
        if timed:
            cells.append(f"{row['seconds']:.3f}" if "seconds" in row else "")
        rows.append(cells)
    listed = "; ".join(f"({number}) {why}" for why, number in notes.items())
    below = [f"But for {listed}."] if listed else []
    if timed and "reference_seconds" not in found:
        below.append("Seconds are of other moments than the ratios, on a busy machine: ratios are the surer figures.")
    return markdown(rows) + (f"\n{' '.join(below)}\n" if below else "")


def _gmacs_there(row: Row, frames: int | None) -> str:
    """What the source counts; of how many frames, where these are others than the table's."""
    if row.get("source_gmacs") is None:
        return ""
    return row["source_gmacs"] + (f" of {row['source_frames']} frames" if row["source_frames"] != frames else "")


def lazy_table(found: Row) -> str:
    """Cascades beside single models on each list: time, multiplications, packed bytes, errors, and what wins.

    A cascade loses to a single model that takes no longer and flips no more trials.
    """
    head = ["on", "system", "escalated", "detector, us a trial", "ms a trial", "ms a recording", "of full precision",
            "G multiplications a trial", "a recording", "MB packed", "EER %", "harmful flips", "loses to"]  # fmt: skip
    rows = [head]
    for one in found["sets"]:
        for row in one["rows"]:
            cascade = "escalated" in row  # else a single model
            rows.append(
                [
                    corpus_of(one["data"]),
                    row["system"].rpartition("/")[2],
                    f"{100 * row['escalated']:.1f} %" if cascade else "",
                    f"{row['detector_microseconds_a_trial']:.2f}" if cascade else "",
                    f"{1e3 * row['seconds_a_trial']:.1f}",
                    f"{1e3 * row['seconds_a_recording']:.1f}",
                    f"{row['ratio']:.2f}",
                    f"{row['macs_a_trial'] / 1e9:.2f}",
                    f"{row['macs_a_recording'] / 1e9:.2f}",
                    f"{row['bytes'] / 1e6:.1f}",
                    f"{row['eer']:.2f}",
                    "" if row["harmful_flips"] is None else str(row["harmful_flips"]),
                    (", ".join(name.rpartition("/")[2] for name in row["beaten_by"]) or "none") if cascade else "",
                ]
            )
    about = {corpus_of(one["data"]): {**one, "utterances": one["recordings"]} for one in found["sets"]}
    return markdown(rows) + about_sets(about)


def activations_table(found: Row) -> str:
    """Models with 8-bit activations beside the same with floating-point ones; bold where beyond chance."""
    rows = [
        ["on", "model", "MB", "EER %", "with float activations", "change", "against FP32", "minDCF, change", "cosine"]
    ]
    for one in found["sets"]:
        for row in one["rows"]:
            # Changes against full precision have the same names behind "full_".
            whole = {key.removeprefix("full_"): value for key, value in row.items() if key.startswith("full_")}
            cells = [f"{row['eer']:.2f}", f"{row['float_eer']:.2f}", change_of(row, "eer_change", 2)]
            cells += [change_of(whole, "eer_change", 2), change_of(row, "min_dcf_change", 3), f"{row['cosine']:.4f}"]
            rows.append([corpus_of(one["data"]), row["name"], f"{row['bytes'] / 1e6:.2f}", *cells])
    return markdown(rows) + about_sets({corpus_of(one["data"]): one for one in found["sets"]})


def across_table(found: Row) -> str:
    """Cascades of different networks beside single models on each list: errors, flips, time and bytes.

    Milliseconds, and the cheapest single model that takes no longer than a cascade and errs no more, are columns where
    a file has them.
    """
    every = [row for one in found["sets"] for row in one["rows"]]
    timed, beaten = (any(key in row for row in every) for key in ("trial_seconds", "beaten_by"))
    head = ["on", "system", "flips allowed", "EER %", "against the last", "minDCF", "against the last", "harmful flips",
            "go on", "time by trial", "by recording", *(["ms by trial", "by recording"] if timed else []),
            "MB", *(["loses to"] if beaten else [])]  # fmt: skip
    rows = [head]
    for one in found["sets"]:
        for row in one["rows"]:
            gated = row["alpha"] is not None  # a cascade; a single model has no gates
            rows.append(
                [
                    corpus_of(one["data"]),
                    row["system"],
                    f"{100 * row['alpha']:g} %" if gated else "",
                    f"{row['eer']:.2f}",
                    change_of(row, "eer_change", 2),
                    f"{row['min_dcf']:.3f}",
                    change_of(row, "min_dcf_change", 3),
                    f"{100 * row['harmful_flip_rate']:.2f} %",
                    f"{100 * row['escalated']:.1f} %" if gated else "",
                    f"{row['trial_ratio']:.2f}",
                    f"{row['recording_ratio']:.2f}",
                    *([f"{1e3 * row[f'{of}_seconds']:.1f}" for of in ("trial", "recording")] if timed else []),
                    f"{row['bytes'] / 1e6:.2f}",
                    *([next(iter(row["beaten_by"]), "none") if "beaten_by" in row else ""] if beaten else []),
                ]
            )
    about = {corpus_of(one["data"]): {**one, "utterances": one["recordings"]} for one in found["sets"]}
    return markdown(rows) + about_sets(about)


def threshold_table(found: Row) -> str:
    """A threshold from own recordings: what it was found to do there, with intervals, and on other speakers."""

    def rate(name: str) -> str:
        low, high = (100 * end for end in found[f"{name}_ci95"])
        return f"{100 * found[name]:.3g} % [{low:.2g}, {high:.3g}]"

    other = found["judged_on"]
    head = ["threshold", "speakers, recordings", "false accepts", "false rejects"]
    own = [f"{found['threshold']:.4f}", f"{found['speakers']}, {found['recordings']}"]
    judged = [f"the same, on {other['set']}", f"{other['speakers']}, {other['trials']:,} trials"]
    rates = [f"{100 * other[name]:.3g} %" for name in ("false_accept_rate", "false_reject_rate")]
    return markdown([head, [*own, rate("false_accept_rate"), rate("false_reject_rate")], [*judged, *rates]])


def stream_table(found: Row) -> str:
    """Long trial lists by the commands that stream them: seconds, memory, and whether shares give the same."""
    rows = [["command", "trials", "processes", "seconds", "most memory of one, MB", "EER %, within", "as one process"]]
    for row in found["rows"]:
        low, high = row["eer_bounds"]
        # Keys of the result that differ from one process's.
        same = "equal" if not row["unlike_one_process"] else f"differs: {', '.join(row['unlike_one_process'])}"
        cells = [row["command"], f"{row['trials']:,}", str(row["processes"]), f"{row['seconds']:,.0f}"]
        cells += [f"{row['peak_memory_mb']:,.0f}", f"{low:.5f} to {high:.5f}", same if row["processes"] > 1 else ""]
        rows.append(cells)
    about = f"{found['utterances']:,} utterances of {found['dim']} dimensions, {found['cores']} cores"
    if any(row["command"] == "snorm" for row in found["rows"]):
        about += f", a cohort of {found['cohort']:,}"
    return markdown(rows) + f"\n{about}, a list of {found['list_bytes'] / 1e9:.1f} GB.\n"


def speed_table(lines: list[Row]) -> str:
    """What benchmarks found beside others, each by its newest line; ratios were measured in turns in one run."""
    # One benchmark at two types of arithmetic is two rows; a later line replaces an earlier one.
    newest = {(line["bench"], line.get("dtype")): line for line in lines}
    rows = [["what", "beside", "found"]]
    for (bench, _), line in newest.items():
        rows += [list(cells) for cells in SPEED_ROWS[bench](line)]
    found = sorted({line["processors"] for line in newest.values()})
    return markdown(rows) + f"\nOn {' or '.join(map(str, found))} processors.\n"


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
    return markdown(rows) + f"\nPython {found['python']} on {found['platform']}, without an accelerator's libraries.\n"


def fuzz_table(found: Row) -> str:
    """How many inputs of each class were tried, and how many were clean."""
    rows = [["class", "tried", "clean", "violations"]]
    for row in [*found["classes"], {**found, "class": "all"}]:
        rows.append([row["class"], *(f"{row[key]:,}" for key in ("tried", "clean", "violations"))])
    return markdown(rows) + f"\n`{found['command']}`, {found['seconds'] / 60:.0f} minutes.\n"


def faults_table(found: Row) -> str:
    """How often each command was disturbed by each fault, and how often that ended otherwise than it should.

    Commands that a fault never met, such as one that ended before Ctrl-C each time, are left out.
    """
    rows = [["fault", "commands, and how often each was disturbed", "violations"]]
    made: dict[str, list[Row]] = {}
    for row in found["rows"]:
        if row["times"]:
            made.setdefault(row["fault"], []).append(row)
    for fault, own in made.items():
        listed = ", ".join(f"{row['command']} {row['times']:,}" for row in own)
        rows.append([fault, listed, str(sum(len(row["violations"]) for row in own))])
    asked = "; ".join(f"`python {command}`" for command in dict.fromkeys(row["made_by"] for row in found["rows"]))
    return markdown(rows) + f"\n{asked}.\n"


def house_table(found: Row) -> str:
    """What can be counted of the structure of several revisions of this project, side by side."""
    columns = found["columns"]
    rows = [["", *(column["name"] for column in columns)]]
    rows += [[name, *(f"{column['figures'][name]:,}" for column in columns)] for name in columns[0]["figures"]]
    at = ", ".join(f"{column['name']}: revision {column['revision']}" for column in columns)
    return markdown(rows) + f"\n{at[0].upper()}{at[1:]}.\n"


def memory_table(found: Row) -> str:
    """The paper's memory table, cell by cell: what is published, and what is counted here, in MiB.

    >>> row = {"network": "ResNet36", "bits": 2, "what": "weights", "published": "1.3", "mib": 1.28}
    >>> print(memory_table({"rows": [row]}), end="")
    | network | bits | what | published | here |  |
    |---|---|---|---|---|---|
    | ResNet36 | 2 | weights | 1.3 | 1.3 | equal |
    """
    rows = [["network", "bits", "what", "published", "here", ""]]
    for row in found["rows"]:
        # As many digits as are published: more cannot be compared.
        digits = len(row["published"].partition(".")[2])
        here = f"{row['mib']:.{digits}f}"
        verdict = "equal" if here == row["published"] else "**differs**"
        rows.append([row["network"], f"{row['bits']}", row["what"], row["published"], here, verdict])
    return markdown(rows)


def biases_table(found: Row) -> str:
    """What biases in half precision save and change, by bits, on each list.

    The cosine is the least of all embeddings' to the same ones with biases in full precision.
    """
    names = list(found["rows"][0]["sets"])
    heads = [head for name in names for head in (f"{corpus_of(name)}, EER %", "in FP16", "change", "minDCF", "cosine")]
    rows = [["bits", "bytes", "in FP16", *heads]]
    for row in found["rows"]:
        cells = [str(row["bits"]), f"{row['bytes']:,}", f"{row['bytes_half']:,}"]
        for name in names:
            one = row["sets"][name]
            cells += [f"{one['eer']:.3f}", f"{one['eer_half']:.3f}", change_of(one, "eer_change", 3)]
            cells += [change_of(one, "min_dcf_change", 4), f"{one['min_cosine']:.6f}"]
        rows.append(cells)
    return markdown(rows) + about_sets({corpus_of(name): found["rows"][0]["sets"][name] for name in names})


def fresh_table(found: Row) -> str:
    """Processor time of commands in processes of their own, least and median of several runs, and most memory."""
    rows = [["command", "least, s", "median, s", "most memory, MB"]]
    for one in found["rows"]:
        rows.append(
            [f"`{one['command']}`", f"{one['least']:.2f}", f"{one['median']:.2f}", f"{one['most_memory'] / 1e6:.0f}"]
        )
    once = ", lists of long or many recordings once" if any(one.get("runs") == 1 for one in found["rows"]) else ""
    machine = f"Python {found['python']}, {found['processor']}, {found['cores']} cores"
    return markdown(rows) + f"\n{found['repeats']} runs each{once}; {machine}.\n"


def runtimes_table(found: Row) -> str:
    """Exported files in other runtimes, one row a model, form and runtime: bytes, cosine, what runs in 8 bits."""
    rows = [["model", "form", "MB", "runtime", "cosine to ours, mean", "least", "convolutions in 8 bits"]]
    for one in found["rows"]:
        about = [one["model"], f"`{one['form']}`" if one["form"].startswith("-") else one["form"]]
        about += [f"{one['bytes'] / 1e6:.2f}", one["runtime"]]
        near, count = one.get("cosine"), one.get("integer_convolutions")
        told = [f"{near['mean']:.4f}", f"{near['least']:.4f}"] if near else ["does not open", ""]
        rows.append([*about, *told, "" if count is None else str(count)])
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return markdown(rows) + f"\n{found['recordings']} recordings; {versions}.\n"
