"""A parametric voice: who is speaking (Speaker), what and how (Tracks), and over which channel.

The source-filter model of speech (Fant 1960; Klatt 1980, "Software for a cascade/parallel formant synthesizer"):
glottal pulses and breath noise pass a cascade of vocal-tract resonances, frication noise a filter of its own. Filters
change every frame and are applied to all frames at once in the frequency domain, by overlap-add, so an utterance takes
milliseconds.

    rng -> speaker() -> Speaker
    Speaker, rng -> plan() -> Tracks -> render() -> clean wave -> transmit() -> wave as recorded

Everything here is a pure function of its arguments and of the generator passed in. Frequencies are in Hz at 16 kHz.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.fft
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from scipy.signal import lfilter

Array = NDArray[np.float32]

SAMPLE_RATE = 16_000
HOP = 128  # 8 ms between frames
WINDOW = 2 * HOP
_FFT = 3 * WINDOW  # leaves 32 ms for the tract to ring
_FRAME_SECONDS = HOP / SAMPLE_RATE
_WINDOW_SHAPE = np.hanning(WINDOW + 1)[:-1].astype(np.float32)  # periodic: shifted copies sum to one
# z^-k on the unit circle, [delays, bins]
_DELAYS = np.exp(-2j * np.pi / _FFT * np.outer(np.arange(16), np.arange(_FFT // 2 + 1))).astype(np.complex64)
_WEAVE = (np.arange(HOP) / HOP).astype(np.float32)


class Phone(NamedTuple):
    """What one sound asks of the tract. Formants are an adult male's; gains are linear; time in ms."""

    kind: str
    f1: float
    f2: float
    f3: float
    voice: float = 0.0
    breath: float = 0.0
    friction: float = 0.0
    friction_hz: float = 4000.0
    friction_width: float = 2000.0
    duration: float = 80.0
    zero: float = 0.0  # nasal antiresonance, 0 for none


# Vowels: the men of Hillenbrand et al. (1995). Consonants: loci and spectra after Stevens (1998), "Acoustic Phonetics".
PHONES: dict[str, Phone] = {
    "i": Phone("vowel", 342, 2322, 3000, voice=1, duration=110),
    "I": Phone("vowel", 427, 2034, 2684, voice=1, duration=90),
    "E": Phone("vowel", 580, 1799, 2605, voice=1, duration=100),
    "ae": Phone("vowel", 588, 1952, 2601, voice=1, duration=130),
    "V": Phone("vowel", 623, 1200, 2550, voice=1, duration=90),
    "a": Phone("vowel", 768, 1333, 2522, voice=1, duration=130),
    "O": Phone("vowel", 652, 997, 2538, voice=1, duration=130),
    "U": Phone("vowel", 469, 1122, 2434, voice=1, duration=90),
    "u": Phone("vowel", 378, 997, 2343, voice=1, duration=110),
    "er": Phone("vowel", 474, 1379, 1710, voice=1, duration=110),
    "w": Phone("glide", 310, 700, 2250, voice=0.6, duration=60),
    "j": Phone("glide", 290, 2200, 2950, voice=0.6, duration=60),
    "l": Phone("glide", 360, 1050, 2600, voice=0.5, duration=60),
    "r": Phone("glide", 360, 1200, 1650, voice=0.6, duration=60),
    "m": Phone("nasal", 280, 1000, 2200, voice=0.45, duration=70, zero=1000),
    "n": Phone("nasal", 280, 1500, 2500, voice=0.45, duration=65, zero=1600),
    "ng": Phone("nasal", 280, 1900, 2300, voice=0.4, duration=75, zero=3000),
    "f": Phone("fricative", 340, 1100, 2200, friction=0.05, friction_hz=6500, friction_width=5000, duration=95),
    "th": Phone("fricative", 340, 1400, 2500, friction=0.04, friction_hz=6000, friction_width=5000, duration=85),
    "s": Phone("fricative", 340, 1700, 2600, friction=0.13, friction_hz=5600, friction_width=1500, duration=105),
    "sh": Phone("fricative", 340, 1800, 2400, friction=0.13, friction_hz=3000, friction_width=1100, duration=105),
    "h": Phone("fricative", 500, 1500, 2500, breath=0.25, duration=60),
    "v": Phone("fricative", 320, 1100, 2200, 0.35, 0.02, 0.03, 6500, 5000, duration=65),
    "z": Phone("fricative", 320, 1700, 2600, 0.3, 0.02, 0.07, 5600, 1500, duration=80),
    "p": Phone("stop", 300, 800, 2100, 0, 0.18, 0.15, 900, 1500, duration=45),
    "t": Phone("stop", 300, 1750, 2650, 0, 0.16, 0.2, 4300, 2000, duration=50),
    "k": Phone("stop", 300, 1850, 2300, 0, 0.2, 0.25, 1900, 700, duration=55),
    "b": Phone("stop", 280, 850, 2150, 0.3, 0.05, 0.12, 900, 1500, duration=18),
    "d": Phone("stop", 280, 1700, 2600, 0.3, 0.05, 0.15, 4000, 2000, duration=20),
    "g": Phone("stop", 280, 1850, 2250, 0.3, 0.05, 0.2, 1900, 700, duration=24),
}
NAMES = tuple(PHONES)
_TABLE = np.array([phone[1:] for phone in PHONES.values()])  # [phones, fields], in the order of Phone from f1
_OF_KIND = {
    kind: np.array([i for i, p in enumerate(PHONES.values()) if p.kind == kind])
    for kind in ("vowel", "glide", "nasal", "fricative", "stop")
}
_CONSONANTS = np.concatenate([_OF_KIND[kind] for kind in ("glide", "nasal", "fricative", "stop")])
_VOICED_STOPS = np.array([NAMES.index(name) for name in "bdg"])
_PAUSE, _CLOSURE = len(NAMES), len(NAMES) + 1  # rows added below every speaker's table: silence, and a stop's hold


