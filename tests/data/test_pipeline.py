import itertools
import logging
import time

import numpy as np
import pytest
import recordings

from kmq_jax.core.errors import UserError
from kmq_jax.data import audio, pipeline
from kmq_jax.data.pipeline import BABBLE_VOICES, ROOM_SAMPLES, Crops, num_speakers, training_batches
from kmq_jax.data.source import open_source

CROP = 8000


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    return open_source(recordings.kaldi(tmp_path_factory.mktemp("speech"), speakers=4, each=3, seconds=1.0))


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    root = tmp_path_factory.mktemp("noise")
    for seed in range(3):
        recordings.write(root / f"{seed}.wav", np.random.default_rng(seed).normal(0, 0.1, 5000))  # shorter than a crop
    return open_source(root)


def take(dataset, count):
    return list(itertools.islice(iter(dataset), count))


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        for key in x:
            np.testing.assert_array_equal(x[key], y[key], err_msg=key)


def test_a_batch(speech, noise):
    for batch in take(training_batches(speech, batch_size=5, crop_samples=CROP, seed=1, noise=noise), 6):
        assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
            "wave": ((5, CROP), np.int16),
            "interference": ((5, CROP), np.int16),
            "snr_db": ((5,), np.float32),
            "reverb": ((5,), np.bool_),
            "speaker": ((5,), np.int32),
        }
        assert np.abs(batch["wave"]).max() > 100  # of 32,768: not scaled twice
        disturbed = np.isfinite(batch["snr_db"])
        np.testing.assert_array_equal(batch["interference"].any(axis=1), disturbed)
        assert not (disturbed & batch["reverb"]).any()
        assert ((batch["snr_db"][disturbed] >= 0) & (batch["snr_db"][disturbed] <= 20)).all()


def test_without_augmentation_no_interference_is_made(speech, noise):
    for batch in take(training_batches(speech, batch_size=5, crop_samples=CROP, seed=1, noise=noise, augment=False), 3):
        assert set(batch) == {"wave", "snr_db", "reverb", "speaker"}
        assert not batch["reverb"].any() and np.isinf(batch["snr_db"]).all()


@pytest.mark.parametrize(("threads", "kept"), [(0, 0), (1, 2), (3, 6), (32, 8)])
def test_a_few_batches_are_kept_ahead_however_many_threads(speech, monkeypatch, threads, kept):
    made, make = [], pipeline._Examples.__call__

    def noted(self, number, rng):
        if self.samples == 999:  # threads of other tests may still be at work
            made.append(number)
        return make(self, number, rng)

    monkeypatch.setattr(pipeline._Examples, "__call__", noted)
    batches = iter(training_batches(speech, batch_size=2, crop_samples=999, seed=1, augment=False, threads=threads))
    next(batches)
    deadline = time.monotonic() + 60
    while len(made) < 2 * (1 + kept) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    batches.close()
    assert len(made) == 2 * (1 + kept)


def test_crops_come_from_the_speaker_they_are_labelled_with(speech):
    waves = [speech.load_int16(i) for i in range(len(speech))]
    seen = set()
    for batch in take(training_batches(speech, batch_size=4, crop_samples=CROP, seed=3, augment=False), 6):
        for wave, label in zip(batch["wave"], batch["speaker"]):
            (found,) = {
                i
                for i, whole in enumerate(waves)
                for at in np.flatnonzero(whole[: len(whole) - CROP + 1] == wave[0])
                if np.array_equal(whole[at : at + CROP], wave)
            }
            assert speech.labels[found] == label
            seen.add(found)
    assert seen == set(range(len(speech)))


def test_each_epoch_is_a_new_permutation(speech):
    batches = take(training_batches(speech, batch_size=4, crop_samples=CROP, seed=0, augment=False), 9)
    labels = np.concatenate([batch["speaker"] for batch in batches]).reshape(3, 12)
    np.testing.assert_array_equal(np.sort(labels, axis=1), np.tile(np.repeat(np.arange(4), 3), (3, 1)))
    assert len({tuple(epoch) for epoch in labels}) == 3


def test_kinds_are_uniform_among_those_at_hand(speech, noise):
    def shares(**sources):
        batches = take(training_batches(speech, batch_size=32, crop_samples=400, seed=5, threads=0, **sources), 8)
        snr = np.concatenate([batch["snr_db"] for batch in batches])
        reverb = np.concatenate([batch["reverb"] for batch in batches])
        return np.mean(np.isfinite(snr)), np.mean(reverb)

    deviation = 3.5 * np.sqrt(0.25 / 256)
    np.testing.assert_allclose(shares(noise=noise, music=noise), (3 / 5, 1 / 5), atol=deviation)
    np.testing.assert_allclose(shares(noise=noise), (2 / 4, 1 / 4), atol=deviation)
    np.testing.assert_allclose(shares(), (1 / 3, 1 / 3), atol=deviation)  # babble needs no further data
    assert shares(augment=False) == (0, 0)


