import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kmq_jax import quant
from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import map_named, named_leaves, replace_named
from kmq_jax.data import source
from kmq_jax.models import registry
from kmq_jax.models.protocol import Part, SpeakerNetwork
from kmq_jax.models.speaker_model import SpeakerModel, at_bits, embed_all, frontend_of, load_model, save_model
from kmq_jax.models.walk import CONVOLUTION, walk
from kmq_jax.nn.conv import window
from kmq_jax.nn.layers import BasicBlock, Conv, ConvNorm, LayerStyle, dense
from kmq_jax.ptq import fit, moments
from kmq_jax.training import qat
from kmq_jax.training.options import QatOptions

DATA = source.open_source("synthetic:train?speakers=4&utterances=4")
RESNET = {"width": 8, "blocks": [1, 1, 1, 1], "embedding_size": 16}


class Residual(SpeakerNetwork):
    """Residual blocks of one shape, as those of ResNets: what is fitted alike need be compiled only once."""

    features: int = 81
    embedding_size: int = 16
    width: int = 8
    norm: str = "bias"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, features, lengths=None, train=False):
        style = LayerStyle(self.norm)
        x = nn.relu(ConvNorm(self.width, 3, 2, style, name="stem")(features[..., None], None, train))
        for name in BLOCKS:
            x = BasicBlock(self.width, 1, False, style, name=name)(x, None, train)
        return dense(self.embedding_size, "head")(x.mean(1).reshape(len(x), -1))

    @nn.nowrap
    def parts(self):
        blocks = (Part(name, name, distilled=True) for name in BLOCKS)
        return Part("stem", "stem"), *blocks, Part("head", "head")


BLOCKS = ("block1", "block2", "block3")
registry.register("fit_residual", Residual)


def reference_of(norm, name="fit_residual", **more):
    """A tiny network with random statistics or biases."""
    settings = {"norm": norm, **(RESNET if name == "resnet18" else {}), **more}
    variables = registry.initialize(registry.build(name, **settings), jax.random.key(0))
    rng = np.random.default_rng(0)

    def disturb(name, leaf):
        if name.endswith(("/bias", "/mean")):
            return np.asarray(rng.normal(size=leaf.shape) * 0.1, np.float32)
        return np.asarray(leaf)

    return SpeakerModel(name, settings, "kiwano", map_named(disturb, variables))


def quantized_of(reference, kept=(), bits=2, **settings):
    rules = [*kept, quant.QuantRule("kernel$", quant.QuantSpec(bits, **settings))]
    params = quant.quantize_params(reference.variables["params"], rules)
    return dataclasses.replace(reference, variables={**reference.variables, "params": params})


def cosine(a, b):
    return np.mean(np.sum(a * b, 1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))


def stage_moments(speaker_model, features):
    """Mean and deviation of each stage's output `[stages, 2]`."""
    variables = quant.dequantize_params(speaker_model.variables, speaker_model.bits)
    return np.array([(jnp.mean(s), jnp.std(s)) for s in stages_of(speaker_model.network(), variables, features)])


def stages_of(network, variables, features):
    """Outputs of the stages."""
    return list(network.taps(variables, features, names=network.distilled_parts())[1].values())


def test_folded_biases_bring_embeddings_nearer_and_match_the_moments():
    reference = reference_of("bias")
    quantized = quantized_of(reference)
    repaired = fit.fit_on(reference, quantized, DATA, crops=16, seconds=1.0)
    exact, before, after = (embed_all(m, DATA) for m in (reference, quantized, repaired))
    assert cosine(exact, after) > cosine(exact, before)

    features = moments.random_features(frontend_of("kiwano"), DATA, 16, 1.0)
    np.testing.assert_allclose(*(stage_moments(m, features) for m in (reference, repaired)), rtol=0.1)


def test_running_statistics_may_be_those_of_the_quantized_network():
    reference = reference_of("batch")
    quantized = quantized_of(reference)
    features = moments.random_features(frontend_of("kiwano"), DATA, 16, 1.0)
    repaired = fit.fit(reference, quantized, features, batch_statistics=True)
    network = reference.network()
    variables = quant.dequantize_params(repaired.variables)
    trained = network.apply(variables, features, train=True, mutable=["batch_stats"])[0]
    np.testing.assert_allclose(network.apply(variables, features), trained, rtol=1e-2, atol=1e-3)


