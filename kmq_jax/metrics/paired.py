"""Differences between systems on the same trials, over the same draws of speakers: what a draw does to both cancels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json
from kmq_jax.metrics.bootstrap import enough, percentile_interval, speaker_bootstrap
from kmq_jax.metrics.detection import Array, eer, min_dcf


@dataclass(frozen=True, eq=False)
class Errors:
    """The error rates of a system, on all trials and in every draw of speakers.

    Attributes:
        eer: percent.
        min_dcf: normalised detection cost.
        eer_draws: `[draws]`, percent; draws without target or nontarget trials are left out.
        min_dcf_draws: `[draws]`.
        replicates: draws that were asked for.
    """

    eer: float
    min_dcf: float
    eer_draws: Array
    min_dcf_draws: Array
    replicates: int

    @classmethod
    def of(
        cls,
        scores: ArrayLike,
        labels: ArrayLike,
        enrol_speaker: ArrayLike,
        test_speaker: ArrayLike,
        replicates: int = 1000,
        seed: int = 0,
        p_target: float = 0.01,
    ) -> "Errors":
        """Measures a system. Arguments and errors are as of `bootstrap.speaker_bootstrap`; 0 replicates: no draws."""
        eers = costs = np.empty(0)
        if replicates:
            draws = speaker_bootstrap(scores, labels, enrol_speaker, test_speaker, replicates, seed, p_target)
            eers, costs = 100 * draws.eer, draws.min_dcf
        return cls(100 * eer(scores, labels)[0], min_dcf(scores, labels, p_target), eers, costs, replicates)

    @classmethod
    def mean(cls, several: Sequence["Errors"]) -> "Errors":
        """The mean over systems measured on the same trials with the same seed, draw by draw."""
        return cls(
            float(np.mean([one.eer for one in several])),
            float(np.mean([one.min_dcf for one in several])),
            np.mean([one.eer_draws for one in several], axis=0),
            np.mean([one.min_dcf_draws for one in several], axis=0),
            several[0].replicates,
        )

    def minus(self, other: "Errors") -> Json:
        """The change against another system on the same trials, drawn as often and with the same seed.

        Returns:
            `eer_change` (points of a percent) and `min_dcf_change`, each with `_ci95`: the central 95 % over draws that
            both share; None where the speakers are too few to draw.

        Raises:
            UserError: the other system was drawn another number of times.

        >>> scores, labels, speakers = [0.9, 0.8, 0.1, 0.2], [1, 1, 0, 0], ([0, 1, 0, 1], [0, 1, 1, 0])
        >>> errors = Errors.of(scores, labels, *speakers, replicates=0)
        >>> errors.minus(errors)["eer_change"], errors.minus(errors)["eer_change_ci95"]
        (0.0, None)
        """
        # Whether a draw is usable depends on trials and seed alone, so both systems have the same draws, in one order.
        known = enough(len(self.eer_draws), self.replicates)
        if known and len(self.eer_draws) != len(other.eer_draws):
            draws = f"{len(self.eer_draws)} and {len(other.eer_draws)}"
            raise UserError(f"a paired interval needs as many draws of both systems, got {draws}")
        pairs = {"eer": (self.eer_draws, other.eer_draws), "min_dcf": (self.min_dcf_draws, other.min_dcf_draws)}
        found: Json = {"eer_change": self.eer - other.eer, "min_dcf_change": self.min_dcf - other.min_dcf}
        for name, (ours, theirs) in pairs.items():
            found[f"{name}_change_ci95"] = list(percentile_interval(ours - theirs)) if known else None
        return found


def told_apart(interval: Sequence[float] | None) -> bool:
    """Whether a difference is beyond chance: its paired interval leaves out zero.

    >>> told_apart([-0.1, 0.2]), told_apart([0.1, 0.2]), told_apart(None)
    (False, True, False)
    """
    return interval is not None and (interval[0] > 0 or interval[1] < 0)
