"""The embedded corpus: the same for everyone, disjoint splits, and neither trivial nor without a voice in it."""

import itertools
import pickle
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from scipy.fft import dct
from sklearn.metrics import roc_curve

from kmq_jax.core.errors import UserError
from kmq_jax.data import synthetic
from kmq_jax.data.source import open_source
from kmq_jax.data.synthetic import NOISES, Reader, noise, parse, synthetic_trials
from kmq_jax.data.trials import read_trials

SPLITS = ("train", "dev", "test")


def test_default_sizes_and_ids():
    table = open_source("synthetic:train")
    assert len(table) == 200 * 10 and len(table.speaker_names) == 200
    assert "syn-train-0003-07" in table.ids
    assert table.speakers[table.ids.index("syn-train-0003-07")] == "syn-train-0003"
    assert sorted(set(table.genders.values())) == ["f", "m"]
    assert len(set(table.ids)) == len(table)


def test_an_utterance_is_the_same_whoever_asks():
    small = open_source("synthetic:dev?speakers=3&utterances=2")
    large = open_source("synthetic:dev?speakers=5&utterances=4&seed=0")
    name = "syn-dev-0002-01"
    wave = small.load(small.ids.index(name))
    np.testing.assert_array_equal(wave, large.load(large.ids.index(name)))
    again = pickle.loads(pickle.dumps(small))
    with ThreadPoolExecutor(2) as pool:
        for other in pool.map(again.load, [small.ids.index(name)] * 4):
            np.testing.assert_array_equal(wave, other)


@pytest.mark.parametrize("split", SPLITS)
def test_waves_are_as_announced(split):
    table = open_source(f"synthetic:{split}?speakers=3&utterances=3")
    for i in range(len(table)):
        wave = table.load(i)
        assert wave.dtype == np.float32 and wave.shape == (table.num_samples(i),)
        assert 2.0 <= len(wave) / 16000 <= 5.0
        assert np.isfinite(wave).all() and np.abs(wave).max() < 1
        assert 0.01 < np.sqrt(np.mean(np.square(wave, dtype=np.float64))) < 0.2


def test_splits_and_seeds_share_no_speaker():
    corpora = [parse(f"synthetic:{split}?seed={seed}") for split in SPLITS for seed in (0, 1)]
    voices = [corpus.speaker(i).pitch for corpus in corpora for i in range(30)]
    assert len(set(voices)) == len(voices)
    names = [set(open_source(f"synthetic:{split}").speakers) for split in SPLITS]
    assert not names[0] & names[1] and not names[0] & names[2] and not names[1] & names[2]


@pytest.mark.parametrize(
    "spec, fault",
    [
        ("synthetic:", "split"),
        ("synthetic:eval", "'eval'"),
        ("synthetic:dev?speaker=3", "'speaker'"),
        ("synthetic:dev?speakers=0", "speakers"),
        ("synthetic:dev?speakers=-3", "'-3'"),
        ("synthetic:dev?utterances=many", "'many'"),
        ("synthetic:dev?seed=", "seed"),
        ("synthetic:dev?seconds=61", "from 0 to 60, got '61'"),
        ("synthetic:dev?seed=99999999999", "seed"),
        ("synthetic:dev?speakers", "speakers"),
        ("synthetic:train?speakers=100000&utterances=100000", "at most"),
        ("synthetic:noise?speakers=3", "'speakers'"),
    ],
)
def test_a_wrong_name_gets_one_line(spec, fault):
    with pytest.raises(UserError, match=fault) as error:
        open_source(spec)
    assert spec in str(error.value) and "\n" not in str(error.value)


def test_utterances_of_a_given_length():
    table = open_source("synthetic:dev?speakers=2&utterances=2&seconds=2")
    assert table.samples.tolist() == [32_000] * 4 and len(table.load(3)) == 32_000


@pytest.mark.parametrize("spec", ["synthetic:noise", "synthetic:dev?utterances=1", "synthetic:dev?speakers=3"])
def test_trials_need_pairs(spec):
    with pytest.raises(UserError, match="trials need"):
        synthetic_trials(spec)


@pytest.mark.parametrize("spec", ["synthetic:dev", "synthetic:test?speakers=7&utterances=5&seed=3"])
def test_trials_hold_what_they_promise(spec):
    table, trials = open_source(spec), synthetic_trials(spec)
    speaker = table.labels
    sex = np.array([table.genders[name] for name in table.speakers])
    np.testing.assert_array_equal(trials.label, speaker[trials.enrol] == speaker[trials.test])
    assert trials.label.sum() * 2 == len(trials)
    assert not (trials.enrol == trials.test).any()
    targets = {(e, t) for e, t in zip(trials.enrol[trials.label], trials.test[trials.label])}
    each = len(table) // len(table.speaker_names)
    assert len(targets) == trials.label.sum() == len(table.speaker_names) * each * (each - 1) // 2
    same_sex = (sex[trials.enrol] == sex[trials.test])[~trials.label]
    assert same_sex.mean() == pytest.approx(0.5, abs=0.01)
    assert len(np.unique(trials.test[~trials.label])) > 0.6 * len(table)


