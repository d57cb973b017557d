"""`kmq-jax conditions`: whether few bits suffer more where speech is short or bad."""

from dataclasses import dataclass
from pathlib import Path

from kmq_jax.cli.command import Command
from kmq_jax.cli.flags import options_of
from kmq_jax.core.options import Options, option
from kmq_jax.diagnosis.options import ConditionOptions


@dataclass(frozen=True, kw_only=True)
class Files(Options):
    """What the command reads and writes."""

    reference: str = option("full-precision MODEL", metavar="MODEL")
    quantized: tuple[str, ...] = option("once for each number of bits; the same network", metavar="BITS:MODEL")
    data: str = option("DATA that the trials compare", metavar="DATA")
    trials: str = option("trial list, or synthetic:SPLIT; left out: pairs drawn at random", "", metavar="TRIALS")
    json: Path = option("write the figures here; `kmq-jax tables` knows them as `conditions`", writes="file")


COMMAND = Command(
    "conditions",
    "Compares quantized models with full precision on recordings that are cut, band-limited, noisy or coded, both\n"
    "sides of every trial alike: EER, minDCF, harmful flips and drift by bits, and whether what few bits lose grows\n"
    "beyond the loss on whole recordings, with intervals over paired draws of speakers.",
    "kmq-jax conditions --reference=runs/quickstart --quantized=2:runs/quickstart-2bit.kmq\n"
    "      --data=synthetic:dev --trials=synthetic:dev --condition=first=1 --json=runs/conditions.json",
    (Files, ConditionOptions),
)


def main() -> None:
    """Runs the command."""
    args = COMMAND.parse()
    files, options = options_of(Files, args), options_of(ConditionOptions, args)
    from kmq_jax.core.files import write_json
    from kmq_jax.diagnosis import conditions, run

    quantized = run.parse_quantized(files.quantized)
    found = conditions.compare_conditions(files.reference, quantized, files.data, files.trials, options)
    write_json(files.json, found)
    print(conditions.describe(found))
