"""`kmq-jax prepare_data`: recordings of any form into array_record shards at 16 kHz."""

import os
from dataclasses import dataclass
from pathlib import Path

from kmq_jax.cli.command import Command
from kmq_jax.cli.flags import options_of
from kmq_jax.core.errors import UserError
from kmq_jax.core.options import Options, option


@dataclass(frozen=True, kw_only=True)
class Flags(Options):
    """What the command reads and writes, and how."""

    source: str = option("DATA: a Kaldi directory, VoxCeleb tree, folder or CSV", metavar="DATA")
    out: Path = option("the directory to write", metavar="DIR", writes="directory")
    workers: int | None = option("processes; left out: one a core", None, at_least=1, at_most=1024)
    min_seconds: float = option("shorter recordings are rejected", 0.5, at_least=0, below=3600)
    beam: str | None = option(
        "write shards on many machines through Apache Beam (extra `beam`), with these of its options, such as "
        "'--runner=FlinkRunner'; all must see the recordings and --out. In place of --workers",
        None,
        metavar="OPTIONS",
    )


COMMAND = Command(
    "prepare_data",
    "Decodes recordings once, mixes to mono, resamples to 16 kHz and writes array_record shards that tfds reads.\n"
    "Recordings that cannot be used are listed in rejected.csv. An interrupted run goes on when started again.",
    "kmq-jax prepare_data --source=voxceleb2/dev --out=data/voxceleb2 --workers=8",
    (Flags,),
)


def main() -> None:
    """Runs the command."""
    args = COMMAND.parse()
    flags = options_of(Flags, args)
    from kmq_jax.data import writer
    from kmq_jax.data.source import open_source

    if args.beam == "":  # `options_of` makes None of it, as if Beam were not asked for
        raise UserError("--beam must name options of Apache Beam, such as '--runner=DirectRunner'")
    if flags.beam is not None and flags.workers:
        raise UserError("--workers cannot be used with --beam: its runner has options of its own")
    workers = flags.workers or os.cpu_count() or 1
    done = writer.prepare(
        open_source(flags.source), flags.out, workers=workers, min_seconds=flags.min_seconds, beam=flags.beam
    )
    print(
        f"{flags.out}: {done['utterances']} utterances of {done['speakers']} speakers, {done['hours']:.2f} hours, "
        f"{done['rejected']} rejected"
    )
