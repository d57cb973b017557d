"""Writes the results tables of a Markdown file from the JSON files they come from.

A table stands between `<!-- table: FILE.json KIND -->` and `<!-- end -->`. FILE is a `study.json`, its path relative to
the Markdown file; KIND is `bits`, one row a model, `trained`, the trained models alone, or `cascades`, one row a
cascade and evaluation set. Of the file that `bench accelerator` writes, KIND is `accelerator`, one row a figure;
of the one by `bench extract --peers`, `extraction`, one row a side.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Row, atomic_write, read_json

BLOCK = re.compile(r"(<!-- table: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def study_table(summary: Row) -> str:
    """The results of a study: size, and EER in percent with its 95 % interval on each evaluation set."""
    sets = list(summary["rows"][0]["sets"])
    rows = [["bits", "weights", "KiB", *(f"{name}, EER %" for name in sets)]]
    for row in summary["rows"]:
        cells = [str(row["bits"]), row["method"], f"{row['bytes'] / 1024:,.0f}"]
        for name in sets:
            eer, interval = row["sets"][name]["eer"], row["sets"][name]["eer_ci95"]
            cells.append(f"{eer:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""))
        rows.append(cells)
    return _markdown(rows)


def trained_table(summary: Row) -> str:
    """The same table without the models that were quantized without training."""
    return study_table({"rows": [row for row in summary["rows"] if not row["method"].startswith("without training")]})


def cascade_table(summary: Row) -> str:
    """The cascades of a study on each evaluation set: errors, flips against full precision, and costs in bits."""
    rows = [["cascade", "on", "EER %", "FP32", "harmful flips", "last level's own", "decided first", "bits, sequential",
             "incremental"]]  # fmt: skip
    for cascade in summary["cascades"]:
        first, last = str(cascade["bits"][0]), str(cascade["bits"][-1])
        for name, found in cascade["sets"].items():
            rows.append(
                [
                    cascade["name"] + (", nested" if "nested" in cascade["family"] else ""),
                    name,
                    f"{found['eer']:.2f}",
                    f"{found['reference_eer']:.2f}",
                    f"{100 * found['harmful_flip_rate']:.3f} %",
                    f"{100 * found['each_width_alone'][last]['harmful_flip_rate']:.3f} %",
                    f"{100 * found['resolved'][first]:.1f} %",
                    f"{found['sequential_bits']:.2f}",
                    f"{found['incremental_bits']:.2f}",
                ]
            )
    return _markdown(rows)


SPEEDS = {
    "examples_per_second": "{:,.0f} examples/s",
    "times_real_time": "{:,.0f} times real time",
    "ratio": "{:.3f} of the time of the step in full precision",
    "times_one_sort": "{:.2f} of the time of one sort",
    "seconds": "{:.3f} s",
}
"""The figures of `bench accelerator` that a table shows; of a line that has several, the first."""


def accelerator_table(lines: list[Row]) -> str:
    """What an accelerator did: one row for each line of figures that holds a speed."""
    rows = [["part", "what", "figure", "card"]]
    for line in lines:
        known = [form.format(line[name]) for name, form in SPEEDS.items() if name in line]
        if known:
            rows.append([line["part"], line["what"], known[0], line["card"]])
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


TABLES: dict[str, Callable[[Any], str]] = {
    "bits": study_table,
    "trained": trained_table,
    "cascades": cascade_table,
    "accelerator": accelerator_table,
    "extraction": extraction_table,
}


def fill(text: str, directory: Path) -> str:
    """The Markdown `text` with its tables written afresh.

    Raises:
        UserError: a JSON file is missing, or is none of a study.
    """

    def table(match: re.Match[str]) -> str:
        if match[3] not in TABLES:
            raise UserError(f"the table {match[3]!r} of {match[2]} must be one of {', '.join(TABLES)}")
        try:
            return match[1] + TABLES[match[3]](_read(directory / match[2])) + match[4]
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