def test_a_network_of_other_statistics_than_the_crops_is_the_same_at_8_bits():
    """Its running statistics are made up: with those of the crops it would be another network."""
    reference = reference_of("batch")
    quantized = quantized_of(reference, bits=8, only_smaller=False)
    features = moments.random_features(frontend_of("kiwano"), DATA, 16, 1.0)
    found = {}
    for batch_statistics in (False, True):
        fitted = fit.fit(reference, quantized, features, batch_statistics=batch_statistics)
        embeddings = (m.network().apply(quant.dequantize_params(m.variables), features) for m in (fitted, reference))
        found[batch_statistics] = cosine(*embeddings)
    assert found[False] > 0.999 and found[True] < 0.99


@pytest.mark.parametrize("recipe", ["normalized", "weights"])
def test_training_can_start_from_the_reference_s_moments(recipe):
    reference = reference_of("bias")
    section = QatOptions(bits=2, recipe=recipe)
    features = moments.random_features(frontend_of("kiwano"), DATA, 16, 1.0)
    begun = qat.init_params(section, reference.variables["params"])
    # Of so small a network they are near as it is.
    off = map_named(lambda name, leaf: leaf + 0.3 if name.endswith("/bias") else leaf, begun.latents)
    begun = dataclasses.replace(begun, latents=off)
    repaired, _ = qat.match_moments(reference, begun, features)
    assert jax.tree.structure(repaired) == jax.tree.structure(begun)
    expected = stage_moments(reference, features)
    shipped = [dataclasses.replace(reference, variables=qat.packed_variables(p, {})) for p in (begun, repaired)]
    before, after = (np.abs(stage_moments(m, features) / expected - 1) for m in shipped)
    assert np.max(after) < 0.1
    assert np.max(before) > 0.3


def convolutions_of(model, params, features):
    """Mean and deviation of each channel of every convolution's outputs."""
    found = {}

    def record(layer, x, run):
        y = run(x)
        if layer.kind == CONVOLUTION:
            found[layer.name] = np.array([y.mean((0, 1, 2)), y.std((0, 1, 2))])
        return y

    walk(model.network(), {"params": params}, features, record)
    return found


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({"granularity": "tensor"}, slice(1)),  # the means alone
        ({"multi_stage": True, "rules": (("^block2/", 3),)}, slice(2)),
        ({"multi_stage": True, "rules": (("^block2/", 3),), "recipe": "weights"}, slice(2)),
    ],
    ids=["one codebook", "phases", "phases of weights"],
)
def test_a_first_step_computes_with_the_reference_s_moments(change, kept):
    """Whatever is in full precision until its phase begins, and though channels that share a codebook share a scale."""
    reference = reference_of("bias")
    section = QatOptions(bits=1, **change)
    features = moments.random_features(frontend_of("kiwano"), DATA, 8, 1.0)
    begun, _ = qat.init_fitted(section, reference, features)
    first = qat.phases_of(section, begun.codebooks)[0]
    weights = qat.effective_weights(section, begun, {}, jnp.zeros((), jnp.int32), names=first)
    expected = convolutions_of(reference, reference.variables["params"], features)
    found = convolutions_of(reference, weights, features)
    assert len(found) > 3
    for name, both in expected.items():
        np.testing.assert_allclose(found[name][kept], both[kept], rtol=0.01, atol=0.01 * both[1].max(), err_msg=name)


