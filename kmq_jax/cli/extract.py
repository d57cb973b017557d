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
    shards: int | None = option(
        "embed in so many shards, kept in OUT.shards/ until all are there: processes started alike share them, and a "
        "run that was killed goes on",
        None,
        at_least=1,
        at_most=99_999,
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
    from kmq_jax.scoring.extract import extract, extract_shards

    if files.shards:
        wrote = extract_shards(files.model, files.data, files.out, files.shards, options)
        how = "put together" if wrote else "which another process put together, or a run before"
        print(f"{files.out}: {files.shards} shards, {how}")
        return
    embeddings = extract(files.model, files.data, files.out, options)
    print(f"{files.out}: {len(embeddings)} embeddings of {embeddings.shape[1]} dimensions")
