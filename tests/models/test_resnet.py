"""The networks against the same arithmetic written in PyTorch, and padded batches against single utterances."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import map_named, named_leaves
from kmq_jax.models import registry, resnet
from kmq_jax.nn.frames import frame_mask, mask_frames

SMALL = {"width": 8, "features": 20, "embedding_size": 16}
NETWORKS = {
    "post": registry.build("resnet36", blocks=[2, 1, 1, 1], **SMALL),
    "pre": registry.build("resnet200", blocks=[1, 2, 1, 1], **SMALL),
    "pre-relu-3x3": registry.build("resnet50", blocks=[1, 1, 1, 1], activation="relu", last_taps=3, **SMALL),
    "basic": registry.build("wespeaker_resnet34", blocks=[1, 1, 2, 1], **SMALL),
    "bottleneck": registry.build("wespeaker_resnet50", blocks=[1, 1, 1, 2], **SMALL),
}
FOLDED = {
    "post-folded": registry.build("resnet36", norm="bias", blocks=[1, 1, 1, 1], **SMALL),
    "pre-folded": registry.build("resnet200", norm="bias", blocks=[1, 1, 1, 1], **SMALL),
}
TIME = 47  # every padded batch below is [3, TIME, features]: one compilation a network


QUICK = {"xla_backend_optimization_level": 0}  # halves the time to compile; nothing here is run for long


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def embed(model, variables, features, lengths=None):
    embedding, stages, _ = model.taps(variables, features, lengths, names=model.distilled_parts())
    if lengths is not None:
        parts = [model.part_of(name) for name in stages]
        masks = [frame_mask(part.frames(lengths), x.shape[1]) for part, x in zip(parts, stages.values())]
        return embedding, [mask_frames(x, mask) for x, mask in zip(stages.values(), masks)]
    return embedding, list(stages.values())


def varied(model, seed: int = 0):
    """Variables whose biases, scales and statistics are all away from their neutral start."""
    rng = np.random.default_rng(seed)

    def draw(name, leaf):
        if name.endswith("kernel"):
            return leaf
        low, high = (0.5, 1.5) if name.endswith(("scale", "var")) else (-0.5, 0.5)
        return jnp.asarray(rng.uniform(low, high, leaf.shape), leaf.dtype)

    return map_named(draw, registry.initialize(model, jax.random.key(seed)))


def utterances(lengths, features: int = 20, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(length, features)).astype(np.float32) for length in lengths]


def padded(utts: list[np.ndarray], filler: float, time: int = TIME) -> np.ndarray:
    batch = np.full((len(utts), time, utts[0].shape[1]), filler, np.float32)
    for row, utt in zip(batch, utts):
        row[: len(utt)] = utt
    return batch


def torch_embedding(model, variables, features: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The network in torch.nn.functional, in PyTorch's own axes: x is `[batch, channel, time, freq]`."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    p = {name.split("/", 1)[1]: torch.tensor(np.array(leaf)) for name, leaf in named_leaves(variables)}

    def conv(x, name, stride=1):
        kernel = p[f"{name}/kernel"].permute(3, 2, 0, 1)
        return functional.conv2d(x, kernel, p.get(f"{name}/bias"), stride, kernel.shape[-1] // 2)

    def norm(x, name):
        if f"{name}/mean" in p:
            return functional.batch_norm(x, *(p[f"{name}/{k}"] for k in ("mean", "var", "scale", "bias")), eps=1e-5)
        if f"{name}/scale" in p:
            return x * p[f"{name}/scale"][None, :, None, None] + p[f"{name}/bias"][None, :, None, None]
        return x

    def linear(x, name):
        return functional.linear(x, p[f"{name}/kernel"].T, p[f"{name}/bias"])

    kind = model.block.__name__
    act = getattr(functional, getattr(dict(model.block_options).get("activation"), "__name__", "relu"))
    x = conv(torch.tensor(features)[:, None], "stem/conv")
    x = getattr(functional, model.stem_activation)(norm(x, "stem/bn"))
    stages = []
    for stage in range(1, 5):
        for block in range(model.blocks[stage - 1]):
            at, stride = f"stage{stage}/block{block}", 2 if stage > 1 and block == 0 else 1
            strides = (1, stride, 1) if kind == "Bottleneck" else (stride, 1, 1)
            y = x
            convs = [i for i in (1, 2, 3) if f"{at}/conv{i}/kernel" in p]
            for i in convs:
                if kind == "PreActivationBlock":
                    y = conv(act(norm(y, f"{at}/bn{i}")), f"{at}/conv{i}", strides[i - 1])
                else:
                    y = norm(conv(y, f"{at}/conv{i}", strides[i - 1]), f"{at}/bn{i}")
                    y = functional.relu(y) if i < convs[-1] else y
            if f"{at}/se/fc1/kernel" in p:
                gate = linear(functional.silu(linear(y.mean((2, 3)), f"{at}/se/fc1")), f"{at}/se/fc2")
                y = y * torch.sigmoid(gate)[:, :, None, None]
            if f"{at}/shortcut/conv/kernel" in p:
                x = norm(conv(x, f"{at}/shortcut/conv", stride), f"{at}/shortcut/bn")
            x = x + y if kind == "PreActivationBlock" else functional.relu(x + y)
        stages.append(x.permute(0, 2, 3, 1).numpy())
    frames = x.permute(0, 2, 3, 1).flatten(2)
    if model.attentive:
        weights = torch.softmax(linear(torch.tanh(linear(frames, "pool/attention1")), "pool/attention2"), 1)
        mean = (weights * frames).sum(1)
        deviation = ((weights * frames**2).sum(1) - mean**2).clamp(min=1e-5).sqrt()
    else:
        mean, deviation = frames.mean(1), (frames.var(1) + 1e-7).sqrt()
    x = norm(torch.cat([mean, deviation], 1), "head/bn_in")
    return norm(linear(x, "head/linear"), "head/bn").numpy(), stages


@pytest.mark.parametrize("name", [*NETWORKS, *FOLDED])
def test_embedding_and_stages_equal_pytorch(name):
    model = (NETWORKS | FOLDED)[name]
    variables = varied(model)
    (utt,) = utterances([40])
    expected, expected_stages = torch_embedding(model, variables, utt[None])
    embedding, stages = embed(model, variables, utt[None])
    assert embedding.dtype == jnp.float32
    np.testing.assert_allclose(embedding, expected, atol=2e-5 * np.abs(expected).max())
    assert [stage.shape[1:3] for stage in stages] == [(40, 20), (20, 10), (10, 5), (5, 3)]
    for stage, reference in zip(stages, expected_stages):
        np.testing.assert_allclose(stage, reference, atol=2e-5 * np.abs(reference).max())


@pytest.mark.parametrize("name", NETWORKS)
def test_padded_utterances_of_every_length_equal_pytorch_alone(name):
    """All lengths modulo the networks' total stride of 8."""
    model = NETWORKS[name]
    variables = varied(model)
    for lengths in ([9, 10, 11], [12, 13, 14], [15, 16, 46]):
        utts = utterances(lengths, seed=1)
        expected = np.concatenate([torch_embedding(model, variables, utt[None])[0] for utt in utts])
        together, _ = embed(model, variables, padded(utts, 1e4), np.array(lengths, np.int32))
        np.testing.assert_allclose(together, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", NETWORKS)
def test_an_utterance_is_embedded_alike_alone_and_padded(name):
    model = NETWORKS[name]
    variables = varied(model)
    lengths = np.array([23, 40, 47], np.int32)
    utts = utterances(lengths)
    for filler in (0.0, 1e4, np.nan):
        together, stages = embed(model, variables, padded(utts, filler), lengths)
        for i in (0, 1):
            alone, alone_stages = embed(model, variables, utts[i][None])
            np.testing.assert_allclose(together[i : i + 1], alone, atol=1e-5 * max(1, np.abs(alone).max()))
            for stage, reference in zip(stages, alone_stages):
                real = reference.shape[1]
                np.testing.assert_allclose(stage[i, :real], reference[0], atol=1e-5 * np.abs(reference).max())
                assert not np.asarray(stage[i, real:]).any()
    # Taken for real frames, the padding does change the embedding: the test above can fail.
    unmasked, _ = embed(model, variables, padded(utts, 0.0), np.full(3, TIME, np.int32))
    assert np.abs(unmasked - together)[:2].max() > 1e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_shortest_utterances_give_finite_embeddings(name):
    model = NETWORKS[name]
    lengths = np.array([1, 2, 0], np.int32)
    together, _ = embed(model, varied(model), padded(utterances(lengths), np.nan), lengths)
    assert np.isfinite(together).all()


@pytest.mark.parametrize("name", ["pre", "basic"])
def test_bfloat16_compute_stays_near_float32_and_masks_as_well(name):
    model = NETWORKS[name]
    half = model.clone(dtype=jnp.dtype("bfloat16"))
    variables = varied(model)
    lengths = np.array([23, 40, 47], np.int32)
    utts = utterances(lengths)
    exact, _ = embed(model, variables, padded(utts, 3.0), lengths)
    together, _ = embed(half, variables, padded(utts, 3.0), lengths)
    alone, _ = embed(half, variables, utts[1][None])
    assert together.dtype == jnp.float32
    scale = np.abs(exact).max()
    assert 0 < np.abs(together - exact).max() < 0.05 * scale
    assert np.abs(together[1] - alone[0]).max() < 0.02 * scale
    assert {leaf.dtype for leaf in jax.tree.leaves(registry.shapes(half))} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", ["pre"])
def test_training_statistics_do_not_see_the_padding(name):
    """Doubling the padding changes neither the training output, nor the statistics, nor the gradients."""
    model = NETWORKS[name]
    variables = varied(model)
    utts = utterances([17, 24, 31, 32])
    lengths = jnp.array([17, 24, 31, 32])
    direction = np.random.default_rng(1).normal(size=(4, 16)).astype(np.float32)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(params, batch):
        def loss(params):
            out, new = model.apply({**variables, "params": params}, batch, lengths, True, mutable=["batch_stats"])
            return jnp.sum(out * direction), new

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, stats), grads = step(variables["params"], padded(utts, 0.0, 32))
    (loss2, stats2), grads2 = step(variables["params"], padded(utts, np.inf, 64))
    assert np.isfinite(loss)
    assert float(loss2) == pytest.approx(float(loss), abs=1e-4)
    for one, other in ((stats, stats2), (grads, grads2)):
        for (path, a), (_, b) in zip(named_leaves(one), named_leaves(other)):
            np.testing.assert_allclose(b, a, atol=2e-3 * max(1, np.abs(a).max()), err_msg=path)


