"""The tables of a study's results, from its JSON."""

from collections.abc import Iterable, Sequence
from typing import Any

from kmq_jax.cascade.costs import savings
from kmq_jax.core.files import Row
from kmq_jax.metrics.paired import told_apart
from kmq_jax.study.markdown import about_sets, change_of, markdown
from kmq_jax.study.paired import changes_of


def study_table(summary: Row) -> str:
    """The results of a study: size, EER and minDCF, and their paired changes against full precision where known.

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
            interval = found["eer_ci95"] if not number else None  # of full precision; others have that of their change
            cells.append(f"{found['eer']:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""))
            cells += [change_of(change, "eer_change", 2)] if shown[name] else []
            if "min_dcf" in rows[0]["sets"][name]:
                cells += [f"{found['min_dcf']:.3f}", *([change_of(change, "min_dcf_change", 3)] if costs[name] else ())]
        lines.append(cells)
    return markdown(lines) + about_sets({name: rows[0]["sets"][name] for name in sets})


def gains_table(summary: Row) -> str:
    """The first table of a page: this project's trained networks beside full precision trained alike, their control.

    Args:
        summary: of a study that compares with its control, as `wespeaker_so762.py:compare` does.
    """
    sets = summary["rows"][0]["sets"]
    heads = [head for name in sets for head in (f"EER %, {name}", "change", "minDCF", "change")]
    rows, full = [["weights", "MB", "times smaller", *heads]], summary["rows"][0]["bytes"]
    changes = {
        (one["bits"], one["set"]): one
        for one in summary["differences"]
        if (one["recipe"], one["trained"], one["against"]) == ("distilled", True, "control")
    }
    kept = ("full precision", "trained", "trained, full precision")
    # Full precision stays first, trained on or not; then most bits first.
    for row in sorted(summary["rows"], key=lambda row: -row["bits"]):
        if row["method"] not in kept:
            continue
        name = f"{row['bits']:g} bits" if row["bits"] < 32 else "full precision"
        name += ", trained" if row["method"].startswith("trained") else ""
        cells = [name, f"{row['bytes'] / 1e6:.1f}", f"{full / row['bytes']:.1f}"]
        for place, found in row["sets"].items():
            change = changes.get((row["bits"], place), {})
            cells += [f"{found['eer']:.2f}", change_of(change, "eer_change", 2)]
            cells += [f"{found['min_dcf']:.3f}", change_of(change, "min_dcf_change", 3)]
        rows.append(cells)
    return markdown(rows) + about_sets(sets)


def difference_table(summary: Row) -> str:
    """What networks differ by on each evaluation set.

    The last column says "none" where the paired 95 % interval of the EER's difference contains zero.
    """
    rows = [["network", "bits", "less", "on", "EER, points", "minDCF", "EER apart"]]
    for one in summary["differences"]:
        interval = one["eer_change_ci95"]
        apart = ("lower" if one["eer_change"] < 0 else "higher") if interval and told_apart(interval) else "none"
        against = {"control": "full precision, trained alike"}.get(one["against"], one["against"])
        name = one["recipe"] + ("" if one["trained"] else ", without training")
        cells = [change_of(one, "eer_change", 2), change_of(one, "min_dcf_change", 3), apart if interval else ""]
        rows.append([name, str(one["bits"]), against, one["set"], *cells])
    return markdown(rows) + about_sets(_listed(summary, (one["set"] for one in summary["differences"])))


def _listed(summary: Row, names: Iterable[str]) -> Row:
    """What a study tells of the whole lists of these sets, each once."""
    sets = summary["rows"][0]["sets"]
    return {name: sets[name] for name in dict.fromkeys(names)}


def recipes_table(summary: Row) -> str:
    """One row a recipe and number of bits: EER, and its paired changes against full precision, the control and ours.

    EERs are means over seeds. Of minDCF the change against full precision stands beside them. Ours is this project's
    recipe with levels by k-means, trained or not as the row's is.
    """
    # By recipe, bits and whether trained; then by set; then by what it is compared with.
    found: dict[tuple[str, int, bool], dict[str, dict[str, Row]]] = {}
    for one in summary["differences"]:
        rows = found.setdefault((one["recipe"], one["bits"], one["trained"]), {})
        rows.setdefault(one["set"], {})[one["against"]] = one
    names = list(dict.fromkeys(one["set"] for one in summary["differences"]))
    against = {"full precision": "full precision", "control": "trained alike", "distilled": "ours"}
    costs = ["minDCF less full precision"] if all("min_dcf_change" in one for one in summary["differences"]) else []
    whats = ("EER %", *(f"less {text}" for text in against.values()), *costs)
    lines = [["network", "bits", "seeds", *(f"{name}, {what}" for name in names for what in whats)]]
    # Trained ones first, then most bits first.
    for (recipe, bits, trained), sets in sorted(found.items(), key=lambda item: (not item[0][2], -item[0][1])):
        first = next(iter(sets.values()))["full precision"]
        cells = [_recipe_name(recipe, bits, trained), str(bits), str(first["seeds"])]
        for name in names:
            compared = sets[name]
            eers: list[float] = compared["full precision"]["eer_by_seed"]
            cells.append(f"{sum(eers) / len(eers):.2f}")
            cells += [change_of(compared[one], "eer_change", 2) if one in compared else "" for one in against]
            cells += [change_of(compared["full precision"], "min_dcf_change", 3)] if costs else []
        lines.append(cells)
    return markdown(lines) + about_sets(_listed(summary, names))


def _recipe_name(recipe: str, bits: int, trained: bool) -> str:
    """The name of a recipe beside others; where nothing is trained, that of its levels."""
    if not trained:
        return f"{'k-means' if recipe == 'distilled' else recipe}, without training"
    return f"{recipe}'s loss in full precision" if bits == 32 else recipe


def cascade_table(summary: Row) -> str:
    """The cascades of a study on each evaluation set: errors, flips against full precision, and costs in bits.

    The cost by trial stands beside the cost by utterance: there each utterance is embedded once at every level that
    some trial needs. New bits alone are counted only where codebooks nest. The last column says what is saved by
    utterance against the last level alone.
    """
    costs = all(_min_dcf(found) for cascade in summary["cascades"] for found in cascade["sets"].values())
    rows = [["cascade", "on", "EER %", "FP32", *(("minDCF", "FP32") if costs else ()), "harmful flips",
             "last level's own", "decided first", "bits a trial", "new bits a trial", "bits an utterance",
             "new bits an utterance", "by utterance"]]  # fmt: skip
    for cascade in summary["cascades"]:
        first, last, nested = str(cascade["bits"][0]), cascade["bits"][-1], "nested" in cascade["family"]
        for name, found in cascade["sets"].items():
            rows.append(
                [
                    cascade["name"] + (", nested" if nested else "") + _gates(cascade),
                    name,
                    f"{found['eer']:.2f}",
                    f"{found['reference_eer']:.2f}",
                    *(_min_dcf(found) if costs else ()),
                    f"{100 * found['harmful_flip_rate']:.3f} %",
                    f"{100 * found['each_level_alone'][str(last)]['harmful_flip_rate']:.3f} %",
                    f"{100 * found['resolved'][first]:.1f} %",
                    f"{found['sequential_bits']:.2f}",
                    f"{found['incremental_bits']:.2f}" if nested else "",
                    f"{found['utterance_bits']:.2f}",
                    f"{found['utterance_incremental_bits']:.2f}" if nested else "",
                    _gain(found, last, nested),
                ]
            )
    return markdown(rows) + about_sets(_judged(summary))


def _min_dcf(found: Row) -> list[str]:
    """The minDCF of a cascade and of full precision on the same trials; nothing where it is not known.

    Crosswise it is the mean of the halves', as the EER is.
    """
    parts = found.get("halves", [found])
    if any(part.get(name) is None for part in parts for name in ("min_dcf", "reference_min_dcf")):
        return []
    return [f"{sum(part[name] for part in parts) / len(parts):.3f}" for name in ("min_dcf", "reference_min_dcf")]


def _judged(summary: Row) -> Row:
    """What is known of the trials that cascades were judged on: by halves of speakers, those within either half."""
    about, first = dict[str, Row](), summary["cascades"][0] if summary["cascades"] else {"sets": {}}
    for name, found in first["sets"].items():
        listed = summary["rows"][0]["sets"][name]
        if "halves" in found:
            within = {key: sum(half[key] for half in found["halves"]) for key in ("trials", "targets")}
            about[f"{name}, within halves of its speakers"] = {"speakers": listed.get("speakers"), **within}
        else:
            about[name] = listed
    return about


def rescue_table(summary: Row) -> str:
    """How much of what a cascade's first level loses the cascade gains back, on every set that did not calibrate it.

    Changes are paired, on the same draws of speakers, and bold where they are told apart from none. The cost by trial
    stands beside the cost by utterance, and what that saves against the last level alone.
    """
    costs = all("min_dcf" in found for found in summary["rows"][0]["sets"].values())
    rows = [["on", "what decides", "EER %", "against full precision", "against the first level",
             *(("minDCF", "against full precision") if costs else ()), "harmful flips", "bits a trial",
             "bits an utterance", "by utterance"]]  # fmt: skip
    judged = dict[str, None]()  # a dict as a set that keeps the order
    for cascade in summary["cascades"]:
        first, nested = str(cascade["bits"][0]), "nested" in cascade["family"]
        row = _row_of_level(summary["rows"], cascade, first)
        for name, found in cascade["sets"].items():
            if not found.get("changes"):
                continue  # the calibration set has none
            judged[name] = None
            alone, change = row["sets"][name], changes_of(summary, row, name)
            flips = f"{100 * found['each_level_alone'][first]['harmful_flip_rate']:.2f} %"
            errors = [f"{alone['eer']:.2f}", change_of(change, "eer_change", 2), "", *_cost(alone, change, costs)]
            rows.append([name, f"{first} bits, {row['method']}", *errors, flips, first, first, ""])
            against = found["changes"]
            errors = [f"{found['eer']:.2f}", *(change_of(against[one], "eer_change", 2) for one in _AGAINST)]
            errors += _cost(found, against["reference"], costs)
            bits = [f"{found[f'{kind}_bits']:.2f}" for kind in ("sequential", "utterance")]
            flips, gain = f"{100 * found['harmful_flip_rate']:.2f} %", _gain(found, cascade["bits"][-1], nested)
            rows.append([name, cascade["name"] + (", nested" if nested else ""), *errors, flips, *bits, gain])
    # Cascades with the same first level repeat its row: only the first stays.
    return markdown(list(map(list, dict.fromkeys(map(tuple, rows))))) + about_sets(_listed(summary, judged))


_AGAINST = ("reference", "first")  # what a cascade's changes are against


def _cost(found: Row, change: Row, known: bool) -> list[str]:
    """The cells of a minDCF and its change, where a table has them."""
    return [f"{found['min_dcf']:.3f}", change_of(change, "min_dcf_change", 3)] if known else []


def _row_of_level(rows: Sequence[Row], cascade: Row, bits: str) -> Row:
    """The row of the network at a cascade's level of so many bits."""
    family, _, nested = cascade["family"].partition("-")
    here = {row["method"]: row for row in rows if f"{row['bits']:g}" == bits}
    own = f"{'without training' if family == 'ptq' else 'trained'}{', nested' if nested else ''}"
    # The study's own recipe goes without saying, another one is named; nested ones never are (`networks._method`).
    return here[own] if nested else here.get(f"trained, {family}") or here[own]


