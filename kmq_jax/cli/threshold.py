"""`kmq-jax threshold`: the threshold for a wanted false-accept rate, from a few own recordings."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from kmq_jax.cli.command import Command
from kmq_jax.cli.flags import options_of
from kmq_jax.core.options import Options, option
from kmq_jax.scoring.options import ThresholdOptions


@dataclass(frozen=True, kw_only=True)
class Files(Options):
    """What the command reads and writes."""

    model: str = option("MODEL: a training workdir, a .kmq file or an imported directory", metavar="MODEL")
    data: str = option("DATA: a folder with a subfolder a speaker, or any other form of DATA", metavar="DATA")
    out: Path | None = option("write the threshold here, for `verify --threshold`", None, writes="file")
    json: Path | None = option("the same as --out: `threshold`, `false_accept_rate`, ...", None, writes="file")


COMMAND = Command(
    "threshold",
    "Finds the threshold for a wanted false-accept rate from recordings of a few speakers, 20 to 50 of them or\n"
    "more: embeds all, scores all pairs. Intervals are 95 %, by bootstrap draws of speakers, and wide where the\n"
    "speakers are few; what they cannot tell is said.",
    "kmq-jax threshold --model=runs/wespeaker34 --data=recordings --false_accept=0.05 --out=threshold.json",
    (Files, ThresholdOptions),
)


def main() -> None:
    """Runs the command."""
    args = COMMAND.parse()
    files, options = options_of(Files, args), options_of(ThresholdOptions, args)
    from kmq_jax.scoring import threshold

    found = threshold.find_threshold(files.model, files.data, options)
    command = shlex.join(["kmq-jax", "threshold", *sys.argv[1:]])
    for path in filter(None, (files.out, files.json)):
        threshold.save_threshold(path, found, files.model, files.data, command)
    print(threshold.describe(found))
    if told := threshold.warning(found):
        print(told, file=sys.stderr)
