"""`kmq-jax summarize`: what a model is made of, layer by layer, and what it weighs."""

from dataclasses import dataclass
from pathlib import Path

from kmq_jax.cli.command import Command
from kmq_jax.cli.flags import options_of
from kmq_jax.core.options import Options, option


@dataclass(frozen=True, kw_only=True)
class Files(Options):
    """What the command reads and writes."""

    model: str = option("MODEL to look at", metavar="MODEL")
    json: Path | None = option("write the totals, and what the file tells of itself, here", None, writes="file")


COMMAND = Command(
    "summarize",
    "Prints a model's tensors: shape, bits, codebook entries in use, bytes; totals; and what the file tells of itself.",
    "kmq-jax summarize --model=runs/quickstart-2bit.kmq --json=summary.json",
    (Files,),
)


def main() -> None:
    """Runs the command."""
    files = options_of(Files, COMMAND.parse())
    from kmq_jax.core.files import write_json
    from kmq_jax.models import about, summary
    from kmq_jax.models.speaker_model import load_model

    model = load_model(files.model)
    totals = summary.totals_of(model)
    print(summary.describe(summary.rows_of(model.variables), totals))
    if told := about.describe(model.about):
        print("\n" + "\n".join(told))
    if files.json:
        write_json(files.json, {**totals, **({"about": model.about} if model.about else {})})
