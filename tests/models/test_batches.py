"""Which recordings share a batch, and what is too short for a network."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kmq_jax import frontend
from kmq_jax.core import mesh
from kmq_jax.core.errors import UserError
from kmq_jax.data import buckets
from kmq_jax.data.table import Utterances
from kmq_jax.models import registry
from kmq_jax.models.batches import check_lengths, padded_batches, plan_batches, usable_lengths
from kmq_jax.models.protocol import Part, SpeakerNetwork
from kmq_jax.models.speaker_model import PROGRAMS, SpeakerModel, embed_all, embed_waves, embedding_plan

LENGTHS = np.array([8000, 16000, 8070, 8000, 16010, 24000])  # 8000 and 8070 samples are 48 frames


class Blind(SpeakerNetwork):
    """The mean of all frames, padded ones as well; and its first layer loses eight frames."""

    features: int = 80
    embedding_size: int = 3
    masks_lengths = False

    @nn.compact
    def __call__(self, features, lengths=None, train=False):
        return nn.Dense(self.embedding_size, name="mean")(features.mean(1))

    @nn.nowrap
    def parts(self):
        return (Part("mean", "mean", lost=8),)


@pytest.fixture(scope="module")
def model():
    registry.register("blind", lambda features=80, embedding_size=3, dtype="float32": Blind(features, embedding_size))
    variables = Blind().init(jax.random.key(0), jnp.zeros((1, 20, 80)))
    return SpeakerModel("blind", {}, "wespeaker", variables)


def test_a_network_that_cannot_mask_gets_batches_of_one_number_of_frames():
    plan = plan_batches(Blind(), frontend.WESPEAKER, LENGTHS, 2)
    assert [(batch.size, batch.indices.tolist()) for batch in plan] == [
        (24000, [5]), (16010, [1, 4]), (8070, [0, 2]), (8070, [3])
    ]  # fmt: skip
    devices = mesh.make_mesh(jax.local_devices())
    for batch in padded_batches(plan, LENGTHS, lambda i: np.ones(LENGTHS[i], np.float32), devices):
        assert len(set(frontend.num_frames(np.asarray(batch.samples), frontend.WESPEAKER))) == 1


def test_a_network_that_masks_gets_buckets_as_before():
    network = registry.build("wespeaker_resnet18", width=4)
    plan = plan_batches(network, frontend.WESPEAKER, LENGTHS, 2, max_shapes=4)
    for ours, bucket in zip(plan, buckets.length_buckets(LENGTHS, 2, max_shapes=4), strict=True):
        assert ours.size == bucket.size and ours.indices.tolist() == bucket.indices.tolist()


def test_embeddings_without_masks_do_not_depend_on_the_company(model):
    rng = np.random.default_rng(0)
    waves = [0.1 * rng.standard_normal(length).astype(np.float32) for length in LENGTHS]
    alone = np.concatenate([embed_waves(model, [wave]) for wave in waves])
    np.testing.assert_allclose(embed_waves(model, waves), alone, rtol=1e-5, atol=1e-5)


def test_recordings_that_are_too_short_for_the_network_are_named(model):
    with pytest.raises(UserError, match="recording 2 of 2: 8 frames, but the network needs at least 9"):
        embed_waves(model, [np.ones(1680, np.float32), np.ones(1679, np.float32)])
    table = Utterances(ids=("a", "b"), paths=("a.wav", "b.wav"), speakers=("s", "s"), samples=np.array([9000, 1600]))
    table = dataclasses.replace(table, reader=lambda name: np.ones(9000, np.float32))
    with pytest.raises(UserError, match="b.wav: 8 frames, but the network needs at least 9"):
        embed_all(model, table)
    with pytest.raises(UserError, match="a.wav: 8 frames"):
        usable_lengths(Blind(), frontend.WESPEAKER, table, max_seconds=0.1)
    wave = np.random.default_rng(0).normal(size=9000).astype(np.float32)
    enough = dataclasses.replace(table, samples=np.array([9000, 9000]), reader=lambda name: wave)
    with pytest.raises(UserError, match=r"max_frames \(=8\): the network needs at least 9"):
        embed_all(model, enough, max_frames=8)
    assert embed_all(model, enough, max_frames=9).shape == (2, 3)
    with pytest.raises(UserError, match="x: shorter than one analysis frame"):
        check_lengths(Blind(), frontend.WESPEAKER, np.array([399]), lambda i: "x")


@pytest.mark.parametrize(("hours", "shapes"), [(3, 3), (100, 5), (10_000, 16)])
def test_an_accelerator_compiles_no_more_than_the_speech_is_worth(monkeypatch, hours, shapes):
    """A list of VoxCeleb1's length took longer to compile for, twenty shapes, than to embed."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    network, longest = registry.build("wespeaker_resnet34", width=4), 20 * 16000
    lengths = np.random.default_rng(0).integers(4 * 16000, longest, 2000)
    lengths = np.tile(lengths, -(-hours * 3600 * 16000 // int(lengths.sum())))
    plan = embedding_plan(network, frontend.WESPEAKER, lengths, 64)
    made = {(len(batch.indices), batch.size) for batch in plan}
    assert abs(len({size for _, size in made}) - shapes) <= 1 and len(made) <= PROGRAMS[1]
    members = np.concatenate([batch.indices for batch in plan])
    assert np.array_equal(np.sort(members[members >= 0]), np.arange(len(lengths)))
    processed = sum(len(batch.indices) * batch.size for batch in plan)
    assert processed < {3: 1.3, 100: 1.2, 10_000: 1.06}[hours] * lengths.sum()


@pytest.mark.parametrize(
    ("count", "seconds", "most_padding"), [(1250, (2, 60), 0.05), (50, (2, 60), 0.05), (5000, (2, 11), 0.12)]
)
def test_what_a_list_is_padded_by_on_a_cpu(count, seconds, most_padding):
    """Little where recordings are long. Where they are short, eight lengths have to do for thousands of them."""
    network = registry.build("wespeaker_resnet34", width=4)
    lengths = np.random.default_rng(0).integers(seconds[0] * 16000, seconds[1] * 16000, count)
    plan = embedding_plan(network, frontend.WESPEAKER, lengths, 16)
    members = np.concatenate([batch.indices for batch in plan])
    assert np.array_equal(np.sort(members[members >= 0]), np.arange(count))
    assert sum(len(batch.indices) * batch.size for batch in plan) <= (1 + most_padding) * lengths.sum()
    assert most_padding == 0.05 or len({batch.size for batch in plan}) <= 8
