"""Writes the results tables of a Markdown file from the JSON files they come from.

A table stands between `<!-- table: FILE.json KIND -->` and `<!-- end -->`, FILE relative to the Markdown file:

| FILE is of | KIND |
|---|---|
| `study` | `bits`, one row a model; `gains`, its trained networks beside their control, for a first page |
| | `differences`, with paired intervals; `recipes`, of those a row a recipe; `cascades`; `rescues`; `components` |
| `study --settings` | `settings`, one row a line of the paper |
| `conditions` | `conditions` |
| `threshold` | `threshold`, with `judged_on` added |
| `bench accelerator`, `extract --peers`, `networks`, `lazy` | `accelerator`, `extraction`, `networks`, `lazy` |
| `bench across`, `activations`, `stream` | `across`, `activations`, `stream` |
| `bench pods`, a line of a `.jsonl` each | `pods` |
| `bench memory`, `biases` | `memory`, one row a cell of the paper's table; `biases` |
| `bench train`, `extract`, `quant`, `qat`, `diagnose`, a line of a `.jsonl` each | `speed` |
| `launch/fuzz.py`, `launch/faults.py`, `launch/runtimes.py` | `fuzz`, `faults`, `runtimes` |
| `.ci/weigh.py`, `.ci/house.py`, `.ci/fresh.py` | `weights`, `house`, `fresh` |
| several studies, separated by commas | `architectures`, one row a model of each network; `fragile`, its components |
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import atomic_write, read_json
from kmq_jax.study.bench_tables import (
    accelerator_table,
    across_table,
    activations_table,
    biases_table,
    conditions_table,
    extraction_table,
    faults_table,
    fresh_table,
    fuzz_table,
    house_table,
    lazy_table,
    memory_table,
    networks_table,
    pods_table,
    runtimes_table,
    speed_table,
    stream_table,
    threshold_table,
    weights_table,
)
from kmq_jax.study.study_tables import (
    architectures_table,
    cascade_table,
    components_table,
    difference_table,
    fragile_table,
    gains_table,
    recipes_table,
    rescue_table,
    settings_table,
    study_table,
)

START = re.compile(r"(<!-- table: (\S+) (\S+) -->\n)")
# To the first end, but never past the start of another table: one without an end would swallow what follows.
BLOCK = re.compile(rf"{START.pattern}(?:(?!<!-- table: ).)*?(<!-- end -->)", re.DOTALL)


def _read(path: Path) -> Any:
    """A JSON file, or the list of the lines of one that ends in `.jsonl`."""
    if path.suffix != ".jsonl":
        return read_json(path)
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


TABLES: dict[str, Callable[[Any], str]] = {
    "bits": study_table,
    "gains": gains_table,
    "differences": difference_table,
    "recipes": recipes_table,
    "cascades": cascade_table,
    "rescues": rescue_table,
    "components": components_table,
    "conditions": conditions_table,
    "accelerator": accelerator_table,
    "pods": pods_table,
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
    "runtimes": runtimes_table,
}


TABLES_OF_SEVERAL: dict[str, Callable[[Sequence[Any]], str]] = {
    "architectures": architectures_table,
    "fragile": fragile_table,
}
"""Tables of one or more files, whose names are separated by commas."""


def fill(text: str, directory: Path) -> str:
    """The Markdown `text` with its tables written afresh.

    Args:
        text: of the file; what is outside of tables stays as it is.
        directory: where the names of JSON files start.

    Raises:
        UserError: a JSON file is missing, or is none of a study; or a table has no end.
    """
    # A start at which no block begins has no end.
    closed = {match.start() for match in BLOCK.finditer(text)}
    for match in START.finditer(text):
        if match.start() not in closed:
            raise UserError(f"the table {match[3]!r} of {match[2]} has no <!-- end -->")

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
            what = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{directory / match[2]} holds no results of the table {match[3]!r}: {what}") from error

    return BLOCK.sub(table, text)


def fill_file(path: Path) -> None:
    """Writes the tables of a Markdown file afresh.

    Raises:
        UserError: the file cannot be read, or a JSON file is at fault.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: it is not UTF-8 ({error.reason} at byte {error.start})") from error
    with atomic_write(path) as temporary:
        temporary.write_text(fill(text, path.parent), encoding="utf-8")