@pytest.mark.slow
def test_wider_widths_begin_fitted_inside_the_cells_of_a_narrow_network_that_stays_as_it_is():
    reference = reference_of("bias")
    kept = "^block3/"  # in full precision
    section = QatOptions(bits=4, coarse=(2, 3), grow_from="narrow", rules=((kept, 0),))
    features = moments.random_features(frontend_of("kiwano"), DATA, 8, 1.0)
    narrow = fit.fit(reference, quantized_of(reference, [quant.QuantRule(kept, None)]), features)
    narrow = map_named(
        lambda name, leaf: leaf + 0.01 if name.endswith("/bias") else leaf,  # as training moves them
        narrow.variables["params"], is_leaf=quant.is_codebook_tensor,
    )  # fmt: skip
    begun, batch_stats = qat.init_fitted(section, reference, features, parent=narrow)
    shapes = jax.eval_shape(lambda p: qat.init_params(section, p, parent=narrow), reference.variables["params"])
    sizes = [[(name, x.shape, x.dtype) for name, x in named_leaves(tree)] for tree in (begun, shapes)]
    assert sizes[0] == sizes[1]

    cells = qat.parent_indices(begun, narrow)
    variables = {**qat.packed_variables(begun, cells), "batch_stats": batch_stats}
    shipped = dataclasses.replace(reference, variables=variables)
    here, there = quant.dequantize_params(at_bits(shipped, 2).variables["params"], 2), quant.dequantize_params(narrow)
    jax.tree.map(np.testing.assert_array_equal, here, there)

    def nearness(packed, bits):
        """To the reference, of the last stage's outputs."""
        at = at_bits(dataclasses.replace(reference, variables=packed), bits)
        exact, own = (
            stages_of(m.network(), quant.dequantize_params(m.variables, m.bits), features)[-1] for m in (reference, at)
        )
        return float(jnp.mean((own - exact) ** 2))

    plain = qat.packed_variables(qat.init_params(section, reference.variables["params"], parent=narrow), cells)
    for bits in (3, 4):
        assert nearness(variables, bits) < nearness(plain, bits)
    assert nearness(variables, 4) < nearness(variables, 3) < nearness(variables, 2)


@pytest.mark.parametrize("norm", [pytest.param("bias", marks=pytest.mark.slow), "batch"])
def test_training_begins_with_the_network_fitted_without_training(norm):
    reference = reference_of(norm)
    section = QatOptions(bits=2)
    features = moments.random_features(frontend_of("kiwano"), DATA, 8, 1.0)
    params, batch_stats = qat.init_fitted(section, reference, features)
    assert jax.tree.structure(params) == jax.tree.structure(
        jax.eval_shape(lambda p: qat.init_params(section, p), reference.variables["params"])
    )
    expected = fit.fit(reference, quantized_of(reference), features, batch_statistics=True).variables
    shipped = {**qat.packed_variables(params, {}), "batch_stats": batch_stats}
    for name, leaf in named_leaves(expected):
        np.testing.assert_array_equal(dict(named_leaves(shipped))[name], leaf, err_msg=name)


@pytest.mark.parametrize("change", [{"recipe": "weights"}, {"granularity": "tensor"}, {"multi_stage": True}])
def test_what_cannot_be_fitted_begins_with_the_reference_s_moments(change):
    reference = reference_of("bias")
    section = QatOptions(bits=2, **change)
    features = moments.random_features(frontend_of("kiwano"), DATA, 8, 1.0)
    begun = qat.init_fitted(section, reference, features)
    expected = qat.match_moments(reference, qat.init_params(section, reference.variables["params"]), features)
    jax.tree.map(np.testing.assert_array_equal, begun, expected)
    plain, _ = qat.init_fitted(section, reference, None)
    jax.tree.map(np.testing.assert_array_equal, plain, qat.init_params(section, reference.variables["params"]))


def test_a_network_that_recomputes_its_blocks_is_repaired_alike():
    reference, other = (reference_of("batch", "resnet18", remat=remat) for remat in (False, True))
    features = moments.random_features(frontend_of("kiwano"), DATA, 4, 1.0)
    found, expected = (moments.measure(m, quantized_of(m), features).statistics for m in (other, reference))
    assert found.keys() == expected.keys() and found
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)


def test_the_size_stays():
    reference = reference_of("bias")
    quantized = quantized_of(reference)
    repaired = fit.fit_on(reference, quantized, DATA, crops=8, seconds=1.0)
    assert quant.size_bytes(repaired.variables) == quant.size_bytes(quantized.variables)


def test_one_codebook_for_all_channels_cannot_be_repaired():
    reference = reference_of("bias")
    with pytest.raises(UserError, match="output channel"):
        fit.fit_on(reference, quantized_of(reference, granularity="tensor"), DATA, crops=4, seconds=1.0)


def test_activations_that_no_memory_holds_are_refused_before_any_are_there():
    reference = reference_of("bias")
    features = jax.ShapeDtypeStruct((10**9, 98, 24), jnp.float32)
    with pytest.raises(UserError, match="^fitting on 1,000,000,000 crops of 98 frames: takes .* GB or more"):
        fit.fit(reference, quantized_of(reference), features)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["bias", "batch"])
