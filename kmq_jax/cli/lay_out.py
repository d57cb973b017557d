"""`kmq-jax lay_out`: a corpus that one can have, as DATA with trial lists."""

from dataclasses import dataclass
from pathlib import Path

from kmq_jax.cli.command import Command
from kmq_jax.cli.flags import options_of
from kmq_jax.core.options import Options, option

CORPORA = ("speechocean762", "voxceleb1", "voxceleb2")


@dataclass(frozen=True, kw_only=True)
class Flags(Options):
    """What is laid out, and where."""

    corpus: str = option("which", choices=CORPORA)
    out: Path = option("the directory to write", metavar="DIR", writes="directory")
    archives: Path | None = option(
        "where its files lie, and are downloaded to; left out: archives/ in --out", None, metavar="DIR"
    )
    mirror: str = option("http(s):// address that all files are had from, in place of where they are published", "")


COMMAND = Command(
    "lay_out",
    "Lays out a corpus as DATA, with its trial lists, from the archives in which it is published.\n"
    "speechocean762 (0.5 GB) is downloaded from OpenSLR: DIR/train and DIR/dev, by the speakers of this project's\n"
    "results, and DIR/dev/trials.txt. VoxCeleb's archives must be asked for and put into --archives; their lists\n"
    "are downloaded. Published hashes are checked. The same command goes on after an interruption.",
    "kmq-jax lay_out --corpus=speechocean762 --out=data/so762",
    (Flags,),
)


def main() -> None:
    """Runs the command."""
    flags = options_of(Flags, COMMAND.parse())
    from kmq_jax.data.layouts import RELEASES, lay_out

    archives = flags.archives or flags.out / "archives"
    for line in lay_out(RELEASES[flags.corpus], flags.out, archives, flags.mirror):
        print(line)