def test_rematerialization_changes_memory_and_arithmetic_only():
    """By what blocks keep: the gradient stays; arithmetic falls to that of a network that keeps everything."""
    plain = registry.build("resnet50", width=4, features=8, embedding_size=4, blocks=[1, 1, 1, 1])
    variables = varied(plain)
    batch = np.stack(utterances([24] * 8, features=8))
    convolutions = {}

    def gradient(model, keeps):
        def loss(params):
            out, _ = model.apply({**variables, "params": params}, batch, None, True, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(out))

        lowered = jax.jit(jax.grad(loss)).lower(variables["params"])
        convolutions[keeps] = lowered.as_text().count("stablehlo.convolution")
        return lowered.compile(compiler_options=QUICK)(variables["params"])

    whole = gradient(plain, "everything")
    for keeps in resnet.KEPT:
        again = plain.clone(remat=True).keeping(keeps)
        assert jax.tree.structure(registry.shapes(again)) == jax.tree.structure(registry.shapes(plain))
        for (path, a), (_, b) in zip(named_leaves(whole), named_leaves(gradient(again, keeps))):
            np.testing.assert_allclose(b, a, atol=1e-3 * max(1, np.abs(a).max()), err_msg=path)
    assert convolutions["nothing"] == convolutions["statistics"] > convolutions["convolutions"]
    assert convolutions["convolutions"] == convolutions["everything"]


