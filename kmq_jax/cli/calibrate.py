"""`kmq-jax calibrate`: a cascade's policy from trials of a development set."""

import sys
from dataclasses import dataclass
from pathlib import Path

from kmq_jax.cascade.options import CalibrationOptions
from kmq_jax.cli.command import Command
from kmq_jax.cli.flags import options_of
from kmq_jax.core.errors import UserError
from kmq_jax.core.options import Options, option


@dataclass(frozen=True, kw_only=True)
class Files(Options):
    """What the command reads and writes."""

    levels: tuple[str, ...] = option(
        "embeddings of one level; once for each", flag="stage", metavar="BITS:EMBEDDINGS.npz"
    )
    reference: str = option("embeddings of the full-precision model", metavar="FILE")
    trials: str = option("trial list of the development set, or synthetic:SPLIT", metavar="TRIALS")
    enrol_models: str | None = option(
        "the list enrols models: `model utterance [utterance ...]` a line", None, metavar="FILE"
    )
    out: Path = option("the policy, JSON", writes="file")
    cascade: Path | None = option(
        "also make this directory of policy and models, for `verify` and `cascade`",
        None,
        metavar="DIR",
        writes="directory",
    )
    models: tuple[str, ...] = option(
        "MODEL of one level, once for each; with --cascade", (), flag="model", metavar="BITS:MODEL"
    )
    plot: Path | None = option(
        "picture of the Pareto front; left out: beside --out", None, suffixes=(".png", ".pdf", ".svg"), writes="file"
    )


COMMAND = Command(
    "calibrate",
    "Fits a cascade: maps from each level's scores to the reference's, a threshold, and gates that tell which\n"
    "trials need more bits. The rule `pareto` searches all gates and takes the cheapest that flip no more\n"
    "decisions than the last level alone (or than --alpha, where that is more). The rule `risk` takes the\n"
    "cheapest that keep harmful flips made by stopping early at --alpha or less on new speakers, by a test on\n"
    "speakers kept apart; that promise is approximate with --bound=survey, the default, and is broken more often\n"
    "than --delta says where few speakers are unlike the others. What is proven is printed beside it, and how\n"
    "many speakers a proof needs. The last level may be the reference itself: --stage=32:EMB32.npz.",
    "kmq-jax calibrate --stage=2:e2.npz --stage=3:e3.npz --stage=4:e4.npz --reference=e32.npz\n"
    "      --trials=dev_trials.txt --out=policy.json",
    (Files, CalibrationOptions),
)


def main() -> None:
    """Runs the command."""
    args = COMMAND.parse()
    files, options = options_of(Files, args), options_of(CalibrationOptions, args)
    options.refuse_ignored()
    from kmq_jax.cascade import calibrate, figures
    from kmq_jax.cascade.verifier import save_cascade
    from kmq_jax.scoring.levels import parse_levels

    levels, models = parse_levels(files.levels), dict(parse_levels(files.models, "model", "MODEL"))
    if bool(files.cascade) != bool(models) or files.cascade and set(models) != {bits for bits, _ in levels}:
        raise UserError("--cascade needs one --model=BITS:MODEL for each --stage, and they need --cascade")
    # No picture is put beside a device, such as --out=/dev/stdout.
    plot = files.plot or (files.out.with_suffix(".png") if files.out.is_file() or not files.out.exists() else None)
    if plot == files.out:
        raise UserError(f"--out (={files.out}) is where the picture goes: name the policy .json, or give --plot")
    policy = calibrate.calibrate(levels, files.reference, files.trials, options, files.enrol_models)
    policy.save(files.out)
    if files.cascade:
        save_cascade(files.cascade, policy, models)
    if plot:
        figures.draw_front(plot, policy)
    print(calibrate.describe(policy))
    if warning := calibrate.warning(policy):
        print(warning, file=sys.stderr)
