"""What a diagnosis leaves on disk: tables as CSV, everything as JSON, figures as PNG, and `report.html` of it all."""

import csv
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from kmq_jax import html
from kmq_jax.core.files import Json, Row, atomic_write, write_json
from kmq_jax.diagnosis import figures, scores
from kmq_jax.diagnosis.diagnosis import GROUP_DRAWS, Diagnosis
from kmq_jax.diagnosis.layers import more_bits
from kmq_jax.diagnosis.networks import COMPONENT_DRAWS

_FIGURE_PREFIX, _WHOLE = "figure-", "diagnosis.json"
_NETWORK_TABLES = ("retention", "layers", "blocks", "correlations")  # which embeddings alone do not give
_SCORE_TABLES = ("systems", "drift", "flips", "speakers", "utterances", "groups", "drift_causes", "worst_trials")
_OURS = re.compile(
    rf"({'|'.join((*_SCORE_TABLES, *_NETWORK_TABLES))})\.csv|{_FIGURE_PREFIX}({'|'.join(figures.FIGURES)})\.png|"
    r"rules-[\d.]+\.json"
)
"""Names of files that one diagnosis writes and another may not."""


def write(out: Path, found: Diagnosis) -> None:
    """Writes everything into the directory `out`; each file appears whole or not at all, the report last.

    What an earlier diagnosis left there, and this one has not, is removed: it would pass for a part of this one.
    """
    pictures = {name: html.png(figure) for name, figure in figures.draw_all(found).items()}
    for name in pictures:
        with atomic_write(out / f"{_FIGURE_PREFIX}{name}.png") as temporary:
            temporary.write_bytes(pictures[name])
    tables = {name: rows for name, rows in found.tables.items() if rows}
    for name, rows in tables.items():
        write_csv(out / f"{name}.csv", rows)
    layers = tables.get("layers", [])
    # A dict as a set that keeps the order.
    rules = {f"rules-{bits:g}.json": more_bits(layers, bits) for bits in {row["bits"]: None for row in layers}}
    rules = {name: rows for name, rows in rules.items() if rows}
    for name, rows in rules.items():
        write_json(out / name, rows)
    kept = {*rules, *(f"{name}.csv" for name in tables), *(f"{_FIGURE_PREFIX}{name}.png" for name in pictures)}
    for path in out.iterdir() if (out / _WHOLE).is_file() else ():
        if _OURS.fullmatch(path.name) and path.name not in kept:
            path.unlink()
    write_json(out / _WHOLE, finite({"notes": found.notes, **found.tables}))
    html.write(
        out / "report.html",
        "diagnosis",
        pictures,
        notes={"seconds": None, "compute": None} | found.notes,
        tables=dict.fromkeys(_NETWORK_TABLES, ()) | found.tables,
        summary=summary_of(found),
        base=found.tables["systems"][0],
        headline=headline(found),
        knees=knees_in_words(found),
        best=best_predictors(found),
        top=top_components(found),
        rules=list(rules),
        GROUP_DRAWS=GROUP_DRAWS,
        COMPONENT_DRAWS=COMPONENT_DRAWS,
        KNEE_RULE=scores.KNEE_RULE,
    )


