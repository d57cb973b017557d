"""`kmq-jax study`: a network in full precision and at fewer bits, from training to a cascade and a report."""

import os
import sys

from kmq_jax.cli.config_flags import asks_for_help, parse_flags

HELP = """usage: python -m kmq_jax.study --config=NAME[:ARG] [--config.KEY=VALUE ...] --workdir=DIR

Trains (or imports) a full-precision network, quantizes it with and without training at each number of bits, measures
all of them on the same trials, diagnoses the damage, and calibrates cascades: DIR/report.html and DIR/study.json. Run
again, it goes on where it stopped and repeats only what has changed.

  --config    a configuration with a `study` section: a file, or the name of one that comes with the package; `:smoke`
              after it runs it in seconds
  --config.X  changes one of its settings
  --engine    what extracts embeddings: jax, onnxruntime, or auto; short for --config.study.engine
  --only      makes and measures these networks alone, such as distilled-2,kmqat-2: several processes may share a study
              so, on one host or as an array of jobs, before the same command without it; `list` prints all names
  --settings  only prints what the paper says of one training (fp32, kmqat-2, ...) beside its settings here, and writes
              it to DIR/settings-NAME.json
  --workdir   directory of all models, embeddings and results

example:
  python -m kmq_jax.study --config=quickstart --workdir=runs/study"""


def main() -> None:
    """Runs the command."""
    if asks_for_help():
        print(HELP)
        return
    # XLA reads this when it is loaded. Its warnings of slow compilations would stand between the printed steps.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from absl import flags as absl_flags

    from kmq_jax.core.memory import keep_freed_memory

    keep_freed_memory()  # before JAX starts its threads
    from kmq_jax.study.networks import training_steps
    from kmq_jax.study.pipeline import options_of, study, write_settings
    from kmq_jax.study.study_tables import settings_table, study_table

    own = absl_flags.FlagValues()
    absl_flags.DEFINE_list("only", [], "", flag_values=own)
    absl_flags.DEFINE_string("settings", None, "", flag_values=own)
    config, workdir = parse_flags(sys.argv, own, {"--engine": "--config.study.engine"})
    if own["only"].value == ["list"]:
        print("\n".join(training_steps(options_of(config))))
        return
    if own["settings"].value is not None:
        print(settings_table(write_settings(config, workdir, own["settings"].value)), end="")
        return
    summary = study(config, workdir, own["only"].value or ())
    if summary:
        print(study_table(summary), end="")
        print(workdir / "report.html")
