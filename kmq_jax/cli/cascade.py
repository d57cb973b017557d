"""`kmq-jax cascade`: runs a cascade over a trial list and tells decisions, errors and costs."""

import argparse
from typing import Any

import numpy as np

from kmq_jax.cascade.policy import CascadePolicy, read_policy
from kmq_jax.cascade.run import Outcome, run
from kmq_jax.cascade.verifier import load_cascade
from kmq_jax.cli import command
from kmq_jax.cli.calibrate import each_alone, equal_error, flip_rates
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import atomic_write, write_json
from kmq_jax.data import source
from kmq_jax.data.trials import Trials
from kmq_jax.metrics.bootstrap import percentile_interval, speaker_bootstrap
from kmq_jax.metrics.calibration import cllr
from kmq_jax.metrics.detection import min_dcf
from kmq_jax.metrics.operating import error_rates
from kmq_jax.models.speaker_model import COMPUTE
from kmq_jax.scoring.join import join
from kmq_jax.scoring.levels import LevelScores, parse_levels, score_levels
from kmq_jax.scoring.table import EmbeddingTable

_LINES = 1 << 16  # lines written at a time
BANDS = (0, 1, 2, 5, 10, 20, 50, 100)
"""Percent of the trials, those nearest the threshold at full precision first: where flips are looked for."""


def flags() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = command.parser(
        "cascade",
        "Runs a cascade over a trial list: each trial is decided by the lowest width that is sure enough.\n"
        "Costs: `sequential` bits count every width climbed through, `incremental` those that nested codebooks read,\n"
        "`utterance` the widths at which an utterance must be embedded, once each. Harmful flips: trials that the\n"
        "reference decides right at the same threshold and the cascade wrong. With --cascade and --data in place of\n"
        "--policy and --stage it runs lazily from recordings: each width embeds only those still in doubt.",
        "kmq-jax cascade --policy=policy.json --stage=2:t2.npz --stage=3:t3.npz --stage=4:t4.npz\n"
        "      --reference=t32.npz --trials=trials.txt --out=decisions.csv --json=cascade.json",
    )
    parser.add_argument("--policy", help="what `calibrate` wrote")
    parser.add_argument("--stage", action="append", default=[], help="BITS:EMBEDDINGS.npz, once for each width")
    parser.add_argument("--cascade", help="directory of a policy and its models, from `calibrate --cascade`")
    parser.add_argument("--data", help="with --cascade: DATA that the trials compare")
    parser.add_argument("--compute", default="float32", choices=COMPUTE, help="lazily: arithmetic below the last width")
    parser.add_argument("--reference", help="embeddings of the full-precision model, to count flips against")
    parser.add_argument("--trials", required=True, help="trial list, in VoxCeleb or Kaldi form, or synthetic:SPLIT")
    parser.add_argument("--enrol_models", help="the list enrols models: `model utterance [utterance ...]` a line")
    parser.add_argument("--out", help="write `enrol,test,score,decision,bits` here, in trial order; decision is 1 or 0")
    parser.add_argument("--llr", action="store_true", help="add the column `llr`, natural log likelihood ratios")
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--p_target", type=float, default=0.01, help="prior of a target, for minDCF (0.01)")
    parser.add_argument("--replicates", type=int, default=1000, help="bootstrap draws (1000); 0: no intervals")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")
    return parser


def log_ratios(policy: CascadePolicy, outcome: Outcome) -> np.ndarray | None:
    """Natural log likelihood ratio of each trial `[trials]`, by the map of the width that decided."""
    if policy.llr_maps is None:
        return None
    scale, offset = np.array([[fitted.scale, fitted.offset] for fitted in policy.llr_maps]).T
    return scale[outcome.stage] * outcome.score + offset[outcome.stage]


def write_decisions(path: str, trials: Trials, outcome: Outcome, llrs: np.ndarray | None) -> None:
    """Writes one CSV row a trial, with names as in the list. Nine digits give every float32 back exactly."""
    names = np.array([_quoted(name) for name in trials.names], object)
    with atomic_write(path) as temporary, temporary.open("w") as file:
        file.write("enrol,test,score,decision,bits" + (",llr\n" if llrs is not None else "\n"))
        for start in range(0, len(trials), _LINES):
            part = slice(start, start + _LINES)
            columns = [
                names[trials.enrol_name[part]],
                names[trials.test_name[part]],
                outcome.score[part].tolist(),
                outcome.accept[part].astype(int).tolist(),
                outcome.bits[part].tolist(),
            ]
            if llrs is None:
                file.write("".join([f"{e},{t},{s:.9g},{d},{b}\n" for e, t, s, d, b in zip(*columns)]))
            else:
                rows = zip(*columns, llrs[part].tolist())
                file.write("".join([f"{e},{t},{s:.9g},{d},{b},{r:.6g}\n" for e, t, s, d, b, r in rows]))


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"' if set(name) & set(',"\n\r') else name