@dataclass(frozen=True)
class Spread:
    """How far speakers differ against how far one speaker's recordings do: this sets how hard the corpus is.

    At 1 the deviations are those written beside each quantity. The defaults make a narrow network, trained for minutes,
    err in one trial of twenty, while means and deviations of features cannot tell speakers apart.

    Attributes:
        speaker: Multiplies every difference between speakers of one sex.
        session: Multiplies what changes between one speaker's utterances: mood, effort, rate, a little of the tract.
        channel: Multiplies the microphone's and the room's departure from flat, and lowers the noise's distance, in dB.
    """

    speaker: float = 1.6
    session: float = 0.7
    channel: float = 0.9


@dataclass(frozen=True)
class Speaker:
    """What stays the same in one person's voice.

    Attributes:
        sex: "female" or "male".
        pitch: Median fundamental frequency, Hz.
        liveliness: Standard deviation of accents, semitones.
        declination: Fall of pitch through a phrase, semitones a second.
        open_quotient: Share of a cycle in which the glottis is open.
        speed_quotient: Opening time over closing time.
        tilt: Corner of the source's low-pass, Hz: soft voices are low.
        breathiness: Gain of breath noise in voiced sounds.
        jitter: Relative standard deviation of a cycle's length.
        shimmer: Relative standard deviation of a cycle's strength.
        creak: Share of phrase ends that creak.
        nasality: Departure of the nasal zero from its pole in vowels, Hz.
        tract: Resonance frequencies relative to an average man's: the inverse of relative length.
        formants: [phones, 3] targets of F1 to F3, Hz.
        higher: [4] F4 to F7, Hz.
        sinus: Frequency of the piriform sinuses' dip, Hz.
        bandwidth: Factor on formant bandwidths.
        friction: [phones] centres of frication, Hz.
        rate: Speaking rate relative to the table's durations.
        coarticulation: Standard deviation of the smoothing between targets, ms.
        pausing: Probability of a pause after a syllable.
    """

    sex: str
    pitch: float
    liveliness: float
    declination: float
    open_quotient: float
    speed_quotient: float
    tilt: float
    breathiness: float
    jitter: float
    shimmer: float
    creak: float
    nasality: float
    tract: float
    formants: NDArray[np.float64]
    higher: NDArray[np.float64]
    sinus: float
    bandwidth: float
    friction: NDArray[np.float64]
    rate: float
    coarticulation: float
    pausing: float


