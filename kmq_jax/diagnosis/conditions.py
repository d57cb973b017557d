"""Whether a network at few bits suffers more where speech is short or bad: errors and flips, condition by condition.

Both sides of every trial are made worse in the same way. Flips are counted at full precision's EER threshold under the
same condition, so that what is measured is quantization and not the condition. Growth is the loss under a condition
less the loss on whole recordings. Every interval is paired: one draw of speakers for all networks and conditions.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json, Row
from kmq_jax.data import source
from kmq_jax.data.trials import open_trials
from kmq_jax.diagnosis import degrade, scores
from kmq_jax.diagnosis.networks import Networks
from kmq_jax.diagnosis.options import ConditionOptions, DiagnosisOptions
from kmq_jax.diagnosis.resample import SpeakerDraws
from kmq_jax.diagnosis.run import load_at, used_only
from kmq_jax.metrics.bootstrap import enough, percentile_interval
from kmq_jax.metrics.detection import Array, eer, min_dcf
from kmq_jax.models.speaker_model import fingerprint, load_model

LOSSES = ("eer", "min_dcf", "harmful_flip_rate", "mean_abs_drift")
"""What a network at few bits loses against full precision, by name; the EER and the flips in percent."""


@dataclass(frozen=True, eq=False)
class Losses:
    """What a network loses against full precision under one condition.

    Attributes:
        values: by name of `LOSSES`.
        draws: `[replicates]` by name; empty where there are none.
    """

    values: dict[str, float]
    draws: dict[str, Array]


def compare_conditions(
    reference: str | Path, quantized: Mapping[int, str | Path], data: str, trials: str, options: ConditionOptions
) -> Json:
    """Repeats a comparison of networks under each condition.

    Args:
        reference: the full-precision MODEL.
        quantized: by bits, the quantized MODELs; the same network.
        data: DATA that the trials compare.
        trials: a trial list; empty draws pairs at random.
        options: which conditions, and how.

    Returns:
        `notes` (`trials`, `targets`, `speakers`, `utterances`, `data`, `trial_list`, `replicates`, `models`), and
        `rows`, one a condition and network (bits 32: full precision), with `condition`, `title`, `seconds` (mean
        length), `bits`, `eer` in percent, `min_dcf`, `threshold`; of quantized ones also `NAME_loss` for each of
        `LOSSES` and, but for whole recordings, `NAME_growth`, each with `_ci95`.

    Raises:
        UserError: a model, the trials, a recording or a condition is at fault.
    """
    wanted = [degrade.parse_condition(text) for text in options.conditions]
    if options.noise is None:
        left_out = [str(one) for one in wanted if one.kind == "noise"]
        wanted = [one for one in wanted if one.kind != "noise"]
        if left_out:
            print(f"left out for want of clips of noise (--noise): {', '.join(left_out)}", file=sys.stderr)
    clips = source.open_source(options.noise) if options.noise else None
    table = source.open_source(data)
    utterances, listed = used_only(table, open_trials(trials, table))
    base, models = load_model(reference), {bits: load_at(place, bits) for bits, place in quantized.items()}
    how = DiagnosisOptions(compute=options.compute)
    rows: list[Json] = []
    whole: dict[int, Losses] = {}
    for condition in [degrade.Condition("whole"), *(one for one in wanted if one.kind != "whole")]:
        worse = degrade.degrade(utterances, condition, clips, options.seed)
        try:
            scored = Networks(base, models, worse, how).score(listed)
        except UserError as error:
            raise UserError(f"{condition}: {error}") from error
        about = {"condition": str(condition), "title": condition.title, "seconds": degrade.speech_seconds(worse)}
        rows += condition_rows(scored, about, whole, options.replicates, options.seed)
    label, speakers = listed.label, np.union1d(scored.enrol_speaker, scored.test_speaker)
    notes: Json = {"trials": len(label), "targets": int(label.sum()), "speakers": len(speakers)}
    notes |= {"utterances": len(utterances), "data": data, "trial_list": trials or "pairs drawn at random"}
    notes |= {"noise": options.noise, "replicates": options.replicates, "compute": options.compute}
    notes["models"] = {str(bits): fingerprint(model) for bits, model in [(32, base), *models.items()]}
    return {"notes": notes, "rows": rows}


def condition_rows(
    scored: scores.ScoredTrials, about: Row, whole: dict[int, Losses], replicates: int, seed: int
) -> list[Json]:
    """The rows of one condition.

    Args:
        scored: its trials.
        about: what every row begins with.
        whole: losses on whole recordings, by bits; filled where it is empty.
        replicates: draws of speakers.
        seed: of the draws.

    Returns:
        A row of full precision, then one for each quantized network, as `compare_conditions` describes them.
    """
    first = not whole
    threshold = eer(scored.reference, scored.labels)[1]
    found = losses_of(scored, threshold, replicates, seed)
    rows: list[Json] = []
    for bits, row in zip((32, *scored.bits), (scored.reference, *scored.full)):
        rate, own = eer(row, scored.labels)
        line: Json = {**about, "bits": bits, "eer": 100 * rate, "min_dcf": min_dcf(row, scored.labels)}
        line["threshold"] = own
        if bits in found:  # full precision loses nothing against itself
            if first:
                whole[bits] = found[bits]
            for name in LOSSES:
                here, there = found[bits], whole[bits]
                line[f"{name}_loss"] = here.values[name]
                line[f"{name}_loss_ci95"] = _interval(here.draws, name)
                if not first:
                    line[f"{name}_growth"] = here.values[name] - there.values[name]
                    grown = {key: here.draws[key] - there.draws[key] for key in here.draws}
                    line[f"{name}_growth_ci95"] = _interval(grown, name)
        rows.append(line)
    return rows


def _interval(draws: Mapping[str, Array], name: str) -> list[float] | None:
    """The central 95 % of a loss; None where there are no draws, or more than one in ten is not finite."""
    if name not in draws:
        return None
    usable = draws[name][np.isfinite(draws[name])]
    return list(percentile_interval(usable)) if enough(len(usable), len(draws[name])) else None


def losses_of(scored: scores.ScoredTrials, threshold: float, replicates: int, seed: int) -> dict[int, Losses]:
    """What each quantized network loses, by its bits, with paired draws.

    Flips are counted at full precision's `threshold`, which stays the same in every draw.
    """
    flips = scores.find_flips(scored, "reference EER", threshold)
    systems: Sequence[Array] = (scored.reference, *scored.full)
    values = [(100 * eer(row, scored.labels)[0], min_dcf(row, scored.labels)) for row in systems]
    speakers = scored.enrol_speaker, scored.test_speaker
    # Draws without a class of trials are left out: the same ones for every network and condition.
    boots = scores.system_draws(scored, replicates, seed)
    draws = SpeakerDraws(*speakers, replicates, seed) if replicates else None
    weights = draws.sums(np.ones(len(scored.labels))) if draws else None
    result = {}
    for m, bits in enumerate(scored.bits):
        drift = np.abs(scored.full[m] - scored.reference)
        own = {
            "eer": values[m + 1][0] - values[0][0],
            "min_dcf": values[m + 1][1] - values[0][1],
            "harmful_flip_rate": 100 * float(flips.harmful[m].mean()),
            "mean_abs_drift": float(drift.mean()),
        }
        drawn: dict[str, Array] = {}
        if draws is not None and weights is not None:
            share = np.where(weights > 0, weights, np.nan)  # a draw without any trial has no mean
            drawn["harmful_flip_rate"] = 100 * draws.sums(flips.harmful[m].astype(float)) / share
            drawn["mean_abs_drift"] = draws.sums(drift) / share
            if boots:
                drawn["eer"] = 100 * (boots[m + 1].eer - boots[0].eer)
                drawn["min_dcf"] = boots[m + 1].min_dcf - boots[0].min_dcf
        result[bits] = Losses(own, drawn)
    return result


def describe(found: Json) -> str:
    """The rows as a short table for a terminal."""
    notes = found["notes"]
    lines = [
        f"{notes['trials']:,} trials, {notes['targets']:,} of them targets, {notes['speakers']:,} speakers, "
        f"{notes['utterances']:,} utterances; growth: the loss here less that on whole recordings",
        f"{'condition':16} {'bits':>4} {'EER %':>7} {'loss':>7}  {'grows by':26} {'flips %':>8}  grow by",
    ]
    for row in found["rows"]:
        line = f"{row['title']:16} {row['bits']:4} {row['eer']:7.2f}"
        if "eer_loss" in row:
            line += f" {row['eer_loss']:+7.2f}  {_with_interval(row, 'eer_growth'):26}"
            line += f" {row['harmful_flip_rate_loss']:8.3f}  {_with_interval(row, 'harmful_flip_rate_growth')}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _with_interval(row: Row, name: str) -> str:
    if name not in row:
        return ""
    interval = row[f"{name}_ci95"]
    return f"{row[name]:+.2f}" + (f" [{interval[0]:+.2f}, {interval[1]:+.2f}]" if interval else "")
