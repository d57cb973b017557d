"""Calibrates a cascade: makes its policy from its levels' embedding files and the trials of a development set."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kmq_jax.cascade import gates
from kmq_jax.cascade.costs import describe_costs
from kmq_jax.cascade.evaluate import each_alone, equal_error, flip_rates
from kmq_jax.cascade.fit import Calibration, control_risk, fit, front_of, pareto, split_speakers
from kmq_jax.cascade.options import CalibrationOptions
from kmq_jax.cascade.policy import CascadePolicy
from kmq_jax.cascade.run import run, run_grid
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json, Row, file_hash
from kmq_jax.core.options import shown
from kmq_jax.metrics.calibration import IsotonicMap
from kmq_jax.metrics.operating import OperatingPoint, error_rates, parse_point, threshold_interval
from kmq_jax.scoring.levels import LevelScores, score_levels


def calibrate(
    levels: Sequence[tuple[int, str]],
    reference: str,
    trials: str,
    options: CalibrationOptions | None = None,
    enrol_models: str | None = None,
) -> CascadePolicy:
    """Fits a cascade's maps, threshold and gates on a trial list.

    Args:
        levels: bits and embedding file of each level, ascending in bits. The last may be the reference itself.
        reference: embedding file of the full-precision model.
        trials: trial list of the development set, or `synthetic:SPLIT`.
        options: how maps, threshold and gates are found; the defaults where left out.
        enrol_models: list of enrolment models, where the trials enrol models.

    Returns:
        The policy. Its notes record how it was made, for people and for `figures.draw_front`.

    Raises:
        UserError: a file cannot be read or does not fit the others, or the trials are too few for the rule.
    """
    how = options or CalibrationOptions()
    if how.seconds and len(how.seconds) != len(levels):
        raise UserError(f"`seconds` (={shown(how.seconds)}) must be one number for each of {len(levels)} levels")
    point = _point(how.operating_point)
    joined = score_levels(levels, reference, trials, how.enrolment, enrol_models)
    assert joined.reference is not None  # a reference was asked for
    prints = {path: file_hash(path) for path in {reference, *(path for _, path in levels)}}
    data = Calibration(
        tuple(bits for bits, _ in levels),
        joined.scores,
        joined.reference,
        joined.trials.label,
        joined.sides.enrol_speaker,
        joined.sides.test_speaker,
        # By content, not by name: the last level may be a copy of the reference, and then needs no map.
        reference_level=prints[levels[-1][1]] == prints[reference],
        enrol=joined.sides.enrol,
        test=joined.sides.test,
        one_table=joined.one_table,
    )
    try:
        policy, front, notes = _fitted(data, how, point)
    except UserError as error:
        raise UserError(f"{trials}: {error}") from error
    # Before the figures are made: the cost of an utterance depends on how the enrolled side is embedded.
    policy = dataclasses.replace(policy, enrolment=how.enrolment, seconds=how.seconds or None)
    notes |= {
        "operating_point": str(point),
        "threshold_ci95": _interval(data, point, how),
        "reference": _reference_notes(data, policy) | {"sha256": prints[reference]},
        "levels": {str(bits): {"file": Path(path).name, "sha256": prints[path]} for bits, path in levels},
        "map": how.map,
        "trials": _trial_notes(joined) | {"file": Path(trials).name},
        "here": _report(policy, joined),
        "each_level_alone": each_alone(policy, joined),
        "front": describe_front(front, policy, joined),
    }
    return dataclasses.replace(
        policy,
        models=tuple(table.model for table in joined.tables),
        dims=tuple(table.embeddings.shape[1] for table in joined.tables),
        vad=joined.tables[-1].vad,
        notes=notes,
    )


def _point(text: str) -> OperatingPoint:
    try:
        return parse_point(text)
    except UserError as error:
        raise UserError(f"`operating_point`: {error}") from error


def _fitted(
    data: Calibration, options: CalibrationOptions, point: OperatingPoint
) -> tuple[CascadePolicy, gates.Front, Json]:
    """The policy by the rule that is asked for, the front of gates, and notes on what was chosen."""
    if options.rule == "risk":
        policy, notes = control_risk(data, options)
        return policy, front_of(policy, data, options, "flips"), notes
    return pareto(data, fit(data, options.map, point), options)


def _interval(data: Calibration, point: OperatingPoint, options: CalibrationOptions) -> tuple[float, float] | None:
    """The threshold's 95 % interval over draws of speakers; None without draws, or where a class has no trials."""
    if options.rule == "risk":  # by which the speakers of one group alone make the threshold
        data, _ = split_speakers(data, options.certify_share, options.seed)
    if not options.replicates or data.labels.all() or not data.labels.any():
        return None
    speakers = data.enrol_speaker, data.test_speaker
    return threshold_interval(data.reference, data.labels, *speakers, point, options.replicates, options.seed)


def _reference_notes(data: Calibration, policy: CascadePolicy) -> Json:
    """The reference's own error rates at the policy's threshold, as fractions, and its EER in percent."""
    far, frr = error_rates(data.reference, data.labels, policy.threshold)
    return {"far": far, "frr": frr, "eer": equal_error(data.reference, data.labels)}


