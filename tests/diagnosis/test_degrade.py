"""Recordings made worse, against tones whose fate is known."""

import dataclasses

import numpy as np
import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.data import audio
from kmq_jax.data.source import open_source
from kmq_jax.diagnosis import degrade

DATA = "synthetic:dev?speakers=2&utterances=2"


def tone(frequency, seconds=1.0):
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(int(16000 * seconds)) / 16000)).astype(np.float32)


def level(wave):
    return float(np.sqrt(np.mean(wave[2000:-2000] ** 2)))


@pytest.mark.parametrize(
    ("frequency", "passes"), [(100, False), (1000, True), (2500, True), (3900, False), (6000, False)]
)
def test_a_telephone_passes_its_band_alone(frequency, passes):
    share = level(degrade.telephone(tone(frequency))) / level(tone(frequency))
    assert share > 0.9 if passes else share < 0.4


@pytest.mark.parametrize("codec", list(degrade.CODECS))
def test_a_codec_gives_back_as_many_samples_and_nearly_the_sound(codec):
    wave = tone(1000, 0.987)
    heard = degrade.coded(wave, codec)
    assert heard.shape == wave.shape and heard.dtype == np.float32
    assert 0.7 < level(heard) / level(wave) < 1.3
    # Codecs delay: the spectrum tells that it is still this tone.
    spectrum = np.abs(np.fft.rfft(heard[2000:-2000] * np.hanning(len(heard) - 4000)))
    assert abs(spectrum.argmax() * 16000 / (len(heard) - 4000) - 1000) < 10


def test_mu_law_is_that_of_g711():
    """Eight bits by the standard's law leave about 38 dB of signal over quantization noise, at any level."""
    for gain in (1.0, 0.05):
        wave = gain * tone(1000)
        band = degrade.telephone(wave)
        error = degrade.coded(wave, "ulaw") - band
        assert 32 < 20 * np.log10(level(band) / level(error)) < 46


def test_noise_is_at_its_level_and_goes_by_name():
    table, clips = open_source(DATA), open_source("synthetic:train?speakers=1&utterances=3")
    noisy = degrade.degrade(table, degrade.parse_condition("noise=5"), clips, seed=1)
    for i in range(len(table)):
        clean, heard = table.load(i), noisy.load(i)
        assert 10 * np.log10(np.mean(clean**2) / np.mean((heard - clean) ** 2)) == pytest.approx(5, abs=0.01)
    np.testing.assert_array_equal(noisy.load(1), noisy.select([1]).load(0))
    other = degrade.degrade(table, degrade.parse_condition("noise=5"), clips, seed=2)
    assert any((other.load(i) != noisy.load(i)).any() for i in range(len(table)))
    with pytest.raises(UserError, match="needs clips of noise: --noise"):
        degrade.degrade(table, degrade.parse_condition("noise=5"))


def test_names_of_recordings_are_any_bytes():
    table = open_source(DATA)
    odd = dataclasses.replace(table, ids=("caf\udce9", *table.ids[1:]), reader=lambda name: tone(440))
    worse = degrade.degrade(odd, degrade.parse_condition("noise=5"), table.select([1, 2]))
    assert len(worse.load(0)) == 16000


def test_lengths_are_known_before_anything_is_read():
    table = open_source(DATA)
    for text in ("first=0.5", "telephone", "codec=opus"):
        worse = degrade.degrade(table, degrade.parse_condition(text))
        assert worse.lengths().tolist() == [len(worse.load(i)) for i in range(len(worse))]
    assert degrade.degrade(table, degrade.parse_condition("whole")) is table


def test_what_a_condition_leaves_silent_is_named_with_the_condition():
    wave = np.concatenate([np.zeros(16000, np.float32), tone(440)])
    table = dataclasses.replace(open_source(DATA), reader=lambda name: wave)
    worse = degrade.degrade(table, degrade.parse_condition("first=1"))
    with pytest.raises(audio.AudioError, match=rf"^{table.ids[1]}: silent in the condition first=1$"):
        worse.load(1)
    silent = dataclasses.replace(table, ids=("clip",), paths=("clip",), reader=lambda name: 0 * wave)
    noisy = degrade.degrade(table, degrade.parse_condition("noise=5"), silent)
    with pytest.raises(UserError, match="^noise: clip: silent$"):
        noisy.load(1)


@pytest.mark.parametrize(
    "text", ["", "first", "first=0", "first=x", "noise=", "noise=nan", "codec=", "codec=aac", "half"]
)
def test_other_conditions_are_refused(text):
    with pytest.raises(UserError, match="must be whole, first=SECONDS"):
        degrade.parse_condition(text)


@pytest.mark.parametrize("text", ["whole", "first=2", "first=0.5", "telephone", "noise=-5", "codec=ulaw"])
def test_a_condition_is_written_as_it_is_read(text):
    assert str(degrade.parse_condition(text)) == text
