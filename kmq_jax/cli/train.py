"""`python -m kmq_jax.train`: trains a speaker-embedding network from a configuration."""

import json
import sys

from kmq_jax.cli.config_flags import asks_for_help, parse_flags

HELP = """usage: python -m kmq_jax.train --config=NAME[:ARG] [--config.KEY=VALUE ...] --workdir=DIR

Trains a speaker-embedding network. Run again with the same workdir it resumes where it stopped.

  --config       a configuration: a file, or the name of one that comes with the package; `:smoke` after it runs it in
                 seconds
  --config.X     changes one of its settings
  --workdir      directory of config.json, inputs.json, starts.json, metrics.jsonl, checkpoints/ and summary.json
  --tensorboard  also write the metrics as TensorBoard events, into the workdir
  --wandb        also send the metrics to this project of Weights & Biases (extra `wandb`)

Several processes train together where launch/ starts them. The status is 75 when the run was asked to stop (SIGTERM,
Ctrl-C) and was saved before its end.

example:
  python -m kmq_jax.train --config=quickstart --workdir=runs/quickstart"""

STOPPED = 75
"""Status of a run that was saved before its end: EX_TEMPFAIL of sysexits.h, "try again"."""


def main() -> None:
    """Runs the command."""
    if asks_for_help():
        print(HELP)
        return
    from absl import flags as absl_flags

    from kmq_jax.core.memory import keep_freed_memory

    keep_freed_memory()  # before JAX starts its threads
    import jax

    from kmq_jax.core import distributed
    from kmq_jax.training.loop import train

    own = absl_flags.FlagValues()
    absl_flags.DEFINE_boolean("tensorboard", False, "", flag_values=own)
    absl_flags.DEFINE_string("wandb", "", "", flag_values=own)
    config, workdir = parse_flags(sys.argv, own)
    distributed.join()
    summary = train(config, workdir, bool(own["tensorboard"].value), own["wandb"].value or "")
    if jax.process_index() == 0:
        print(json.dumps(summary))
    if not summary["finished"]:
        sys.exit(STOPPED)