def flat(row: Row) -> Json:
    """A row without lists: an interval `x_ci95` becomes `x_ci95_low` and `x_ci95_high`.

    >>> flat({"eer": 1.5, "eer_ci95": [1.0, 2.0]})
    {'eer': 1.5, 'eer_ci95_low': 1.0, 'eer_ci95_high': 2.0}
    """
    result: Json = {}
    for key, value in row.items():
        if key.endswith("_ci95"):
            low, high = value or (None, None)
            result |= {f"{key}_low": low, f"{key}_high": high}
        else:
            result[key] = value
    return result


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Writes rows that share their keys; None is an empty cell, infinity is `inf`. A file's name may hold any bytes."""
    with (
        atomic_write(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.DictWriter(file, list(flat(rows[0])))
        writer.writeheader()
        writer.writerows(flat(row) for row in rows)


def finite(value: object) -> object:
    """The value with None for NaN and infinity, which JSON lacks.

    >>> finite({"snr_db": float("inf"), "eer": 1.5})
    {'snr_db': None, 'eer': 1.5}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def summary_of(found: Diagnosis) -> list[Json]:
    """The figures that matter for each model, that of the most bits first.

    Returns:
        `bits`, and rows of the tables: `system`; `full` and `test_only` of drift; of flips, `flips` at the reference's
        threshold, `own` at the model's own, and `near`, in the bin nearest the reference's threshold.
    """
    drift = {(r["bits"], r["kind"]): r for r in found.tables["drift"] if r["class"] == "all"}
    rates = {
        (r["bits"], r["threshold_name"]): r
        for r in found.tables["flips"]
        if r["binning"] == "none" and r["class"] == "all"
    }
    near = {
        r["bits"]: r
        for r in found.tables["flips"]
        if r["threshold_name"] == "reference EER" and r["binning"] == "equal-mass" and r["bin"] == 0
    }
    return [
        {
            "bits": system["bits"],
            "system": system,
            "full": drift[system["bits"], "full"],
            "test_only": drift.get((system["bits"], "test-only")),
            "flips": rates[system["bits"], "reference EER"],
            "own": rates[system["bits"], "own EER"],
            "near": near[system["bits"]],
        }
        for system in found.tables["systems"][1:]
    ]


def describe(found: Diagnosis) -> str:
    """The figures that matter as a short table for a terminal."""
    base = found.tables["systems"][0]
    lines = [
        f"{found.notes['trials']:,} trials, {found.notes['targets']:,} of them targets, {found.notes['speakers']:,} "
        f"speakers; reference EER {base['eer']:.3f} % at threshold {found.notes['threshold']:.4f}",
        f"{'bits':>4} {'EER %':>8} {'|drift|':>8} {'test-only':>9} {'Pearson':>8} {'harmful %':>9} {'benefic. %':>10}",
    ]
    for row in summary_of(found):
        test = f"{row['test_only']['mean_abs']:9.4f}" if row["test_only"] else f"{'-':>9}"
        pearson = row["full"]["pearson"]
        lines.append(
            f"{row['bits']:4} {row['system']['eer']:8.3f} {row['full']['mean_abs']:8.4f} {test} "
            f"{pearson if pearson is None else round(pearson, 4)!s:>8} {100 * row['flips']['harmful_rate']:9.3f} "
            f"{100 * row['flips']['beneficial_rate']:10.3f}"
        )
    for row in found.tables.get("retention", []):
        if row["experiment"] == "mirror" and row["drift_recovery"] is not None:
            eer = "-" if row["recovery"] is None else f"{row['recovery']:.0f} %"
            lines.append(
                f"{row['component']} alone at {row['bits']} bits: makes {eer} of the EER's rise, "
                f"{row['drift_recovery']:.0f} % of the drift"
            )
    return "\n".join(lines)


def headline(found: Diagnosis) -> Json:
    """What the first paragraph says: the figures at the fewest bits."""
    last = summary_of(found)[-1]
    flips = last["flips"]
    # Where nothing flips, the share is 0 of 1.
    everywhere = max(flips["harmful"], 1)
    return last | {
        "near_share": last["near"]["harmful"] / everywhere,
        "near_trials": last["near"]["trials"] / found.notes["trials"],
        "changed": flips["harmful"] + flips["beneficial"],
    }


def knees_in_words(found: Diagnosis) -> list[tuple[str, str]]:
    """Where the knees lie, and of what: `[("3 bits", "EER and mean |drift|"), ...]`."""
    titles = {"eer": "EER", "mean_abs_drift": "mean |drift|", "harmful_flips": "harmful flips"}
    places: dict[int | None, list[str]] = {}
    for key, title in titles.items():
        places.setdefault(found.notes["knees"][key], []).append(title)
    joined = {
        place: " and ".join([", ".join(some[:-1]), some[-1]] if some[1:] else some) for place, some in places.items()
    }
    return [(f"{place} bits" if place else "no number of bits", names) for place, names in joined.items()]


def best_predictors(found: Diagnosis) -> list[Json]:
    """At each number of bits, the correlations of the relative error and of the best predictor: `bits, error, best`."""
    rows = [row for row in found.tables.get("correlations", []) if row["spearman"] is not None]
    result = []
    for bits in dict.fromkeys(row["bits"] for row in rows):
        here = {row["predictor"]: row for row in rows if row["bits"] == bits}
        if "relative_error" in here:
            best = max(here.values(), key=lambda row: row["spearman"])
            result.append({"bits": bits, "error": here["relative_error"], "best": best})
    return result


def top_components(found: Diagnosis) -> Json | None:
    """The components at the fewest bits that were tried; None where none was.

    Returns:
        `bits`; the rows of `retention`, by the drift that they recover, and of `mirror`, by the drift that they make.
    """
    rows = [row for row in found.tables.get("retention", []) if row["component"]]
    rows = [row for row in rows if row["drift_recovery"] is not None]
    if not rows:
        return None
    bits = min(row["bits"] for row in rows)
    kept = {
        kind: sorted(
            (row for row in rows if row["bits"] == bits and row["experiment"] == kind),
            key=lambda row: -row["drift_recovery"],
        )
        for kind in ("retention", "mirror")
    }
    return {"bits": bits, **kept}
