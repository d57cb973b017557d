"""Noise levels, room acoustics and SpecAugment, measured on what comes out."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from kmq_jax.core.errors import UserError
from kmq_jax.core.mesh import make_mesh, shard_batch
from kmq_jax.frontend.augment import (
    SPEED_OF_SOUND,
    Room,
    RoomConfig,
    SpecAugmentConfig,
    add_noise,
    augment_batch,
    draw_room,
    reverberate,
    room_response,
    simulate_rir,
    spec_augment,
)

RNG = np.random.default_rng(0)
SPEECH = (0.1 * RNG.standard_normal((4, 8000))).astype(np.float32)
NOISE = (0.4 * RNG.standard_normal((4, 8000))).astype(np.float32)

# Jitted once for all tests: operation by operation, each would compile dozens of small programs.
draw_response = jax.jit(room_response, static_argnames="config")
draw_rirs = jax.jit(
    lambda key, count, config: jax.vmap(lambda k: simulate_rir(k, config))(jax.random.split(key, count)),
    static_argnums=(1, 2),
)
augment = jax.jit(augment_batch, static_argnames=("config", "mesh"))
mask = jax.jit(spec_augment, static_argnames="config")


def power(x):
    return np.mean(np.asarray(x, np.float64) ** 2, -1)


def decibel(x):
    return 10 * np.log10(np.maximum(x, 1e-30))


class TestAddNoise:
    def test_the_ratio_is_the_one_asked_for(self):
        asked = np.array([-5.0, 0.0, 13.0, 20.0], np.float32)
        mixed = np.asarray(add_noise(jnp.asarray(SPEECH), jnp.asarray(NOISE), jnp.asarray(asked)))
        np.testing.assert_allclose(decibel(power(SPEECH) / power(mixed - SPEECH)), asked, atol=1e-2)

    def test_infinity_asks_for_none(self):
        mixed = add_noise(jnp.asarray(SPEECH), jnp.asarray(NOISE), jnp.full(4, jnp.inf))
        np.testing.assert_array_equal(mixed, SPEECH)

    @pytest.mark.parametrize("silent", ["speech", "noise", "both"])
    @pytest.mark.parametrize("snr", [0.0, 15.0, np.inf])
    def test_silence_changes_nothing(self, silent, snr):
        speech = SPEECH * (silent == "noise")
        noise = NOISE * (silent == "speech")
        mixed = add_noise(jnp.asarray(speech), jnp.asarray(noise), jnp.full(4, snr))
        np.testing.assert_array_equal(mixed, speech)


def mirror(position: float, side: float, order: int) -> float:
    """The image of a point, mirrored `order` times: at the walls side, 2 side, ... or, backwards, 0, -side, ..."""
    for i in range(abs(order)):
        wall = side * (i + 1) if order > 0 else -side * i
        position = 2 * wall - position
    return position


def reference_response(room: Room, config: RoomConfig, reflection: float) -> np.ndarray:
    """Image sources one by one, in float64, up to the distance where images are missing."""
    size, source, microphone = (np.asarray(x, np.float64) for x in room[:3])
    direct = np.linalg.norm(source - microphone)
    horizon = min(n * side for n, side in zip(config.images, size))
    response = np.zeros(config.taps)
    for order in itertools.product(*(range(-n, n + 1) for n in config.images)):
        image = [mirror(*axis) for axis in zip(source, size, order)]
        distance = np.linalg.norm(image - microphone)
        delay = round((distance - direct) / SPEED_OF_SOUND * config.sample_rate)
        if distance <= horizon and delay < config.taps:
            response[delay] += (-reflection) ** sum(map(abs, order)) * direct / distance
    return response


class TestRooms:
    def test_early_reflections_are_the_images(self):
        config = RoomConfig(images=(3, 3, 3), seconds=0.02)
        room = Room(jnp.array([5.0, 4.0, 3.0]), jnp.array([1.0, 1.2, 1.4]), jnp.array([3.7, 2.9, 1.6]), jnp.array(0.4))
        # Eyring: 60 dB in rt60 at 4V/S metres between walls.
        volume, surface = 60.0, 2 * (20 + 12 + 15)
        reflection = 10 ** (-3 * 4 * volume / (surface * SPEED_OF_SOUND * 0.4))
        expected = reference_response(room, config, reflection)
        direct = np.linalg.norm(room.source - room.microphone)
        tail = round((3 * 3.0 - direct) / SPEED_OF_SOUND * 16000) - 1  # three images on a height of 3 m
        assert np.count_nonzero(expected[:tail]) > 30
        result = np.asarray(draw_response(jax.random.key(0), room, config))
        np.testing.assert_allclose(result[:tail], expected[:tail], atol=1e-4)

    def test_reverberation_time_is_the_one_asked_for(self):
        config = RoomConfig(seconds=1.2)

        @jax.jit
        @jax.vmap
        def responses(key, rt60):
            return room_response(key, draw_room(key, config)._replace(rt60=rt60), config)

        asked = np.repeat(np.float32([0.2, 0.4, 0.6]), 16)
        keys = jax.random.split(jax.random.key(0), len(asked))
        ratios = np.zeros(len(asked))
        for i, response in enumerate(np.asarray(responses(keys, asked), np.float64)):
            decay = decibel(np.cumsum(response[::-1] ** 2)[::-1] / np.sum(response**2))  # Schroeder's integral
            span = np.flatnonzero((decay < -5) & (decay > -35))  # T30, ISO 3382
            ratios[i] = -60 / np.polyfit(span / 16000, decay[span], 1)[0] / asked[i]
        assert np.abs(ratios.reshape(3, 16).mean(1) - 1).max() < 0.05
        assert np.abs(ratios - 1).max() < 0.2

    def test_the_tail_continues_the_reflections_without_a_step(self):
        config = RoomConfig(seconds=0.3)
        room = Room(jnp.array([6.0, 5.0, 3.0]), jnp.array([2.0, 1.2, 1.4]), jnp.array([3.7, 3.9, 1.6]), jnp.array(0.5))
        powers = np.zeros(config.taps)
        for seed in range(8):
            powers += np.asarray(draw_response(jax.random.key(seed), room, config), np.float64) ** 2
        horizon = 15.0  # five images on the height of 3 m, less than four on the depth and six on the width
        direct = float(jnp.linalg.norm(room.source - room.microphone))
        edge = round((horizon - direct) / SPEED_OF_SOUND * config.sample_rate)
        before, after = powers[edge - 160 : edge].mean(), powers[edge : edge + 160].mean()
        assert abs(decibel(before / after) - 60 * 0.01 / 0.5) < 2.5

    def test_direct_sound_comes_first_with_height_one(self):
        config = RoomConfig()
        responses = np.asarray(draw_rirs(jax.random.key(1), 40, config))
        assert responses.shape == (40, 8000)
        np.testing.assert_allclose(responses[:, 0], 1, atol=0.05)
        assert np.isfinite(responses).all()
        assert len({row.tobytes() for row in responses}) == 40

    def test_spectrum_is_level(self):
        # With images of one sign a room gains 17 dB near 0 Hz, and keeping the power would starve the voice.
        config = RoomConfig()
        responses = np.asarray(draw_rirs(jax.random.key(2), 40, config))
        spectrum = (np.abs(np.fft.rfft(responses, 16000)) ** 2 / np.sum(responses**2, -1, keepdims=True)).mean(0)
        for low, high in [(80, 160), (160, 640), (640, 2560), (2560, 8000)]:
            assert abs(decibel(spectrum[low:high].mean())) < 2
        assert decibel(spectrum[:40].mean()) < 0

    def test_rooms_stay_within_the_settings(self):
        config = RoomConfig()
        rooms = jax.jit(jax.vmap(lambda k: draw_room(k, config)))(jax.random.split(jax.random.key(0), 500))
        size = np.asarray(rooms.size)
        assert (size >= config.smallest).all() and (size <= config.largest).all()
        for place in (np.asarray(rooms.source), np.asarray(rooms.microphone)):
            assert (place >= config.margin - 1e-5).all() and (place <= size - config.margin + 1e-5).all()
        assert rooms.rt60.min() < 0.12 and rooms.rt60.max() > 0.58

    @pytest.mark.parametrize(
        ("settings", "name"),
        [
            ({"smallest": (0.5, 3, 3)}, "smallest"),
            ({"largest": (2, 8, 4)}, "largest"),
            ({"rt60": (0.5, 0.2)}, "rt60"),
            ({"rt60": (0, 0.2)}, "rt60"),
            ({"seconds": 0}, "seconds"),
        ],
    )
    def test_wrong_settings_are_named(self, settings, name):
        with pytest.raises(UserError, match=name):
            RoomConfig(**settings)


class TestReverberate:
    RIR = np.asarray(draw_rirs(jax.random.key(3), 1, RoomConfig(seconds=0.1)))[0]

    def test_is_a_convolution_of_the_same_length_and_power(self):
        rirs = np.stack([self.RIR] * 4)
        wet = np.asarray(reverberate(jnp.asarray(SPEECH), jnp.asarray(rirs)))
        assert wet.shape == SPEECH.shape
        np.testing.assert_allclose(power(wet), power(SPEECH), rtol=1e-4)
        for row, speech in zip(wet, SPEECH.astype(np.float64)):
            direct = scipy.signal.convolve(speech, self.RIR.astype(np.float64), method="direct")[:8000]
            np.testing.assert_allclose(row, direct * np.sqrt(power(speech) / power(direct)), atol=1e-5)

    def test_does_not_delay(self):
        click = np.zeros((1, 4000), np.float32)
        click[0, 1000] = 1
        wet = np.asarray(reverberate(jnp.asarray(click), jnp.asarray(self.RIR[None])))[0]
        assert np.abs(wet[:1000]).max() < 1e-5 * np.abs(wet).max()
        assert np.abs(wet[1000]) > 0.1 * np.abs(wet).max()

    def test_silence_stays_silent(self):
        np.testing.assert_array_equal(reverberate(jnp.zeros((1, 4000)), jnp.asarray(self.RIR[None])), 0)

    def test_an_empty_room_changes_nothing(self):
        wet = reverberate(jnp.asarray(SPEECH), jnp.zeros((4, 100)).at[:, 0].set(1))
        np.testing.assert_allclose(wet, SPEECH, atol=1e-6)


BATCH = {
    "wave": SPEECH,
    "interference": NOISE,
    "snr_db": np.array([5, np.inf, np.inf, 15], np.float32),
    "reverb": np.array([False, False, True, False]),
    "speaker": np.arange(4, dtype=np.int32),
}


class TestAugmentBatch:
    CONFIG = RoomConfig(seconds=0.1)

    def test_each_example_gets_what_it_asked_for(self):
        batch = {name: jnp.asarray(value) for name, value in BATCH.items()}
        result = np.asarray(augment(jax.random.key(0), batch, self.CONFIG))
        assert result.shape == SPEECH.shape
        for i in (0, 3):
            measured = decibel(power(SPEECH[i]) / power(result[i] - SPEECH[i]))
            assert measured == pytest.approx(BATCH["snr_db"][i], abs=0.01)
        np.testing.assert_array_equal(result[1], SPEECH[1])
        np.testing.assert_allclose(power(result[2]), power(SPEECH[2]), rtol=1e-4)
        assert power(result[2] - SPEECH[2]) > 0.01 * power(SPEECH[2])

    def test_the_key_alone_decides(self):
        batch = {name: jnp.asarray(value) for name, value in BATCH.items()}
        first, again, other = (np.asarray(augment(jax.random.key(k), batch, self.CONFIG)) for k in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert np.abs(first[2] - other[2]).max() > 1e-3

    def test_compiles_once(self):
        sizes = []
        for k in range(3):
            batch = {name: jnp.asarray(np.roll(value, k, axis=0)) for name, value in BATCH.items()}
            augment(jax.random.key(k), batch, self.CONFIG)
            sizes.append(augment._cache_size())
        assert len(set(sizes)) == 1

    def test_four_devices_equal_one_and_samples_of_16_bits_their_floats(self):
        mesh = make_mesh()
        assert mesh.size == 4
        stored = BATCH | {name: np.rint(BATCH[name] * 3000).astype(np.int16) for name in ("wave", "interference")}
        floats = stored | {name: stored[name] / np.float32(32768) for name in ("wave", "interference")}
        one = augment(jax.random.key(0), {n: jnp.asarray(v) for n, v in floats.items()}, self.CONFIG)
        compiled = augment.lower(jax.random.key(0), shard_batch(stored, mesh), self.CONFIG, mesh).compile()
        assert "all-gather" not in compiled.as_text()
        np.testing.assert_allclose(compiled(jax.random.key(0), shard_batch(stored, mesh)), one, atol=1e-6)


def widths(masked: np.ndarray) -> np.ndarray:
    """The length of the single run of true values in each row; fails where there are two."""
    edges = np.diff(masked.astype(int), axis=1, prepend=0, append=0)
    assert ((edges == 1).sum(1) <= 1).all()
    return masked.sum(1)


class TestSpecAugment:
    def test_strips_and_their_share(self):
        result = np.asarray(mask(jax.random.key(0), jnp.ones((4000, 60, 40)), SpecAugmentConfig()))
        assert set(np.unique(result)) == {0.0, 1.0}
        frames = widths((result == 0).all(2))
        bands = widths((result == 0).all(1))
        touched = frames > 0
        np.testing.assert_array_equal(touched, bands > 0)  # both strips, or none
        assert abs(touched.mean() - 0.6) < 4 * np.sqrt(0.6 * 0.4 / 4000)
        assert set(frames[touched]) == set(range(1, 11))
        assert set(bands[touched]) == set(range(1, 9))
        # Nothing but the two strips.
        wiped = (result == 0).sum((1, 2))
        np.testing.assert_array_equal(wiped, frames * 40 + bands * 60 - frames * bands)
        # Every place is hit, the last as well as the first.
        assert ((result == 0).all(2).sum(0) > 0).all() and ((result == 0).all(1).sum(0) > 0).all()

    @pytest.mark.parametrize("probability", [0.0, 1.0])
    def test_never_and_always_and_nothing_outside_the_strips(self, probability):
        features = RNG.standard_normal((20, 50, 30)).astype(np.float32)
        config = SpecAugmentConfig(probability=probability)
        result = np.asarray(mask(jax.random.key(0), jnp.asarray(features), config))
        assert (result == 0).any((1, 2)).mean() == probability
        np.testing.assert_array_equal(result[result != 0], features[result != 0])

    def test_strips_longer_than_the_features(self):
        config = SpecAugmentConfig(probability=1.0, max_frames=100, max_bands=100)
        assert mask(jax.random.key(0), jnp.ones((8, 3, 2)), config).shape == (8, 3, 2)

    @pytest.mark.parametrize("settings", [{"probability": 1.1}, {"max_frames": 0}, {"max_bands": 0}])
    def test_wrong_settings_are_named(self, settings):
        with pytest.raises(UserError, match=next(iter(settings))):
            SpecAugmentConfig(**settings)
