"""The cascade: seconds and memory on a long trial list, and with --stage how it does over random splits of speakers."""

import argparse
import dataclasses
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kmq_jax.cascade import fit as fitting
from kmq_jax.cascade.evaluate import equal_error, flip_rates
from kmq_jax.cascade.options import BOUNDS, CalibrationOptions
from kmq_jax.cascade.policy import CascadePolicy, fit_map, symmetric_gates
from kmq_jax.cascade.risk import pair_up
from kmq_jax.cascade.run import prices, run, run_grid
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import write_json
from kmq_jax.core.progress import progress
from kmq_jax.scoring.levels import parse_levels, score_levels

_KNOT_TRIALS = 200_000


def add_flags(flags: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    flags.add_argument("--trials", default="1000000", help="how many random trials, or with --stage a trial list")
    flags.add_argument("--utterances", type=int, default=150_000, help="utterances of the random trials")
    flags.add_argument("--policies", type=int, default=32, help="policies run at once")
    flags.add_argument("--repeats", type=int, default=5, help="timed rounds, each side in turn; the median counts")
    flags.add_argument("--stage", action="append", help="BITS:EMBEDDINGS.npz: measure splits of speakers instead")
    flags.add_argument("--reference", help="embeddings of the reference, with --stage")
    flags.add_argument("--splits", type=int, default=20, help="random halvings of the speakers, with --stage")
    flags.add_argument("--rule", default="pareto", choices=("pareto", "risk"), help="with --stage")
    flags.add_argument("--alpha", type=float, default=0.001, help="with --stage: as in `calibrate`")
    flags.add_argument("--delta", type=float, default=0.05, help="with --stage: as in `calibrate`")
    flags.add_argument("--bound", default="survey", choices=BOUNDS, help="with --stage: as in `calibrate`")
    flags.add_argument("--objective", default="flips", help="with --stage: as in `calibrate`")
    flags.add_argument("--json", type=Path, help="also write the figures to this file")


def make(trials: int, utterances: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, CascadePolicy]:
    """Random scores at 2, 3, 4 bits `[3, trials]`, reference scores, both sides' utterances, and a policy."""
    rng = np.random.default_rng(0)
    reference = 0.25 * rng.standard_normal(trials, np.float32)
    noise = np.array([[0.08], [0.05], [0.03]], np.float32)
    scores = np.tanh(reference + noise * rng.standard_normal((3, trials), np.float32))
    enrol, test = rng.integers(utterances, size=(2, trials), dtype=np.int32)
    some = slice(_KNOT_TRIALS)
    maps = tuple(fit_map("isotonic", row[some], reference[some], reference[some] > 0) for row in scores)
    return scores, reference, enrol, test, CascadePolicy((2, 3, 4), maps, symmetric_gates(0.1, [0.1, 0.06]), 0.1)


def peer(policy: CascadePolicy, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cascade the plain way in numpy: deciding bits and decision of each trial."""
    mapped = [fitted(row) for fitted, row in zip(policy.maps, scores)]
    bits, score = np.full(scores.shape[1], policy.bits[-1]), mapped[-1]
    for i in reversed(range(len(policy.gates))):
        low, high = policy.gates[i]
        stops = (mapped[i] <= low) | (mapped[i] >= high)
        bits, score = np.where(stops, policy.bits[i], bits), np.where(stops, mapped[i], score)
    return bits, score >= policy.threshold


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of one policy and of a grid, beside numpy."""
    if not args.trials.isdigit() or min(int(args.trials), args.utterances, args.policies, args.repeats) < 1:
        raise UserError("--trials, --utterances, --policies and --repeats must be whole numbers of at least 1")
    scores, reference, enrol, test, policy = make(int(args.trials), args.utterances)
    widened = [
        dataclasses.replace(policy, gates=symmetric_gates(0.1, [0.3 * (i + 1) / args.policies, 0.05]))
        for i in range(args.policies)
    ]
    kept: dict[str, Any] = {}
    tasks: dict[str, Callable[[], Any]] = {
        "one": lambda: run(policy, scores, enrol, test),
        "grid": lambda: run_grid(widened, scores, enrol, test, reference >= 0.1, reference >= 0.1),
        "numpy": lambda: peer(policy, scores),
    }
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    memory = 0.0
    for round_ in range(args.repeats + 1):
        for name, task in tasks.items():
            start = time.perf_counter()
            kept[name] = task()
            seconds[name].append(time.perf_counter() - start)
            if name == "grid" and not round_:
                memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    bits, accept = kept["numpy"]
    figures = {
        "trials": int(args.trials),
        "policies": args.policies,
        "first_call_seconds": {name: times[0] for name, times in seconds.items()},
        "seconds": {name: statistics.median(times[1:]) for name, times in seconds.items()},
        "memory_mb": memory,
        "trials_decided_unlike_numpy": int(np.sum((bits != kept["one"].bits) | (accept != kept["one"].accept))),
    }
    print(f"{figures['trials']:,} trials at 2, 3, 4 bits          first call   afterwards")
    for name, label in (("one", "one policy"), ("grid", f"{args.policies} at once"), ("numpy", "numpy, no costs")):
        print(f"{label:36}{figures['first_call_seconds'][name]:10.3f} s{figures['seconds'][name]:10.3f} s")
    print(f"peak memory {memory:.0f} MB; decided unlike numpy in double precision: ", end="")
    print(f"{figures['trials_decided_unlike_numpy']} trials")
    return figures


def splits(args: argparse.Namespace) -> dict[str, Any]:
    """Calibrates on half of the speakers and evaluates on the other half, for many random halvings."""
    if not args.reference:
        raise UserError("--stage needs --reference")
    levels = parse_levels(args.stage)
    joined = score_levels(levels, args.reference, args.trials)
    sides = joined.sides
    assert joined.reference is not None
    data = fitting.Calibration(
        tuple(bits for bits, _ in levels),
        joined.scores,
        joined.reference,
        joined.trials.label,
        sides.enrol_speaker,
        sides.test_speaker,
        levels[-1][1] == args.reference,
    )
    options = CalibrationOptions(alpha=args.alpha, delta=args.delta, bound=args.bound, objective=args.objective)
    rows = []
    for seed in progress(range(args.splits), desc="splits", unit="split"):
        known, new = fitting.split_speakers(data, 0.5, seed)
        if args.rule == "risk":
            policy, notes = fitting.control_risk(known, dataclasses.replace(options, seed=seed))
        else:
            policy, _, notes = fitting.pareto(known, fitting.fit(known), options)
        mapped = fitting.map_scores(policy, new.scores)
        level = fitting.levels_of(policy, mapped)
        score = mapped[level, np.arange(len(new))]
        sequential, incremental = (price[level].mean() for price in prices(policy.bits))
        flips = fitting.gates.harmful_flips(mapped, policy.threshold, new.reference, new.labels)
        lost = fitting.flips_of(policy, mapped, flips, last_counts=False)
        eer, reference = equal_error(score, new.labels), equal_error(new.reference, new.labels)
        rates = flip_rates(score, policy.threshold, new.reference, new.labels)
        assert eer is not None and reference is not None
        rows.append(
            {
                "eer": eer,
                "reference_eer": reference,
                "eer_ratio": eer / reference,
                "last_level_eer": equal_error(mapped[-1], new.labels),
                **{name: 100 * value for name, value in rates.items()},
                "last_level_flip_rate": 100 * float(flips[-1].mean()),
                "early_flip_rate": 100 * float(lost.mean()),
                "early_risk": 100 * float(pair_up(new.enrol_speaker, new.test_speaker, new.labels).losses(lost).mean()),
                "first_level_share": 100 * float((level == 0).mean()),
                "sequential_bits": float(sequential),
                "incremental_bits": float(incremental),
                "gates_found": float(notes.get("kept", 1) > 0),
            }
        )
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    spread = {name: [float(q) for q in np.quantile([row[name] for row in rows], (0.05, 0.95))] for name in rows[0]}
    broken = float(np.mean([row["early_risk"] > 100 * args.alpha for row in rows]))
    broken_trials = float(np.mean([row["early_flip_rate"] > 100 * args.alpha for row in rows]))
    print(f"{args.splits} halvings of the speakers, rule {args.rule}, alpha {args.alpha:g}: mean [5 %, 95 %]")
    for name, value in means.items():
        print(f"{name:24}{value:10.4f}   [{spread[name][0]:.4f}, {spread[name][1]:.4f}]")
    print(f"flips by stopping early exceed alpha in {100 * broken:.1f} % of halvings", end="")
    print(f" ({100 * broken_trials:.1f} % where every trial counts alike)")
    return {"means": means, "quantiles": spread, "exceed_alpha": broken, "exceed_alpha_by_trial": broken_trials}


def main(args: argparse.Namespace) -> None:
    """Prints the comparison."""
    figures = splits(args) if args.stage else speed(args)
    if args.json:
        write_json(args.json, figures)
