"""The synthetic voice against measurement: pitch by autocorrelation, formants by linear prediction."""

import dataclasses

import numpy as np
import pytest
from scipy.linalg import solve_toeplitz
from scipy.signal import lfilter

from kmq_jax.data import voice

RATE = voice.SAMPLE_RATE


def rng(seed):
    return np.random.default_rng(seed)


def autocorrelation(frame, lags):
    spectrum = np.fft.rfft(frame, 2 * len(frame))
    return np.fft.irfft(np.abs(spectrum) ** 2)[:lags]


def measure_pitch(frame, lowest=60, highest=400):
    """Pitch (Hz) of one frame, and how periodic it is (0 to 1), by normalised autocorrelation."""
    frame = frame - frame.mean()
    half = len(frame) // 2
    first, last = RATE // highest, RATE // lowest
    head = frame[:half]
    score = np.array(
        [
            head @ frame[k : k + half] / (np.linalg.norm(head) * np.linalg.norm(frame[k : k + half]) + 1e-9)
            for k in range(first, last)
        ]
    )
    # The first peak nearly as high as the highest: not a multiple of the period.
    peaks = [k for k in range(1, len(score) - 1) if score[k] >= score[k - 1] and score[k] >= score[k + 1]]
    best = next((k for k in peaks if score[k] > 0.9 * score.max()), int(score.argmax()))
    return RATE / (first + best), score[best]


def measure_formants(wave, order=18):
    """Resonances (Hz) of a steady vowel: roots of the linear predictor that lie near the unit circle."""
    wave = lfilter([1, -0.97], [1], wave) * np.hanning(len(wave))
    r = autocorrelation(wave, order + 1)
    r[0] *= 1 + 1e-9
    roots = np.roots(np.append(1, -solve_toeplitz(r[:order], r[1:])))
    roots = roots[(np.imag(roots) > 0) & (np.abs(roots) > 0.85)]
    return np.sort(np.angle(roots) * RATE / (2 * np.pi))


@pytest.mark.parametrize("sex", ["female", "male"])
@pytest.mark.parametrize("seed", range(4))
def test_a_held_vowel_has_the_speakers_pitch(sex, seed):
    person = dataclasses.replace(voice.speaker(rng(seed), sex), breathiness=0.01)
    wave = voice.render(voice.hold(person, "a", 0.5), person, rng(seed))
    pitch, periodicity = measure_pitch(wave[2000:4000].astype(float))
    assert pitch == pytest.approx(person.pitch, rel=0.03)
    assert periodicity > 0.7


def test_pitch_follows_its_track_through_an_utterance():
    person = voice.speaker(rng(3), "male")
    tracks = voice.plan(person, rng(4), 4.0)
    wave = voice.render(tracks, person, rng(5)).astype(float)
    loud = np.flatnonzero(tracks.voice > 0.5)
    loud = loud[(loud > 5) & (loud < len(tracks.pitch) - 8)]
    error = [measure_pitch(wave[f * voice.HOP - 400 : f * voice.HOP + 400])[0] / tracks.pitch[f] - 1 for f in loud[::4]]
    assert len(error) > 10
    assert np.median(np.abs(error)) < 0.03


def steady(person):
    """The same person speaking low and without breath, which makes the tract easy to see."""
    return dataclasses.replace(person, pitch=80.0, breathiness=0.001, jitter=0.0, nasality=0.0, bandwidth=0.8)


@pytest.mark.parametrize("vowel", ["i", "E", "a", "u"])
def test_linear_prediction_finds_the_formants(vowel):
    person = steady(voice.speaker(rng(0), "male", voice.Spread(speaker=0.0)))
    wave = voice.render(voice.hold(person, vowel, 0.6), person, rng(1)).astype(float)
    found = measure_formants(wave[2000:8000])
    for formant in person.formants[voice.NAMES.index(vowel)]:
        assert np.min(np.abs(found / formant - 1)) < 0.09, (formant, found)


