"""Batch normalisation that is put back computes what the folded network did, and measures what is there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import map_named, named_leaves
from kmq_jax.models import registry
from kmq_jax.models.speaker_model import SpeakerModel
from kmq_jax.ptq.moments import averaged_statistics
from kmq_jax.ptq.unfold import unfold

SETTINGS = {"blocks": [1, 1, 1, 1], "width": 4, "features": 16, "embedding_size": 8, "norm": "bias"}
FEATURES = jax.random.normal(jax.random.key(1), (6, 40, 16))


@pytest.fixture(scope="module")
def folded():
    network = registry.build("wespeaker_resnet34", **SETTINGS)
    rng = np.random.default_rng(0)
    made = registry.initialize(network, jax.random.key(0))
    variables = map_named(
        lambda name, leaf: np.float32(rng.normal(0.1, 0.3, leaf.shape)) if name.endswith("bias") else leaf, made
    )
    return SpeakerModel("wespeaker_resnet34", SETTINGS, "wespeaker", variables)


def test_it_computes_what_the_folded_network_did(folded):
    model = unfold(folded, FEATURES)
    assert model.settings == SETTINGS | {"norm": "batch"}
    names = {name for name, _ in named_leaves(model.variables["params"])}
    assert "stem/bn/scale" in names and "stem/conv/bias" not in names
    others = jax.random.normal(jax.random.key(2), (3, 64, 16)) * 3 + 1  # nothing like what was measured
    expected = folded.network().apply(folded.variables, others, train=False)
    found = model.network().apply(model.variables, others, train=False)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * float(jnp.abs(expected).max()))


def test_its_statistics_are_those_of_the_features(folded):
    model = unfold(folded, FEATURES)
    measured = dict(named_leaves(averaged_statistics(model, [FEATURES])))
    for name, leaf in named_leaves(model.variables["batch_stats"]):
        np.testing.assert_allclose(leaf, measured[name], rtol=1e-3, atol=1e-4, err_msg=name)
    # So a training batch of the same features is normalised as in evaluation.
    trained, _ = model.network().apply(model.variables, FEATURES, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(trained, model.network().apply(model.variables, FEATURES, train=False), atol=1e-3)


def test_only_folded_convolutions_can_be(folded):
    model = unfold(folded, FEATURES)
    with pytest.raises(UserError, match="wespeaker_resnet34: no batch normalisation is folded"):
        unfold(model, FEATURES)
    with pytest.raises(UserError, match="campplus: no batch normalisation is folded"):
        unfold(dataclasses.replace(folded, architecture="campplus", settings={}), FEATURES)
    # Kiwano's head has normalisations of its own, which are folded into a linear layer.
    settings = {**SETTINGS, "blocks": [1, 1, 1, 1]}
    network = registry.build("resnet36", **settings)
    variables = registry.initialize(network, jax.random.key(0))
    with pytest.raises(UserError, match="resnet36: head/bn(_in)? follows no convolution"):
        unfold(SpeakerModel("resnet36", settings, "kiwano", variables), FEATURES)
