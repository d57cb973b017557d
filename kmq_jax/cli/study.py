"""`kmq-jax study`: a network in full precision and at every width, from training to a cascade and a report."""

import sys

import jax

from kmq_jax.cli.train import parse_flags
from kmq_jax.core.errors import UserError
from kmq_jax.core.memory import keep_freed_memory
from kmq_jax.study.pipeline import study
from kmq_jax.study.tables import study_table

HELP = """usage: python -m kmq_jax.study --config=configs/NAME.py[:ARG] [--config.KEY=VALUE ...] --workdir=DIR

Trains (or imports) a full-precision network, quantizes it with and without training at each width, measures all of
them on the same trials, diagnoses the damage, and calibrates cascades: DIR/report.html and DIR/study.json. Run again,
it goes on where it stopped and repeats only what has changed.

  --config    a configuration file with a `study` section; `:smoke` after it runs it in seconds
  --config.X  changes one of its settings
  --workdir   directory of all models, embeddings and results

example:
  python -m kmq_jax.study --config=configs/quickstart.py --workdir=runs/study"""


def main() -> None:
    """Runs the command."""
    if {"--help", "-h", "--helpfull"} & set(sys.argv[1:]):
        print(HELP)
        return
    keep_freed_memory()
    config, workdir = parse_flags(sys.argv)
    if "study" not in config:
        raise UserError("--config names a configuration without a `study` section: that is for `kmq-jax train`")
    if config.study.quick_compile:
        jax.config.update("jax_disable_most_optimizations", True)
    print(study_table(study(config, workdir)), end="")
    print(workdir / "report.html")