def test_a_shorter_tract_raises_every_formant():
    male = steady(voice.speaker(rng(0), "male", voice.Spread(speaker=0.0)))
    factor = 1.2
    short = dataclasses.replace(male, tract=factor, formants=male.formants * factor, higher=male.higher * factor)
    found = []
    for person in (male, short):
        wave = voice.render(voice.hold(person, "E", 0.6), person, rng(1)).astype(float)
        peaks = measure_formants(wave[2000:8000])
        targets = person.formants[voice.NAMES.index("E")]
        found.append([peaks[np.argmin(np.abs(peaks - target))] for target in targets])
    assert np.array(found[1]) / np.array(found[0]) == pytest.approx([factor] * 3, rel=0.06)


def test_women_have_shorter_tracts_and_higher_voices():
    women = [voice.speaker(rng(i), "female") for i in range(40)]
    men = [voice.speaker(rng(100 + i), "male") for i in range(40)]
    assert np.median([w.pitch for w in women]) > 1.4 * np.median([m.pitch for m in men])
    assert np.median([w.tract for w in women]) > 1.08 * np.median([m.tract for m in men])


def test_without_spread_all_speakers_of_a_sex_are_one():
    one, other = (voice.speaker(rng(i), "female", voice.Spread(speaker=0.0)) for i in (1, 2))
    for field in dataclasses.fields(one):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


def test_pitch_varies_less_within_a_speaker_than_between():
    medians = []
    for i in range(8):
        person = voice.speaker(rng(i), "male")
        row = []
        for j in range(5):
            draw = rng([i, j])
            wave = voice.transmit(voice.render(voice.plan(person, draw, 2.0), person, draw), draw)
            frames = [measure_pitch(wave[k : k + 900].astype(float)) for k in range(4000, 28000, 1200)]
            row.append(np.log(np.median([pitch for pitch, periodicity in frames if periodicity > 0.6])))
        medians.append(row)
    medians = np.array(medians)
    assert medians.mean(axis=1).var() > medians.var(axis=1).mean()


def test_the_noisy_sounds_are_noise_and_the_voiced_are_not():
    person = voice.speaker(rng(0), "male")
    draw = rng(1)
    tracks = voice.plan(person, draw, 5.0)
    wave = voice.render(tracks, person, draw).astype(float)
    hissing = np.flatnonzero((tracks.friction > 0.1) & (tracks.voice < 0.01))
    voiced = np.flatnonzero((tracks.friction < 0.001) & (tracks.voice > 0.5))
    crossings = np.abs(np.diff(np.sign(wave), append=0))

    def rate(frames):
        return np.mean([crossings[f * voice.HOP : (f + 1) * voice.HOP].mean() for f in frames])

    assert len(hissing) > 5 and len(voiced) > 50
    assert rate(hissing) > 3 * rate(voiced)


@pytest.mark.parametrize("seconds", [0.5, 2.0, 5.0])
def test_a_recording_is_finite_and_within_range(seconds):
    person = voice.speaker(rng(7), "female")
    draw = rng(8)
    wave = voice.transmit(voice.render(voice.plan(person, draw, seconds), person, draw), draw)
    assert wave.dtype == np.float32 and np.isfinite(wave).all()
    assert len(wave) == np.ceil(seconds * RATE / voice.HOP) * voice.HOP
    assert 0.01 < np.sqrt(np.mean(np.square(wave, dtype=np.float64))) < 0.2 and np.abs(wave).max() < 1


def test_the_channel_does_not_wrap_around():
    wave = np.zeros(RATE, np.float32)
    wave[-200:] = rng(0).standard_normal(200)
    heard = voice.transmit(wave, rng(1))
    quiet = voice.transmit(wave[::-1].copy(), rng(1))
    # Before the sound there is only background noise; after it, noise and the room.
    assert np.square(heard[:4000]).mean() < 0.05 * np.square(heard[-200:]).mean()
    assert np.square(quiet[-4000:]).mean() < 0.05 * np.square(quiet[:200]).mean()
