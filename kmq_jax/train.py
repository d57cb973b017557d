"""`python -m kmq_jax.train`: trains a speaker-embedding network from a configuration."""

import json
import sys
from pathlib import Path

import jax
import ml_collections
from absl import flags as absl_flags
from ml_collections import config_flags

from kmq_jax.core import cli
from kmq_jax.core.errors import UserError
from kmq_jax.core.memory import keep_freed_memory
from kmq_jax.train_loop import train

HELP = """usage: python -m kmq_jax.train --config=configs/NAME.py[:ARG] [--config.KEY=VALUE ...] --workdir=DIR

Trains a speaker-embedding network. Run again with the same workdir it resumes where it stopped.

  --config    a configuration file; `:smoke` after it runs it in seconds
  --config.X  changes one of its settings
  --workdir   directory of config.json, metrics.jsonl, checkpoints/ and summary.json

example:
  python -m kmq_jax.train --config=configs/quickstart.py --workdir=runs/quickstart"""


def parse_flags(argv: list[str]) -> tuple[ml_collections.ConfigDict, Path]:
    """Reads `--config`, its overrides and `--workdir`.

    Raises:
        UserError: a flag or a configuration key is unknown or has a value of the wrong type.
    """
    values = absl_flags.FlagValues()
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
        raise UserError(str(error)) from error
    if rest[1:]:
        raise UserError(f"argument {rest[1]!r} is not a flag (see --help)")
    if config is None or workdir is None:
        raise UserError("--config and --workdir are both needed (see --help)")
    return config, Path(workdir)


def main() -> None:
    """Runs the command."""
    if {"--help", "-h", "--helpfull"} & set(sys.argv[1:]):
        print(HELP)
        return
    keep_freed_memory()
    config, workdir = parse_flags(sys.argv)
    summary = train(config, workdir)
    if jax.process_index() == 0:
        print(json.dumps(summary))


if __name__ == "__main__":
    cli.run("train", main)
