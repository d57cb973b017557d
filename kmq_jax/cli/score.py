"""`kmq-jax score`: scores of a trial list, and how good they are."""

import argparse
import os
import sys
from typing import Any

import numpy as np

from kmq_jax.cli import command
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import atomic_write, read_json, write_json
from kmq_jax.data.trials import Trials
from kmq_jax.metrics.calibration import AffineMap, IsotonicMap, fit_logistic, map_from_dict
from kmq_jax.metrics.evaluate import evaluate
from kmq_jax.scoring.cosine import average, cosine_scores
from kmq_jax.scoring.join import Sides, join
from kmq_jax.scoring.snorm import adaptive_snorm
from kmq_jax.scoring.table import EmbeddingTable, read_embeddings

_TOP_N = 300
_LINES = 1 << 16  # lines written at a time


def flags() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = command.parser(
        "score",
        "Scores a trial list by cosine, with adaptive S-norm if a cohort is given, and prints EER, minDCF, actDCF,\n"
        "Cllr and minCllr. The intervals are the central 95 % over bootstrap draws of speakers. actDCF and Cllr are\n"
        "of calibrated scores: by --calibration, else cross-validated, each trial by a logistic fit on other speakers.",
        "kmq-jax score --embeddings=runs/dev.npz --trials=synthetic:dev --out=scores.txt --json=metrics.json",
    )
    parser.add_argument("--embeddings", required=True, help="embeddings (.npz of `extract`) of the test utterances")
    parser.add_argument("--enrol_embeddings", help="those of the enrolment utterances (default: --embeddings)")
    parser.add_argument("--trials", required=True, help="trial list, in VoxCeleb or Kaldi form, or synthetic:SPLIT")
    parser.add_argument("--enrol_models", help="the list enrols models: `model utterance [utterance ...]` a line")
    parser.add_argument("--snorm_cohort", help="embeddings of a cohort of other speakers, for adaptive S-norm")
    parser.add_argument("--cohort_speaker_means", action="store_true", help="one cohort member a speaker: the mean")
    parser.add_argument(
        "--top_n", type=int, help=f"nearest cohort members that count (default: {_TOP_N}, or all if fewer)"
    )
    parser.add_argument("--calibration", help="use this calibration instead of a cross-validated one")
    parser.add_argument("--save_calibration", help="write the logistic calibration fitted on all these trials")
    parser.add_argument("--p_target", type=float, default=0.01, help="prior of a target, for minDCF and actDCF (0.01)")
    parser.add_argument("--replicates", type=int, default=1000, help="bootstrap draws (1000); 0: no intervals")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap and the calibration folds (0)")
    parser.add_argument("--out", help="write `enrol test score` lines here, in trial order")
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--det", help="draw the DET curve into this .png, .pdf or .svg")
    return parser


def normalise(
    scores: np.ndarray, sides: Sides, cohort: EmbeddingTable, top_n: int | None, means: bool
) -> tuple[np.ndarray, dict[str, Any]]:
    """Applies adaptive S-norm; returns the new scores and what was done."""
    members = cohort.embeddings
    if means:
        if cohort.speakers is None:
            raise UserError(f"--cohort_speaker_means: {cohort.source} has no `speakers`")
        _, label = np.unique(np.array(cohort.speakers), return_inverse=True)
        order = np.argsort(label, kind="stable")
        members = average(members, np.split(order, np.flatnonzero(np.diff(label[order])) + 1))
    if top_n is not None and not 2 <= top_n <= len(members):
        raise UserError(f"--top_n={top_n} must lie between 2 and the cohort's size, {len(members)}")
    top_n = min(_TOP_N, len(members)) if top_n is None else top_n
    shared = len(sides.speaker_names & set(cohort.speakers or ()))
    if shared:
        print(f"warning: {shared} speakers of the trials are also in the cohort {cohort.source}", file=sys.stderr)
    scores = adaptive_snorm(
        scores, sides.enrol_embeddings, sides.test_embeddings, sides.enrol, sides.test, members, top_n
    )
    return scores, {"cohort": cohort.source, "members": len(members), "top_n": top_n, "shared_speakers": shared}