@pytest.mark.parametrize("shape", [(2, 30, 21), (30, 20)])
def test_wrong_feature_size_is_told(shape):
    model = NETWORKS["post"]
    with pytest.raises(UserError, match=r"20 features"):
        jax.eval_shape(model.apply, registry.shapes(model), jax.ShapeDtypeStruct(shape, jnp.float32))


def test_parameter_names():
    """The names that quantization rules and imports are written for."""
    kiwano = {name for name, _ in named_leaves(registry.shapes(NETWORKS["post"])["params"])}
    for name in (
        "stem/conv/kernel",
        "stem/bn/scale",
        "stage1/block0/conv1/kernel",
        "stage1/block1/bn2/bias",
        "stage2/block0/shortcut/conv/kernel",
        "stage2/block0/shortcut/bn/scale",
        "stage1/block0/se/fc1/kernel",
        "stage2/block0/se/fc2/bias",
        "pool/attention1/kernel",
        "pool/attention2/bias",
        "head/linear/kernel",
        "head/linear/bias",
        "head/bn_in/scale",
        "head/bn/scale",
    ):
        assert name in kiwano
    assert not any(name.startswith(("stage3", "stage4")) and "/se/" in name for name in kiwano)
    assert not any(name.startswith("stage1") and "shortcut" in name for name in kiwano)
    folded = {name for name, _ in named_leaves(registry.shapes(FOLDED["post-folded"])["params"])}
    assert not any("/bn" in name for name in folded)
    assert "stage1/block0/conv1/bias" in folded
    folded = {name for name, _ in named_leaves(registry.shapes(FOLDED["pre-folded"])["params"])}
    assert {name.rsplit("/")[-2] for name in folded if "/bn" in name} == {"bn1"}
    assert "stage1/block0/conv3/bias" not in folded
