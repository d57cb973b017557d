"""Flips and drift by speaker, by utterance and by group of recordings, and the worst trials."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kmq_jax.core.files import Json, Row
from kmq_jax.diagnosis.correlation import spearman
from kmq_jax.diagnosis.resample import SpeakerDraws, in_threads, interval_of_ratio
from kmq_jax.diagnosis.scores import Flips, ScoredTrials
from kmq_jax.metrics.detection import Array

SNR_RULE = (
    "level of the loudest tenth of 25 ms frames over that of the quietest tenth, 10 lg of the ratio of the 90th to "
    "the 10th percentile of frame power: a measure of how far speech stands above the background, not a true SNR"
)
ADULT = 18
_FRAME, _HOP = 400, 160


def snr_db(wave: Array) -> float:
    """Estimates how far speech stands above the background, in dB (`SNR_RULE`).

    Args:
        wave: `[samples]` at 16 kHz.

    Returns:
        0 for steady noise, up to 120 dB for digital silence between words; NaN for less than two frames.

    >>> rng = np.random.default_rng(0)
    >>> steady = rng.standard_normal(16000)
    >>> round(snr_db(np.concatenate([0.01 * steady, steady])))
    40
    """
    samples = np.asarray(wave, np.float64)
    if len(samples) < _FRAME + _HOP:
        return float("nan")
    # The power of overlapping frames, from one running sum.
    squares = np.concatenate([[0.0], np.cumsum(np.square(samples - samples.mean()))])
    starts = np.arange(0, len(samples) - _FRAME + 1, _HOP)
    power = (squares[starts + _FRAME] - squares[starts]) / _FRAME
    low, high = np.quantile(power, [0.1, 0.9])  # background, and speech
    # The running sum is good to about 120 dB; what lies deeper is rounding.
    return float(10 * np.log10(max(high, 1e-12) / max(low, 1e-12, 1e-12 * high)))


@dataclass(frozen=True, eq=False)
class Recordings:
    """What is known of the utterances that trials compare.

    Attributes:
        ids: of each utterance.
        places: its file, so that a person can listen.
        speakers: its speaker's name.
        enrol: `[trials]`, rows of this table.
        test: `[trials]`, rows of this table.
        seconds: `[utterances]`, NaN where unknown; None where unknown of all.
        snr: `[utterances]` dB, NaN where unknown; None where unknown of all.
        genders: by speaker.
        ages: years by speaker.
    """

    ids: Sequence[str]
    places: Sequence[str]
    speakers: Sequence[str]
    enrol: Array
    test: Array
    seconds: Array | None
    snr: Array | None
    genders: Mapping[str, str]
    ages: Mapping[str, float]


def _by(rows: tuple[Array, Array], values: Array, count: int) -> Array:
    """Sums `values` `[trials]` by the row on either side, to `[count]`; a trial whose sides are one row counts once."""
    one, two = rows
    total = np.bincount(one, values, minlength=count)
    return total + np.bincount(two, np.where(one == two, 0, values), minlength=count)


def speaker_rows(trials: ScoredTrials, flips: Flips, recordings: Recordings) -> list[Json]:
    """Flips and drift in the trials that a speaker takes part in, on either side; most harmful flips first.

    Args:
        trials: the scores.
        flips: at one threshold.
        recordings: what the trials compare.

    Returns:
        `bits, speaker, gender, age, trials, harmful, beneficial, harmful_rate, share_of_harmful` (of the speaker's
        trials among all harmful flips, so that shares sum to more than one), `mean_abs_drift`.
    """
    names = sorted(set(recordings.speakers))
    number = {name: i for i, name in enumerate(names)}
    row_of = np.array([number[name] for name in recordings.speakers])
    sides = row_of[recordings.enrol], row_of[recordings.test]
    count = _by(sides, np.ones(len(trials.labels)), len(names))
    rows = []
    for m, bits in enumerate(trials.bits):
        harmful, beneficial = (_by(sides, x[m], len(names)) for x in (flips.harmful, flips.beneficial))
        drift = _by(sides, np.abs(trials.full[m] - trials.reference), len(names))
        total = int(flips.harmful[m].sum())
        for s in sorted(range(len(names)), key=lambda s: (-harmful[s], names[s])):
            if count[s]:
                rows.append(
                    {
                        "bits": bits,
                        "speaker": names[s],
                        "gender": recordings.genders.get(names[s]),
                        "age": recordings.ages.get(names[s]),
                        "trials": int(count[s]),
                        "harmful": int(harmful[s]),
                        "beneficial": int(beneficial[s]),
                        "harmful_rate": float(harmful[s] / count[s]),
                        "share_of_harmful": float(harmful[s] / total) if total else 0.0,
                        "mean_abs_drift": float(drift[s] / count[s]),
                    }
                )
    return rows


def utterance_rows(trials: ScoredTrials, flips: Flips, recordings: Recordings) -> list[Json]:
    """As `speaker_rows` for utterances: `bits, utterance, speaker, path, seconds, snr_db, trials, harmful, ...`."""
    size = len(recordings.ids)
    sides = recordings.enrol, recordings.test
    count = _by(sides, np.ones(len(trials.labels)), size)
    rows = []
    for m, bits in enumerate(trials.bits):
        harmful, beneficial = (_by(sides, x[m], size) for x in (flips.harmful, flips.beneficial))
        drift = _by(sides, np.abs(trials.full[m] - trials.reference), size)
        order = np.lexsort((-drift / np.maximum(count, 1), -harmful))
        for u in order[count[order] > 0].tolist():
            rows.append(
                {
                    "bits": bits,
                    "utterance": recordings.ids[u],
                    "speaker": recordings.speakers[u],
                    "path": recordings.places[u],
                    "seconds": _known(recordings.seconds, u),
                    "snr_db": _known(recordings.snr, u),
                    "trials": int(count[u]),
                    "harmful": int(harmful[u]),
                    "beneficial": int(beneficial[u]),
                    "mean_abs_drift": float(drift[u] / count[u]),
                }
            )
    return rows


def _known(values: Array | None, i: int) -> float | None:
    return None if values is None or np.isnan(values[i]) else float(values[i])


def groups_of(recordings: Recordings) -> dict[str, dict[str, Array]]:
    """Groups of the utterances that trials compare: by gender, age, and thirds of duration and of SNR.

    Returns:
        Masks `[utterances]` by title and group; groups without utterances, and titles of a single group, are left out.
    """
    groups: dict[str, dict[str, Array]] = {}
    compared = np.zeros(len(recordings.ids), bool)
    compared[recordings.enrol] = compared[recordings.test] = True
    genders = np.array([recordings.genders.get(name, "") for name in recordings.speakers])
    ages = np.array([recordings.ages.get(name, np.nan) for name in recordings.speakers], float)
    groups["gender"] = {name: genders == letter for name, letter in (("female", "f"), ("male", "m"))}
    groups["age"] = {f"under {ADULT}": ages < ADULT, f"{ADULT} and over": ages >= ADULT}
    for title, unit, values in (("duration", "s", recordings.seconds), ("SNR estimate", "dB", recordings.snr)):
        if values is None or np.isnan(values[compared]).all():
            continue
        low, high = np.nanquantile(values[compared], [1 / 3, 2 / 3])
        groups[title] = {
            f"below {low:.1f} {unit}": values < low,
            f"{low:.1f} to {high:.1f} {unit}": (values >= low) & (values < high),
            f"from {high:.1f} {unit}": values >= high,
        }
    groups = {title: {name: mask & compared for name, mask in masks.items()} for title, masks in groups.items()}
    some = {title: {name: mask for name, mask in masks.items() if mask.any()} for title, masks in groups.items()}
    return {title: masks for title, masks in some.items() if len(masks) > 1}


def group_rows(
    trials: ScoredTrials, flips: Flips, recordings: Recordings, draws: SpeakerDraws | None = None
) -> list[Json]:
    """Flips and drift by group of utterances. A trial counts once for each of its two sides that is of the group.

    Args:
        trials: the scores.
        flips: at one threshold.
        recordings: what the trials compare.
        draws: of the trials' speakers, for intervals.

    Returns:
        `bits, by, group, utterances, trial_sides, harmful_rate, harmful_rate_ci95, mean_abs_drift,
        mean_abs_drift_ci95`.
    """
    harmful = [np.flatnonzero(which) for which in flips.harmful]
    size = np.abs(trials.full - trials.reference)

    def of_group(group: tuple[str, str, Array]) -> list[Json]:
        title, name, mask = group
        sides = mask[recordings.enrol].astype(float) + mask[recordings.test]
        # A trial within the group has both of its sides in it, and counts twice.
        total = float(sides.sum())
        if not total:
            return []
        weights = draws.sums(sides) if draws else None
        rows = []
        for m, bits in enumerate(trials.bits):
            row: Json = {"bits": bits, "by": title, "group": name, "utterances": int(mask.sum())}
            flipped, drift = sides[harmful[m]], size[m] * sides
            row |= {"trial_sides": int(total), "harmful_rate": float(flipped.sum()) / total, "harmful_rate_ci95": None}
            row |= {"mean_abs_drift": float(drift.sum()) / total, "mean_abs_drift_ci95": None}
            if draws and weights is not None:
                row["harmful_rate_ci95"] = interval_of_ratio(draws.sums(flipped, harmful[m]), weights)
                row["mean_abs_drift_ci95"] = interval_of_ratio(draws.sums(drift), weights)
            rows.append(row)
        return rows

    groups = [(title, name, mask) for title, masks in groups_of(recordings).items() for name, mask in masks.items()]
    rows = [row for found in in_threads(of_group, groups) for row in found]
    return sorted(rows, key=lambda row: -row["bits"])


def drift_causes(utterances: Sequence[Row]) -> list[Json]:
    """Spearman's correlation of an utterance's mean |drift| with its duration and its SNR, by bits.

    Returns:
        `bits, with` ("seconds" or "snr_db"), `utterances, spearman`; no row where fewer than four are known, or all
        are alike.
    """
    rows = []
    for bits in sorted({row["bits"] for row in utterances}, reverse=True):
        for key in ("seconds", "snr_db"):
            some = [row for row in utterances if row["bits"] == bits and row[key] is not None]
            pairs = [(row[key], row["mean_abs_drift"]) for row in some]
            x, y = np.array(pairs, float).reshape(-1, 2).T
            if len(x) > 3 and np.ptp(x) and np.ptp(y):
                rows.append({"bits": bits, "with": key, "utterances": len(x), "spearman": float(spearman(x, y))})
    return rows


def worst_trials(trials: ScoredTrials, flips: Flips, recordings: Recordings, count: int = 20) -> list[Json]:
    """The trials to listen to: harmful flips by the size of their drift, then other trials by theirs.

    Args:
        trials: the scores.
        flips: at one threshold.
        recordings: what the trials compare.
        count: at each number of bits.

    Returns:
        `bits, flip, label, enrol_path, test_path, enrol, test, reference_score, score, drift, margin`.
    """
    rows = []
    for m, bits in enumerate(trials.bits):
        drift = trials.full[m] - trials.reference
        size = np.abs(drift)
        some = np.flatnonzero(flips.harmful[m])
        best = some[np.argsort(-size[some], kind="stable")[:count]]
        if len(best) < count:
            # Harmful flips are listed already; below zero they come last, and are dropped.
            others = np.where(flips.harmful[m], -1.0, size)
            rest = np.argsort(-others, kind="stable")[: count - len(best)]
            best = np.append(best, rest[others[rest] > 0])
        for t in best.tolist():
            enrol, test = int(recordings.enrol[t]), int(recordings.test[t])
            kind = "harmful" if flips.harmful[m, t] else "beneficial" if flips.beneficial[m, t] else "none"
            rows.append(
                {
                    "bits": bits,
                    "flip": kind,
                    "label": "target" if trials.labels[t] else "nontarget",
                    "enrol": recordings.ids[enrol],
                    "test": recordings.ids[test],
                    "reference_score": float(trials.reference[t]),
                    "score": float(trials.full[m, t]),
                    "drift": float(drift[t]),
                    "margin": float(flips.margin[t]),
                    "enrol_path": recordings.places[enrol],
                    "test_path": recordings.places[test],
                }
            )
    return rows
