"""`python -m kmq_jax.study`: a network in full precision and at fewer bits, from training to a cascade and a report.

Steps: train (or import) the full-precision network; quantize it without training; train it quantized, at each number
of bits and with nested codebooks; embed and score the evaluation sets with every one; diagnose; calibrate cascades and
run them. A step that is done is not repeated; one whose settings, data or code changed is, with all that depends on it.
"""

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import ml_collections
import numpy as np

from kmq_jax import quant
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json, Row, atomic_write, read_json, sweep, write_json
from kmq_jax.core.locks import sole_writer
from kmq_jax.data.source import require_data
from kmq_jax.diagnosis import report as diagnosis_report
from kmq_jax.diagnosis.run import diagnose
from kmq_jax.metrics.det_plot import save_det
from kmq_jax.models.speaker_model import load_model
from kmq_jax.scoring.extract import extract
from kmq_jax.scoring.levels import score_levels
from kmq_jax.scoring.options import ExtractionOptions
from kmq_jax.scoring.run import score
from kmq_jax.study import report
from kmq_jax.study.cascades import check_plans, family_steps, run_cascade
from kmq_jax.study.compare import compare_on, differences
from kmq_jax.study.networks import Network, make_networks
from kmq_jax.study.options import FULL, NESTED, EvaluationSet, StudyOptions
from kmq_jax.study.paper import settings_beside
from kmq_jax.study.plan import planned, seconds_left
from kmq_jax.study.steps import Steps

RECIPES = {"embed": 1, "score": 2, "diagnose": 2, "det": 1}
"""To be raised when a change of the code changes what a step computes: studies then repeat it (see `study.steps`)."""


def study(config: ml_collections.ConfigDict, workdir: Path, only: Sequence[str] = ()) -> Json:
    """Runs what is not done yet.

    Args:
        config: of the full-precision run, with its `study` section.
        workdir: gets models, embeddings, scores, `diagnosis/`, `cascades/`, `study.json`, `report.html`; `steps.json`
            holds what each step took, `starts.json` the commands, and what they ran with.
        only: makes and measures these networks alone (see `networks.make_networks`). Several processes may do so at
            once; a study of all then finds them done.

    Returns:
        Of `only`, nothing. Else what `study.json` holds: `network`, its name; `rows`, one a model, with
        `model`, `method`, `bits`, `bytes` and the metrics of each evaluation set; `diagnosis`, by evaluation
        set; `cascades`; `published`, `published_figures` and `members` of groups, to compare with; `seconds`
        that each step took; where several recipes, seeds or a control were trained, `differences`, as
        `compare.differences` gives them.

    Raises:
        UserError: a setting, file or value is at fault.
    """
    settings = json.loads(config.to_json())
    options = options_of(config)
    check_plans(options)
    _require_inputs(config, options)
    if options.quick_compile:
        jax.config.update("jax_disable_most_optimizations", True)
    with sole_writer(workdir, shared=bool(only)):
        if not only:
            sweep(workdir)
        plan = planned(options, 0.0 if config.init_from else config.epochs, only)
        steps = Steps(workdir, plan, functools.partial(seconds_left, plan))
        networks: list[Network] = []
        rows: list[Row] = []
        # Each is measured before the next one is made: the first result comes early.
        for network in make_networks(config, options, steps, only):
            networks.append(network)
            for evaluated in options.sets.values():
                embed(steps, network, evaluated, options)
            rows.append(measure(steps, network, networks[0], options))
            print(f"    {in_words(rows[-1])}", file=sys.stderr, flush=True)
        return {} if only else _summed_up(steps, networks, rows, options, settings)


def _require_inputs(config: ml_collections.ConfigDict, options: StudyOptions) -> None:
    """Refuses missing data and lists before the first step: some are read only hours later.

    Raises:
        UserError: one is missing.
    """
    data = config.data
    heard = [data.train, data.noise, data.music, data.babble, data.rooms]
    for text in (*heard, *(evaluated.data for evaluated in options.sets.values())):
        if text:
            require_data(text)
    for text in (text for evaluated in options.sets.values() for text in evaluated.lists):
        if not text.startswith("synthetic:") and not os.path.exists(text):
            raise UserError(f"no list of trials or models at {text}: no such file")


