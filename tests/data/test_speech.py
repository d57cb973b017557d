"""Voice activity: silence is left out, speech is kept, and what was used is said."""

import os
from pathlib import Path

import numpy as np
import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.data import source, speech

pytest.importorskip("webrtcvad")
RATE = source.SAMPLE_RATE


@pytest.fixture(scope="module")
def voice():
    table = source.open_source("synthetic:dev?speakers=1&utterances=3")
    wave = np.concatenate([table.load(row) for row in range(3)])
    return wave / np.abs(wave).max() / 2


def with_pauses(voice, seconds=4.0):
    noise = np.random.default_rng(0).normal(size=int(seconds * RATE)).astype(np.float32) * 1e-4
    return np.concatenate([noise, voice, noise])


def test_pauses_are_left_out_and_speech_is_kept(voice):
    wave = with_pauses(voice)
    active = speech.activity(wave)
    assert active.shape == (-(-len(wave) // speech.FRAME),)
    pause = 4 * RATE // speech.FRAME
    assert active[: pause - 8].mean() < 0.05 and active[8 - pause :].mean() < 0.05
    energy = np.array([np.square(part).mean() for part in np.array_split(wave, len(active))])
    loud = energy > 0.1 * energy.max()
    assert active[loud].mean() > 0.95
    found = speech.kept(wave, active)
    np.testing.assert_array_equal(found[:100], wave[int(np.argmax(active)) * speech.FRAME :][:100])


@pytest.mark.skipif("KMQ_SHARED" not in os.environ, reason="KMQ_SHARED names no real speech")
def test_real_speech_is_mostly_kept():
    table = source.open_source(Path(os.environ["KMQ_SHARED"]) / "data" / "so762" / "dev")
    waves = [table.load(row) for row in range(0, 60, 6)]
    shares = [speech.activity(wave).mean() for wave in waves]
    assert np.mean(shares) > 0.6
    wave = np.concatenate([piece for wave in waves for piece in (wave, np.zeros(3 * RATE, np.float32))])
    used, speaks = len(speech.kept(wave, speech.activity(wave))), sum(map(len, waves))
    assert 0.6 * speaks < used < 1.1 * speaks < 0.7 * len(wave)


def test_what_was_used_is_said_and_nothing_is_refused(voice, capsys):
    wave = with_pauses(voice, 2 * len(voice) / RATE)
    found = speech.only(wave, "a.wav")
    told = capsys.readouterr().err
    assert told.startswith(f"a.wav: used {len(found) / RATE:.1f} s of speech of {len(wave) / RATE:.1f} s")
    assert "warning: mostly no speech" in told
    assert "warning" not in speech.describe(60, 100)
    noise = np.random.default_rng(0).normal(size=2 * RATE).astype(np.float32) * 1e-4
    with pytest.raises(UserError, match=r"b\.wav: no speech"):
        speech.only(noise, "b.wav")


def test_a_table_of_speech_alone(voice, tmp_path, capsys):
    import soundfile

    (tmp_path / "alice").mkdir()
    for name, wave in (("1", voice), ("2", with_pauses(voice))):
        soundfile.write(tmp_path / "alice" / f"{name}.wav", wave, RATE, subtype="FLOAT")
    table = source.open_source(tmp_path)
    capsys.readouterr()
    found = speech.of_table(table)
    assert "2 recordings: used " in capsys.readouterr().err
    assert found.ids == table.ids and found.paths == table.paths
    for row in range(2):
        assert len(found.load(row)) == found.lengths()[row] < table.lengths()[row] + 1
    assert found.lengths()[1] < 0.8 * table.lengths()[1]
    (other,) = found.select([1]).ids
    np.testing.assert_array_equal(found.select([1]).load(0), found.load(found.ids.index(other)))


def test_without_the_package_one_line(monkeypatch, voice):
    import sys

    monkeypatch.setitem(sys.modules, "webrtcvad", None)
    with pytest.raises(UserError, match="webrtcvad-wheels"):
        speech.activity(voice)
