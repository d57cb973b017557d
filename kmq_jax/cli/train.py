"""`python -m kmq_jax.train`: trains a speaker-embedding network from a configuration."""

import json
import sys
from pathlib import Path

import jax
import ml_collections
from absl import flags as absl_flags
from ml_collections import config_flags

from kmq_jax.core import distributed
from kmq_jax.core.errors import UserError
from kmq_jax.core.memory import keep_freed_memory
from kmq_jax.training.loop import train

HELP = """usage: python -m kmq_jax.train --config=configs/NAME.py[:ARG] [--config.KEY=VALUE ...] --workdir=DIR

Trains a speaker-embedding network. Run again with the same workdir it resumes where it stopped.

  --config       a configuration file; `:smoke` after it runs it in seconds
  --config.X     changes one of its settings
  --workdir      directory of config.json, starts.json, metrics.jsonl, checkpoints/ and summary.json
  --tensorboard  also write the metrics as TensorBoard events, into the workdir

Several processes train together where launch/ starts them. The status is 75 when the run was asked to stop (SIGTERM,
Ctrl-C) and was saved before its end.

example:
  python -m kmq_jax.train --config=configs/quickstart.py --workdir=runs/quickstart"""


STOPPED = 75
"""Status of a run that was saved before its end: EX_TEMPFAIL of sysexits.h, "try again"."""


def parse_flags(argv: list[str], more: absl_flags.FlagValues | None = None) -> tuple[ml_collections.ConfigDict, Path]:
    """Reads `--config`, its overrides and `--workdir`.

    Args:
        argv: the command line.
        more: further flags, whose values are set.

    Raises:
        UserError: a flag or a configuration key is unknown or has a value of the wrong type.
    """
    values = absl_flags.FlagValues() if more is None else more
    config_flags.DEFINE_config_file("config", flag_values=values)
    absl_flags.DEFINE_string("workdir", None, "", flag_values=values)
    try:
        rest = values(argv)
        config, workdir = values["config"].value, values["workdir"].value
        if config is not None:
            config.to_dict()  # a file that cannot be loaded is told only when its configuration is used
    except OSError as error:
        raise UserError(f"--config: {str(error).strip().splitlines()[-1].strip()}") from error
    except (absl_flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        message = str(error)
        if "Traceback" in message:  # what the configuration file raised, as text
            last = message.strip().splitlines()[-1]
            message = "--config: " + last.removeprefix(f"{UserError.__module__}.UserError: ")
        raise UserError(message) from error
    if rest[1:]:
        raise UserError(f"argument {rest[1]!r} is not a flag (see --help)")
    if config is None or workdir is None:
        raise UserError("--config and --workdir are both needed (see --help)")
    if "://" in workdir:
        raise UserError(f"--workdir={workdir} is no directory: mount the bucket (launch/README.md)")
    return config, Path(workdir)


def main() -> None:
    """Runs the command."""
    if {"--help", "-h", "--helpfull"} & set(sys.argv[1:]):
        print(HELP)
        return
    keep_freed_memory()
    own = absl_flags.FlagValues()
    absl_flags.DEFINE_boolean("tensorboard", False, "", flag_values=own)
    config, workdir = parse_flags(sys.argv, own)
    distributed.join()
    summary = train(config, workdir, bool(own["tensorboard"].value))
    if jax.process_index() == 0:
        print(json.dumps(summary))
    if not summary["finished"]:
        sys.exit(STOPPED)