@dataclass(frozen=True)
class Tracks:
    """An utterance as the articulators see it, a row every `HOP` samples.

    Attributes:
        pitch: [frames] Hz, also where nothing is voiced.
        formants: [frames, 3] F1 to F3, Hz.
        zero: [frames] nasal antiresonance, Hz.
        voice: [frames] gain of the glottal pulses.
        breath: [frames] gain of aspiration noise.
        friction: [frames] gain of frication noise.
        friction_hz: [frames] its centre, Hz.
        friction_width: [frames] its bandwidth, Hz.
        effort: Vocal effort of the utterance, in standard deviations from the speaker's usual.
        tract: Factor on the speaker's fixed resonances in this utterance.
    """

    pitch: Array
    formants: Array
    zero: Array
    voice: Array
    breath: Array
    friction: Array
    friction_hz: Array
    friction_width: Array
    effort: float = 0.0
    tract: float = 1.0


def speaker(rng: np.random.Generator, sex: str, spread: Spread = Spread()) -> Speaker:
    """Draws a person: averages of the sex, and departures from them."""
    male = sex == "male"
    size = spread.speaker

    def near(mean: float, deviation: float) -> float:  # log-normal: deviations are relative
        return mean * float(np.exp(size * deviation * rng.standard_normal()))

    tract = near(1.0 if male else 1.16, 0.04)
    # Habits of articulation: a vowel space wider or narrower than usual, and a departure for every sound.
    log_formants = np.log(_TABLE[:, :3])
    centre = log_formants[_OF_KIND["vowel"]].mean(axis=0)
    reach = 1.0 + size * np.array([0.12, 0.10, 0.12]) * rng.standard_normal(3)
    habits = size * np.array([0.06, 0.05, 0.035]) * rng.standard_normal((len(NAMES), 3))
    higher = tract * np.array([near(f, d) for f, d in ((3450, 0.05), (4400, 0.05), (5450, 0.035), (6500, 0.025))])
    # Resonances of one tube repel each other; coinciding ones would ring out of all proportion.
    for k in (1, 2, 3):
        higher[k] = max(higher[k], 1.12 * higher[k - 1])
    formants = tract * np.exp(centre + reach * (log_formants - centre) + habits)
    formants[:, 2] = np.minimum(formants[:, 2], 0.88 * higher[0])
    for k in (1, 0):
        formants[:, k] = np.minimum(formants[:, k], 0.86 * formants[:, k + 1])
    return Speaker(
        sex=sex,
        pitch=near(115.0 if male else 200.0, 0.14),
        liveliness=near(1.8, 0.35),
        declination=near(1.2, 0.5),
        open_quotient=float(np.clip(near(0.58 if male else 0.68, 0.14), 0.35, 0.92)),
        speed_quotient=float(np.clip(near(2.2, 0.25), 1.1, 4.5)),
        tilt=near(2200.0 if male else 1700.0, 0.4),
        breathiness=min(near(0.025 if male else 0.04, 0.6), 0.12),  # voices, not patients
        jitter=min(near(0.006, 0.5), 0.02),
        shimmer=min(near(0.04, 0.5), 0.12),
        creak=float(np.clip(0.25 + 0.25 * size * rng.standard_normal(), 0.0, 1.0)),
        nasality=near(60.0, 0.7),
        tract=tract,
        formants=formants,
        higher=higher,
        sinus=near(4700.0 if male else 5200.0, 0.08),
        bandwidth=near(1.0, 0.22),
        friction=_TABLE[:, 6] * (0.4 + 0.6 * tract) * np.exp(size * 0.08 * rng.standard_normal(len(NAMES))),
        rate=near(1.0, 0.14),
        coarticulation=near(20.0, 0.25),
        pausing=float(np.clip(near(0.07, 0.4), 0.0, 0.3)),
    )