@pytest.mark.parametrize("utterances", [2, 3, 17])
def test_pairs_are_those_of_itertools(utterances):
    wanted = list(itertools.combinations(range(utterances), 2))
    assert synthetic._pairs(np.arange(len(wanted)), utterances).tolist() == list(map(list, wanted))


def test_trials_of_many_utterances_take_little_memory():
    tracemalloc.start()
    synthetic_trials("synthetic:dev?speakers=4&utterances=1500", most=10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20  # all pairs of 1,500 as a list are 120 MB


def test_many_trials_are_capped_evenly():
    trials = synthetic_trials("synthetic:test", most=500)
    assert trials.label.sum() == 500 and len(trials) == 1000
    assert len(set(open_source("synthetic:test").labels[trials.enrol[trials.label]])) == 40


def test_trials_are_the_list_that_they_would_be_as_a_file(tmp_path):
    spec = "synthetic:dev?speakers=4&utterances=3"
    table, trials = open_source(spec), synthetic_trials(spec)
    path = tmp_path / "trials.txt"
    lines = (
        f"{label:d} {trials.names[e]} {trials.names[t]}\n"
        for label, e, t in zip(trials.label, trials.enrol_name, trials.test_name)
    )
    path.write_text("".join(lines))
    read = read_trials(path, table.ids)
    for field in ("enrol", "test", "label"):
        np.testing.assert_array_equal(getattr(read, field), getattr(trials, field))


@pytest.mark.parametrize("kind", NOISES)
def test_noise_is_in_range_and_of_many_kinds(kind):
    clips = [noise(kind, 32000, np.random.default_rng(i)) for i in range(5)]
    for clip in clips:
        assert clip.dtype == np.float32 and clip.shape == (32000,) and np.isfinite(clip).all()
        assert 0.05 < np.abs(clip).max() < 1
    assert not np.array_equal(clips[0], clips[1])


def test_noise_is_a_source_and_knows_its_kinds():
    table = open_source("synthetic:noise?utterances=2")
    assert len(table) == 2 * len(NOISES) and set(table.speaker_names) == {f"syn-noise-{kind}" for kind in NOISES}
    assert all(len(table.load(i)) == table.num_samples(i) for i in range(len(table)))
    with pytest.raises(ValueError, match="babble"):
        noise("babble", 100, np.random.default_rng(0))


def cepstra(wave):
    """[frames, 20]: cosine transform of log energies in 40 bands of equal width on the mel scale."""
    frames = np.lib.stride_tricks.sliding_window_view(wave, 400)[::160] * np.hamming(400)
    power = np.abs(np.fft.rfft(frames, 512)) ** 2
    mel = 2595 * np.log10(1 + np.fft.rfftfreq(512, 1 / 16000) / 700)
    band = np.minimum((40 * mel / mel[-1]).astype(int), 39)
    energies = np.stack([power[:, band == b].sum(axis=1) for b in range(40)], 1)
    return dct(np.log(energies + 1e-10), norm="ortho")[:, :20]


def equal_error_rate(embeddings, trials):
    embeddings = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    scores = (embeddings[trials.enrol] * embeddings[trials.test]).sum(axis=1)
    false_alarm, hit, _ = roc_curve(trials.label, scores)
    i = np.argmin(np.abs(false_alarm - (1 - hit)))
    return (false_alarm[i] + 1 - hit[i]) / 2


def test_means_and_deviations_do_not_tell_speakers_apart():
    spec = "synthetic:dev?speakers=16&utterances=5"
    table = open_source(spec)
    trials = synthetic_trials(spec)
    features = [cepstra(table.load(i)) for i in range(len(table))]
    means = np.stack([f.mean(axis=0) for f in features])
    both = np.stack([np.concatenate([f.mean(axis=0), f.std(axis=0)]) for f in features])
    both = (both - both.mean(axis=0)) / both.std(axis=0)
    assert equal_error_rate(means, trials) > 0.15
    assert 0.15 < equal_error_rate(both, trials) < 0.45  # but there is a speaker in them


def test_a_reader_remembers_within_its_room():
    corpus = parse("synthetic:dev?speakers=1&utterances=3")
    bytes_of_one = 2 * int(corpus.samples(0)[0])
    reader = Reader(corpus, room=bytes_of_one)
    first = reader("syn-dev-0000-00")
    assert reader("syn-dev-0000-00") is not first  # the caller's to change
    first[:] = 0
    assert np.abs(reader("syn-dev-0000-00")).max() > 0
    reader("syn-dev-0000-01")
    assert sum(wave.nbytes for wave in reader._made.values()) == bytes_of_one
    assert not pickle.loads(pickle.dumps(reader))._made
    np.testing.assert_array_equal(np.rint(reader("syn-dev-0000-02") * 32768) / 32768, reader("syn-dev-0000-02"))
