"""Cascades of different networks: maps from other speakers, gates by time, shares counted by hand."""

import types
from pathlib import Path

import numpy as np
import pytest

from kmq_jax.benchmarks import across
from kmq_jax.benchmarks.options import AcrossBench
from kmq_jax.cascade.policy import CascadePolicy
from kmq_jax.core.errors import UserError
from kmq_jax.data.table import Utterances
from kmq_jax.metrics.calibration import AffineMap
from kmq_jax.metrics.detection import eer

SPEAKERS, EACH = 16, 4
GIVEN = {"first": ("2:small.kmq",), "last": "32:big.kmq", "data": ("d",), "trials": ("t",), "kept": "k"}


def task(seed, scale):
    """Trials of all pairs; the small model's scores lie on a scale of its own."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(SPEAKERS), EACH)
    enrol, test = np.triu_indices(len(owner), 1)
    label = owner[enrol] == owner[test]
    big = (0.3 * label + 0.1 * rng.standard_normal(len(enrol))).astype(np.float32)
    small = (scale * (big + 0.08 * rng.standard_normal(len(enrol))) - 1).astype(np.float32)
    sides = types.SimpleNamespace(enrol=enrol, test=test, enrol_speaker=owner[enrol], test_speaker=owner[test])
    joined = types.SimpleNamespace(sides=sides, trials=types.SimpleNamespace(label=label))
    return across.Task(
        "d", joined, {"small.kmq": small, "big.kmq": big}, {"small.kmq": 0.1, "big.kmq": 0.4}, len(owner)
    )


def model(name, size):
    return across.Model(name, f"{name}.kmq", None, name, size)


MODELS = {"small.kmq": model("small", 10), "big.kmq": model("big", 100)}
SMALL, BIG = (2, "small.kmq"), (32, "big.kmq")


def judged(system, base, new, **more):
    options = AcrossBench(**GIVEN, replicates=20, **more)
    return across.judge(system, MODELS, base, new, options)


def test_a_cascade_costs_the_first_model_always_and_the_last_for_what_is_in_doubt():
    base, new = task(0, 3.0), task(1, 3.0)
    row = judged(across.System((SMALL, BIG), 0.01), base, new)
    assert row["system"] == "small > big" and row["bytes"] == 110
    assert 0 < row["escalated"] < 0.7
    assert row["trial_ratio"] == pytest.approx(0.25 + row["escalated"])
    assert row["trial_ratio"] < row["recording_ratio"] <= 1.25  # most recordings are in some trial in doubt
    seconds = [row[f"{of}_seconds"] for of in ("trial", "recording")]
    assert seconds == pytest.approx([0.4 * row["trial_ratio"], 0.4 * row["recording_ratio"]])  # the last takes 0.4 s
    assert row["harmful_flip_rate"] < 0.02
    # A second scale that falls apart is mapped alike: what counts is order.
    again = judged(across.System((SMALL, BIG), 0.01), task(0, 30.0), task(1, 30.0))
    assert again["escalated"] == pytest.approx(row["escalated"], abs=0.01)


def test_models_alone_err_as_their_own_scores_do_and_flip_as_their_maps_say():
    base, new = task(0, 3.0), task(1, 3.0)
    label = new.joined.trials.label
    for level, cost, size in ((SMALL, 0.25, 10), (BIG, 1.0, 100)):
        row = judged(across.System((level,)), base, new)
        assert row["eer"] == pytest.approx(100 * eer(new.scores[level[1]], label)[0])
        assert (row["trial_ratio"], row["recording_ratio"], row["escalated"]) == (pytest.approx(cost), cost, 0.0)
        assert row["bytes"] == size
    assert row["harmful_flip_rate"] == 0 and row["eer_change"] == 0  # the last model beside itself
    small = judged(across.System((SMALL,)), base, new)
    assert 0.01 < small["harmful_flip_rate"] < 0.3  # at its raw scale every decision would be another


def test_the_first_list_is_decided_by_policies_of_other_speakers(monkeypatch):
    base, seen = task(0, 3.0), []
    make = across.policy_of

    def watched(system, data, seconds, cost):
        seen.append(set(data.enrol_speaker) | set(data.test_speaker))
        return make(system, data, seconds, cost)

    monkeypatch.setattr(across, "policy_of", watched)
    judged(across.System((SMALL, BIG), 0.01), base, base)
    assert len(seen) == 2 and not seen[0] & seen[1]


def test_kept_embeddings_are_of_the_set_not_of_one_that_names_its_recordings_alike(tmp_path, monkeypatch):
    made = []

    def embed(loaded, utterances, engine):
        made.append(len(utterances))
        seed = {"clean": 0, "noisy": 1}[utterances.root.name]
        return np.random.default_rng(seed).standard_normal((9, 5))[[int(name) for name in utterances.ids]]

    monkeypatch.setattr(across, "embed_all", embed)
    ids, options = tuple("012345678"), AcrossBench(**GIVEN | {"kept": tmp_path})
    clean, noisy = (Utterances(ids, ids, ids, root=Path(name, "x").parent) for name in ("clean", "noisy"))
    first = across.embedded(MODELS["big.kmq"], "sets/clean", clean, options)
    assert across.embedded(MODELS["big.kmq"], "sets/clean", clean, options) == first and made == [9, 4]
    assert across.embedded(MODELS["big.kmq"], "sets/noisy", noisy, options) != first and made == [9, 4, 4, 9]


def test_shares_by_hand():
    """Three recordings; the trial of the last two alone goes on."""
    same = AffineMap(1.0, 0.0)
    policy = CascadePolicy((2, 32), (same, same), ((0.4, 0.6),), 0.5)
    scores = np.float32([[0.9, 0.1, 0.55], [0.9, 0.1, 0.2]])
    sides = np.array([0, 0, 1]), np.array([1, 2, 2])
    data = across.Calibration((2, 32), scores, scores[1], np.array([True, False, False]), *sides, True, *sides)
    found = across.decide(policy, data)
    assert found.accept.tolist() == [True, False, False]
    assert found.trials.tolist() == pytest.approx([1, 1 / 3]) and found.recordings.tolist() == pytest.approx([1, 2 / 3])
    assert found.used == 3


def test_a_cascade_loses_to_single_models_that_take_no_longer_and_err_no_more():
    rows = [{"system": "big", "alpha": None, "eer": 2.0, "trial_ratio": 1.0, "recording_ratio": 1.0}]
    rows += [{"system": "small", "alpha": None, "eer": 2.5, "trial_ratio": 0.4, "recording_ratio": 0.4}]
    rows += [{"system": "small > big", "alpha": 0.01, "eer": 2.5, "trial_ratio": 0.6, "recording_ratio": 1.2}]
    rows += [{"system": "small > big", "alpha": 0.001, "eer": 1.9, "trial_ratio": 0.7, "recording_ratio": 1.3}]
    assert [row.get("beaten_by") for row in across.compared(rows, "trial")] == [None, None, ["small"], []]
    assert [row.get("beaten_by") for row in across.compared(rows, "recording")][2:] == [["small", "big"], []]


def test_mistakes():
    with pytest.raises(UserError, match="`first`"):
        AcrossBench(**{**GIVEN, "first": ()})
    with pytest.raises(UserError, match="`trials`"):
        AcrossBench(**{**GIVEN, "trials": ()})
    with pytest.raises(UserError, match=r"`first` \(=32\) must have fewer bits than the last model's 4"):
        across.compare(AcrossBench(**{**GIVEN, "first": ("32:a.kmq",), "last": "4:b.kmq"}))


def test_of_the_first_list_what_is_judged_is_counted_and_weighs_by_its_trials(monkeypatch):
    """The halves of the speakers differ in trials and recordings; of the trials of one of them all go on."""
    whole, system = task(0, 3.0), across.System((SMALL, BIG), 0.01)
    all_sides, label = whole.joined.sides, whole.joined.trials.label
    _, two = across.split_speakers(whole.calibration(system, "big.kmq"), 0.5, 0)
    one, other = (np.isin(side, two.enrol_speaker) for side in (all_sides.enrol_speaker, all_sides.test_speaker))
    # The second half keeps what its even recordings take part in.
    keep = ~(one & other) | ((all_sides.enrol % 2 == 0) & (all_sides.test % 2 == 0))
    sides = types.SimpleNamespace(**{name: value[keep] for name, value in vars(all_sides).items()})
    joined = types.SimpleNamespace(sides=sides, trials=types.SimpleNamespace(label=label[keep]))
    scores = {place: row[keep] for place, row in whole.scores.items()}
    base = across.Task("d", joined, scores, whole.seconds, whole.recordings)
    judged_of = [new for _, new in across.parts_of(system, base, base, "big.kmq")]
    within = (one == other)[keep]
    found = across.counts(judged_of)
    assert found == {"trials": within.sum(), "targets": label[keep][within].sum(), "speakers": SPEAKERS}
    assert found["trials"] < len(sides.enrol)
    same = AffineMap(1.0, 0.0)
    gates = iter([((0.15, 0.15),), ((-9.0, 9.0),)])  # none of the second half's trials go on, all of the first's do
    monkeypatch.setattr(across, "policy_of", lambda *_: CascadePolicy((2, 32), (same, same), next(gates), 0.15))
    row = judged(system, base, base)
    on = len(judged_of[1]) / found["trials"]
    assert on > 0.7 and row["escalated"] == pytest.approx(on) and row["trial_ratio"] == pytest.approx(0.25 + on)
    assert row["recording_ratio"] == pytest.approx(0.25 + 2 / 3)  # 32 of 48 recordings


def test_embeddings_of_any_data_stay_in_the_directory_that_keeps_them(tmp_path, monkeypatch):
    monkeypatch.setattr(across, "embed_all", lambda loaded, utterances, engine: np.eye(len(utterances)))
    table, options = Utterances(("0",), ("0",), ("0",)), AcrossBench(**GIVEN | {"kept": tmp_path})
    for data in ("/so762", "/", "a/b/c", "synthetic:dev", "."):
        for old in tmp_path.glob("*.npz"):
            old.unlink()
        assert across.embedded(MODELS["big.kmq"], data, table, options).parent == tmp_path


def test_first_models_may_have_the_same_bits(monkeypatch):
    seen, row = [], {"system": "one", "alpha": 0.1, "eer": 1.0, "trial_ratio": 1.0}
    monkeypatch.setattr(across.Model, "read", lambda place: model(place.removesuffix(".kmq"), 1))
    monkeypatch.setattr(across, "parts_of", lambda *_: [])
    monkeypatch.setattr(across, "counts", lambda judged: {})
    monkeypatch.setattr(across, "judge", lambda system, *_: seen.append(system.levels) or row)
    monkeypatch.setattr(across, "task_of", lambda *_: types.SimpleNamespace(data="d", recordings=1, seconds={}))
    across.compare(AcrossBench(**GIVEN | {"first": ("2:small.kmq", "2:big.kmq"), "last": "32:last.kmq"}))
    assert [levels[0] for levels in seen if len(levels) == 2] == [(2, "big.kmq"), (2, "small.kmq")]
