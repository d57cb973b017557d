"""Paired comparison of a study's trained networks: with full precision, with the control, with other recipes.

Two networks are scored on the same trials and on the same draws of speakers, so that what a draw does to both is not
counted as a difference. Where the interval of a difference holds zero, there is none to speak of.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kmq_jax.core.files import Row
from kmq_jax.metrics.bootstrap import percentile_interval, speaker_bootstrap
from kmq_jax.metrics.detection import Array, eer, min_dcf
from kmq_jax.scoring.cosine import cosine_scores
from kmq_jax.scoring.join import join
from kmq_jax.scoring.table import read_embeddings
from kmq_jax.study.networks import Network
from kmq_jax.study.options import FULL, NESTED, EvaluationSet

FULL_PRECISION, CONTROL = "full precision", "control"


@dataclass(frozen=True, eq=False)
class Errors:
    """What one or several networks err, all trials and every draw of speakers; several: the mean over them.

    Attributes:
        eer: percent.
        min_dcf: at the study's prior.
        eer_draws: `[replicates]`, percent.
        min_dcf_draws: `[replicates]`.
    """

    eer: float
    min_dcf: float
    eer_draws: Array
    min_dcf_draws: Array

    @classmethod
    def of(cls, embeddings: Path, trials: str, replicates: int) -> "Errors":
        """Scores a trial list by cosine.

        Args:
            embeddings: file of a network's embeddings.
            trials: TRIALS.
            replicates: draws of speakers.
        """
        table = read_embeddings(embeddings)
        listed, sides = join(trials, table, table, None)
        scores = cosine_scores(sides.enrol_embeddings, sides.test_embeddings, sides.enrol, sides.test)
        draws = speaker_bootstrap(scores, listed.label, sides.enrol_speaker, sides.test_speaker, replicates)
        return cls(100 * eer(scores, listed.label)[0], min_dcf(scores, listed.label), 100 * draws.eer, draws.min_dcf)

    @classmethod
    def mean(cls, several: Sequence["Errors"]) -> "Errors":
        """The mean over networks, draw by draw."""
        return cls(
            float(np.mean([one.eer for one in several])),
            float(np.mean([one.min_dcf for one in several])),
            np.mean([one.eer_draws for one in several], axis=0),
            np.mean([one.min_dcf_draws for one in several], axis=0),
        )

    def minus(self, other: "Errors") -> Row:
        """The difference to other networks on the same trials, with paired 95 % intervals."""
        return {
            "eer": self.eer - other.eer,
            "eer_ci95": list(percentile_interval(self.eer_draws - other.eer_draws)),
            "min_dcf": self.min_dcf - other.min_dcf,
            "min_dcf_ci95": list(percentile_interval(self.min_dcf_draws - other.min_dcf_draws)),
        }


def trained_groups(networks: Sequence[Network]) -> dict[tuple[str, float], list[Network]]:
    """The networks that were trained, those that differ in the seed alone together, by recipe and bits.

    Nested and mixed ones are left out: they have no control.
    """
    groups: dict[tuple[str, float], list[Network]] = {}
    for one in networks:
        if one.run and one.step == one.run.step and one.run.name.isdigit() and one.run.name != NESTED:
            groups.setdefault((one.run.recipe, one.bits), []).append(one)
    return groups


def pairs(groups: dict[tuple[str, float], list[Network]]) -> Iterator[tuple[tuple[str, float], str]]:
    """What is compared: a group, and what with: full precision, the control, or another recipe's name."""
    for recipe, bits in groups:
        yield (recipe, bits), FULL_PRECISION
        if bits != FULL and (recipe, FULL) in groups:
            yield (recipe, bits), CONTROL
        for other, same in groups:
            if same == bits and list(groups).index((other, same)) < list(groups).index((recipe, bits)):
                yield (recipe, bits), other


def differences(
    networks: Sequence[Network],
    sets: Sequence[EvaluationSet],
    embeddings: Callable[[Network, EvaluationSet], Path],
    replicates: int = 1000,
) -> list[Row]:
    """All differences of a study's trained networks.

    Args:
        networks: of the study; the first is full precision.
        sets: evaluation sets.
        embeddings: gives the file of a network's embeddings of a set.
        replicates: draws of speakers.

    Returns:
        Rows with `recipe`, `bits`, `seeds`, `against`, `set`; `eer` in points of a percent and `min_dcf`, each with
        its paired `..._ci95`; and `eer_by_seed`, the EER of every training.
    """
    groups = trained_groups(networks)
    rows: list[Row] = []
    for evaluated in sets:
        made = {
            one.name: Errors.of(embeddings(one, evaluated), evaluated.trials, replicates)
            for one in [networks[0], *(one for group in groups.values() for one in group)]
        }
        full = made[networks[0].name]
        errors = {key: Errors.mean([made[one.name] for one in group]) for key, group in groups.items()}
        for (recipe, bits), against in pairs(groups):
            named = {FULL_PRECISION: full, CONTROL: errors.get((recipe, FULL))}
            other = named[against] if against in named else errors[against, bits]
            assert other is not None
            group = groups[recipe, bits]
            about = {"recipe": recipe, "bits": bits, "seeds": len(group), "against": against, "set": evaluated.name}
            by_seed = [made[one.name].eer for one in group]
            rows.append({**about, **errors[recipe, bits].minus(other), "eer_by_seed": by_seed})
    return rows
