"""`python -m kmq_jax.study`: a network in full precision and at fewer bits, from training to a cascade and a report.

Steps: train (or import) the full-precision network; quantize it without training; train it quantized, at each number
of bits and with nested codebooks; embed and score the evaluation sets with every one; diagnose; calibrate cascades and
run them. A step that is done is not repeated; one whose settings, data or code changed is, with all that depends on it.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import ml_collections
import numpy as np

from kmq_jax import quant
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json, read_json, sweep, write_json
from kmq_jax.core.locks import sole_writer
from kmq_jax.diagnosis import report as diagnosis_report
from kmq_jax.diagnosis.run import diagnose
from kmq_jax.models.speaker_model import load_model
from kmq_jax.scoring.extract import extract
from kmq_jax.scoring.options import ExtractionOptions
from kmq_jax.scoring.run import score
from kmq_jax.study import report
from kmq_jax.study.cascades import family_steps, run_cascade
from kmq_jax.study.networks import Network, make_networks
from kmq_jax.study.options import NESTED, EvaluationSet, StudyOptions
from kmq_jax.study.steps import Steps

RECIPES = {"embed": 1, "score": 1, "diagnose": 1}
"""To be raised when a change of the code changes what a step computes: studies then repeat it (see `study.steps`)."""


def study(config: ml_collections.ConfigDict, workdir: Path) -> Json:
    """Runs what is not done yet.

    Args:
        config: of the full-precision run, with its `study` section.
        workdir: gets models, embeddings, scores, `diagnosis/`, `cascades/`, `steps.json`, `study.json`, `report.html`.

    Returns:
        What `study.json` holds: `rows`, one a model, with `model`, `method`, `bits`, `bytes` and the metrics of each
        evaluation set; `diagnosis`, by evaluation set; `cascades`; `published`.

    Raises:
        UserError: a setting, file or value is at fault.
    """
    if "study" not in config:
        raise UserError("--config names a configuration without a `study` section: that is for `kmq-jax train`")
    settings = json.loads(config.to_json())
    try:
        options = StudyOptions.of(settings["study"])
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError) as error:  # a section of another form
        raise UserError(f"the configuration's section `study` has another form: {error}") from error
    if options.quick_compile:
        jax.config.update("jax_disable_most_optimizations", True)
    with sole_writer(workdir):
        sweep(workdir)
        return _run(config, options, settings, workdir)


def _run(config: ml_collections.ConfigDict, options: StudyOptions, settings: Json, workdir: Path) -> Json:
    steps = Steps(workdir)
    networks = make_networks(config, options, steps)
    for evaluated in options.sets.values():
        for network in networks:
            embed(steps, network, evaluated, options)
    summary = {
        "rows": [measure(steps, network, options) for network in networks],
        "diagnosis": {name: run_diagnosis(steps, options, networks, options.sets[name]) for name in options.diagnose},
        "cascades": [run_cascade(steps, options, networks, plan) for plan in options.cascades],
        "published": options.published,
    }
    write_json(workdir / "study.json", summary)
    report.write(workdir, summary, settings)
    return summary


def embed(steps: Steps, network: Network, evaluated: EvaluationSet, options: StudyOptions) -> Path:
    """The embeddings of an evaluation set by a network."""
    name, how = (
        f"{network.name}-{evaluated.name}",
        ExtractionOptions(bits=network.read_at, compute=options.compute, max_seconds=options.max_seconds),
    )

    def action(out: Path) -> None:
        extract(network.path, evaluated.data, out, how)

    about, out = [evaluated.data, options.compute, options.max_seconds, network.bits], f"embeddings/{name}.npz"
    needs, data = (network.step,), [evaluated.data]
    return steps.run(f"embed-{name}", about, needs, out, action, data=data, recipe=RECIPES["embed"])


def measure(steps: Steps, network: Network, options: StudyOptions) -> Json:
    """One row of the results: a network's size, its metrics on each evaluation set, and mean EERs of groups of sets."""
    found = {name: measure_on(steps, network, evaluated) for name, evaluated in options.sets.items()}
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
        write_json(out, score(steps.directory / "embeddings" / f"{name}.npz", evaluated.trials).metrics)

    needs, out, data = (f"embed-{name}",), f"metrics/{name}.json", [evaluated.trials]
    made = steps.run(f"score-{name}", evaluated.trials, needs, out, action, data=data, recipe=RECIPES["score"])
    found: Json = read_json(made)
    return found


def run_diagnosis(steps: Steps, options: StudyOptions, networks: Sequence[Network], evaluated: EvaluationSet) -> Json:
    """Where the errors of the trained networks come from.

    Bits that were not trained alone are taken from the nested network.

    Returns:
        Those of its tables that are short.
    """
    steps_of = family_steps(options.recipe, options.bits)
    nested = {int(one.bits): one for one in networks if one.step == f"distilled-{NESTED}"}
    chosen = nested | {int(one.bits): one for one in networks if one.step in steps_of}
    how = dataclasses.replace(options.diagnosis, compute=options.compute)

    def action(out: Path) -> None:
        models = {bits: one.path for bits, one in chosen.items()}
        found = diagnose(networks[0].path, models, evaluated.data, evaluated.trials, how)
        diagnosis_report.write(out, found)

    name, places = f"diagnose-{evaluated.name}", [evaluated.data, evaluated.trials]
    needs = ["fp32", *(one.step for one in chosen.values())]
    about, directory = [*places, dataclasses.asdict(how)], f"diagnosis/{evaluated.name}"
    made = steps.run(name, about, needs, directory, action, data=places, recipe=RECIPES["diagnose"])
    found = read_json(made / "diagnosis.json")
    return {key: found[key] for key in ("systems", "retention", "correlations")} | {
        "knees": found["notes"]["knees"],
        "directory": directory,
    }
