"""`kmq-jax diagnose`: where low-bit errors come from, as tables, figures and a report."""

from dataclasses import dataclass
from pathlib import Path

from kmq_jax.cli.command import Command
from kmq_jax.cli.flags import options_of
from kmq_jax.core.options import Options, option
from kmq_jax.diagnosis.options import DiagnosisOptions


@dataclass(frozen=True, kw_only=True)
class Files(Options):
    """What the command reads and writes."""

    reference: str = option("full-precision MODEL, or its embeddings (.npz)", metavar="MODEL")
    quantized: tuple[str, ...] = option("MODEL or .npz; once for each number of bits", metavar="BITS:MODEL")
    data: str | None = option(
        "DATA that the trials compare; with embeddings: for durations, gender and age", None, metavar="DATA"
    )
    trials: str = option("trial list, or synthetic:SPLIT; left out: pairs drawn at random", "", metavar="TRIALS")
    enrol_models: str | None = option(
        "the list enrols models: `model utterance [utterance ...]` a line", None, metavar="FILE"
    )
    out: Path = option("directory for tables, figures and report.html", metavar="DIR", writes="directory")


COMMAND = Command(
    "diagnose",
    "Compares quantized models with the full-precision model they were made from, and writes tables, figures and\n"
    "a report. Given embeddings (.npz of `extract`) in place of every model, it tells what scores alone tell.",
    "kmq-jax diagnose --reference=runs/quickstart --quantized=2:runs/quickstart-2bit.kmq\n"
    "      --data=synthetic:dev --trials=synthetic:dev --out=runs/diagnosis",
    (Files, DiagnosisOptions),
)


def main() -> None:
    """Runs the command."""
    args = COMMAND.parse()
    files, options = options_of(Files, args), options_of(DiagnosisOptions, args)
    from kmq_jax.diagnosis import report, run

    quantized = run.parse_quantized(files.quantized)
    found = run.diagnose(files.reference, quantized, files.data, files.trials, options, files.enrol_models)
    report.write(files.out, found)
    print(report.describe(found))
    print(files.out / "report.html")