def plan(speaker: Speaker, rng: np.random.Generator, seconds: float, spread: Spread = Spread()) -> Tracks:
    """Decides what is said and how: random syllables in the speaker's habits and the utterance's mood.

    Returns:
        Tracks of `seconds`, rounded up to whole frames.
    """
    mood = spread.session * rng.standard_normal(6)
    effort = float(mood[0])
    frames = int(np.ceil(seconds / _FRAME_SECONDS))
    rate = speaker.rate * np.exp(0.1 * mood[1])
    phones, stress = _syllables(speaker, rng, int(seconds * 12 * rate) + 8)  # more than fit

    # One more row for a pause and one for the hold before a stop's release: they keep the neighbour's formants.
    durations = np.append(_TABLE[:, 8], (180.0, 55.0))[phones] / rate * np.exp(0.2 * rng.standard_normal(len(phones)))
    durations[0] = rng.uniform(50, 250)
    ends = np.cumsum(durations / 1000 / _FRAME_SECONDS)
    last = int(np.searchsorted(ends, frames - 10))  # the rest is silence
    phone_of_frame = np.minimum(np.searchsorted(ends, np.arange(frames), side="right"), last)
    phones = np.append(phones[:last], _PAUSE)
    stress = np.append(stress[:last], 0.0)

    silent = phones >= len(NAMES)
    carrier = _next_sound(silent)  # a silence prepares for the targets of the sound behind it
    sounds = np.where(silent, phones[carrier], phones)
    sounds = np.where(sounds >= len(NAMES), NAMES.index("V"), sounds)
    tract = float(np.exp(0.012 * mood[2]))
    # Louder speech opens the jaw: F1 rises with effort. Every rendition misses its target a little.
    targets = np.log(speaker.formants[sounds] * tract) + 0.03 * effort * np.array([1.0, 0.0, 0.0])
    targets = targets + spread.session * np.array([0.05, 0.04, 0.03]) * rng.standard_normal((len(sounds), 3))
    table = _TABLE[sounds]
    sounding = ~silent
    # A voiced stop's hold lets a weak murmur through.
    murmur = (phones == _CLOSURE) & np.isin(sounds, _VOICED_STOPS)
    loudness = np.exp(0.12 * stress + 0.1 * rng.standard_normal(len(sounds)))
    voice = np.where(sounding, table[:, 3], np.where(murmur, 0.08, 0.0)) * loudness
    breath = np.where(sounding, table[:, 4], 0.0) * loudness
    friction = np.where(sounding, table[:, 5], 0.0) * loudness
    neutral = 270.0 * speaker.tract + speaker.nasality
    zero = np.where(sounding & (table[:, 9] > 0), table[:, 9] * speaker.tract, neutral)

    def follow(values: np.ndarray, milliseconds: float) -> Array:
        track = values.astype(np.float32)[phone_of_frame]
        return gaussian_filter1d(track, milliseconds / 1000 / _FRAME_SECONDS, axis=0, mode="nearest")

    seconds_in = np.arange(frames) * _FRAME_SECONDS
    semitones = (
        speaker.liveliness * np.exp(0.25 * mood[3]) * follow(stress, 45.0)
        - speaker.declination * (seconds_in - seconds / 2)
        + 1.4 * mood[4]
        + 0.5 * effort
        + 0.25 * gaussian_filter1d(rng.standard_normal(frames), 6.0) * 4.0  # slow wander
    )
    return Tracks(
        pitch=(speaker.pitch * 2 ** (semitones / 12)).astype(np.float32),
        formants=np.exp(follow(targets, speaker.coarticulation)),
        zero=follow(zero, 10.0),
        voice=follow(voice, 9.0),
        breath=follow(breath, 7.0) + follow(voice, 9.0) * speaker.breathiness * float(np.exp(0.4 * mood[5])),
        friction=follow(friction, 5.0),
        friction_hz=follow(np.where(sounding, speaker.friction[sounds], 3000.0), 8.0),
        friction_width=follow(table[:, 7], 8.0),
        effort=effort,
        tract=tract,
    )


def hold(speaker: Speaker, vowel: str, seconds: float) -> Tracks:
    """A vowel sung on the speaker's median pitch: the voice without what it says."""
    frames = int(np.ceil(seconds / _FRAME_SECONDS))
    constant = np.ones(frames, np.float32)
    return Tracks(
        pitch=speaker.pitch * constant,
        formants=speaker.formants[NAMES.index(vowel)].astype(np.float32) * constant[:, None],
        zero=(270.0 * speaker.tract + speaker.nasality) * constant,
        voice=constant,
        breath=speaker.breathiness * constant,
        friction=0 * constant,
        friction_hz=4000 * constant,
        friction_width=2000 * constant,
    )