def _trial_notes(joined: LevelScores) -> Json:
    labels, sides = joined.trials.label, joined.sides
    return {
        "trials": len(labels),
        "targets": int(labels.sum()),
        "speakers": len(np.union1d(sides.enrol_speaker, sides.test_speaker)),
        "speakers_source": sides.speakers_source,
    }


def _report(policy: CascadePolicy, joined: LevelScores) -> Json:
    """The figures of the policy on the calibration trials themselves."""
    labels, sides = joined.trials.label, joined.sides
    outcome = run(policy, joined.scores, sides.enrol, sides.test, joined.one_table)
    flips = flip_rates(outcome.score, policy.threshold, joined.reference, labels)
    return {"eer": equal_error(outcome.score, labels), **flips, **outcome.costs()}


def describe_front(front: gates.Front, policy: CascadePolicy, joined: LevelScores) -> list[Json]:
    """Runs the cascade at every point of a front, for figures and tables.

    Args:
        front: the points.
        policy: the cascade; its own gates do not count.
        joined: the trials and every level's scores of them, with the reference's.

    Returns:
        A row for each point: `gates` (an infinite side is None), `eer` (exact, in percent), `harmful_flip_rate`,
        `resolved` and the costs.
    """
    assert joined.reference is not None
    # The search adds up sums in float64; the figures that people see come from the cascade itself.
    policies = [dataclasses.replace(policy, gates=front.point(i)) for i in range(len(front))]
    labels, sides = joined.trials.label, joined.sides
    accepted = joined.reference >= policy.threshold
    figures = run_grid(policies, joined.scores, sides.enrol, sides.test, accepted, labels, joined.one_table)
    rows = []
    for i, one in enumerate(policies):
        outcome = run(one, joined.scores, sides.enrol, sides.test, joined.one_table)
        row: Json = {"gates": [[_finite(side) for side in gate] for gate in one.gates]}
        row["eer"] = equal_error(outcome.score, labels)
        row |= {name: float(values[i]) for name, values in figures.items() if name != "resolved"}
        row["resolved"] = {str(bits): float(share) for bits, share in zip(one.bits, figures["resolved"][i])}
        rows.append(row)
    return rows


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def describe(policy: CascadePolicy) -> str:
    """A calibrated policy and its figures as a few lines."""
    notes, here = policy.notes, policy.notes["here"]
    interval = notes["threshold_ci95"]
    span = f"   [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
    lines = [f"threshold {policy.threshold:.4f}{span}   ({notes['operating_point']} of the reference)"]
    for i, (bits, fitted) in enumerate(zip(policy.bits, policy.maps)):
        gate = f"climbs between {policy.gates[i][0]:.4f} and {policy.gates[i][1]:.4f}" if i < len(policy.gates) else ""
        knots = f"{len(fitted.x)} knots" if isinstance(fitted, IsotonicMap) else "line"  # type: ignore[arg-type]
        lines.append(f"{bits:2} bits: decides {100 * here['resolved'][str(bits)]:5.1f} %   {knots:11} {gate}")
    rate = "" if here["eer"] is None else f"EER {here['eer']:.3f} % (reference {notes['reference']['eer']:.3f} %), "
    lines.append(f"{rate}harmful flips {100 * here['harmful_flip_rate']:.4f} %, on the calibration trials themselves")
    lines += describe_costs(here, policy.bits[-1], bool(notes.get("nested")), policy.seconds)
    if notes["rule"] == "risk":
        lines.append(_promise(notes))
    return "\n".join(lines)


def _promise(notes: Row) -> str:
    """What the rule `risk` promises, as lines."""
    ends = f"with confidence {1 - notes['delta']:g}" if notes["delta"] else "in expectation"
    kind = "approximate" if notes["approximate"] else "proven"
    needed, every, kept = notes["speakers_needed"], notes["with_last_level"], notes["kept_by"]
    lines = [
        f"promise ({kind}): harmful flips made by stopping early at most {100 * notes['alpha']:g} % on new speakers, "
        f"{ends} ({notes['bound']} bound, {notes['certifying_speakers']} speakers kept apart)",
        f"proven for these gates: at most {100 * notes['proven_upper_bound']:.3g} % (hoeffding-bentkus, over all "
        f"{notes['tested']} gates tried); hoeffding-bentkus would keep {kept['hoeffding-bentkus']} of them, conformal "
        f"{kept['conformal']}",
        f"a proof of {100 * notes['alpha']:g} % needs {needed['hoeffding-bentkus']:,} speakers kept apart without a "
        f"flip (hoeffding-bentkus), or {needed['conformal']:,} (conformal, in expectation)",
        f"the last level's own harmful flips are not in the promise: with them {100 * every['rate']:.4f} % were seen, "
        f"at most {100 * every['proven_upper_bound']:.3g} % is proven",
    ]
    if notes["approximate"]:
        lines.insert(1, "approximate: the promise is broken more often where few speakers are unlike the others")
    return "\n".join(lines)


def warning(policy: CascadePolicy) -> str | None:
    """A warning where no gates keep the promise of the rule `risk`; None otherwise."""
    notes = policy.notes
    if notes["rule"] != "risk" or notes["kept"]:
        return None
    return (
        f"warning: no gates keep the promise with alpha {notes['alpha']:g} by the {notes['bound']} bound on "
        f"{notes['certifying_speakers']} speakers: every trial climbs to {policy.bits[-1]} bits"
    )