def read_calibration(path: str, kind: str) -> AffineMap | IsotonicMap:
    """Reads what --save_calibration wrote, for scores of the same kind, "cosine" or "snorm"."""
    value = read_json(path)
    try:
        calibration = map_from_dict(value)
    except UserError as error:
        raise UserError(f"--calibration={path}: {error}") from error
    if value.get("scores", kind) != kind:
        raise UserError(f"--calibration={path} is for {value['scores']} scores, but these are {kind} scores")
    return calibration


def write_scores(path: str, trials: Trials, scores: np.ndarray) -> None:
    """Writes `enrol test score` lines, with names as in the list. Nine digits give every float32 back exactly."""
    names = np.array(trials.names, object)
    with atomic_write(path) as temporary, temporary.open("w") as file:
        for start in range(0, len(scores), _LINES):
            part = slice(start, start + _LINES)
            rows = zip(names[trials.enrol_name[part]], names[trials.test_name[part]], scores[part].tolist())
            file.write("".join([f"{enrol} {test} {score:.9g}\n" for enrol, test, score in rows]))


def describe(result: dict[str, Any]) -> str:
    """The figures as a short table."""

    def line(name: str, value: float | None, interval: list[float] | None, digits: int, unit: str = "") -> str:
        if value is None:
            return f"{name:10}{'-':>9}"
        span = f"   [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else ""
        return f"{name:10}{value:9.{digits}f}{unit}{span}"

    return "\n".join(
        [
            f"{result['trials']:,} trials, {result['targets']:,} of them targets, {result['speakers']:,} speakers "
            f"({result['speakers_source']})",
            line("EER %", result["eer"], result["eer_ci95"], 3),
            line("minDCF", result["min_dcf"], result["min_dcf_ci95"], 4),
            line("actDCF", result["act_dcf"], None, 4),
            line("Cllr", result["cllr"], None, 4),
            line("minCllr", result["min_cllr"], None, 4),
            line("threshold", result["threshold"], None, 5),
            f"target prior {result['p_target']:g}; intervals: {result['intervals']}",
            f"calibration: {result['calibration']}",
        ]
    )


def score(args: argparse.Namespace) -> dict[str, Any]:
    """Does what the flags ask for; returns what `--json` holds."""
    if not 0 < args.p_target < 1:
        raise UserError(f"--p_target={args.p_target} must lie between 0 and 1")
    if args.replicates < 0 or args.seed < 0:
        raise UserError(f"--replicates={args.replicates} and --seed={args.seed} must not be negative")
    if args.det and os.path.splitext(args.det)[1] not in (".png", ".pdf", ".svg"):
        raise UserError(f"--det={args.det} must end in .png, .pdf or .svg")
    if not args.snorm_cohort and (args.top_n is not None or args.cohort_speaker_means):
        raise UserError("--top_n and --cohort_speaker_means need --snorm_cohort")
    kind = "snorm" if args.snorm_cohort else "cosine"
    calibration = None
    if args.calibration:
        calibration = read_calibration(args.calibration, kind)

    test_table = read_embeddings(args.embeddings)
    enrol_table = read_embeddings(args.enrol_embeddings) if args.enrol_embeddings else test_table
    trials, sides = join(args.trials, enrol_table, test_table, args.enrol_models)
    scores = cosine_scores(sides.enrol_embeddings, sides.test_embeddings, sides.enrol, sides.test)
    snorm = None
    if args.snorm_cohort:
        scores, snorm = normalise(
            scores, sides, read_embeddings(args.snorm_cohort), args.top_n, args.cohort_speaker_means
        )
    try:
        result = evaluate(
            scores,
            trials.label,
            sides.enrol_speaker,
            sides.test_speaker,
            args.p_target,
            calibration,
            args.replicates,
            args.seed,
        )
    except UserError as error:
        raise UserError(f"{args.trials}: {error}") from error
    if calibration is not None:
        result["calibration"] = f"given by {args.calibration}"
    result |= {"speakers_source": sides.speakers_source, "snorm": snorm}
    if args.out:
        write_scores(args.out, trials, scores)
    if args.save_calibration:
        write_json(args.save_calibration, fit_logistic(scores, trials.label).to_dict() | {"scores": kind})
    if args.json:
        write_json(args.json, result)
    if args.det:
        from kmq_jax.metrics.det_plot import save_det  # matplotlib takes a second to import

        with atomic_write(args.det) as temporary:
            save_det(temporary, {kind: (scores, trials.label)})
    return result


def main() -> None:
    """Runs the command."""
    print(describe(score(flags().parse_args())))