def render(tracks: Tracks, speaker: Speaker, rng: np.random.Generator) -> Array:
    """Sounds the tracks through the speaker's glottis and vocal tract.

    Returns:
        [frames * HOP] the voice at the lips, of arbitrary level.
    """
    frames = len(tracks.pitch)
    noise = rng.standard_normal((2, frames * HOP), dtype=np.float32)
    pulses, flow = _glottis(tracks, speaker, rng)
    source = pulses * _per_sample(tracks.voice) + noise[0] * (0.4 + flow) * _per_sample(tracks.breath)
    hiss = noise[1] * _per_sample(tracks.friction)

    poles, gain = _resonators(tracks.formants, np.array([60.0, 85.0, 130.0], np.float32) * speaker.bandwidth)
    zeros, zero_gain = _resonators(tracks.zero[:, None], np.array([90.0], np.float32))
    hiss_poles, _ = _resonators(tracks.friction_hz[:, None], tracks.friction_width[:, None])

    spectrum = scipy.fft.rfft(_frames(source), _FFT, axis=1)
    spectrum *= _spectrum(zeros * (gain / zero_gain)[:, None])
    spectrum *= _fixed_response(speaker, tracks.tract)
    spectrum /= _spectrum(poles)
    frication = scipy.fft.rfft(_frames(hiss), _FFT, axis=1)
    frication *= 1 - _DELAYS[1]  # frication has no low frequencies
    frication /= _spectrum(hiss_poles)
    spectrum += frication
    return _overlap_add(scipy.fft.irfft(spectrum, _FFT, axis=1))


