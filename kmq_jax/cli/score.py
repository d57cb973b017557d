"""`kmq-jax score`: scores of a trial list, and how good they are."""

from dataclasses import dataclass
from pathlib import Path

from kmq_jax.cli.command import Command
from kmq_jax.cli.flags import options_of
from kmq_jax.core.options import Options, option, refuse_given
from kmq_jax.scoring.options import ScoringOptions


@dataclass(frozen=True, kw_only=True)
class Files(Options):
    """What the command reads and writes."""

    embeddings: Path = option("embeddings (.npz of `extract`, or Kaldi's .scp or .ark) of the test utterances")
    enrol_embeddings: Path | None = option("those of the enrolment utterances; left out: --embeddings", None)
    reference: Path | None = option("those of another model: what changes against it, with paired intervals", None)
    trials: str = option("trial list, in VoxCeleb or Kaldi form, or synthetic:SPLIT", metavar="TRIALS")
    enrol_models: str | None = option("models that it enrols: `model utterance [...]` a line", None, metavar="FILE")
    snorm_cohort: Path | None = option("embeddings of a cohort of other speakers, for adaptive S-norm", None)
    calibration: Path | None = option("use this calibration instead of a cross-validated one", None)
    save_calibration: Path | None = option(
        "write the logistic calibration fitted on all these trials", None, writes="file"
    )
    out: Path | None = option(
        "write `enrol test score` lines here, in trial order; a name in .npy gets the scores alone", None, writes="file"
    )
    json: Path | None = option("write the figures here", None, writes="file")
    det: Path | None = option(
        "draw the DET curve into this .png, .pdf or .svg", None, suffixes=(".png", ".pdf", ".svg"), writes="file"
    )


WHOLE = "enrol_embeddings", "reference", "calibration", "save_calibration", "det"  # these need all scores at once
COMMAND = Command(
    "score",
    "Scores a trial list by cosine, with adaptive S-norm if a cohort is given, and prints EER, minDCF, actDCF,\n"
    "Cllr and minCllr. The intervals are the central 95 % over bootstrap draws of speakers. actDCF and Cllr are\n"
    "of calibrated scores: by --calibration, else cross-validated, each trial by a logistic fit on other speakers.",
    "kmq-jax score --embeddings=runs/2bit.npz --reference=runs/32bit.npz --trials=synthetic:dev --json=metrics.json",
    (Files, ScoringOptions),
)


def main() -> None:
    """Runs the command."""
    args = COMMAND.parse()
    files, options = options_of(Files, args), options_of(ScoringOptions, args)
    if options.stream:
        refuse_given(files, WHOLE, "cannot be used with `stream`")
        refuse_given(options, ("replicates", "seed"), "does not go with `stream`, which has no intervals")
        from kmq_jax.scoring.stream import score_together

        paths = files.embeddings, files.trials, files.enrol_models, files.snorm_cohort, files.out, files.json
        score_together(*paths, options)
        return
    from kmq_jax.core.files import write_json
    from kmq_jax.scoring import run

    scored = run.score(
        files.embeddings,
        files.trials,
        options,
        enrol_embeddings=files.enrol_embeddings,
        enrol_models=files.enrol_models,
        cohort=files.snorm_cohort,
        calibration=files.calibration,
        reference=files.reference,
    )
    if files.out:
        run.write_scores(files.out, scored.trials, scored.scores)
    if files.save_calibration:
        run.save_calibration(files.save_calibration, scored)
    if files.json:
        write_json(files.json, scored.metrics)
    if files.det:
        run.draw_det(files.det, scored)
    print(run.describe(scored.metrics))
