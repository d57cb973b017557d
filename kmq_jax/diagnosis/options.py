"""Options of the diagnosis: how much is computed."""

from dataclasses import dataclass

from kmq_jax.core.errors import UserError
from kmq_jax.core.options import Options, option, shown
from kmq_jax.scoring.options import Compute


@dataclass(frozen=True, kw_only=True)
class DiagnosisOptions(Options):
    """How much of a diagnosis is computed."""

    compute: Compute = option("the networks' arithmetic", "float32")
    max_seconds: float = option("only so much of each recording; 0: all of it", 0.0, at_least=0)
    thresholds: tuple[float, ...] = option("count flips here too; repeatable", (), flag="threshold", repeat=True)
    margin_bins: int = option("bins of equally many trials", 3, at_least=1)
    margin_edges: tuple[float, ...] = option("inner edges of the fixed bins of margin", (0.05, 0.1, 0.2), above=0)
    retention_utterances: int = option(
        "components: all pairs of so many utterances; 0: the trial list", 240, at_least=0
    )
    retention_bits: tuple[int, ...] = option(
        "components: bits at which they are tried, such as 2,3; left out: the fewest", ()
    )
    layer_utterances: int = option(
        "single layers: all pairs of so many utterances; 0: leave damage and activations out", 32, at_least=0
    )
    hessian_draws: int = option("random vectors for Hessian traces; 0: leave them out", 10, at_least=0)
    hessian_utterances: int = option("crops they are measured on", 8, at_least=1)
    hessian_seconds: float = option("length of these crops", 2.0, above=0)
    worst: int = option("worst trials to list at each number of bits", 20, at_least=0)
    replicates: int = option("bootstrap draws; 0: none", 1000, at_least=0)
    seed: int = option("of every random draw", 0, at_least=0)

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            UserError: "`name` (=value) must ...".
        """
        super().__post_init__()
        if any(a >= b for a, b in zip(self.margin_edges, self.margin_edges[1:])):
            raise UserError(f"`margin_edges` (={shown(self.margin_edges)}) must ascend")