def test_babble_is_other_speakers(tmp_path):
    # Every speaker is a pure tone of a frequency of its own, so a spectrum tells who speaks.
    for s in range(8):
        time = np.arange(16000) / 16000
        recordings.write(tmp_path / f"s{s}" / "a.wav", 0.3 * np.sin(2 * np.pi * 400 * (s + 1) * time))
    table = open_source(tmp_path)
    counts = []
    for batch in take(training_batches(table, batch_size=32, crop_samples=CROP, seed=0), 4):
        spectrum = np.abs(np.fft.rfft(batch["interference"], axis=1))[:, 200:1601:200]
        for row, label, snr in zip(spectrum, batch["speaker"], batch["snr_db"]):
            if np.isfinite(snr):
                voices = np.flatnonzero(row > 0.05 * row.max())
                assert label not in voices and 13 <= snr <= 20
                counts.append(len(voices))  # at most the number of voices: one may come twice
    assert max(counts) <= BABBLE_VOICES[1] and len(set(counts)) > 2


def test_speed_makes_new_speakers_of_another_pitch(tmp_path):
    time = np.arange(32000) / 16000
    recordings.write(tmp_path / "s0" / "a.wav", 0.5 * np.sin(2 * np.pi * 1000 * time))
    recordings.write(tmp_path / "s1" / "a.wav", 0.5 * np.sin(2 * np.pi * 2000 * time))
    table = open_source(tmp_path)
    speeds = (1.0, 0.9, 1.1)
    assert num_speakers(table) == 2 and num_speakers(table, speeds) == 6
    (batch,) = take(training_batches(table, batch_size=6, crop_samples=16000, seed=0, speeds=speeds, augment=False), 1)
    pitch = np.abs(np.fft.rfft(batch["wave"], axis=1)).argmax(axis=1)  # Hz, as a crop is one second
    expected = {0: 1000, 1: 2000, 2: 900, 3: 1800, 4: 1100, 5: 2200}
    assert dict(zip(batch["speaker"].tolist(), pitch.tolist())) == expected


@pytest.mark.parametrize("threads", [0, 3])
def test_position_is_taken_up_exactly(speech, noise, threads):
    def make(threads):
        settings = {"noise": noise, "speeds": (1.0, 0.9), "threads": threads}
        return training_batches(speech, batch_size=4, crop_samples=CROP, seed=9, **settings)

    whole = take(make(0), 12)
    first = iter(make(threads))
    assert_same([next(first) for _ in range(7)], whole[:7])
    state = first.get_state()
    second = iter(make(threads))
    second.set_state(state)
    assert_same([next(second) for _ in range(5)], whole[7:])


def test_other_seeds_give_other_batches(speech):
    a, b = (take(training_batches(speech, batch_size=4, crop_samples=CROP, seed=s), 1)[0] for s in (0, 1))
    assert not np.array_equal(a["wave"], b["wave"])


def test_processes_share_the_batches_of_one(speech, noise):
    settings = {"crop_samples": CROP, "seed": 2, "noise": noise}
    one = take(training_batches(speech, batch_size=6, **settings), 8)
    parts = [
        take(training_batches(speech, batch_size=2, process_index=p, process_count=3, **settings), 8) for p in range(3)
    ]
    for key in one[0]:
        together = np.stack([[batch[key] for batch in part] for part in parts], axis=2)  # [step, row, process, ...]
        whole = np.stack([batch[key] for batch in one])
        np.testing.assert_array_equal(together.reshape(whole.shape), whole)


def test_the_cache_changes_nothing(tmp_path):
    for name, rate in (("a.ogg", 16000), ("b.wav", 8000), ("c.flac", 16000)):
        recordings.write(tmp_path / name[0] / name, recordings.tone(2, rate=rate), rate)
    table = open_source(tmp_path)
    settings = {"batch_size": 3, "crop_samples": CROP, "seed": 0}
    assert_same(
        take(training_batches(table, cache_bytes=0, **settings), 4),
        take(training_batches(table, cache_bytes=1 << 26, **settings), 4),
    )


def test_short_utterances_are_repeated(tmp_path):
    wave = audio.to_int16(recordings.tone(0.2))
    recordings.write(tmp_path / "s" / "a.wav", wave)
    piece, used = Crops(open_source(tmp_path)).crop(0, 8000, np.random.default_rng(0))
    assert used == 0
    np.testing.assert_array_equal(piece, np.tile(wave, 3)[:8000])


def test_crops_reach_every_place(tmp_path):
    recordings.write(tmp_path / "s" / "a.wav", np.arange(1, 3203, dtype=np.int16))
    crops, rng = Crops(open_source(tmp_path)), np.random.default_rng(0)
    starts = {int(crops.crop(0, 3200, rng)[0][0]) for _ in range(60)}
    assert starts == {1, 2, 3}


