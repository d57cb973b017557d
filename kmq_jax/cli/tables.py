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
    "A table stands between `<!-- table: FILE.json KIND -->` and `<!-- end -->`, FILE relative to the Markdown file.\n"
    "Of a study.json, KIND is `bits`, one row a model, `gains`, its trained networks beside their control, for a\n"
    "first page, `differences`, what they differ by, `recipes`, of that one row a recipe, `cascades`, one row a\n"
    "cascade and evaluation set, `rescues`, what a cascade gains back, or `components`; of `study --settings`,\n"
    "`settings`; of `conditions`, `conditions`; of `threshold`, with `judged_on` added, `threshold`; of\n"
    "`bench NAME --json`, NAME of accelerator, networks, lazy, across, activations, stream, memory, biases, pods,\n"
    "NAME; of `bench extract --peers`, `extraction`; of a .jsonl of other benchmarks, `speed`; of several studies,\n"
    "separated by commas, `architectures` or `fragile`.",
    "kmq-jax tables --file=README.md",
    (Files,),
)


def main() -> None:
    """Runs the command."""
    files = options_of(Files, COMMAND.parse())
    from kmq_jax.study.tables import fill_file

    fill_file(files.file)
