"""Options of calibrating and running a cascade."""

from dataclasses import dataclass
from typing import Literal

from kmq_jax.core.errors import UserError
from kmq_jax.core.options import Options, draws, option, refuse_given

MAPS = ("isotonic", "affine", "logistic")
ENROLMENTS = ("each", "top")
OBJECTIVES = ("flips", "balanced", "eer")
COSTS = ("sequential", "incremental", "utterance")
BOUNDS = ("survey", "hoeffding-bentkus", "conformal")
APPROXIMATE = ("survey",)
"""Bounds without a proof: they fail where few speakers are unlike the others. The rest of `BOUNDS` is proven."""

IGNORED_BY = {"pareto": ("bound", "certify_share"), "risk": ("objective",)}
"""The options that have no effect under a rule."""


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions(Options):
    """How a cascade's maps, threshold and gates are found."""

    enrolment: str = option(
        "each: both sides of a trial at the level's bits; top: the enrolled side at the last level's",
        "each",
        choices=ENROLMENTS,
    )
    map: str = option("map to the reference's scores", "isotonic", choices=MAPS)
    operating_point: str = option(
        "what the threshold is for: eer, far=RATE, frr=RATE or dcf=P_TARGET", "eer", metavar="POINT"
    )
    rule: Literal["pareto", "risk"] = option(
        "how gates are chosen; risk: its promise is approximate unless --bound is a proven one", "pareto"
    )
    alpha: float = option("harmful flips a trial that are allowed", 0.001, above=0, below=1)
    delta: float = option(
        "one minus the confidence that new speakers keep to it; the objective eer has none", 0.05, above=0, below=1
    )
    bound: str = option(
        "risk: bound on the rate. survey is approximate: it is broken more often than --delta says where few speakers "
        "are unlike the others. hoeffding-bentkus (with confidence) and conformal (in expectation) are proven, and "
        "need many speakers",
        "survey",
        choices=BOUNDS,
    )
    certify_share: float = option("risk: share of the speakers kept to test gates on", 0.5, above=0, below=1)
    objective: str = option("pareto: what is kept low", "flips", choices=OBJECTIVES)
    cost: str = option(
        "bits that count as cost: a trial's at every level climbed through, those it adds where codebooks nest, or "
        "an utterance's, embedded once at every level that a trial needs",
        "sequential",
        choices=COSTS,
    )
    seconds: tuple[float, ...] = option(
        "what a recording takes at each level, in the order of bits: gates are then chosen by seconds in place of "
        "bits, as they must where levels are different networks",
        (),
        above=0,
    )
    nested: bool = option("the levels are one nested model, so that climbing reads only the bits that are new", False)
    symmetric: bool = option("gates that reach equally far on both sides of the threshold, as in the paper", False)
    replicates: int = draws("bootstrap draws for the threshold's interval; 0: none", 200)
    seed: int = option("of the bootstrap and of the deal of speakers", 0, at_least=0, at_most=2**32 - 1)

    def __post_init__(self) -> None:
        """See `Options`; also refuses `seconds` together with nested levels."""
        super().__post_init__()
        if self.seconds and self.nests:
            raise UserError("`seconds` goes with levels that are networks of their own, not with nested codebooks")

    def refuse_ignored(self) -> None:
        """Refuses options that were given but have no effect, by the rule and the objective.

        Raises:
            UserError: one was given.
        """
        refuse_given(self, IGNORED_BY[self.rule], f"does not go with `rule` ({self.rule})")
        if self.rule == "pareto" and self.objective == "eer":
            refuse_given(self, ("delta",), "does not go with `objective` (eer), which has no margin")

    @property
    def nests(self) -> bool:
        """Whether the levels are one nested model; `cost` "incremental" implies it."""
        return self.nested or self.cost == "incremental"


@dataclass(frozen=True, kw_only=True)
class CascadeOptions(Options):
    """How a cascade's decisions are evaluated."""

    p_target: float = option("prior of a target, for minDCF", 0.01, above=0, below=1)
    replicates: int = draws()
    stream: bool = option(
        "read the list part by part, in bounded memory: EER and minDCF from histograms, with bounds and without "
        "intervals. Processes that are started together share the list",
        False,
    )
    seed: int = option("of the bootstrap", 0, at_least=0)