def in_words(row: Row) -> str:
    """One row of the results in words.

    >>> found = {"eer": 3.5, "eer_change": 1.25, "eer_change_ci95": [0.5, 2.0]}
    >>> in_words({"bits": 2, "method": "trained", "bytes": 20480, "sets": {"test": found}})
    '2 bits, trained: 20 KiB, EER 3.50 % on test (+1.25 [+0.50, +2.00] against full precision)'
    """
    told = []
    for name, found in row["sets"].items():
        change = found.get("eer_change_ci95")
        against = "" if change is None else f" ({found['eer_change']:+.2f} [{change[0]:+.2f}, {change[1]:+.2f}]"
        told.append(f"{found['eer']:.2f} % on {name}" + (against and f"{against} against full precision)"))
    called = row["method"] if row["bits"] == FULL else f"{row['bits']:g} bits, {row['method']}"
    return f"{called}: {row['bytes'] / 1024:,.0f} KiB, EER {', '.join(told)}"


def options_of(config: ml_collections.ConfigDict) -> StudyOptions:
    """The options in a configuration's section `study`.

    Raises:
        UserError: there is no such section, or a setting has a value that cannot be used.
    """
    if "study" not in config:
        raise UserError("--config names a configuration without a `study` section: that is for `kmq-jax train`")
    try:
        return StudyOptions.of(json.loads(config.to_json())["study"])
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError) as error:  # a section of another form
        raise UserError(f"the configuration's section `study` has another form: {error}") from error


def write_settings(config: ml_collections.ConfigDict, workdir: Path, step: str) -> Json:
    """Writes what is published of one training beside its settings (`paper.settings_beside`) into the directory.

    Raises:
        UserError: a setting is at fault, or nothing is published of such a training.
    """
    found = settings_beside(config, options_of(config), step)
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / f"settings-{step}.json", found)
    return found


def _summed_up(
    steps: Steps, networks: Sequence[Network], rows: Sequence[Row], options: StudyOptions, settings: Json
) -> Json:
    for evaluated in options.sets.values():
        draw_det(steps, networks, evaluated)
    summary = {
        "network": settings["model"]["name"],
        "rows": rows,
        "diagnosis": {name: run_diagnosis(steps, options, networks, options.sets[name]) for name in options.diagnose},
        "cascades": [run_cascade(steps, options, networks, plan) for plan in options.cascades],
        "published": options.published,
        "published_figures": options.published_figures,
        "members": {group: list(members) for group, members in options.groups.items()},
    }
    # Other recipes, seeds or a control: else each network is compared with full precision alone, in its row.
    if options.also or options.seeds > 1 or options.epochs.get(str(FULL)):
        summary["differences"] = differences(networks, list(options.sets.values()), functools.partial(place_of, steps))
    summary["seconds"] = {name: cost["seconds"] for name, cost in steps.costs().items()}
    write_json(steps.directory / "study.json", summary)
    report.write(steps.directory, summary, settings, steps.costs())
    return summary


def embed(steps: Steps, network: Network, evaluated: EvaluationSet, options: StudyOptions) -> Path:
    """The step that embeds an evaluation set by a network; returns the file."""
    name = f"{network.name}-{evaluated.name}"
    how = ExtractionOptions(
        bits=network.read_at,
        compute=options.compute,
        max_seconds=options.max_seconds,
        max_frames=options.max_frames,
        engine=options.engine,
    )

    def action(out: Path) -> None:
        extract(network.path, evaluated.data, out, how)

    about = [evaluated.data, options.compute, options.max_seconds, network.bits]
    # Named only where they are set, so that studies done before they were there are not repeated.
    about += filter(None, [options.max_frames, options.engine if options.engine != "jax" else ""])
    out = f"embeddings/{name}.npz"
    needs, data = (network.step,), [evaluated.data]
    return steps.run(f"embed-{name}", about, needs, out, action, data=data, recipe=RECIPES["embed"])


def place_of(steps: Steps, network: Network, evaluated: EvaluationSet) -> Path:
    """Where `embed` puts its file."""
    return steps.directory / "embeddings" / f"{network.name}-{evaluated.name}.npz"


def measure(steps: Steps, network: Network, reference: Network, options: StudyOptions) -> Json:
    """One row of the results: a network's size, its metrics on each evaluation set, and mean EERs of groups of sets.

    Of all networks but the reference, the metrics hold their paired changes against it (`compare.compare_on`).
    """
    found = {name: measure_on(steps, network, evaluated) for name, evaluated in options.sets.items()}
    if network is not reference:
        found = {
            name: metrics | compare_on(steps, network, reference, options.sets[name]) for name, metrics in found.items()
        }
    inside = network.path.is_relative_to(steps.directory)
    # Relative, so that results do not depend on where the study lies.
    place = network.path.relative_to(steps.directory) if inside else network.path
    groups = {group: [found[one]["eer"] for one in members] for group, members in options.groups.items()}
    return {
        "model": str(place),
        "method": network.method,
        "bits": network.bits,
        "bytes": quant.size_bytes(load_model(network.path).variables).total,
        "sets": found,
        "groups": {group: float(np.mean(eers)) for group, eers in groups.items()},
    }


