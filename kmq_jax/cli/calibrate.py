"""`kmq-jax calibrate`: a cascade's policy from trials of a development set."""

import argparse
import dataclasses
import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

from kmq_jax.cascade import gates, risk
from kmq_jax.cascade.fit import Calibration, control_risk, fit, pareto
from kmq_jax.cascade.policy import ENROLMENTS, MAPS, CascadePolicy
from kmq_jax.cascade.run import Outcome, map_scores, run, run_grid
from kmq_jax.cascade.verifier import save_cascade
from kmq_jax.cli import command
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import atomic_write
from kmq_jax.metrics.calibration import IsotonicMap
from kmq_jax.metrics.detection import eer
from kmq_jax.metrics.operating import FORMS, error_rates, parse_point, threshold_interval
from kmq_jax.scoring.levels import LevelScores, parse_levels, score_levels


def flags() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = command.parser(
        "calibrate",
        "Fits a cascade: maps from each width's scores to the reference's, a threshold, and gates that tell which\n"
        "trials need more bits. The rule `pareto` searches all gates and takes the cheapest that flip no more\n"
        "decisions than the last stage alone (or than --alpha, where that is more). The rule `risk` takes the\n"
        "cheapest that keep harmful flips made by stopping early at --alpha or less on new speakers, by a test on\n"
        "speakers kept apart. The last stage may be the reference itself: --stage=32:EMB32.npz.",
        "kmq-jax calibrate --stage=2:e2.npz --stage=3:e3.npz --stage=4:e4.npz --reference=e32.npz\n"
        "      --trials=dev_trials.txt --out=policy.json",
    )
    parser.add_argument("--stage", action="append", required=True, help="BITS:EMBEDDINGS.npz, once for each width")
    parser.add_argument("--reference", required=True, help="embeddings of the full-precision model")
    parser.add_argument("--trials", required=True, help="trial list of the development set, or synthetic:SPLIT")
    parser.add_argument("--enrol_models", help="the list enrols models: `model utterance [utterance ...]` a line")
    parser.add_argument("--enrolment", default="each", choices=ENROLMENTS, help="top: enrolled side at the last stage")
    parser.add_argument("--out", required=True, help="the policy, JSON")
    parser.add_argument("--cascade", help="also make this directory of policy and models, for `verify` and `cascade`")
    parser.add_argument("--model", action="append", default=[], help="BITS:MODEL, once for each width; with --cascade")
    parser.add_argument("--plot", help="picture of the Pareto front, .png, .pdf or .svg (default: beside --out)")
    parser.add_argument("--map", default="isotonic", choices=MAPS, help="map to the reference's scores (isotonic)")
    parser.add_argument("--operating_point", default="eer", help=f"what the threshold is for: {FORMS} (eer)")
    parser.add_argument("--rule", default="pareto", choices=("pareto", "risk"), help="how gates are chosen (pareto)")
    parser.add_argument("--alpha", type=float, default=0.001, help="harmful flips a trial that are allowed (0.001)")
    parser.add_argument(
        "--delta", type=float, default=0.05, help="one minus the confidence that new speakers keep to it (0.05)"
    )
    parser.add_argument("--bound", default="survey", choices=risk.BOUNDS, help="risk: bound on the rate (survey)")
    parser.add_argument("--certify_share", type=float, default=0.5, help="risk: speakers kept to test gates on (0.5)")
    parser.add_argument("--objective", default="flips", choices=gates.OBJECTIVES, help="pareto: what is kept low")
    parser.add_argument("--cost", default="sequential", choices=gates.COSTS, help="bits that count as cost")
    parser.add_argument("--symmetric", action="store_true", help="gates equally wide on both sides, as in the paper")
    parser.add_argument("--replicates", type=int, default=200, help="bootstrap draws for the threshold (200); 0: none")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap and of the deal of speakers (0)")
    return parser


