"""The change of each network of a study against full precision, from the study's JSON."""

from kmq_jax.core.files import Json, Row

CHANGES = ("eer_change", "min_dcf_change")


def changes_of(summary: Row, row: Row, name: str) -> Json:
    """The changes of one row of a study on one set: its own, or those that the diagnosis found of trained networks.

    Args:
        summary: as in `study.json`.
        row: one of its rows.
        name: of the set.

    Returns:
        `eer_change`, `min_dcf_change` and their `_ci95`, as far as they are known; nothing of full precision.

    >>> full, row = {"sets": {}}, {"sets": {"dev": {"eer_change": 0.5, "eer_change_ci95": None}}}
    >>> changes_of({"rows": [full, row]}, row, "dev")
    {'eer_change': 0.5}
    """
    if row is summary["rows"][0]:
        return {}
    known: Json = row["sets"][name]
    # A study without comparisons of its own may have them in its diagnosis.
    if "eer_change" not in known and row["method"] == "trained":
        systems = summary.get("diagnosis", {}).get(name, {}).get("systems", [])
        known = next((one for one in systems if one["bits"] == row["bits"]), {})
    keys = [key for change in CHANGES for key in (change, f"{change}_ci95")]
    return {key: known[key] for key in keys if known.get(key) is not None}
