"""`kmq-jax tables`: writes the results tables of a Markdown file from the JSON files they come from."""

from dataclasses import dataclass
from pathlib import Path

from kmq_jax.cli.command import Command
from kmq_jax.cli.flags import options_of
from kmq_jax.core.options import Options, option


@dataclass(frozen=True, kw_only=True)
class Files(Options):
    """What the command changes."""

    file: Path = option("the Markdown file to fill")


COMMAND = Command(
    "tables",
    "Writes the results tables of a Markdown file from the JSON files they come from.\n"
    "A table stands between `<!-- table: FILE.json KIND -->` and `<!-- end -->`. FILE is a study.json, its path\n"
    "relative to the Markdown file; KIND is `bits`, one row a model, `trained`, those of them that were,\n"
    "`gains`, what of them a first page needs, `differences`, what they differ by, `cascades`, one row a cascade\n"
    "and evaluation set, or `components`. Of what `conditions` writes, KIND is `conditions`; of `bench\n"
    "accelerator`, `accelerator`; of `bench extract --peers --json`, `extraction`; of `bench networks --json`,\n"
    "`networks`; of `bench across`, `across`; of `bench stream`, `stream`; of `.ci/house.py`, `house`;\n"
    "of `threshold`, with `judged_on` added, `threshold`. Several studies, separated by commas, stand in one table of\n"
    "the KIND `architectures` or `fragile`.",
    "kmq-jax tables --file=README.md",
    (Files,),
)


def main() -> None:
    """Runs the command."""
    files = options_of(Files, COMMAND.parse())
    from kmq_jax.study.tables import fill_file

    fill_file(files.file)