def test_the_narrowest_width_of_a_nested_model_is_fitted_as_though_it_were_alone_and_wider_ones_go_on(norm, tmp_path):
    reference = reference_of(norm)
    spec = quant.QuantSpec(6, coarse=(2, 3), only_smaller=False)
    params = quant.quantize_params(reference.variables["params"], [quant.QuantRule("kernel$", spec)])
    nested = dataclasses.replace(reference, variables={**reference.variables, "params": params})
    fitted = fit.fit_on(reference, nested, DATA, crops=8, seconds=1.0)
    assert quant.size_bytes(fitted.variables["params"]) == quant.size_bytes(nested.variables["params"])
    save_model(tmp_path / "nested.kmq", fitted)
    found = {bits: load_model(tmp_path / "nested.kmq", bits) for bits in spec.all_bits}

    tensors = dict(named_leaves(params, quant.is_codebook_tensor))
    narrow = {name: read_at(leaf, 2) for name, leaf in tensors.items() if quant.is_codebook_tensor(leaf)}
    alone = replace_named(params, narrow, quant.is_codebook_tensor)
    single = dataclasses.replace(reference, variables={**reference.variables, "params": alone})
    expected = fit.fit_on(reference, single, DATA, crops=8, seconds=1.0)
    here, there = (dict(named_leaves(quant.dequantize_params(m.variables, m.bits))) for m in (found[2], expected))
    assert here.keys() == there.keys()
    for name in here:
        np.testing.assert_array_equal(here[name], there[name])

    if norm == "batch":
        return  # its reference has made-up statistics, and is not to be come near to
    exact = embed_all(reference, DATA)
    nearness = [cosine(exact, embed_all(found[bits], DATA)) for bits in spec.all_bits]
    assert nearness == sorted(nearness) and nearness[-1] > 0.99


def test_a_layer_s_outputs_are_nearer_than_with_the_nearest_centroids():
    """On other crops than it was fitted on, of the last convolution, where the errors of all have added up."""
    reference = reference_of("bias", width=16)
    quantized = quantized_of(reference)
    fitted = fit.fit_on(reference, quantized, DATA, crops=16, seconds=1.0)
    others = source.open_source("synthetic:dev?speakers=4&utterances=2")
    features = moments.random_features(frontend_of("kiwano"), others, 8, 1.0)
    exact, nearest, fed_back = (last_stage(m, features) for m in (reference, quantized, fitted))
    assert np.mean((fed_back - exact) ** 2) < 0.5 * np.mean((nearest - exact) ** 2)


def last_stage(speaker_model, features):
    variables = quant.dequantize_params(speaker_model.variables, speaker_model.bits)
    return stages_of(speaker_model.network(), variables, features)[-1]


@pytest.mark.parametrize("settings", [{"symmetric": True}, {"pinned_zero": True}])
def test_constrained_codebooks_are_only_scaled(settings):
    reference = reference_of("bias")
    quantized = quantized_of(reference, codebook_dtype="float32", **settings)
    fitted = fit.fit_on(reference, quantized, DATA, crops=8, seconds=1.0)
    before, after = (dict(named_leaves(m.variables["params"], quant.is_codebook_tensor)) for m in (quantized, fitted))
    moved = 0
    for name in before:
        if quant.is_codebook_tensor(before[name]) and before[name].ndim == 4:
            slope = np.max(np.abs(after[name].codebook), 1) / np.max(np.abs(before[name].codebook), 1)
            np.testing.assert_allclose(after[name].codebook, before[name].codebook * slope[:, None], rtol=1e-5)
            moved += np.mean(np.asarray(after[name].packed) != np.asarray(before[name].packed)) > 0
    assert moved > 0


def test_what_is_kept_in_half_precision_keeps_its_size():
    reference = reference_of("bias")
    rules = [quant.QuantRule("stem/", quant.QuantSpec(16)), quant.QuantRule("kernel$", quant.QuantSpec(2))]
    params = quant.quantize_params(reference.variables["params"], rules)
    quantized = dataclasses.replace(reference, variables={**reference.variables, "params": params})
    fitted = fit.fit_on(reference, quantized, DATA, crops=4, seconds=1.0)
    assert quant.size_bytes(fitted.variables) == quant.size_bytes(quantized.variables)


