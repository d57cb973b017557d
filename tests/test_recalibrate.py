import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kmq_jax import model, quant, recalibrate
from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import map_named
from kmq_jax.data import source
from kmq_jax.models import registry

DATA = source.open_source("synthetic:train?speakers=4&utterances=4")


def reference_of(norm):
    """A tiny network with random statistics or biases."""
    settings = {"width": 8, "blocks": [1, 1, 1, 1], "embedding_size": 16, "norm": norm}
    variables = registry.initialize(registry.build("wespeaker_resnet18", **settings), jax.random.key(0))
    rng = np.random.default_rng(0)

    def disturb(name, leaf):
        if name.endswith(("/bias", "/mean")):
            return np.asarray(rng.normal(size=leaf.shape) * 0.1, np.float32)
        return np.asarray(leaf)

    return model.SpeakerModel("wespeaker_resnet18", settings, "wespeaker", map_named(disturb, variables))


def quantized_of(reference, **settings):
    params = quant.quantize(reference.variables["params"], [quant.QuantRule("kernel$", quant.QuantSpec(2, **settings))])
    return dataclasses.replace(reference, variables={**reference.variables, "params": params})


def cosine(a, b):
    return np.mean(np.sum(a * b, 1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))


def test_folded_biases_bring_embeddings_nearer_and_match_the_moments():
    reference = reference_of("bias")
    quantized = quantized_of(reference)
    repaired = recalibrate.recalibrate(reference, quantized, DATA, crops=16, seconds=1.0)
    exact, before, after = (model.embed_all(m, DATA) for m in (reference, quantized, repaired))
    assert cosine(exact, after) > cosine(exact, before)

    features = recalibrate.random_features(model.frontend_of("wespeaker"), DATA, 16, 1.0)
    moments = []
    for m in (reference, repaired):
        stages = m.network().apply(quant.dequantize(m.variables), features, return_stages=True)[1]
        moments.append([(jnp.mean(s), jnp.std(s)) for s in stages])
    np.testing.assert_allclose(*moments, rtol=0.1)


def test_running_statistics_are_those_of_the_quantized_network():
    reference = reference_of("batch")
    quantized = quantized_of(reference)
    repaired = recalibrate.recalibrate(reference, quantized, DATA, crops=16, seconds=1.0)
    features = recalibrate.random_features(model.frontend_of("wespeaker"), DATA, 16, 1.0)
    network = reference.network()
    variables = quant.dequantize(repaired.variables)
    trained = network.apply(variables, features, train=True, mutable=["batch_stats"])[0]
    np.testing.assert_allclose(network.apply(variables, features), trained, rtol=1e-2, atol=1e-3)


def test_the_size_stays():
    reference = reference_of("bias")
    quantized = quantized_of(reference)
    repaired = recalibrate.recalibrate(reference, quantized, DATA, crops=8, seconds=1.0)
    assert quant.size_bytes(repaired.variables) == quant.size_bytes(quantized.variables)


def test_one_codebook_for_all_channels_cannot_be_repaired():
    reference = reference_of("bias")
    with pytest.raises(UserError, match="output channel"):
        recalibrate.recalibrate(reference, quantized_of(reference, granularity="tensor"), DATA, crops=4, seconds=1.0)
