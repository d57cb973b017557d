"""Flips by speaker, utterance and group on hand-made trials, and the SNR estimate on made recordings."""

import numpy as np
import pytest

from kmq_jax.diagnosis import people, report, scores
from kmq_jax.diagnosis.resample import SpeakerDraws

# Utterances a1 a2 (speaker a), b1 (speaker b), c1 (speaker c).
ENROL, TEST = np.array([0, 0, 1, 2]), np.array([1, 2, 2, 3])
OWNER = np.array([0, 0, 1, 2])
REFERENCE = np.array([0.9, 0.1, 0.2, 0.3])
LOW = np.array([0.4, 0.2, 0.7, 0.3])
HERE = people.Recordings(
    ids=("a1", "a2", "b1", "c1"),
    places=("a/1.wav", "a/2.wav", "b/1.wav", "c/1.wav"),
    speakers=("a", "a", "b", "c"),
    enrol=ENROL,
    test=TEST,
    seconds=np.array([1.0, 2.0, 3.0, 4.0]),
    snr=np.array([10.0, np.nan, 30.0, 40.0]),
    genders={"a": "f", "b": "m", "c": "m"},
    ages={"a": 9, "b": 40},
)
TRIALS = scores.scored_trials(REFERENCE, {2: LOW}, None, np.array([1, 0, 0, 0]), OWNER[ENROL], OWNER[TEST])
FLIPS = scores.find_flips(TRIALS, "0.5", 0.5)  # harmful: the first (0.9 -> 0.4) and the third (0.2 -> 0.7)


def test_names_of_files_are_any_bytes(tmp_path):
    report.write_csv(tmp_path / "a.csv", [{"path": "caf\udce9.wav"}])
    assert (tmp_path / "a.csv").read_bytes() == b"path\r\ncaf\xe9.wav\r\n"


def test_speakers():
    rows = {row["speaker"]: row for row in people.speaker_rows(TRIALS, FLIPS, HERE)}
    assert list(rows) == ["a", "b", "c"]  # most harmful flips first
    assert (rows["a"]["trials"], rows["a"]["harmful"], rows["a"]["share_of_harmful"]) == (3, 2, 1.0)
    assert (rows["b"]["trials"], rows["b"]["harmful"], rows["b"]["harmful_rate"]) == (3, 1, pytest.approx(1 / 3))
    assert rows["c"]["harmful"] == 0 and rows["c"]["age"] is None and rows["a"]["gender"] == "f"
    assert rows["a"]["mean_abs_drift"] == pytest.approx((0.5 + 0.1 + 0.5) / 3)


def test_utterances():
    rows = {row["utterance"]: row for row in people.utterance_rows(TRIALS, FLIPS, HERE)}
    assert [rows[name]["harmful"] for name in ("a1", "a2", "b1", "c1")] == [1, 2, 1, 0]
    assert rows["a2"]["path"] == "a/2.wav" and rows["a2"]["snr_db"] is None and rows["b1"]["snr_db"] == 30
    assert rows["c1"]["mean_abs_drift"] == 0


def test_groups_count_a_trial_once_for_each_side():
    rows = {(row["by"], row["group"]): row for row in people.group_rows(TRIALS, FLIPS, HERE)}
    female, male = rows["gender", "female"], rows["gender", "male"]
    assert (female["trial_sides"], female["harmful_rate"]) == (4, 0.75)  # sides: a1 a2 | a1 | a2 | none
    assert (male["trial_sides"], male["harmful_rate"]) == (4, 0.25)
    assert rows["age", "under 18"]["utterances"] == 2 and rows["age", "18 and over"]["utterances"] == 1
    assert rows["duration", "below 2.0 s"]["utterances"] == 1
    assert rows["SNR estimate", "from 33.3 dB"]["utterances"] == 1


def test_groups_leave_out_what_no_trial_compares():
    """An embedding file holds more than a list compares, and an enrolment model more than its first utterance."""
    more = people.Recordings(
        ids=(*HERE.ids, "a3", "c2"),
        places=(*HERE.places, "a/3.wav", "c/2.wav"),
        speakers=(*HERE.speakers, "a", "c"),
        enrol=ENROL,
        test=TEST,
        seconds=np.append(HERE.seconds, [90.0, 80.0]),
        snr=np.append(HERE.snr, [0.0, np.nan]),
        genders=HERE.genders,
        ages=HERE.ages,
    )
    assert people.group_rows(TRIALS, FLIPS, more) == people.group_rows(TRIALS, FLIPS, HERE)


def test_groups_with_intervals_and_without_what_is_unknown():
    draws = SpeakerDraws(TRIALS.enrol_speaker, TRIALS.test_speaker, 50)
    for row in people.group_rows(TRIALS, FLIPS, HERE, draws):
        interval = row["mean_abs_drift_ci95"]
        assert interval is None or interval[0] <= interval[1]
    bare = people.Recordings(HERE.ids, HERE.places, HERE.speakers, ENROL, TEST, None, None, {}, {})
    assert people.group_rows(TRIALS, FLIPS, bare, draws) == []
    assert people.utterance_rows(TRIALS, FLIPS, bare)[0]["seconds"] is None


def test_worst_trials_are_harmful_ones_by_drift_then_the_largest_drifts():
    rows = people.worst_trials(TRIALS, FLIPS, HERE, count=3)
    assert [(row["enrol_path"], row["test_path"], row["flip"]) for row in rows] == [
        ("a/1.wav", "a/2.wav", "harmful"),
        ("a/2.wav", "b/1.wav", "harmful"),
        ("a/1.wav", "b/1.wav", "none"),
    ]
    assert rows[0]["drift"] == pytest.approx(-0.5) and rows[0]["label"] == "target"
    assert len(people.worst_trials(TRIALS, FLIPS, HERE, count=9)) == 3  # the fourth did not drift at all
    assert people.worst_trials(TRIALS, FLIPS, HERE, count=0) == []


def test_what_drift_goes_with():
    rows = [{"bits": 2, "seconds": s, "snr_db": None, "mean_abs_drift": 1 / s} for s in (1.0, 2.0, 3.0, 4.0)]
    assert people.drift_causes(rows) == [{"bits": 2, "with": "seconds", "utterances": 4, "spearman": pytest.approx(-1)}]
    steady = [row | {"snr_db": float(i), "seconds": None} for i, row in enumerate(rows)]  # 0 dB is known, too
    assert people.drift_causes(steady)[0]["utterances"] == 4


@pytest.mark.parametrize("ratio", [10.0, 30.0])
def test_snr_of_bursts_above_a_noise(ratio):
    rng = np.random.default_rng(0)
    wave = 0.001 * rng.standard_normal(32000)
    wave[8000:24000] *= 10 ** (ratio / 20)
    assert people.snr_db(wave) == pytest.approx(ratio, abs=1.0)


def test_snr_of_steady_noise_is_near_zero_and_of_gated_speech_bounded():
    assert people.snr_db(np.random.default_rng(0).standard_normal(32000)) < 2
    gated = np.zeros(32000)
    gated[8000:20000] = np.sin(np.arange(12000))
    assert 60 < people.snr_db(gated) <= 121
    assert np.isnan(people.snr_db(np.zeros(300)))