def read_at(tensor, bits):
    """A nested tensor as one of a single width."""
    indices = np.asarray(quant.indices_of(tensor, bits)).reshape(-1, tensor.groups).T
    return dataclasses.replace(
        tensor, codebook=tensor.codebook_of(bits), packed=quant.pack_bits(indices, bits), coarse=(), bits=bits
    )


@pytest.mark.slow
def test_statistics_of_a_trained_nested_model_are_measured_at_each_width():
    reference = reference_of("batch")
    params = quant.quantize_params(
        reference.variables["params"], [quant.QuantRule("kernel$", quant.QuantSpec(4, coarse=(1,), only_smaller=False))]
    )
    nested = dataclasses.replace(reference, variables={**reference.variables, "params": params})
    features = moments.random_features(frontend_of("kiwano"), DATA, 8, 1.0)
    measured = moments.own_statistics(nested, features)
    for bits in (1, 4):
        at = at_bits(measured, bits)
        variables = quant.dequantize_params(at.variables, bits)
        trained = at.network().apply(variables, features, train=True, mutable=["batch_stats"])[0]
        np.testing.assert_allclose(at.network().apply(variables, features), trained, rtol=1e-2, atol=2e-3)
    with pytest.raises(UserError, match="cannot be read at 3 bits"):
        at_bits(measured, 3)


@pytest.mark.parametrize("rank", [1, 2])
def test_second_moments_of_a_convolution_s_inputs_are_those_of_its_patches(rank):
    moves = window(rank, 3, 2, "valid" if rank == 1 else "same", 2 if rank == 1 else 1)
    rng = np.random.default_rng(0)
    x, own = (rng.normal(size=(2, *(11, 6)[:rank], 3)).astype(np.float32) for _ in range(2))
    # So few places that all are taken.
    H, cross = fit._second_moments(fit._seen(jnp.concatenate([x, own]), moves))

    def patches(x):
        x = np.pad(x, ((0, 0), *moves.padding, (0, 0)))
        rows = []
        for place in np.ndindex(*moves.sizes((11, 6)[:rank])):
            index = [p * s + d * np.arange(3) for p, s, d in zip(place, moves.strides, moves.dilations)]
            rows.append(x[(slice(None), *np.ix_(*index))].reshape(2, -1))
        return np.concatenate(rows)

    a, b = patches(x), patches(own)
    np.testing.assert_allclose(H, b.T @ b / len(b), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(cross, b.T @ (a - b) / len(b), rtol=1e-4, atol=1e-4)


class Grouped(SpeakerNetwork):
    """A grouped and a depthwise convolution."""

    features: int = 81
    embedding_size: int = 8
    dtype: str = "float32"

    @nn.compact
    def __call__(self, features, lengths=None, train=False):
        x = Conv(16, 3, use_bias=True, name="in")(features)
        x = Conv(16, 3, groups=4, use_bias=True, name="grouped")(nn.relu(x))
        x = Conv(16, 3, groups=16, use_bias=True, name="depthwise")(nn.relu(x))
        return dense(self.embedding_size, "head")(x.mean(1))

    @nn.nowrap
    def parts(self):
        return tuple(Part(name, name) for name in ("in", "grouped", "depthwise", "head"))


def test_grouped_and_depthwise_convolutions_are_fitted():
    registry.register("fit_grouped", Grouped)
    variables = registry.initialize(registry.build("fit_grouped"), jax.random.key(0))
    reference = SpeakerModel("fit_grouped", {}, "kiwano", jax.device_get(variables))
    quantized = quantized_of(reference)
    fitted = fit.fit_on(reference, quantized, DATA, crops=16, seconds=1.0)
    exact, before, after = (embed_all(m, DATA) for m in (reference, quantized, fitted))
    assert np.mean((after - exact) ** 2) < 0.5 * np.mean((before - exact) ** 2)
    assert quant.size_bytes(fitted.variables) == quant.size_bytes(quantized.variables)


class Attending(SpeakerNetwork):
    """Attention over frames, whose linear layers see every frame; one of them has no bias."""

    features: int = 81
    embedding_size: int = 8
    dtype: str = "float32"

    @nn.compact
    def __call__(self, features, lengths=None, train=False):
        x = dense(12, "in")(features)
        query, key = dense(12, "query")(x), nn.Dense(12, use_bias=False, name="key")(x)
        weights = nn.softmax(query @ key.swapaxes(1, 2), axis=-1)
        return dense(self.embedding_size, "head")(jnp.mean(x + weights @ x, axis=1))

    @nn.nowrap
    def parts(self):
        return tuple(Part(name, name) for name in ("in", "query", "key", "head"))


def test_linear_layers_that_see_every_frame_are_fitted():
    registry.register("fit_attending", Attending)
    variables = registry.initialize(registry.build("fit_attending"), jax.random.key(0))
    reference = SpeakerModel("fit_attending", {}, "kiwano", jax.device_get(variables))
    quantized = quantized_of(reference, kept=[quant.QuantRule("^head/", None)])  # it sees one vector a crop
    features = moments.random_features(frontend_of("kiwano"), DATA, 16, 0.5)
    fitted = fit.fit(reference, quantized, features)

    def embeddings(model):
        return np.asarray(model.network().apply(quant.dequantize_params(model.variables), features))

    exact, before, after = map(embeddings, (reference, quantized, fitted))
    assert np.mean((after - exact) ** 2) < 0.5 * np.mean((before - exact) ** 2)
    there = dict(named_leaves(quantized.variables["params"], quant.is_codebook_tensor))
    for name, leaf in named_leaves(fitted.variables["params"], quant.is_codebook_tensor):
        if quant.is_codebook_tensor(leaf):
            assert not np.array_equal(leaf.packed, there[name].packed)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "measured"), [("campplus", False), ("ecapa_c512", True), ("redimnet_b0", True)])
