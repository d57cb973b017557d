"""A diagnosis: tables of rows about a reference and its quantized versions; and what scores alone tell."""

from dataclasses import dataclass, field

import numpy as np

from kmq_jax.core.files import Json
from kmq_jax.diagnosis import people, scores
from kmq_jax.diagnosis.options import DiagnosisOptions
from kmq_jax.diagnosis.resample import SpeakerDraws

GROUP_DRAWS = 4
"""Of the draws of speakers, one in so many serves the intervals of groups, which are many."""


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What was found.

    Attributes:
        trials: the scores.
        flips: at each threshold; the first is the reference's EER threshold.
        tables: rows by table: systems, drift, flips, speakers, utterances, groups, drift_causes, worst_trials, and,
            where there were networks, retention, layers, blocks, correlations.
        notes: what was done, and single findings such as knees.
    """

    trials: scores.ScoredTrials
    flips: list[scores.Flips]
    tables: dict[str, list[Json]]
    notes: Json = field(default_factory=dict)


def diagnose_scores(trials: scores.ScoredTrials, recordings: people.Recordings, options: DiagnosisOptions) -> Diagnosis:
    """Everything that scores alone tell.

    Args:
        trials: the scores of the reference and of its quantized versions.
        recordings: what the trials compare.
        options: how much is computed; those of networks do not count here.

    Returns:
        The tables of scores, without those of networks.
    """
    replicates, seed = options.replicates, options.seed
    draws = few = None
    if replicates:
        draws = SpeakerDraws(trials.enrol_speaker, trials.test_speaker, replicates, seed)
        few = SpeakerDraws(trials.enrol_speaker, trials.test_speaker, max(replicates // GROUP_DRAWS, 1), seed)
    flips = scores.all_flips(trials, options.thresholds)
    found = scores.system_draws(trials, replicates, seed)
    systems = scores.system_rows(trials, found)
    drift = scores.drift_rows(trials, draws)
    flip_rows = [
        row for f in flips for row in scores.flip_rows(trials, f, draws, options.margin_bins, options.margin_edges)
    ]
    utterances = people.utterance_rows(trials, flips[0], recordings)
    tables = {
        "systems": systems,
        "drift": drift,
        "flips": flip_rows,
        "speakers": people.speaker_rows(trials, flips[0], recordings),
        "utterances": utterances,
        "groups": people.group_rows(trials, flips[0], recordings, few),
        "drift_causes": people.drift_causes(utterances),
        "worst_trials": people.worst_trials(trials, flips[0], recordings, options.worst),
    }
    notes = {
        "bits": list(trials.bits),
        "trials": len(trials.labels),
        "targets": int(trials.labels.sum()),
        "speakers": len(np.union1d(trials.enrol_speaker, trials.test_speaker)),
        "utterances": len({row["utterance"] for row in utterances}),
        "threshold": flips[0].threshold,
        "knees": scores.knees(trials, flips[0], found, draws),
        "snr_rule": people.SNR_RULE,
        "replicates": replicates,
    }
    return Diagnosis(trials, flips, tables, notes)