def _gates(cascade: Row) -> str:
    return ", gates as published" if cascade.get("gates") == "published" else ""


def _gain(found: Row, last: int, nested: bool) -> str:
    """What a cascade saves by utterance of the bits of its last level, or that it gains nothing."""
    saved = savings(found, last, nested)["utterance"]
    if saved <= 0:
        return f"gains nothing: {last} bits alone cost less"
    return f"saves {100 * saved:.0f} % of {last}" + (", in new bits" if nested else "")


def components_table(summary: Row) -> str:
    """The share of the whole drift that each component makes alone at the fewest bits, all others in full precision."""
    found = {
        name: [row for row in one["retention"] if row["experiment"] == "mirror"]
        for name, one in summary["diagnosis"].items()
    }
    if not any(found.values()):
        raise KeyError("diagnosis")  # told as what the file lacks
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
    first = {name: next(iter(rows.values())) for name, rows in chosen.items() if rows}
    return markdown(lines) + about_sets(first)


def architectures_table(studies: Sequence[Row]) -> str:
    """Several networks at each number of bits: size, errors, and paired changes against their own full precision.

    Of a network that stands in several files, later ones add their trained rows, but for nested ones. How long training
    and embedding took are columns where a file holds them. Below it, for each network the fewest bits at which no set
    shows a loss of EER beyond chance: its knee.
    """
    sets = list(studies[0]["rows"][0]["sets"])
    heads = [head for name in sets for head in (f"{name}, EER %", "against FP32", "minDCF", "against FP32")]
    shown = [(study, row) for study, rows in _shown_of(studies) for row in rows]
    trained = any("training" in row for _, row in shown)
    timed = any(_embedding_seconds(study, row) is not None for study, row in shown)
    lines = [["network", "bits", "weights", "MB", *heads]]
    lines[0] += [*(["training"] if trained else []), *(["embedding, s"] if timed else [])]
    for study, row in shown:
        cells = [study["network"], f"{row['bits']:g}", row["method"], f"{row['bytes'] / 1e6:.2f}"]
        for name in sets:
            found, change = row["sets"][name], changes_of(study, row, name)
            cells += [f"{found['eer']:.2f}", change_of(change, "eer_change", 2)]
            cells += [f"{found['min_dcf']:.3f}", change_of(change, "min_dcf_change", 3)]
        if trained:
            took = row.get("training")
            cells.append(
                f"{took['seconds'] / 60:.0f} min, {took['cores']} core" + "s" * (took["cores"] > 1) if took else ""
            )
        if timed:
            seconds = _embedding_seconds(study, row)
            cells.append("" if seconds is None else f"{seconds:,.0f}")
        lines.append(cells)
    knees = []
    for study, rows in _shown_of(studies):
        for method in dict.fromkeys(row["method"] for row in rows if row is not study["rows"][0]):
            bits = _knee(study, [row for row in rows if row["method"] == method])
            knees.append(f"{study['network']}, {method}: {f'{bits:g}' if bits else 'none'}")
    about = about_sets({name: studies[0]["rows"][0]["sets"][name] for name in sets})
    return f"{markdown(lines)}\nFewest bits without a loss of EER beyond chance: {'; '.join(knees)}.\n{about}"


