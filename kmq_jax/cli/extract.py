"""`kmq-jax extract`: embeddings of every utterance of a dataset."""

from dataclasses import dataclass
from pathlib import Path

from kmq_jax.cli.command import Command
from kmq_jax.cli.flags import options_of
from kmq_jax.core.options import Options, option
from kmq_jax.scoring.options import ExtractionOptions


@dataclass(frozen=True, kw_only=True)
class Files(Options):
    """What the command reads and writes."""

    model: str = option("MODEL: a training workdir, a .kmq file or an imported directory", metavar="MODEL")
    data: str = option("DATA: Kaldi directory, VoxCeleb tree, folder, CSV, prepared set", metavar="DATA")
    out: Path = option(
        "the .npz to write: ids, paths, speakers, embeddings, model; or Kaldi's .ark, or .scp with its .ark beside",
        writes="file",
    )


COMMAND = Command(
    "extract",
    "Embeds every utterance of a dataset with a model.",
    "kmq-jax extract --model=runs/quickstart --data=synthetic:dev --out=runs/dev.npz",
    (Files, ExtractionOptions),
)


def main() -> None:
    """Runs the command."""
    args = COMMAND.parse()
    files, options = options_of(Files, args), options_of(ExtractionOptions, args)
    from kmq_jax.scoring.extract import extract

    embeddings = extract(files.model, files.data, files.out, options)
    print(f"{files.out}: {len(embeddings)} embeddings of {embeddings.shape[1]} dimensions")
