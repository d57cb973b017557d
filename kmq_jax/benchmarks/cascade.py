"""A cascade: seconds and memory on a long trial list, or how it does over random splits of speakers."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from kmq_jax.benchmarks.options import CascadeBench
from kmq_jax.benchmarks.timing import Figures, in_turns, medians
from kmq_jax.cascade import fit as fitting
from kmq_jax.cascade.evaluate import equal_error, flip_rates
from kmq_jax.cascade.options import CalibrationOptions
from kmq_jax.cascade.policy import CascadePolicy, fit_map, symmetric_gates
from kmq_jax.cascade.risk import pair_up
from kmq_jax.cascade.run import Outcome, prices, run, run_grid
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import write_json
from kmq_jax.core.memory import peak_memory_mb
from kmq_jax.core.progress import progress
from kmq_jax.scoring.levels import parse_levels, score_levels

_KNOT_TRIALS = 200_000  # random trials that maps are fitted on


def make(trials: int, utterances: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, CascadePolicy]:
    """Random scores at 2, 3, 4 bits `[3, trials]`, reference scores, utterances of both sides, and a policy."""
    rng = np.random.default_rng(0)
    reference = 0.25 * rng.standard_normal(trials, np.float32)
    noise = np.array([[0.08], [0.05], [0.03]], np.float32)  # fewer bits, more noise
    scores = np.tanh(reference + noise * rng.standard_normal((3, trials), np.float32))
    enrol, test = rng.integers(utterances, size=(2, trials), dtype=np.int32)
    some = slice(_KNOT_TRIALS)
    maps = tuple(fit_map("isotonic", row[some], reference[some], reference[some] > 0) for row in scores)
    return scores, reference, enrol, test, CascadePolicy((2, 3, 4), maps, symmetric_gates(0.1, [0.1, 0.06]), 0.1)


def peer(policy: CascadePolicy, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cascade the plain way in numpy: deciding bits and decision of each trial."""
    mapped = [fitted(row) for fitted, row in zip(policy.maps, scores)]
    bits, score = np.full(scores.shape[1], policy.bits[-1]), mapped[-1]
    # From the last gate back: the lowest level that stops a trial overwrites those above it.
    for i in reversed(range(len(policy.gates))):
        low, high = policy.gates[i]
        stops = (mapped[i] <= low) | (mapped[i] >= high)
        bits, score = np.where(stops, policy.bits[i], bits), np.where(stops, mapped[i], score)
    return bits, score >= policy.threshold


def speed(options: CascadeBench) -> Figures:
    """Seconds of one policy and of a grid, beside numpy."""
    trials = int(options.trials)
    scores, reference, enrol, test, policy = make(trials, options.utterances)
    widened = [
        dataclasses.replace(policy, gates=symmetric_gates(0.1, [0.3 * (i + 1) / options.policies, 0.05]))
        for i in range(options.policies)
    ]
    tasks: dict[str, Callable[[], object]] = {
        "one": lambda: run(policy, scores, enrol, test),
        "grid": lambda: run_grid(widened, scores, enrol, test, reference >= 0.1, reference >= 0.1),
        "numpy": lambda: peer(policy, scores),
    }
    memory: list[float] = []  # the peak after each task; it never falls
    first = in_turns(tasks, 1, warm_up=0, between=lambda name: memory.append(peak_memory_mb()))
    seconds = in_turns(tasks, options.repeats, warm_up=0)
    figures: Figures = {
        "trials": trials,
        "policies": options.policies,
        "first_call_seconds": {name: times[0] for name, times in first.items()},
        "seconds": medians(seconds),
        "memory_mb": memory[1],  # before the first turn of numpy
        "trials_decided_unlike_numpy": unlike(run(policy, scores, enrol, test), *peer(policy, scores)),
    }
    print(f"{trials:,} trials at 2, 3, 4 bits          first call   afterwards")
    for name, label in (("one", "one policy"), ("grid", f"{options.policies} at once"), ("numpy", "numpy, no costs")):
        print(f"{label:36}{figures['first_call_seconds'][name]:10.3f} s{figures['seconds'][name]:10.3f} s")
    print(f"peak memory {memory[1]:.0f} MB; decided unlike numpy in double precision: ", end="")
    print(f"{figures['trials_decided_unlike_numpy']} trials")
    return figures


def unlike(ours: Outcome, bits: np.ndarray, accept: np.ndarray) -> int:
    """How many trials two cascades decide at other bits, or otherwise."""
    return int(np.sum((bits != ours.bits) | (accept != ours.accept)))