def measure_on(steps: Steps, network: Network, evaluated: EvaluationSet) -> Json:
    """A network's metrics on one evaluation set."""
    name = f"{network.name}-{evaluated.name}"

    def action(out: Path) -> None:
        file = place_of(steps, network, evaluated)
        write_json(out, score(file, evaluated.trials, enrol_models=evaluated.models).metrics)

    needs, out, data = (f"embed-{name}",), f"metrics/{name}.json", evaluated.lists
    made = steps.run(f"score-{name}", data, needs, out, action, data=data, recipe=RECIPES["score"])
    found: Json = read_json(made)
    return found


def draw_det(steps: Steps, networks: Sequence[Network], evaluated: EvaluationSet) -> Path:
    """The DET curves of full precision and of one network at each number of bits."""
    shown = one_of_each(networks)

    def action(out: Path) -> None:
        # Numbers in place of bits: only the order counts here.
        levels = [(number, str(place_of(steps, one, evaluated))) for number, one in enumerate(shown)]
        joined = score_levels(levels, None, evaluated.trials, models_path=evaluated.models)
        names = [f"{one.bits:g} bits" if one.run else "full precision" for one in shown]
        with atomic_write(out) as temporary:
            save_det(
                temporary, {name: (row, joined.trials.label) for name, row in zip(names, joined.scores)}, evaluated.name
            )

    needs = [f"embed-{one.name}-{evaluated.name}" for one in shown]
    name, data, recipe = f"det-{evaluated.name}", evaluated.lists, RECIPES["det"]
    return steps.run(name, data, needs, f"figure-{name}.png", action, data=data, recipe=recipe)


def one_of_each(networks: Sequence[Network]) -> list[Network]:
    """Full precision, then one network at each number of bits: the first that was trained, else the first."""
    chosen: dict[float, Network] = {}
    for one in networks[1:]:
        if one.bits != FULL and (one.bits not in chosen or one.trained and not chosen[one.bits].trained):
            chosen[one.bits] = one
    return [networks[0], *(chosen[bits] for bits in sorted(chosen, reverse=True))]


def run_diagnosis(steps: Steps, options: StudyOptions, networks: Sequence[Network], evaluated: EvaluationSet) -> Json:
    """The step that finds where errors come from: of the trained networks, or where there are none of the fitted ones.

    Bits that were not trained by themselves are taken from the trained nested network.

    Returns:
        Those of the diagnosis's tables that are short, and the `directory` of all of it.
    """
    steps_of = family_steps(options.recipe, options.bits)
    nested = {int(one.bits): one for one in networks if one.step == f"distilled-{NESTED}"}
    chosen = nested | {int(one.bits): one for one in networks if one.step in steps_of}
    # Mixed precision has no whole number of bits, by which a diagnosis names its systems.
    chosen = chosen or {int(one.bits): one for one in one_of_each(networks)[1:] if one.bits == int(one.bits)}
    # What is extracted is diagnosed: the arithmetic and how much of a recording counts are the study's.
    how = dataclasses.replace(
        options.diagnosis,
        compute=options.compute,
        max_seconds=options.max_seconds or options.diagnosis.max_seconds,
        max_frames=options.max_frames or options.diagnosis.max_frames,
    )

    def action(out: Path) -> None:
        models = {bits: one.path for bits, one in chosen.items()}
        found = diagnose(networks[0].path, models, evaluated.data, evaluated.trials, how, evaluated.models)
        diagnosis_report.write(out, found)

    name, places = f"diagnose-{evaluated.name}", [evaluated.data, *evaluated.lists]
    needs = ["fp32", *(one.step for one in chosen.values())]
    about, directory = [*places, dataclasses.asdict(how)], f"diagnosis/{evaluated.name}"
    made = steps.run(name, about, needs, directory, action, data=places, recipe=RECIPES["diagnose"])
    found = read_json(made / "diagnosis.json")
    short = {key: found[key] for key in ("systems", "retention", "correlations")}
    whole = [row for row in found["flips"] if row["threshold_name"] == "reference EER" and row["class"] == "all"]
    return short | {
        "drift": found["drift"],
        "flips": [row for row in whole if row["binning"] in ("none", "equal-mass")],
        "knees": found["notes"]["knees"],
        "directory": directory,
    }
