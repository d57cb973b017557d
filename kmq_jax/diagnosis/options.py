"""How much a diagnosis computes."""

import dataclasses
import itertools
import math

from kmq_jax.core.errors import UserError
from kmq_jax.core.options import Options, draws, option
from kmq_jax.models.choices import Compute
from kmq_jax.scoring.options import check_max_seconds

CONDITIONS = "whole, first=SECONDS, telephone, noise=DB or codec=NAME"
"""The forms of a condition that recordings are compared under (`diagnosis.degrade`)."""
STANDARD_CONDITIONS = (
    "first=5",
    "first=3",
    "first=2",
    "first=1",
    "telephone",
    "noise=15",
    "noise=5",
    "codec=ulaw",
    "codec=opus",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiagnosisOptions(Options):
    """How much is computed.

    >>> DiagnosisOptions(worst=-1)
    Traceback (most recent call last):
    kmq_jax.core.errors.UserError: `worst` (=-1) must be at least 0
    """

    thresholds: tuple[float, ...] = option(
        "count flips at this threshold too; repeatable", (), flag="threshold", repeat=True
    )
    margin_bins: int = option("bins of margin that hold equally many trials", 3, at_least=1, at_most=1000)
    margin_edges: tuple[float, ...] = option("edges of fixed bins of margin, ascending", (0.05, 0.1, 0.2), above=0)
    worst: int = option("worst trials to list at each number of bits", 20, at_least=0, at_most=1_000_000)
    replicates: int = draws()
    seed: int = option("of every random draw", 0, at_least=0, at_most=2**32 - 1)
    retention_utterances: int = option(
        "components are tried on all pairs of so many utterances; 0: on the trial list", 240, at_least=0, at_most=5000
    )
    retention_bits: tuple[int, ...] = option("components are tried at these bits, such as 2,3 (none: the fewest)", ())
    layer_utterances: int = option(
        "single layers are tried on all pairs of so many utterances; 0: leave damage and activations out",
        32,
        at_least=0,
        at_most=5000,
    )
    hessian_draws: int = option("random vectors for Hessian traces; 0: leave them out", 10, at_least=0, at_most=100_000)
    hessian_utterances: int = option("crops that Hessian traces are measured on", 8, at_least=1, at_most=5000)
    hessian_seconds: float = option("length of these crops", 2.0, above=0, at_most=60)
    compute: Compute = option("the networks' arithmetic", "float32")
    max_seconds: float = option("only so much from the start of each recording; 0: all", 0.0, at_least=0)
    max_frames: int = option(
        "networks see only so many frames of each, less the mean over all of its frames; 0: all", 0, at_least=0
    )

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: "`name` (=value) must be ...".
        """
        super().__post_init__()
        check_max_seconds(self.max_seconds)
        edges = self.margin_edges
        if any(low >= high for low, high in itertools.pairwise(edges)) or not all(map(math.isfinite, edges)):
            raise UserError(f"`margin_edges` (={','.join(map(str, edges))}) must ascend from above zero")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConditionOptions(Options):
    """Which conditions, and how they are measured."""

    conditions: tuple[str, ...] = option(
        f"a condition beside whole recordings: {CONDITIONS}; repeatable",
        STANDARD_CONDITIONS,
        flag="condition",
        repeat=True,
    )
    noise: str | None = option("DATA of noise clips; left out: conditions of noise are, too", None, metavar="DATA")
    replicates: int = draws()
    seed: int = option("of the draws and of the noise", 0, at_least=0)
    compute: Compute = option("the networks' arithmetic", "float32")
