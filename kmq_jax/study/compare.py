"""The step of a study that compares a network with full precision on the same draws of speakers."""

from pathlib import Path

from kmq_jax.core.files import Json, read_json, write_json
from kmq_jax.scoring.run import compare
from kmq_jax.study.networks import Network
from kmq_jax.study.options import EvaluationSet
from kmq_jax.study.steps import Steps

RECIPES = {"compare": 1}
"""To be raised when a change of the code changes what a step computes: studies then repeat it (see `study.steps`)."""


def compare_on(steps: Steps, network: Network, reference: Network, evaluated: EvaluationSet) -> Json:
    """The changes of EER and minDCF against the reference on one evaluation set (`scoring.run.compare`)."""
    place, name = steps.directory / "embeddings", f"{network.name}-{evaluated.name}"

    def action(out: Path) -> None:
        pair = place / f"{name}.npz", place / f"{reference.name}-{evaluated.name}.npz"
        write_json(out, compare(*pair, evaluated.trials, enrol_models=evaluated.models))

    needs = (f"embed-{name}", f"embed-{reference.name}-{evaluated.name}")
    data = evaluated.lists
    out, recipe = f"metrics/{name}-change.json", RECIPES["compare"]
    made = steps.run(f"compare-{name}", data, needs, out, action, data=data, recipe=recipe)
    found: Json = read_json(made)
    return found