def fingerprint(path: str) -> str:
    """SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_front(
    front: gates.Front, policy: CascadePolicy, joined: LevelScores, reference: Any
) -> list[dict[str, Any]]:
    """The front as rows for people, each run by the cascade itself, with its exact EER."""
    policies = [dataclasses.replace(policy, gates=front.point(i)) for i in range(len(front))]
    labels, sides = joined.trials.label, joined.sides
    figures = run_grid(policies, joined.scores, sides.enrol, sides.test, reference, labels, joined.one_table)
    rows = []
    for i, one in enumerate(policies):
        outcome = run(one, joined.scores, sides.enrol, sides.test, joined.one_table)
        row: dict[str, Any] = {"gates": [[_finite(side) for side in gate] for gate in one.gates]}
        row["eer"] = equal_error(outcome.score, labels)
        row |= {name: float(values[i]) for name, values in figures.items() if name != "resolved"}
        row["resolved"] = {str(w): float(s) for w, s in zip(one.bits, figures["resolved"][i])}
        rows.append(row)
    return rows


def equal_error(scores: Any, labels: Any) -> float | None:
    """EER in percent, or None where a class has no trials."""
    return None if labels.all() or not labels.any() else 100 * eer(scores, labels)[0]


def each_alone(policy: CascadePolicy, joined: LevelScores) -> dict[str, dict[str, Any]]:
    """Every width alone: EER, harmful flips, beneficial flips."""
    labels, mapped = joined.trials.label, map_scores(policy, joined.scores)
    result = {}
    for width, row in zip(policy.bits, mapped):
        figures: dict[str, Any] = {"eer": equal_error(row, labels)}
        if joined.reference is not None:
            figures |= flip_rates(row, policy.threshold, joined.reference, labels)
        result[str(width)] = figures
    return result


def flip_rates(scores: Any, threshold: float, reference: Any, labels: Any) -> dict[str, float]:
    """Shares of trials that the reference decides right and the scores wrong, and the reverse."""
    ours, theirs = (scores >= threshold) == labels, (reference >= threshold) == labels
    return {
        "harmful_flip_rate": float(np.mean(theirs & ~ours)),
        "beneficial_flip_rate": float(np.mean(ours & ~theirs)),
    }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def draw(path: str, rows: list[dict[str, Any]], singles: dict[str, Any], chosen: int | None, cost: str) -> None:
    """Draws harmful flips and EER against bits: the front, each width alone, and the point chosen."""
    from matplotlib.figure import Figure

    from kmq_jax import html

    figure = Figure(figsize=(html.WIDTH, 6.4), layout="constrained", dpi=160)
    panels = figure.subplots(2, 1)
    for axes, key, scale, label in zip(
        panels, ("harmful_flip_rate", "eer"), (100, 1), ("Harmful flips (%)", "EER (%)")
    ):
        if any(row[key] is None for row in rows):
            axes.set_axis_off()
            continue
        bits = [row[f"{cost}_bits"] for row in rows]
        values = [scale * row[key] for row in rows]
        axes.plot(bits, values, ".-", color="tab:blue", linewidth=1, markersize=4, label="cascade, the front")
        alone = [int(width) for width in singles if int(width) <= max(8, 1.5 * max(bits))]
        heights = [scale * singles[str(width)][key] for width in alone]
        axes.plot(alone, heights, "s", color="tab:gray", label="one width alone")
        for width, height in zip(alone, heights):
            axes.annotate(f"{width} bits", (width, height), xytext=(6, 4), textcoords="offset points", fontsize=8)
        if chosen is not None:
            axes.plot(
                bits[chosen], values[chosen], "o", color="tab:red", markersize=8, fillstyle="none", label="chosen"
            )
        axes.set(xlabel=f"mean {cost} bits a trial", ylabel=label)
        axes.grid(color="0.9", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper right", frameon=False, fontsize=8)
    with atomic_write(path) as temporary:
        figure.savefig(temporary)


def report(policy: CascadePolicy, outcome: Outcome, joined: LevelScores) -> dict[str, Any]:
    """The figures of the chosen policy on the calibration trials."""
    assert joined.reference is not None
    labels = joined.trials.label
    flips = flip_rates(outcome.score, policy.threshold, joined.reference, labels)
    return {"eer": equal_error(outcome.score, labels), **flips, **outcome.costs()}


def calibrate(args: argparse.Namespace) -> CascadePolicy:
    """Does what the flags ask for; returns the policy that was written."""
    for name in ("alpha", "delta", "certify_share"):
        if not 0 < getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)} must lie between 0 and 1")
    if args.replicates < 0 or args.seed < 0:
        raise UserError(f"--replicates={args.replicates} and --seed={args.seed} must not be negative")
    plot = args.plot or str(Path(args.out).with_suffix(".png"))
    if Path(plot).suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--plot={plot} must end in .png, .pdf or .svg")
    try:
        point = parse_point(args.operating_point)
    except UserError as error:
        raise UserError(f"--operating_point: {error}") from error
    stages, models = parse_levels(args.stage), dict(parse_levels(args.model, "model", "MODEL"))
    if bool(args.cascade) != bool(models) or args.cascade and set(models) != {bits for bits, _ in stages}:
        raise UserError("--cascade needs one --model=BITS:MODEL for each --stage, and they need --cascade")
    joined = score_levels(stages, args.reference, args.trials, args.enrolment, args.enrol_models)
    sides, labels, reference = joined.sides, joined.trials.label, joined.reference
    assert reference is not None
    prints = {path: fingerprint(path) for path in {args.reference, *(path for _, path in stages)}}
    last_is_reference = prints[stages[-1][1]] == prints[args.reference]
    widths = tuple(bits for bits, _ in stages)
    data = Calibration(
        widths, joined.scores, reference, labels, sides.enrol_speaker, sides.test_speaker, last_is_reference
    )

    try:
        if args.rule == "risk":
            policy, notes = control_risk(
                data, args.map, point, args.alpha, args.delta, args.bound, args.cost, args.symmetric,
                args.certify_share, args.seed,
            )  # fmt: skip
            _, front, _ = pareto(data, policy, args.alpha, args.delta, "flips", args.cost, args.symmetric)
        else:
            fitted = fit(data, args.map, point)
            policy, front, notes = pareto(
                data, fitted, args.alpha, args.delta, args.objective, args.cost, args.symmetric
            )
    except UserError as error:
        raise UserError(f"{args.trials}: {error}") from error

    outcome = run(policy, joined.scores, sides.enrol, sides.test, joined.one_table)
    rows = describe_front(front, policy, joined, reference >= policy.threshold)
    interval = None
    if args.replicates and labels.any() and not labels.all():
        interval = threshold_interval(
            reference, labels, sides.enrol_speaker, sides.test_speaker, point, args.replicates, args.seed
        )
    far, frr = error_rates(reference, labels, policy.threshold)
    singles = each_alone(policy, joined)
    notes |= {
        "operating_point": str(point),
        "threshold_ci95": interval,
        "reference": {"far": far, "frr": frr, "eer": equal_error(reference, labels), "sha256": prints[args.reference]},
        "stages": {str(bits): {"file": Path(path).name, "sha256": prints[path]} for bits, path in stages},
        "map": args.map,
        "trials": {
            "file": Path(args.trials).name,
            "trials": len(labels),
            "targets": int(labels.sum()),
            "speakers": len(np.union1d(sides.enrol_speaker, sides.test_speaker)),
            "speakers_source": sides.speakers_source,
        },
        "here": report(policy, outcome, joined),
        "each_width_alone": singles,
        "front": rows,
    }
    policy = dataclasses.replace(
        policy,
        enrolment=args.enrolment,
        models=tuple(table.model for table in joined.tables),
        dims=tuple(table.embeddings.shape[1] for table in joined.tables),
        notes=notes,
    )
    policy.save(args.out)
    if args.cascade:
        save_cascade(args.cascade, policy, models)
    draw(plot, rows, singles, notes.get("chosen"), args.cost)
    return policy


def describe(policy: CascadePolicy) -> str:
    """The policy and its figures as a few lines."""
    notes, here = policy.notes, policy.notes["here"]
    interval = notes["threshold_ci95"]
    span = f"   [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
    lines = [f"threshold {policy.threshold:.4f}{span}   ({notes['operating_point']} of the reference)"]
    for i, width in enumerate(policy.bits):
        gate = f"climbs between {policy.gates[i][0]:.4f} and {policy.gates[i][1]:.4f}" if i < len(policy.gates) else ""
        knots = f"{len(policy.maps[i].x)} knots" if isinstance(policy.maps[i], IsotonicMap) else "line"  # type: ignore[union-attr]
        lines.append(f"{width:2} bits: decides {100 * here['resolved'][str(width)]:5.1f} %   {knots:11} {gate}")
    rate = "" if here["eer"] is None else f"EER {here['eer']:.3f} % (reference {notes['reference']['eer']:.3f} %), "
    lines.append(f"{rate}harmful flips {100 * here['harmful_flip_rate']:.4f} %, on the calibration trials themselves")
    lines.append(
        f"bits a trial: {here['sequential_bits']:.3f} sequential, {here['incremental_bits']:.3f} incremental; "
        f"an utterance: {here['utterance_bits']:.3f}"
    )
    if notes["rule"] == "risk":
        ends = f"with confidence {1 - notes['delta']:g}" if notes["delta"] else "in expectation"
        lines.append(
            f"promise: harmful flips made by stopping early at most {100 * notes['alpha']:g} % on new speakers, {ends} "
            f"({notes['bound']} bound, {notes['certifying_speakers']} speakers kept apart)"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs the command."""
    args = flags().parse_args()
    policy = calibrate(args)
    print(describe(policy))
    if args.rule == "risk" and not policy.notes["kept"]:
        print(
            f"warning: no gates keep the promise with alpha {args.alpha:g} by the {args.bound} bound on "
            f"{policy.notes['certifying_speakers']} speakers: every trial climbs to {policy.bits[-1]} bits",
            file=sys.stderr,
        )