def test_broken_files_are_replaced_reported_once_and_counted(tmp_path, caplog):
    root = recordings.kaldi(tmp_path, speakers=3, each=2)
    (root / "audio/s0-u1.wav").unlink()
    (root / "audio/s2-u0.wav").write_text("noise")
    table = open_source(root)
    failures = {}
    settings = {"batch_size": 6, "crop_samples": CROP, "seed": 0, "augment": False}
    with caplog.at_level(logging.WARNING):
        batches = take(training_batches(table, failures=failures, threads=0, **settings), 5)
    for batch in batches:  # each file's place is taken by the next: s1-u0 and s2-u1
        np.testing.assert_array_equal(np.sort(batch["speaker"]), [0, 1, 1, 1, 2, 2])
    assert sorted(reason.split(" ")[0] for reason in failures.values()) == ["missing", "unreadable"]
    assert len(caplog.records) == 2
    assert "wav.scp:2: " in caplog.text and "s0-u1.wav: missing" in caplog.text
    assert_same(take(training_batches(table, threads=2, **settings), 5), batches)


def test_a_set_that_cannot_be_read_at_all(tmp_path):
    root = recordings.kaldi(tmp_path, 1, 2)
    for path in (root / "audio").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="^2 utterances in a row cannot be read; the last: "):
        take(training_batches(open_source(root), batch_size=2, crop_samples=CROP, seed=0, threads=0), 1)
    alone = open_source(root).select([0])
    with pytest.raises(UserError, match="^the only utterance cannot be read: .*wav"):
        take(training_batches(alone, batch_size=1, crop_samples=CROP, seed=0, threads=0), 1)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"batch_size": 0}, "`batch_size`"),
        ({"crop_samples": 0}, "`crop_samples`"),
        ({"speeds": ()}, "`speeds`"),
        ({"speeds": (1.0, 1.0)}, "`speeds`"),
        ({"speeds": (1.0, 9.0)}, "`speeds`"),
        ({"process_index": 2, "process_count": 2}, "`process_index`"),
    ],
)
def test_wrong_settings(speech, setting, message):
    with pytest.raises(UserError, match=message):
        training_batches(speech, **({"batch_size": 2, "crop_samples": 100, "seed": 0} | setting))
    with pytest.raises(UserError, match="no utterance"):
        training_batches(speech.select([]), batch_size=2, crop_samples=100, seed=0)


def test_real_speech(shared):
    table, noise = open_source(shared / "data/words/dev"), open_source(shared / "data/noise/dev")
    (batch,) = take(training_batches(table, batch_size=16, crop_samples=32000, seed=0, noise=noise), 1)
    assert np.isfinite(batch["wave"]).all() and (batch["wave"].std(axis=1) > 1e-4).all()
    assert (batch["speaker"] < 11).all()


def test_whole_utterances_repeat_to_one_length(speech):
    waves = [speech.load_int16(i) for i in range(len(speech))]
    samples = max(map(len, waves)) + 500

    def batches(**settings):
        made = training_batches(speech, batch_size=4, crop_samples=CROP, seed=3, augment=False, **settings)
        return {key: np.concatenate([batch[key] for batch in take(made, 3)]) for key in ("wave", "length", "place")}

    found = batches(whole_samples=samples)
    for wave, length, place in zip(found["wave"], found["length"], found["place"]):
        assert 0 <= place < 1 and wave.shape == (samples,)
        np.testing.assert_array_equal(wave[length:], wave[: samples - length])
        assert any(len(whole) == length and np.array_equal(wave[:length], whole) for whole in waves)
    assert set(batches(whole_samples=9000)["length"]) == {9000}
    slow = batches(whole_samples=2 * samples, speeds=(0.9,))
    assert set(slow["length"]) <= {-(-len(whole) * 10 // 9) for whole in waves}


def test_rooms_and_voices_that_are_given(speech, tmp_path):
    response = np.zeros(4000)
    response[[300, 1300]] = 0.5, -0.25  # the direct sound comes late
    recordings.write(tmp_path / "rooms" / "a" / "r.wav", response)
    recordings.write(tmp_path / "voices" / "b" / "v.wav", np.random.default_rng(0).normal(0, 0.1, 20000))
    given = {"rooms": open_source(tmp_path / "rooms"), "babble": open_source(tmp_path / "voices")}
    batches = take(training_batches(speech, batch_size=6, crop_samples=CROP, seed=0, **given), 8)
    rooms = np.concatenate([batch["rir"] for batch in batches])
    placed = np.concatenate([batch["reverb"] for batch in batches])
    assert placed.any() and rooms.shape[1] == ROOM_SAMPLES and not rooms[~placed].any()
    expected = np.zeros(ROOM_SAMPLES)
    expected[[0, 1000]] = 1.0, -0.5
    np.testing.assert_allclose(rooms[placed][0], expected, atol=1e-3)
    assert np.isfinite(np.concatenate([batch["snr_db"] for batch in batches])).any()
