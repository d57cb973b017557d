"""Mixing networks, embedding with many at once, activation SQNR, and subsets."""

import jax
import numpy as np
import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import named_leaves
from kmq_jax.data.synthetic import open_synthetic
from kmq_jax.data.table import Utterances
from kmq_jax.diagnosis import variants
from kmq_jax.models import registry
from kmq_jax.models.speaker_model import SpeakerModel, embed_all, frontend_of

SETTINGS = {"width": 4, "blocks": [1, 2, 1, 1], "embedding_size": 6}


@pytest.fixture(scope="module", params=["resnet36", "resnet50", "wespeaker_resnet34"])
def speaker_model(request):
    variables = registry.initialize(registry.build(request.param, **SETTINGS), jax.random.key(0))
    frontend = "kiwano" if request.param.startswith("resnet") else "wespeaker"
    return SpeakerModel(request.param, SETTINGS, frontend, jax.device_get(variables))


@pytest.fixture(scope="module")
def utterances():
    return open_synthetic("synthetic:dev?speakers=2&utterances=2")


def shaken(variables, amount=0.1):
    rng = np.random.default_rng(7)

    def shake(leaf):
        factors = 1 + amount * rng.normal(size=leaf.shape)
        return jax.device_put((np.asarray(leaf) * factors).astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(shake, variables)


def test_mixes_share_arrays_and_differ_in_one_component_only(speaker_model):
    base = variants.on_devices(speaker_model.variables)
    low = jax.tree.map(lambda leaf: leaf + 1, base)
    network = speaker_model.network()
    mixes = list(variants.component_mixes(network, base, low))
    present = {network.component_of(name.split("/", 1)[1]) for name, _ in named_leaves(base)}
    assert [(kind, name) for kind, name, _ in mixes] == [
        (kind, name) for name in network.components() if name in present for kind in ("retention", "mirror")
    ]
    for kind, component, mixed in mixes:
        for (name, leaf), (_, full), (_, few) in zip(named_leaves(mixed), named_leaves(base), named_leaves(low)):
            inside = network.component_of(name.split("/", 1)[1]) == component
            assert leaf is (full if inside == (kind == "retention") else few)


def test_layer_mixes_take_kernel_and_bias_of_one_layer(speaker_model):
    base = variants.on_devices(speaker_model.variables)
    low = jax.tree.map(lambda leaf: leaf + 1, base)
    (mixed,) = variants.layer_mixes(base, low, ["head/linear/kernel"])
    changed = {name for (name, a), (_, b) in zip(named_leaves(mixed), named_leaves(base)) if a is not b}
    assert changed == {"params/head/linear/kernel", "params/head/linear/bias"}


def test_embeddings_are_those_of_extract(speaker_model, utterances):
    seen = {}
    network, fbank = speaker_model.network(), frontend_of(speaker_model.frontend)
    batches = variants.feature_batches(
        network, fbank, utterances, batch_size=3, seen=lambda i, wave: seen.update({i: wave})
    )
    base = variants.on_devices(speaker_model.variables)
    found = variants.embed_variants(network, batches, [base, shaken(base), base], len(utterances))
    np.testing.assert_allclose(found[0], embed_all(speaker_model, utterances), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found[0], found[2])
    assert np.abs(found[0] - found[1]).max() > 1e-3
    assert sorted(seen) == list(range(len(utterances)))
    np.testing.assert_array_equal(seen[2], utterances.load(2))


@pytest.mark.parametrize("cut", [{"max_seconds": 1.0}, {"max_frames": 60}])
def test_what_is_left_of_a_recording_is_that_of_extract(speaker_model, utterances, cut):
    network, fbank = speaker_model.network(), frontend_of(speaker_model.frontend)
    batches = variants.feature_batches(network, fbank, utterances, batch_size=3, **cut)
    (found,) = variants.embed_variants(
        network, batches, [variants.on_devices(speaker_model.variables)], len(utterances)
    )
    np.testing.assert_allclose(found, embed_all(speaker_model, utterances, **cut), rtol=1e-4, atol=1e-4)


def test_activation_sqnr_against_arithmetic_on_single_utterances(speaker_model, utterances):
    """Padding and batching change nothing: sums over utterances alone, without a mask, give the same ratio."""
    fbank, network = frontend_of(speaker_model.frontend), speaker_model.network()
    base = variants.on_devices(speaker_model.variables)
    low = shaken(base, 0.02)
    (found, copy) = variants.activation_sqnr(
        network, variants.feature_batches(network, fbank, utterances, batch_size=3), base, [low, base]
    )
    assert set(copy.values()) == {np.inf}
    names = list(found)
    assert names == ["stem", "stage1/block0", "stage2/block0", "stage2/block1", "stage3/block0", "stage4/block0",
                     "pool", "head"]  # fmt: skip
    signal = noise = head_signal = head_noise = 0.0
    taps = jax.jit(network.taps)
    for batch in variants.feature_batches(network, fbank, utterances, batch_size=1):
        features = batch.features[:1, : int(batch.frames[0])]
        (one, parts, _), (two, others, _) = jax.device_get([taps(tree, features) for tree in (base, low)])
        signal += np.sum(parts["stage4/block0"] ** 2)
        noise += np.sum((parts["stage4/block0"] - others["stage4/block0"]) ** 2)
        head_signal, head_noise = head_signal + np.sum(one**2), head_noise + np.sum((one - two) ** 2)
    assert found["stage4/block0"] == pytest.approx(10 * np.log10(signal / noise), abs=0.02)
    assert found["head"] == pytest.approx(10 * np.log10(head_signal / head_noise), abs=0.02)


def table(sizes):
    speakers = tuple(f"s{s:03d}" for s, size in enumerate(sizes) for _ in range(size))
    ids = tuple(f"u{i}" for i in range(len(speakers)))
    return Utterances(ids=ids, paths=ids, speakers=speakers)


def test_a_subset_has_enough_utterances_of_each_of_its_speakers():
    many = table([10] * 200)
    rows = variants.spread_over_speakers(many, 40)
    assert len(rows) == 40 and (np.diff(rows) > 0).all()
    assert (np.bincount(many.labels[rows])[np.unique(many.labels[rows])] == 4).all()
    assert (variants.spread_over_speakers(many, 40) == rows).all()
    assert not (variants.spread_over_speakers(many, 40, seed=1) == rows).all()


def test_a_subset_of_few_speakers_takes_more_of_each():
    few = table([50, 50, 50])
    np.testing.assert_array_equal(np.bincount(few.labels[variants.spread_over_speakers(few, 30)]), [10, 10, 10])


def test_speakers_with_too_few_utterances_come_last():
    mixed = table([1] * 50 + [6] * 5)
    assert set(mixed.labels[variants.spread_over_speakers(mixed, 20)]) == {50, 51, 52, 53, 54}


@pytest.mark.parametrize("count", [0, 6, 99])
def test_all_where_there_are_not_more(count):
    np.testing.assert_array_equal(variants.spread_over_speakers(table([3, 3]), count), np.arange(6))


def test_a_recording_that_is_too_short_is_named(speaker_model):
    short = Utterances(
        ids=("a",), paths=("a",), speakers=("s",), samples=np.array([100]), reader=lambda _: np.zeros(100)
    )
    with pytest.raises(UserError, match="a: shorter than one analysis frame"):
        next(variants.feature_batches(speaker_model.network(), frontend_of(speaker_model.frontend), short))