def test_real_networks_come_nearer(name, measured):
    """Dense and pre-activated layers; convolution, ReLU, normalisation; depthwise convolutions and attention."""
    settings = {**registry.smoke_settings(name), "features": 80}
    network = registry.build(name, **settings)
    variables = jax.device_get(registry.initialize(network, jax.random.key(0)))
    features, others = (moments.random_features(frontend_of("wespeaker"), DATA, n, 1.0) for n in (16, 24))
    others = others[16:]
    reference = SpeakerModel(name, settings, "wespeaker", variables)
    # As training would leave them. CAM++ normalises embeddings, which hardly differ before training.
    reference = moments.own_statistics(reference, features) if measured else reference
    quantized = quantized_of(reference)
    fitted = fit.fit(reference, quantized, features)
    run = jax.jit(network.apply)
    models = (reference, quantized, fitted)
    exact, before, after = (np.asarray(run(quant.dequantize_params(m.variables), others)) for m in models)
    assert np.mean((after - exact) ** 2) < 0.8 * np.mean((before - exact) ** 2)
    assert quant.size_bytes(fitted.variables) == quant.size_bytes(quantized.variables)


class Repeating(SpeakerNetwork):
    """A convolution of one's own choice that runs once, or twice."""

    features: int = 8
    embedding_size: int = 4
    padding: str = "SAME"
    runs: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, features, lengths=None, train=False):
        conv, x = nn.Conv(8, (3,), padding=self.padding, name="conv"), features
        for _ in range(self.runs):
            x = conv(x)
        return dense(self.embedding_size, "head")(x.mean(1))

    @nn.nowrap
    def parts(self):
        return Part("conv", "conv"), Part("head", "head")


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"runs": 2}, "conv runs more than once"), ({"padding": "CIRCULAR"}, "conv: a Conv cannot be fitted")],
)
def test_a_layer_that_cannot_be_fitted_is_named(settings, message):
    registry.register("fit_repeating", Repeating)
    network, features = registry.build("fit_repeating", **settings), np.ones((2, 9, 8), np.float32)
    variables = network.init(jax.random.key(0), features)
    reference = SpeakerModel("fit_repeating", settings, "kiwano", jax.device_get(variables))
    with pytest.raises(UserError, match=message):
        fit.fit(reference, quantized_of(reference, only_smaller=False), jnp.asarray(features))


def test_a_channel_without_deviation_keeps_its_slope():
    seen = jnp.array([1.0, 1.0, 1.0]), jnp.array([0.0, 1e-9, 2.0])
    wanted = jnp.array([3.0, 3.0, 3.0]), jnp.array([0.5, 0.5, 1.0])
    slope, shift = moments.matching(seen, wanted)
    assert slope.tolist() == [1, 1, 0.5] and shift.tolist() == [2, 2, 2.5]


def test_statistics_of_no_batch_are_refused():
    with pytest.raises(UserError, match="no batch of features"):
        moments.averaged_statistics(reference_of("batch"), [])