def _shown_of(studies: Sequence[Row]) -> list[tuple[Row, list[Row]]]:
    """Each study with those of its rows that stand side by side: all, or of a network shown before the trained ones."""
    before, found = set[str](), []
    for study in studies:
        again = study["network"] in before
        rows = [row for row in study["rows"] if not again or _is_trained(row["method"])]
        found.append((study, rows))
        before.add(study["network"])
    return found


def _is_trained(method: str) -> bool:
    return method.startswith("trained") and "nested" not in method


def _embedding_seconds(study: Row, row: Row) -> float | None:
    """What all sets took to embed by a study's steps; None where it kept no times of them."""
    step = str(row.get("model", "")).removesuffix(".kmq")
    keys = [f"embed-{step}-{row['bits']:g}-{name}" for name in row["sets"]]
    took = study.get("seconds") or {}
    return sum(took[key] for key in keys) if all(key in took for key in keys) else None


def _knee(study: Row, rows: Sequence[Row]) -> float | None:
    """The fewest bits down to which no row's EER rises beyond chance on any set.

    None where it does at the most bits, or the speakers are too few to tell.
    """
    knee = None
    for row in sorted(rows, key=lambda row: -row["bits"]):
        found = [changes_of(study, row, name) for name in row["sets"]]
        if any("eer_change_ci95" not in one for one in found):
            break  # nothing is known of it
        if any(one["eer_change"] > 0 and told_apart(one["eer_change_ci95"]) for one in found):
            break
        knee = row["bits"]
    return knee


def fragile_table(studies: Sequence[Row]) -> str:
    """The components of each network that do most harm alone at the fewest bits, by their mean over the sets."""
    rows = [["network", f"the {_MOST} components that do most harm alone: share of the drift, of the weights"]]
    about = dict[str, Row]()
    for study in studies:
        mirrored = [
            row for one in study["diagnosis"].values() for row in one["retention"] if row["experiment"] == "mirror"
        ]
        about = {name: one["retention"][0] for name, one in study["diagnosis"].items() if one["retention"]} | about
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
    return markdown(rows) + about_sets(about)


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
    return markdown(rows)


def _plainly(value: Any) -> str:
    """A setting as a reader writes it."""
    if isinstance(value, list):
        return f"({', '.join(map(_plainly, value))})"
    return f"{value:g}" if isinstance(value, float) else str(value)


_MOST = 5  # components that a table of fragile ones shows of a network
