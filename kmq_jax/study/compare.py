"""Paired comparison of a study's networks: with full precision, with the control, with other recipes.

Two networks are scored on the same trials and on the same draws of speakers, so that what a draw does to both is not
counted as a difference. Where the interval of a difference contains zero, the networks are not told apart.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kmq_jax.core.files import Json, Row, read_json, write_json
from kmq_jax.metrics.paired import Errors
from kmq_jax.scoring.levels import score_levels
from kmq_jax.scoring.run import compare
from kmq_jax.study.networks import Network
from kmq_jax.study.options import FULL, PATTERNED, EvaluationSet, Recipe
from kmq_jax.study.steps import Steps

RECIPES = {"compare": 1}
"""To be raised when a change of the code changes what a step computes: studies then repeat it (see `study.steps`)."""
FULL_PRECISION, CONTROL = "full precision", "control"


def errors_of(embeddings: Path, evaluated: EvaluationSet, replicates: int) -> Errors:
    """The error rates of a network on an evaluation set, by cosine scores of its embeddings.

    Args:
        embeddings: the network's file.
        evaluated: the set.
        replicates: draws of speakers.
    """
    # One level alone: its number of bits is not used.
    joined = score_levels([(1, str(embeddings))], None, evaluated.trials, models_path=evaluated.models)
    sides = joined.sides
    return Errors.of(joined.scores[0], joined.trials.label, sides.enrol_speaker, sides.test_speaker, replicates)


@dataclass(frozen=True)
class Group:
    """Networks that differ in the seed alone.

    Attributes:
        recipe: how they are made.
        bits: theirs.
        trained: whether they were; else they are fitted without training.
    """

    recipe: Recipe
    bits: float
    trained: bool

    @property
    def control(self) -> "Group":
        """The networks trained on in full precision by the same steps on the same data."""
        # Patterned levels are trained by distillation.
        return Group("distilled" if self.recipe in PATTERNED else self.recipe, FULL, True)


def grouped(networks: Sequence[Network]) -> dict[Group, list[Network]]:
    """The networks by group. Full precision, nested and mixed ones are left out: they have no control."""
    groups: dict[Group, list[Network]] = {}
    for one in networks:
        if one.run and one.run.name.isdigit():
            groups.setdefault(Group(one.run.recipe, one.bits, one.step == one.run.step), []).append(one)
    return groups


def pairs(groups: Sequence[Group]) -> Iterator[tuple[Group, str, Group | None]]:
    """Yields what is compared: a group, the name of what it is compared with, and the group of that.

    The name is "full precision", of which the group is None, "control", or another recipe at the same bits.

    >>> groups = [Group("distilled", 2, True), Group("distilled", 32, True)]
    >>> [(group.bits, against) for group, against, _ in pairs(groups)]
    [(2, 'full precision'), (2, 'control'), (32, 'full precision')]
    """
    for place, group in enumerate(groups):
        yield group, FULL_PRECISION, None
        if group.trained and group.bits != FULL and group.control in groups:
            yield group, CONTROL, group.control
        for other in groups[:place]:  # earlier ones alone: each pair once
            if (other.bits, other.trained) == (group.bits, group.trained):
                # This project's recipe is what others are compared with, also where it is not the study's own.
                one, less = (other, group) if group.recipe == "distilled" else (group, other)
                yield one, less.recipe, less


def differences(
    networks: Sequence[Network],
    sets: Sequence[EvaluationSet],
    embeddings: Callable[[Network, EvaluationSet], Path],
    replicates: int = 1000,
) -> list[Row]:
    """All differences of a study's networks.

    Args:
        networks: of the study; the first is full precision.
        sets: evaluation sets.
        embeddings: gives the file of a network's embeddings of a set.
        replicates: draws of speakers.

    Returns:
        Rows with `recipe`, `bits`, `trained`, `seeds`, `against`, `set`; what `Errors.minus` gives; and `eer_by_seed`,
        the EER of every training in percent.
    """
    groups = grouped(networks)
    rows: list[Row] = []
    for evaluated in sets:
        made = {
            one.name: errors_of(embeddings(one, evaluated), evaluated, replicates)
            for one in [networks[0], *(one for group in groups.values() for one in group)]
        }
        # Draw by draw over seeds, so that an interval is of the mean.
        errors = {group: Errors.mean([made[one.name] for one in members]) for group, members in groups.items()}
        for group, against, other in pairs(list(groups)):
            less = errors[other] if other else made[networks[0].name]
            rows.append(
                {
                    **dataclasses.asdict(group),
                    "seeds": len(groups[group]),
                    "against": against,
                    "set": evaluated.name,
                    **errors[group].minus(less),
                    "eer_by_seed": [made[one.name].eer for one in groups[group]],
                }
            )
    return rows


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