def remaining_flips(
    policy: CascadePolicy, outcome: Outcome, reference: np.ndarray, labels: np.ndarray
) -> list[dict[str, Any]]:
    """Where harmful flips remain: how near full precision was to the threshold, and which width decided.

    Args:
        policy: the cascade.
        outcome: what it did.
        reference: full precision's scores `[trials]`.
        labels: `[trials]` bool.

    Returns:
        A row for each of `BANDS`: `nearest`, from and to which percent of the trials; `margin`, how far from the
        threshold the last of them is; `harmful_flip_rate`, by deciding width, in shares of all trials.
    """
    margin = np.abs(reference - policy.threshold)
    order = np.argsort(margin, kind="stable")
    ours, theirs = (outcome.score >= policy.threshold) == labels, (reference >= policy.threshold) == labels
    harmful, ends = (theirs & ~ours)[order], np.round(np.array(BANDS) / 100 * len(order)).astype(int)
    stage, rows = outcome.stage[order], []
    for low, high, begin, end in zip(BANDS, BANDS[1:], ends, ends[1:]):
        counts = np.bincount(stage[begin:end][harmful[begin:end]], minlength=len(policy.bits)) / len(order)
        rates = {str(width): float(rate) for width, rate in zip(policy.bits, counts)}
        far = float(margin[order[end - 1]]) if end else 0.0
        rows.append({"nearest": [low, high], "margin": far, "harmful_flip_rate": rates})
    return rows


def evaluate(
    policy: CascadePolicy, outcome: Outcome, joined: LevelScores, p_target: float, replicates: int, seed: int
) -> dict[str, Any]:
    """All figures of a cascade on a trial list; what cannot be told is None.

    A lazy run has no embedding tables, and so tells nothing of a width alone.
    """
    labels, sides, reference = joined.trials.label, joined.sides, joined.reference
    both = bool(labels.any() and not labels.all())
    far, frr = error_rates(outcome.score, labels, policy.threshold)
    llrs = log_ratios(policy, outcome)
    result: dict[str, Any] = {
        "eer": equal_error(outcome.score, labels),
        "eer_ci95": None,
        "min_dcf": min_dcf(outcome.score, labels, p_target) if both else None,
        "min_dcf_ci95": None,
        "cllr": cllr(llrs, labels) if llrs is not None and both else None,
        "threshold": policy.threshold,
        "false_accept_rate": far,
        "false_reject_rate": frr,
        **outcome.costs(),
        "top_bits": policy.bits[-1],
        "harmful_flip_rate": None,
        "beneficial_flip_rate": None,
        "reference_eer": None,
        "reference_min_dcf": None,
        "p_target": p_target,
        "trials": len(labels),
        "targets": int(labels.sum()),
        "remaining_flips": None,
        "each_width_alone": each_alone(policy, joined) if joined.tables else None,
    }
    if reference is not None:
        result |= flip_rates(outcome.score, policy.threshold, reference, labels)
        result["remaining_flips"] = remaining_flips(policy, outcome, reference, labels)
        result["reference_eer"] = equal_error(reference, labels)
        result["reference_min_dcf"] = min_dcf(reference, labels, p_target) if both else None
    if replicates and both:
        draws = speaker_bootstrap(
            outcome.score, labels, sides.enrol_speaker, sides.test_speaker, replicates, seed, p_target
        )
        if len(draws.eer) >= 0.9 * replicates:
            result["eer_ci95"] = [100 * side for side in percentile_interval(draws.eer)]
            result["min_dcf_ci95"] = list(percentile_interval(draws.min_dcf))
    return result