def transmit(wave: Array, rng: np.random.Generator, spread: Spread = Spread()) -> Array:
    """Records a clean voice: a room, background noise, a microphone, perhaps a telephone's band, and some level.

    Args:
        wave: [samples].
        rng: Draws the channel.
        spread: How far channels differ.

    Returns:
        [samples] float32 within (-1, 1).
    """
    size = spread.channel
    samples = len(wave)
    length = scipy.fft.next_fast_len(samples + SAMPLE_RATE // 4, real=True)  # room for the tail: no wrap-around
    spectrum = scipy.fft.rfft(wave, length) * scipy.fft.rfft(_room(rng, size), length)

    grid = np.linspace(0, SAMPLE_RATE / 2, 513)  # channels are smooth: drawn coarsely, read finely
    fine = np.linspace(0, 512, length // 2 + 1)

    # Noise from brown to white, at a level relative to the speech.
    colour = (np.maximum(grid, 60.0) / 1000) ** rng.uniform(-1.0, 0.0)
    noise = scipy.fft.rfft(rng.standard_normal(samples, dtype=np.float32), length)
    noise *= np.interp(fine, np.arange(513), colour).astype(np.float32)
    level = rng.uniform(45.0 - 33.0 * size, 60.0 - 20.0 * size)
    noise *= np.linalg.norm(spectrum) / np.linalg.norm(noise) * 10 ** (-level / 20)

    microphone = np.interp(fine, np.arange(513), _microphone(grid, rng, size)).astype(np.float32)
    out = scipy.fft.irfft((spectrum + noise) * microphone, length)[:samples]
    out *= 10 ** (rng.uniform(-32, -18) / 20) / np.sqrt(np.mean(np.square(out)))
    return np.clip(out, -0.99, 0.99).astype(np.float32)


def _syllables(speaker: Speaker, rng: np.random.Generator, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """Random consonant-vowel(-consonant) syllables: indices into the phone table, and each phone's stress."""
    phones, stress = [_PAUSE], [0.0]
    while len(phones) < wanted:
        accent = rng.standard_normal()
        shape = rng.random(5)
        onset = [rng.choice(_CONSONANTS)] if shape[0] < 0.85 else []
        if onset and shape[1] < 0.15:
            onset.append(rng.choice(_OF_KIND["glide"]))
        coda = [rng.choice(_CONSONANTS)] if shape[2] < 0.3 else []
        for phone in (*onset, rng.choice(_OF_KIND["vowel"]), *coda):
            if phone in _OF_KIND["stop"]:
                phones.append(_CLOSURE)
                stress.append(accent)
            phones.append(int(phone))
            stress.append(accent)
        if shape[3] < speaker.pausing:
            phones.append(_PAUSE)
            stress.append(0.0)
    return np.array(phones), np.array(stress)


def _next_sound(silent: np.ndarray) -> np.ndarray:
    """For each phone the index of itself or of the first sound after it (the last sound at the end)."""
    index = np.where(silent, len(silent), np.arange(len(silent)))
    following = np.minimum.accumulate(index[::-1])[::-1]
    return np.where(following == len(silent), np.max(np.flatnonzero(~silent), initial=0), following)


def _glottis(tracks: Tracks, speaker: Speaker, rng: np.random.Generator) -> tuple[Array, Array]:
    """Rosenberg's pulse (1971): [samples] its derivative, which is what the lips radiate, and the flow itself.

    The derivative is the difference of the flow over one sample: the mean of the true derivative, so aliases are weak.
    """
    pitch = _per_sample(tracks.pitch).astype(np.float64)
    cycles = int(pitch.sum() / SAMPLE_RATE) + 2
    cycle = (np.cumsum(pitch) / SAMPLE_RATE).astype(np.int32)  # by the intended pitch: it says whose wobble counts
    wobble = speaker.jitter * rng.standard_normal(cycles)
    strength = 1 + speaker.shimmer * rng.standard_normal(cycles)
    if rng.random() < speaker.creak:  # phrase-final creak: every second pulse is late and weak
        tail = np.arange(cycles) > cycles - rng.integers(8, 25)
        wobble = wobble + np.where(tail, np.where(np.arange(cycles) % 2, 0.12, -0.2), 0.0)
        strength = strength * np.where(tail & (np.arange(cycles) % 2 == 1), 0.5, 1.0)
    phase = np.cumsum(pitch * (1 + wobble[cycle])) / SAMPLE_RATE
    beat = np.minimum(phase.astype(np.int32), cycles - 1)  # the cycle as it turns out
    phase -= np.floor(phase)

    # A louder voice closes faster and for longer.
    open_quotient = np.clip(speaker.open_quotient - 0.05 * tracks.effort, 0.3, 0.95)
    peak = open_quotient * speaker.speed_quotient / (1 + speaker.speed_quotient)
    closing = open_quotient - peak
    grid = np.arange(1025) / 1024
    shape = np.where(grid < peak, 0.5 - 0.5 * np.cos(np.pi * grid / peak), 0.0)
    shape = np.where((grid >= peak) & (grid < open_quotient), np.cos(0.5 * np.pi * (grid - peak) / closing), shape)
    flow = np.interp(phase, grid, shape).astype(np.float32)
    pulses = np.diff(flow, prepend=np.float32(0)) * (closing * SAMPLE_RATE / pitch * strength[beat]).astype(np.float32)
    pole = np.exp(-2 * np.pi * speaker.tilt * np.exp(0.25 * tracks.effort) / SAMPLE_RATE)
    return lfilter([np.float32(1 - pole)], np.array([1, -pole], np.float32), pulses), flow


def _fixed_response(speaker: Speaker, tract: float) -> NDArray[np.complex64]:
    """[bins] of what no articulation moves: the nasal pole, F4 to F7 and the dip of the piriform sinuses."""
    poles, gain = _resonators(
        np.append(270.0 * speaker.tract, speaker.higher * tract)[None].astype(np.float32),
        np.array([90.0, 190.0, 260.0, 350.0, 450.0], np.float32) * np.append(1.0, np.full(4, speaker.bandwidth)),
    )
    sinus = np.full((1, 1), speaker.sinus * tract, np.float32)
    dip, _ = _resonators(sinus, np.array([250.0], np.float32))
    fill, _ = _resonators(sinus * np.float32(1.04), np.array([500.0], np.float32))
    return (_spectrum(dip) / (_spectrum(fill) * _spectrum(poles)) * gain[:, None])[0]


def _room(rng: np.random.Generator, size: float) -> Array:
    """A quarter of a second of room: the direct sound and an exponentially decaying diffuse tail."""
    time = np.arange(SAMPLE_RATE // 4, dtype=np.float32) / SAMPLE_RATE
    tail = rng.standard_normal(len(time), dtype=np.float32)
    # 6.9 is ln 1000: down by 60 dB after the reverberation time, which is drawn.
    tail *= np.exp(-6.9 / rng.uniform(0.1, 0.5) * time)
    tail[: int(SAMPLE_RATE * rng.uniform(0.001, 0.006))] = 0.0
    tail *= size * 10 ** (rng.uniform(-24, -4) / 20) / np.linalg.norm(tail)
    tail[0] = 1.0  # the direct sound
    return tail


def _microphone(frequency: np.ndarray, rng: np.random.Generator, size: float) -> np.ndarray:
    """[points] magnitude: a smooth random curve, a low cut, and a high cut that is sometimes a telephone's."""
    octave = np.log2(np.maximum(frequency, 50.0) / 50.0) / np.log2(SAMPLE_RATE / 2 / 50.0)  # 0 .. 1
    ripples = np.cos(np.pi * np.arange(1, 7)[:, None] * octave + rng.uniform(0, 2 * np.pi, (6, 1)))
    heights = size * np.array([5.0, 3.5, 2.5, 2.0, 1.5, 1.2]) * rng.standard_normal(6)
    curve = 10 ** (heights @ ripples / 20)
    low = rng.uniform(40, 40 + 160 * size)
    high = rng.uniform(3400, 5000) if rng.random() < 0.2 * size else rng.uniform(6000, 7900)
    # Butterworth magnitudes: third order below, twelfth above.
    curve /= np.sqrt(1 + (low / np.maximum(frequency, 1.0)) ** 6)
    curve /= np.sqrt(1 + (frequency / high) ** 24)
    return curve


def _resonators(frequency: Array, bandwidth: Array) -> tuple[Array, Array]:
    """A cascade of two-pole resonators at `frequency` [frames, n], Hz.

    Returns:
        [frames, 2n + 1] coefficients of the denominator; [frames] the gain that makes its response one at 0 Hz.
    """
    radius = np.exp(-np.pi * bandwidth / SAMPLE_RATE)
    angle = 2 * np.pi / SAMPLE_RATE * np.minimum(frequency, 0.49 * SAMPLE_RATE)
    first = (-2 * radius * np.cos(angle)).astype(np.float32)
    second = np.broadcast_to(radius * radius, first.shape).astype(np.float32)
    frames, count = first.shape
    polynomial = np.zeros((frames, 2 * count + 1), np.float32)
    polynomial[:, 0] = 1
    # Each factor 1 + first z^-1 + second z^-2 lengthens the product by two coefficients.
    for k in range(count):
        previous = polynomial[:, : 2 * k + 1].copy()
        polynomial[:, 1 : 2 * k + 2] += first[:, k, None] * previous
        polynomial[:, 2 : 2 * k + 3] += second[:, k, None] * previous
    return polynomial, np.prod(1 + first + second, axis=1)


def _spectrum(polynomial: Array) -> NDArray[np.complex64]:
    """Values on the unit circle: [frames, order + 1] -> [frames, bins]."""
    return polynomial @ _DELAYS[: polynomial.shape[1]]


def _per_sample(track: Array) -> Array:
    """Linear interpolation of a track from frames to samples: [frames] -> [frames * HOP]."""
    step = np.append(np.diff(track), np.float32(0))
    return (track[:, None] + step[:, None] * _WEAVE).ravel()


def _frames(signal: Array) -> Array:
    """Windowed overlapping frames, one centred on every track row: [frames * HOP] -> [frames, WINDOW]."""
    padded = np.concatenate([np.zeros(HOP, np.float32), signal])  # half a window: the first frame is centred on 0
    return np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP] * _WINDOW_SHAPE


def _overlap_add(blocks: Array) -> Array:
    """The inverse of `_frames`, for frames that grew to `_FFT` samples: [frames, _FFT] -> [frames * HOP]."""
    frames, pieces = len(blocks), _FFT // HOP
    out = np.zeros((frames + pieces, HOP), np.float32)
    for k in range(pieces):
        out[k : k + frames] += blocks[:, k * HOP : (k + 1) * HOP]
    return out[1 : frames + 1].ravel()  # without the half window in front of the signal
