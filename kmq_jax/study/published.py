"""Published figures beside those that a study measures: EER, minDCF, drift, flips, and the order of components.

`study.published` holds EER in percent by group and bits; `study.published_figures` any of

- `min_dcf`: `{group: {bits: value}}`,
- `drift`: `{group: {"full" or "test-only": {bits: mean |drift|}}}`,
- `shift`: `{set: {bits: {"target" or "nontarget": mean drift}}}`, where both sides are quantized,
- `pearson`: `{set: {bits: correlation with full precision's scores}}`,
- `flips`: `{set: {bits: [near, mid, far]}}`, harmful flips by thirds of full precision's margin,
- `order`: the components that matter most, first to last.
"""

from collections.abc import Sequence

import numpy as np

from kmq_jax.core.files import Json, Row

_MEASURED = ("full precision", "trained", "trained, mixed")
_THIRDS = ("near", "mid", "far")


def comparison(summary: Row) -> list[Json]:
    """Published figures, a row each, beside what was measured: None where it was not.

    Rows hold `figure`, `where` (a group or a set), `bits`, `published` and `measured`.

    >>> row = {"bits": 4, "method": "trained", "sets": {}, "groups": {"overall": 1.1}}
    >>> comparison({"published": {"overall": {"4": 1.0}}, "rows": [row], "cascades": []})
    [{'figure': 'EER %', 'where': 'overall', 'bits': '4', 'published': 1.0, 'measured': 1.1}]
    """
    more = summary.get("published_figures") or {}
    found = _errors(summary, "EER %", summary["published"])
    found += _errors(summary, "minDCF", more.get("min_dcf", {}))
    found += _drifts(summary, more.get("drift", {}))
    for name, by_bits in more.get("shift", {}).items():
        for bits, classes in by_bits.items():
            for kind, value in classes.items():
                measured = _of_drift(summary, name, "full", bits, "mean", kind)
                found.append(_line(f"mean drift, {kind}", name, bits, value, measured))
    for name, by_bits in more.get("pearson", {}).items():
        for bits, value in by_bits.items():
            found.append(_line("correlation", name, bits, value, _of_drift(summary, name, "full", bits, "pearson")))
    found += _flip_rates(summary, more.get("flips", {}))
    for name, one in (summary.get("diagnosis") or {}).items() if "order" in more else ():
        order = list(more["order"])
        seen = ", ".join(_order(one)[: len(order)]) or None
        found.append(_line("components, most first", name, "", ", ".join(order), seen))
    return found


def _line(figure: str, where: str, bits: str, published: object, measured: object) -> Json:
    return {"figure": figure, "where": where, "bits": bits, "published": published, "measured": measured}


def _errors(summary: Row, figure: str, values: Row) -> list[Json]:
    """EER or minDCF, by group and bits."""
    rows = []
    for group, published in values.items():
        for bits, value in published.items():
            one = _cascade(summary) if bits == "cascade" else _row(summary, bits)
            if figure == "EER %":
                measured = one["groups"].get(group) if one else None
            else:
                sets = one["sets"] if one else {}
                costs = [sets.get(name, {}).get("min_dcf") for name in _members(summary, group)]
                measured = _mean(costs)
            rows.append(_line(figure, group, bits, value, measured))
    return rows


def _drifts(summary: Row, values: Row) -> list[Json]:
    rows = []
    for group, kinds in values.items():
        for kind, published in kinds.items():
            for bits, value in published.items():
                drifts = [_of_drift(summary, name, kind, bits, "mean_abs") for name in _members(summary, group)]
                rows.append(_line(f"mean |drift|, {kind}", group, bits, value, _mean(drifts)))
    return rows


def _flip_rates(summary: Row, values: Row) -> list[Json]:
    rows = []
    for name, by_bits in values.items():
        for bits, thirds in by_bits.items():
            for place, value in enumerate(thirds):
                measured = _flips(summary, name, bits, place)
                rows.append(_line(f"harmful flips, {_THIRDS[place]}", name, bits, value, measured))
    return rows


def _members(summary: Row, group: str) -> Sequence[str]:
    """The evaluation sets of a group."""
    members: Sequence[str] = (summary.get("members") or {}).get(group, ())
    return members


def _row(summary: Row, bits: str) -> Row | None:
    """The row of the trained network of so many bits, or of full precision; None where there is none.

    A part of a bit is mixed precision's, whose mean comes out near what was asked for.
    """
    chosen = [row for row in summary["rows"] if row["method"] in _MEASURED]
    exact = [row for row in chosen if f"{row['bits']:g}" == bits]
    mixed = [row for row in chosen if "." in bits and row["method"] == "trained, mixed"]
    return next(iter([*exact, *mixed]), None)


def _cascade(summary: Row) -> Row | None:
    """The first cascade whose gates are chosen as published, or else the first."""
    all_cascades = summary["cascades"]
    published = [one for one in all_cascades if one.get("gates") == "published"]
    return next(iter([*published, *all_cascades]), None)


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean over sets; None where one of them has not been measured."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def _table(summary: Row, name: str, table: str) -> list[Row]:
    rows: list[Row] = (summary.get("diagnosis") or {}).get(name, {}).get(table, [])
    return rows


def _of_drift(summary: Row, name: str, kind: str, bits: str, figure: str, of: str = "all") -> float | None:
    """A figure of the drift on a set; None where it has not been measured."""
    rows = (row for row in _table(summary, name, "drift") if row["kind"] == kind and row["class"] == of)
    return next((row[figure] for row in rows if str(row["bits"]) == bits), None)


def _flips(summary: Row, name: str, bits: str, place: int) -> float | None:
    rows = [row for row in _table(summary, name, "flips") if row["binning"] == "equal-mass"]
    found = {row["bin"]: row["harmful_rate"] for row in rows if str(row["bits"]) == bits}
    # With another number of bins (`margin_bins`) they are not the published thirds.
    return found[place] if len(found) == len(_THIRDS) else None


def _order(found: Row) -> list[str]:
    """Components by what they take back of the drift at the fewest bits, as the paper orders them; most first."""
    rows = [row for row in found["retention"] if row["experiment"] == "retention"]
    fewest = min((row["bits"] for row in rows), default=0)
    kept = [row for row in rows if row["bits"] == fewest and row["drift_recovery"] is not None]
    return [row["component"] for row in sorted(kept, key=lambda row: -row["drift_recovery"])]