def describe(result: dict[str, Any]) -> str:
    """The figures as a short table."""

    def number(value: float | None, digits: int, factor: float = 1.0) -> str:
        return "-" if value is None else f"{factor * value:.{digits}f}"

    lines = [f"{result['trials']:,} trials, {result['targets']:,} of them targets"]
    lines.append(f"{'':14}{'EER %':>9}{'harmful flips %':>18}{'decides %':>12}")
    for width, resolved in result["resolved"].items():
        alone = (result["each_width_alone"] or {}).get(width, {})
        flips, share = number(alone.get("harmful_flip_rate"), 4, 100), number(resolved, 2, 100)
        lines.append(f"{width + ' bits':14}{number(alone.get('eer'), 3):>9}{flips:>18}{share:>12}")
    lines.append(f"{'cascade':14}{number(result['eer'], 3):>9}{number(result['harmful_flip_rate'], 4, 100):>18}")
    lines.append(f"{'reference':14}{number(result['reference_eer'], 3):>9}")
    lines.append(
        f"bits a trial: {result['sequential_bits']:.3f} sequential, {result['incremental_bits']:.3f} incremental; "
        f"an utterance: {result['utterance_bits']:.3f} ({result['utterance_incremental_bits']:.3f} incremental)"
    )
    if "embedded" in result:
        embedded = ", ".join(f"{count:,} at {width} bits" for width, count in result["embedded"].items())
        lines.append(
            f"recordings embedded: {embedded}; {result['seconds']:.1f} s; models of {result['resident_bytes']:,} bytes"
        )
        macs = ", ".join(f"{count / 1e9:.2f} G at {width} bits" for width, count in result["macs"].items())
        lines.append(f"multiplications for 300 frames: {macs}; a trial: {result['sequential_macs'] / 1e9:.2f} G")
    return "\n".join(lines)


def from_embeddings(args: argparse.Namespace) -> tuple[CascadePolicy, LevelScores]:
    """The policy, and every width's scores of every trial.

    Raises:
        UserError: the stages are not those of the policy, or a file is at fault.
    """
    if not args.policy or not args.stage:
        raise UserError("--policy and --stage are needed, or else --cascade and --data")
    policy, stages = read_policy(args.policy), parse_levels(args.stage)
    if tuple(bits for bits, _ in stages) != policy.bits:
        given = ", ".join(str(bits) for bits, _ in stages)
        raise UserError(f"--stage: {args.policy} is for {', '.join(map(str, policy.bits))} bits, but {given} are given")
    joined = score_levels(stages, args.reference, args.trials, policy.enrolment, args.enrol_models)
    for i, (bits, path) in enumerate(stages):
        policy.check(bits, i, joined.tables[i].embeddings.shape[1], joined.tables[i].model, path)
    return policy, joined


def from_recordings(args: argparse.Namespace) -> tuple[CascadePolicy, LevelScores, dict[str, Any]]:
    """The policy, the scores that a lazy run needed, and what the run took.

    Raises:
        UserError: a flag, a file or a recording is at fault.
    """
    if not args.data or args.policy or args.stage or args.enrol_models:
        raise UserError("--cascade takes --data and --trials, without --policy, --stage and --enrol_models")
    cascade, utterances = load_cascade(args.cascade, args.compute), source.open_source(args.data)
    names = tuple(utterances.ids), tuple(utterances.paths), tuple(utterances.speakers)
    table = EmbeddingTable(*names, np.ones((len(utterances), 1), np.float32), args.data)
    trials, sides = join(args.trials, table, table)
    reference = score_levels([(32, args.reference)], None, args.trials).scores[0] if args.reference else None
    found = cascade.score(utterances, trials)
    run_notes = {"seconds": sum(found.seconds.values()), "embedded": {str(b): n for b, n in found.embedded.items()}}
    return cascade.policy, LevelScores(trials, sides, (), found.scores, reference), run_notes | cascade.costs()


def cascade(args: argparse.Namespace) -> dict[str, Any]:
    """Does what the flags ask for; returns what `--json` holds."""
    if not 0 < args.p_target < 1:
        raise UserError(f"--p_target={args.p_target} must lie between 0 and 1")
    if args.replicates < 0 or args.seed < 0:
        raise UserError(f"--replicates={args.replicates} and --seed={args.seed} must not be negative")
    notes: dict[str, Any] = {}
    if args.cascade:
        policy, joined, notes = from_recordings(args)
    else:
        policy, joined = from_embeddings(args)
    if args.llr and policy.llr_maps is None:
        name = args.policy or args.cascade
        raise UserError(f"--llr: {name} was fitted on trials of one class and has no likelihood ratios")
    sides = joined.sides
    outcome = run(policy, joined.scores, sides.enrol, sides.test, joined.one_table)
    result = evaluate(policy, outcome, joined, args.p_target, args.replicates, args.seed) | notes
    if args.cascade:  # stages may be different networks, whose bits say little of what they compute
        reached = [float(np.mean(outcome.stage >= stage)) for stage in range(len(policy.bits))]
        result["sequential_macs"] = sum(share * count for share, count in zip(reached, notes["macs"].values()))
    if args.out:
        write_decisions(args.out, joined.trials, outcome, log_ratios(policy, outcome) if args.llr else None)
    if args.json:
        write_json(args.json, result)
    return result


def main() -> None:
    """Runs the command."""
    print(describe(cascade(flags().parse_args())))
