"""Counts of ECAPA-TDNN, x-vector and ReDimNet; SpeechBrain's layout with its mirrored ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kmq_jax.benchmarks import networks
from kmq_jax.core.errors import UserError
from kmq_jax.models import onnx_export, registry
from kmq_jax.nn.frames import reflect_frames


@pytest.mark.parametrize(
    ("name", "settings", "parameters", "tensors", "weights", "macs"),
    [
        ("xvector", {}, 4_610_524, 7, 4_605_952, (0.531, 0.812)),
        ("ecapa_c512", {}, 6_190_720, 38, 6_164_480, (1.037, 1.555)),
        ("ecapa_c512", {"context": False}, 5_797_504, 38, 5_771_264, (0.959, 1.437)),
        ("ecapa_c1024", {}, 14_657_088, 38, 14_614_528, (2.649, 3.973)),
        ("ecapa_speechbrain_c512", {}, 6_194_048, 38, None, None),
        ("ecapa_speechbrain_c1024", {}, 20_767_552, 38, None, None),
    ],
)
def test_counts_are_those_of_the_originals(name, settings, parameters, tensors, weights, macs):
    network = registry.build(name, **settings)
    leaves = jax.tree.leaves(registry.shapes(network)["params"])
    kernels = [leaf.size for leaf in leaves if leaf.ndim > 1]
    assert sum(leaf.size for leaf in leaves) == parameters and len(kernels) == tensors
    assert weights is None or sum(kernels) == weights
    if macs:
        assert tuple(round(registry.macs(network, frames) / 1e9, 3) for frames in (200, 300)) == macs


@pytest.mark.parametrize(("name", "width"), [("ecapa_speechbrain_c512", 512), ("ecapa_speechbrain_c1024", 1024)])
@pytest.mark.parametrize("frames", [200, 300])
def test_multiply_accumulates_of_speechbrains_layout_equal_those_added_up_by_hand(name, width, frames):
    first, aggregated, chunk = 5 * 80 * width, 3 * width, width // 8
    block = 2 * width**2 + 7 * 3 * chunk**2  # 1x1, seven of three taps, 1x1
    attention = 3 * aggregated * 128 + 128 * aggregated  # of rows, their mean and their deviation
    once = 3 * 2 * width * 128 + 2 * aggregated * 192  # squeezes, the head
    by_hand = frames * (first + 3 * block + (3 * width) * aggregated + attention) + once
    assert registry.macs(registry.build(name), frames) == by_hand


@pytest.mark.parametrize(
    ("name", "wespeaker", "idrnd", "without_context", "giga", "paper"),
    [
        ("redimnet_b0", 1_001_851, 1_004_251, 850_651, "0.61", ("1.0", "0.43")),
        ("redimnet_b1", 2_123_481, 2_126_937, 1_905_753, "0.88", ("2.2", "0.54")),
        ("redimnet_b2", 4_888_241, 4_892_849, 4_597_937, "1.36", ("4.7", "0.90")),
        pytest.param("redimnet_b3", 3_220_413, 3_225_021, 2_930_109, "4.34", ("3.0", "3.00"), marks=pytest.mark.slow),
        pytest.param("redimnet_b4", 6_432_305, 6_441_521, 5_851_697, "7.05", ("6.3", "4.80"), marks=pytest.mark.slow),
        pytest.param("redimnet_b5", 7_650_545, 7_659_761, 7_069_937, "13.14", ("9.2", "9.87"), marks=pytest.mark.slow),
        pytest.param(
            "redimnet_b6", 15_006_257, 15_015_473, 14_425_649, "30.0", ("15.0", "20.27"), marks=pytest.mark.slow
        ),
    ],
)
def test_counts_of_redimnet(name, wespeaker, idrnd, without_context, giga, paper):
    # Both count a constant 1, the weight of the first stage's only input; IDRnD's have a normalisation more.
    network = registry.build(name)
    assert registry.parameter_count(network) + 1 == wespeaker
    assert registry.parameter_count(network.clone(head_norm=True)) + 1 == idrnd
    assert registry.parameter_count(network.clone(head_norm=True, context=False)) + 1 == without_context
    found = registry.macs(network, 200) / 1e9
    assert f"{found:.{len(giga.partition('.')[2])}f}" == giga
    # The paper's table is not WeSpeaker's: B5 has a sixth fewer parameters here. It counts two thirds to three quarters
    # of the multiply-accumulates, which a hop of 15 ms there would explain.
    assert networks.SOURCES[name].printed == paper
    millions, their_giga = map(float, paper)
    assert wespeaker / 1e6 == pytest.approx(millions, rel=0.2 if name == "redimnet_b5" else 0.08)
    assert 1.3 < found / their_giga < 1.65


def test_mirrored_frames_are_those_of_numpy():
    x = np.random.default_rng(0).normal(size=(2, 9, 3)).astype(np.float32)
    mask = jnp.arange(9)[None] < jnp.array([9, 6])[:, None]
    found = np.asarray(reflect_frames(jnp.asarray(x), mask, 4))
    for row, length in enumerate((9, 6)):
        expected = np.pad(x[row, :length], ((4, 4), (0, 0)), mode="reflect")
        np.testing.assert_array_equal(found[row, : length + 8], expected)


@pytest.fixture(scope="module")
def speechbrain():
    network = registry.build("ecapa_speechbrain_c512", width=16, aggregated=24, features=16, embedding_size=8)
    return network, registry.initialize(network, jax.random.key(0))


def test_padding_changes_nothing_in_speechbrains_layout(speechbrain):
    network, variables = speechbrain
    features = np.random.default_rng(0).normal(size=(2, 60, 16)).astype(np.float32)
    features[1, 41:] = 1e3
    together = jax.jit(network.apply)(variables, features, jnp.array([60, 41]))
    alone = jax.jit(network.apply)(variables, features[1:, :41])
    np.testing.assert_allclose(together[1], alone[0], rtol=1e-5, atol=1e-5)


def test_onnx_runtime_gives_the_embeddings_of_speechbrains_layout(speechbrain, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    network, variables = speechbrain
    onnx_export.export(tmp_path / "a.onnx", network, variables)
    features = np.random.default_rng(1).normal(size=(2, 53, 16)).astype(np.float32)
    (found,) = runtime.InferenceSession(tmp_path / "a.onnx").run(["embs"], {"feats": features})
    np.testing.assert_allclose(found, jax.jit(network.apply)(variables, features), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ecapa_c512", {"width": 12}, "width"),
        ("ecapa_c512", {"layout": "kaldi"}, "layout"),
        ("xvector", {"pooled": 0}, "pooled"),
        ("redimnet_b0", {"block": "plain"}, "block"),
        ("redimnet_b0", {"features": 61}, "divide"),
    ],
)
def test_a_bad_setting_is_named(name, settings, message):
    with pytest.raises(UserError, match=message):
        registry.build(name, **settings)
