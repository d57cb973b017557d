"""Augmentation: added noise, simulated room reverberation and SpecAugment, as pure functions with explicit keys.

A speaker network hears few microphones and rooms in training, and many in use. So training disturbs each crop at
random: by noise, music or other voices at a random level, by a simulated room, or both. Then SpecAugment wipes out a
strip of time and a strip of frequency of the features, so that no single cue suffices.

All of it runs inside the jitted training step, in static shapes: it compiles once for a batch shape. The host only
chooses (which noise, which level, which examples get a room).
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from scipy.fft import next_fast_len

from kmq_jax.core.errors import UserError
from kmq_jax.core.mesh import AXIS

SPEED_OF_SOUND = 343.0  # m/s, in air at 20 degrees Celsius
_SILENCE = 1e-10  # power of -100 dB full scale: less than this is taken for digital silence


def from_int16(wave: jax.Array) -> jax.Array:
    """Turns 16-bit samples, as the data pipeline sends them, into float32 in [-1, 1); floats stay as they are.

    >>> from_int16(jnp.array([16384, -32768], jnp.int16)).tolist()
    [0.5, -1.0]
    """
    return wave if jnp.issubdtype(wave.dtype, jnp.floating) else wave.astype(jnp.float32) / 32768


def add_noise(wave: jax.Array, noise: jax.Array, snr_db: jax.Array) -> jax.Array:
    """Adds noise at a given signal-to-noise ratio.

    Both powers are means over all samples. Where either signal is silent no ratio can be met, and the wave is
    returned as it came; so it is for a ratio of infinity, which asks for no noise.

    Args:
        wave: speech [..., samples].
        noise: as long as the speech [..., samples].
        snr_db: wanted ratio in dB [...], for each waveform.

    Returns:
        The mixture [..., samples]; it may exceed [-1, 1), and is not clipped.

    >>> add_noise(jnp.array([1.0, -1.0]), jnp.array([2.0, 2.0]), jnp.array(0.0)).tolist()  # equal powers
    [2.0, 0.0]
    """
    speech_power = jnp.mean(wave**2, -1)
    noise_power = jnp.mean(noise**2, -1)
    audible = (speech_power > _SILENCE) & (noise_power > _SILENCE)
    ratio = speech_power / jnp.where(audible, noise_power, 1.0)
    gain = jnp.where(audible, jnp.sqrt(ratio) * 10.0 ** (-snr_db / 20.0), 0.0)
    return wave + gain[..., None] * noise


@dataclasses.dataclass(frozen=True)
class RoomConfig:
    """Which rooms `simulate_rir` draws, each value uniformly between two bounds.

    Attributes:
        sample_rate: in Hz.
        smallest: width, depth and height of the smallest room, in metres.
        largest: those of the largest: with the smallest, from a small office to a large meeting room.
        rt60: shortest and longest reverberation time, in seconds: the time in which sound falls by 60 dB.
        margin: least distance of source and microphone from the walls, in metres.
        images: mirror images on each side of the room along each axis. Up to the distance at which the first
            missing image would be heard, reflections are exact; later ones are the diffuse tail.
        seconds: length of the response.

    >>> RoomConfig(rt60=(0.2, 0.4)).largest
    (10.0, 8.0, 4.0)
    """

    sample_rate: int = 16000
    smallest: tuple[float, float, float] = (3.0, 3.0, 2.5)
    largest: tuple[float, float, float] = (10.0, 8.0, 4.0)
    rt60: tuple[float, float] = (0.1, 0.6)
    margin: float = 0.3
    images: tuple[int, int, int] = (4, 4, 5)
    seconds: float = 0.5

    def __post_init__(self) -> None:
        """Checks the settings.

        Raises:
            UserError: a bound is out of order or a room too small; the message names it.
        """
        if any(not 2 * self.margin < a <= b for a, b in zip(self.smallest, self.largest)):
            raise UserError(
                f"smallest (={self.smallest}) must exceed twice the margin (={self.margin}) "
                f"and not exceed largest (={self.largest})"
            )
        if not 0 < self.rt60[0] <= self.rt60[1]:
            raise UserError(f"rt60 (={self.rt60}) must be two positive times in order")
        if self.margin < 0 or min(self.images) < 1 or self.taps < 1:
            raise UserError("margin, images and seconds must be positive")

    @property
    def taps(self) -> int:
        """Samples in a response."""
        return round(self.seconds * self.sample_rate)


class Room(NamedTuple):
    """A box-shaped room with a source and a microphone in it.

    Attributes:
        size: width, depth and height in metres [3].
        source: position of the source, from a corner, in metres [3].
        microphone: position of the microphone [3].
        rt60: reverberation time in seconds, a scalar.
    """

    size: jax.Array
    source: jax.Array
    microphone: jax.Array
    rt60: jax.Array


def draw_room(key: jax.Array, config: RoomConfig) -> Room:
    """Draws a room, places a source and a microphone in it, and sets how long it reverberates.

    >>> room = draw_room(jax.random.key(0), RoomConfig())
    >>> bool(((0.3 <= room.source) & (room.source <= room.size - 0.3)).all())  # off the walls
    True
    """
    keys = jax.random.split(key, 4)
    size = jax.random.uniform(keys[0], (3,), minval=jnp.array(config.smallest), maxval=jnp.array(config.largest))
    place = functools.partial(jax.random.uniform, shape=(3,), minval=config.margin, maxval=size - config.margin)
    rt60 = jax.random.uniform(keys[3], minval=config.rt60[0], maxval=config.rt60[1])
    return Room(size, place(keys[1]), place(keys[2]), rt60)


def room_response(key: jax.Array, room: Room, config: RoomConfig) -> jax.Array:
    """Computes the impulse response of a room: exact early reflections and a diffuse tail.

    A flat wall acts as a mirror, so a box-shaped room sounds like an endless lattice of mirrored sources in the open,
    each heard after its distance over the speed of sound, weakened by its distance and by every wall its sound has
    crossed. The images that matter grow with the cube of time, while the ear soon stops telling them apart: from
    the time at which the lattice is no longer complete, the response goes on as Gaussian noise that falls by 60 dB
    in `rt60`. The level needs no fitting: 4 pi c / V images' worth of power arrives per second at every time,
    reduced by the walls.

    Args:
        key: random key of the tail.
        room: the room.
        config: the sample rate, the images and the length.

    Returns:
        Response [taps]. The direct sound is at index 0 with height 1, so that convolution with it does not delay.

    References:
        Allen & Berkley, "Image method for efficiently simulating small-room acoustics", JASA 65(4), 1979.
        Eyring, "Reverberation time in 'dead' rooms", JASA 1(2), 1930, for the walls' reflection from `rt60`.
        Lehmann & Johansson, "Prediction of energy decay in room impulse responses simulated with an image-source
        model", JASA 124(1), 2008, for the sign.
        Lehmann & Johansson, "Diffuse reverberation model for efficient image-source simulation of room impulse
        responses", IEEE TASLP 18(6), 2010, for the tail.
    """
    width, depth, height = room.size
    volume = width * depth * height
    surface = 2 * (width * depth + depth * height + height * width)
    log_reflection = -12 * math.log(10) * volume / (SPEED_OF_SOUND * surface * room.rt60)

    def axis(i: int) -> tuple[jax.Array, jax.Array]:
        """Squared distance along one axis and walls crossed, of each image."""
        n = jnp.arange(-config.images[i], config.images[i] + 1, dtype=jnp.float32)
        image = n * room.size[i] + jnp.where(n % 2 == 0, room.source[i], room.size[i] - room.source[i])
        return (image - room.microphone[i]) ** 2, jnp.abs(n)

    def lattice(x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
        return (x[:, None, None] + y[None, :, None] + z[None, None, :]).ravel()

    squares, walls = zip(*(axis(i) for i in range(3)))
    # A centimetre at least: the loudness is divided by it.
    distance = jnp.maximum(jnp.sqrt(lattice(*squares)), 0.01)
    crossed = lattice(*walls)
    direct = jnp.maximum(jnp.linalg.norm(room.source - room.microphone), 0.01)
    # Within this distance no image is missing.
    horizon = jnp.min(jnp.array(config.images, jnp.float32) * room.size)

    # Each wall also turns the sound's sign: with all images positive they add up to a 17 dB boost below 20 Hz.
    sign = 1 - 2 * (crossed % 2)
    loudness = sign * jnp.exp(log_reflection * crossed) * direct / distance
    # The direct sound always is.
    heard = (distance <= horizon) | (crossed == 0)
    delay = jnp.round((distance - direct) * (config.sample_rate / SPEED_OF_SOUND)).astype(jnp.int32)
    # Images that arrive after the end are dropped.
    early = jnp.zeros(config.taps).at[delay].add(jnp.where(heard, loudness, 0.0), mode="drop")

    # From here on the tail: time counts from when the sound left its source, as the distance of images does.
    time = direct / SPEED_OF_SOUND + jnp.arange(config.taps) / config.sample_rate
    arrival = 4 * math.pi * SPEED_OF_SOUND / (volume * config.sample_rate)
    envelope = direct * jnp.sqrt(arrival) * 10.0 ** (-3 * time / room.rt60)
    tail = envelope * jax.random.normal(key, (config.taps,))
    return early + jnp.where(time * SPEED_OF_SOUND > horizon, tail, 0.0)


def simulate_rir(key: jax.Array, config: RoomConfig) -> jax.Array:
    """Draws a room and returns its impulse response [taps]; see `draw_room` and `room_response`.

    >>> simulate_rir(jax.random.key(0), RoomConfig(seconds=0.1)).shape
    (1600,)
    """
    room_key, tail_key = jax.random.split(key)
    return room_response(tail_key, draw_room(room_key, config), config)


def reverberate(wave: jax.Array, rir: jax.Array) -> jax.Array:
    """Convolves a waveform with a room's impulse response and keeps its power.

    Args:
        wave: [..., samples].
        rir: [..., taps], direct sound first (`simulate_rir`), with the same leading axes.

    Returns:
        [..., samples]: as long as the wave (the tail after its end is dropped), aligned with it and with its mean
        power. A silent wave stays silent.

    >>> wave = jnp.array([1.0, -1.0, 0.5, 0.0])
    >>> bool(jnp.allclose(reverberate(wave, jnp.array([1.0, 0.0])), wave, atol=1e-6))  # the direct sound alone
    True
    """
    samples = wave.shape[-1]
    # Room for the whole convolution: otherwise its end would wrap around to the start.
    size = next_fast_len(samples + rir.shape[-1] - 1, real=True)
    spectrum = jnp.fft.rfft(wave, size) * jnp.fft.rfft(rir, size)
    wet = jnp.fft.irfft(spectrum, size)[..., :samples]
    power, wet_power = jnp.mean(wave**2, -1), jnp.mean(wet**2, -1)
    gain = jnp.sqrt(power / jnp.where(wet_power > 0, wet_power, 1.0))
    return gain[..., None] * wet


def augment_batch(
    key: jax.Array, batch: Mapping[str, jax.Array], config: RoomConfig, mesh: Mesh | None = None
) -> jax.Array:
    """Disturbs a training batch as the data pipeline asks.

    Args:
        key: random key of this step.
        batch: `wave` [batch, samples]; `interference` [batch, samples], noise, music or babble; both in floats or
            16-bit integers; `snr_db` [batch], infinity for none; `reverb` [batch] bool, which examples are put in a
            room. `rir` [batch, taps], if there, is the response of each one's room, direct sound first. Other entries
            are ignored.
        config: the rooms that are simulated where none are given.
        mesh: where the batch is sharded, the mesh it lies on. XLA does not split Fourier transforms by itself;
            with the mesh each device simulates the rooms of its own examples. The result is the same.

    Returns:
        Waveforms [batch, samples], in the batch's order.

    >>> speech = jax.random.normal(jax.random.key(0), (2, 1600))
    >>> snr_db, reverb = jnp.array([jnp.inf, 0.0]), jnp.zeros(2, bool)
    >>> batch = {"wave": speech, "interference": speech, "snr_db": snr_db, "reverb": reverb}
    >>> mixed = augment_batch(jax.random.key(1), batch, RoomConfig(seconds=0.05))
    >>> bool(jnp.allclose(mixed, speech * jnp.array([[1.0], [2.0]])))
    True
    """

    def disturb(
        rooms: jax.Array, wave: jax.Array, interference: jax.Array, snr_db: jax.Array, reverb: jax.Array
    ) -> jax.Array:
        # `rooms` are responses, or one random key for each.
        rirs = rooms if "rir" in batch else jax.vmap(lambda k: simulate_rir(k, config))(rooms)
        wave = from_int16(wave)
        placed = jnp.where(reverb[:, None], reverberate(wave, rirs), wave)
        return add_noise(placed, from_int16(interference), snr_db)

    if mesh is not None:
        spec = PartitionSpec(AXIS)
        disturb = jax.shard_map(disturb, mesh=mesh, in_specs=(spec,) * 5, out_specs=spec)
    rooms = batch["rir"] if "rir" in batch else jax.random.split(key, batch["wave"].shape[0])
    return disturb(rooms, batch["wave"], batch["interference"], batch["snr_db"], batch["reverb"])


@dataclasses.dataclass(frozen=True)
class SpecAugmentConfig:
    """How `spec_augment` masks features.

    Attributes:
        probability: share of the examples that are masked (both ways); the others are left alone.
        max_frames: longest strip of time; each is 1 to this many frames.
        max_bands: widest strip of frequency; each is 1 to this many features.

    >>> SpecAugmentConfig(probability=1.0).max_frames
    10
    """

    probability: float = 0.6
    max_frames: int = 10
    max_bands: int = 8

    def __post_init__(self) -> None:
        """Checks the settings.

        Raises:
            UserError: a value is out of range; the message names it.
        """
        if not 0 <= self.probability <= 1:
            raise UserError(f"probability (={self.probability}) must lie in 0 to 1")
        if self.max_frames < 1 or self.max_bands < 1:
            raise UserError(f"max_frames (={self.max_frames}) and max_bands (={self.max_bands}) must be at least 1")


def spec_augment(key: jax.Array, features: jax.Array, config: SpecAugmentConfig) -> jax.Array:
    """Wipes out one strip of time and one of frequency in a share of the examples.

    It goes after `mean_normalize`, where zero is each feature's mean and so says nothing. A strip may start
    anywhere, and is cut short at the end.

    Args:
        key: random key of this step.
        features: normalised features [batch, time, mel].
        config: the probability and the widths.

    Returns:
        The same shape, with zeros in the strips.

    References:
        Park et al., "SpecAugment: A simple data augmentation method for ASR", Interspeech 2019 (without its time
        warping; few and narrow strips, as speaker recipes have them).

    >>> masked = spec_augment(jax.random.key(0), jnp.ones((1, 50, 20)), SpecAugmentConfig(probability=1.0))
    >>> 0 < float(jnp.sum(masked == 0)) <= 10 * 20 + 8 * 50
    True
    """
    batch, time, bands = features.shape
    chosen_key, time_key, frequency_key = jax.random.split(key, 3)

    def strip(key: jax.Array, size: int, longest: int) -> jax.Array:
        """Masks [batch, size], each true in one strip of 1 to `longest`."""
        start_key, length_key = jax.random.split(key)
        start = jax.random.randint(start_key, (batch, 1), 0, size)
        length = jax.random.randint(length_key, (batch, 1), 1, longest + 1)
        place = jnp.arange(size)[None]
        return (place >= start) & (place < start + length)

    chosen = jax.random.bernoulli(chosen_key, config.probability, (batch, 1, 1))
    times = strip(time_key, time, config.max_frames)[:, :, None]
    frequencies = strip(frequency_key, bands, config.max_bands)[:, None, :]
    return jnp.where(chosen & (times | frequencies), 0, features)