def calibration_data(options: CascadeBench) -> fitting.Calibration:
    """Scores of the list at every level and at the reference, with their speakers."""
    assert options.reference
    levels = parse_levels(options.levels)
    joined = score_levels(levels, options.reference, options.trials)
    assert joined.reference is not None
    return fitting.Calibration(
        tuple(bits for bits, _ in levels),
        joined.scores,
        joined.reference,
        joined.trials.label,
        joined.sides.enrol_speaker,
        joined.sides.test_speaker,
        levels[-1][1] == options.reference,
    )


def on_new_speakers(policy: CascadePolicy, new: fitting.Calibration, found: float) -> dict[str, float | None]:
    """Errors, flips and costs of a policy on speakers it was not made on; rates in percent.

    `eer_ratio` is None where the reference makes no errors.
    """
    mapped = fitting.map_scores(policy, new.scores)
    level = fitting.levels_of(policy, mapped)
    score = mapped[level, np.arange(len(new))]  # at the level that decides
    sequential, incremental = (price[level].mean() for price in prices(policy.bits))
    flips = fitting.gates.harmful_flips(mapped, policy.threshold, new.reference, new.labels)
    lost = fitting.flips_of(policy, mapped, flips, last_counts=False)
    eer, reference = equal_error(score, new.labels), equal_error(new.reference, new.labels)
    last = equal_error(mapped[-1], new.labels)
    assert eer is not None and reference is not None and last is not None
    rates = flip_rates(score, policy.threshold, new.reference, new.labels)
    return {
        "eer": eer,
        "reference_eer": reference,
        "eer_ratio": eer / reference if reference else None,
        "last_level_eer": last,
        **{name: 100 * value for name, value in rates.items()},
        "last_level_flip_rate": 100 * float(flips[-1].mean()),
        "early_flip_rate": 100 * float(lost.mean()),
        "early_risk": 100 * float(pair_up(new.enrol_speaker, new.test_speaker, new.labels).losses(lost).mean()),
        "first_level_share": 100 * float((level == 0).mean()),
        "sequential_bits": float(sequential),
        "incremental_bits": float(incremental),
        "gates_found": found,
    }


def splits(options: CascadeBench) -> Figures:
    """Calibrates on half of the speakers and evaluates on the other half, for many random halvings."""
    data, alpha = calibration_data(options), options.alpha
    how = CalibrationOptions(alpha=alpha, delta=options.delta, bound=options.bound, objective=options.objective)
    rows = []
    for seed in progress(range(options.splits), desc="splits", unit="split"):
        known, new = fitting.split_speakers(data, 0.5, seed)
        if any(len(set(half.labels.tolist())) < 2 for half in (known, new)):
            raise UserError(f"`trials` (={options.trials}): half of the speakers have no target or no nontarget trials")
        if options.rule == "risk":
            policy, notes = fitting.control_risk(known, dataclasses.replace(how, seed=seed))
        else:
            policy, _, notes = fitting.pareto(known, fitting.fit(known), how)
        # `kept` counts the gates that passed the test of risk; `pareto` tests none.
        rows.append(on_new_speakers(policy, new, float(notes.get("kept", 1) > 0)))
    means, spread = summary(rows)
    broken, broken_trials = (
        float(np.mean([(row[name] or 0) > 100 * alpha for row in rows])) for name in ("early_risk", "early_flip_rate")
    )
    print(f"{options.splits} halvings of the speakers, rule {options.rule}, alpha {alpha:g}: mean [5 %, 95 %]")
    for name, value in means.items():
        print(f"{name:24}{value:10.4f}   [{spread[name][0]:.4f}, {spread[name][1]:.4f}]")
    print(f"flips by stopping early exceed alpha in {100 * broken:.1f} % of halvings", end="")
    print(f" ({100 * broken_trials:.1f} % where every trial counts alike)")
    return {"means": means, "quantiles": spread, "exceed_alpha": broken, "exceed_alpha_by_trial": broken_trials}


def summary(rows: Sequence[dict[str, float | None]]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Of each figure the mean over rows that have it, and its 5 % and 95 % quantiles; what no row has is left out.

    >>> summary([{"a": 1.0, "b": None}, {"a": 1.0, "b": None}])
    ({'a': 1.0}, {'a': [1.0, 1.0]})
    """
    known = {name: [value for row in rows if (value := row[name]) is not None] for name in rows[0]}
    columns = {name: values for name, values in known.items() if values}
    means = {name: float(np.mean(values)) for name, values in columns.items()}
    return means, {name: np.quantile(values, (0.05, 0.95)).tolist() for name, values in columns.items()}


def main(options: CascadeBench) -> None:
    """Prints the comparison."""
    figures = splits(options) if options.levels else speed(options)
    if options.json:
        write_json(options.json, figures)
