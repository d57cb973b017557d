"""The parts of quantization-aware training, on a tree of two kernels."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kmq_jax import quant
from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import named_leaves
from kmq_jax.models import registry
from kmq_jax.models.speaker_model import PER_BITS, SpeakerModel, at_bits, embed_waves, save_model
from kmq_jax.nn import integers
from kmq_jax.ptq import activations
from kmq_jax.training import qat
from kmq_jax.training.options import QatOptions
from kmq_jax.training.state import QatParams, Trainable, TrainState, checkpoint_parts, from_checkpoint
from kmq_jax.training.tasks import Quantized

RNG = np.random.default_rng(0)
NETWORK = {
    "first": {"kernel": RNG.standard_normal((3, 3, 4, 8)).astype(np.float32), "bias": np.zeros(8, np.float32)},
    "second": {"kernel": (0.1 * RNG.standard_normal((72, 6))).astype(np.float32)},
}
NAMES = ("first/kernel", "second/kernel")


def options(**changes):
    return QatOptions(**{"bits": 3, **changes})


def kernels(tree):
    return np.asarray(tree["first"]["kernel"]), np.asarray(tree["second"]["kernel"])


@pytest.mark.parametrize("recipe", ["normalized", "weights"])
@pytest.mark.parametrize("changes", [{}, {"bits": 1, "symmetric": True}])
def test_a_step_computes_with_exactly_what_is_shipped(recipe, changes):
    settings = options(recipe=recipe, **changes)
    params = qat.init_params(settings, NETWORK)
    used = kernels(jax.jit(lambda p, step: qat.effective_weights(settings, p, {}, step))(params, 0))
    for here, there in zip(used, kernels(quant.dequantize_params(qat.packed_variables(params, {})["params"]))):
        np.testing.assert_array_equal(here, there)
    assert all(len(np.unique(used[0][..., c])) <= 2**settings.bits for c in range(8))


def test_a_trained_file_may_exceed_a_quantized_one_by_what_would_not_shrink(tmp_path):
    """At 8 bits, where a channel's codebook takes 512 bytes: of this network only the first kernel shrinks."""
    settings = registry.smoke_settings("xvector")
    network = registry.build("xvector", **settings)
    variables = registry.initialize(network, jax.random.key(0))
    params = variables["params"]

    def trained(**changes):
        begun = jax.eval_shape(lambda p: qat.init_params(options(bits=8, **changes), p), params)
        return jax.eval_shape(lambda p: qat.packed_variables(p, {}), begun)["params"]

    trees = {
        "full": params,
        "quantized": quant.quantize_params(params, {"/kernel$": 8}),
        "trained": trained(),
        "kept": trained(rules=(("^(frame[2-5]|head)/", 0),)),
    }
    sizes = {}
    for name, tree in trees.items():
        filled = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), {**variables, "params": tree})
        save_model(tmp_path / f"{name}.kmq", SpeakerModel("xvector", settings, "wespeaker", filled))
        sizes[name] = (tmp_path / f"{name}.kmq").stat().st_size
    assert sizes["quantized"] < sizes["full"] < sizes["trained"]
    assert abs(sizes["kept"] - sizes["quantized"]) < 200  # but for the text of the header


def grown():
    """Nested codebooks grown from a 2-bit network whose second layer is in full precision; all of it was trained."""
    trained = {**NETWORK, "first": {**NETWORK["first"], "bias": np.full(8, 2.0, np.float32)}}
    trained["second"] = {"kernel": trained["second"]["kernel"] + 1, "bias": np.full(6, 5.0, np.float32)}
    full = {**NETWORK, "second": {**NETWORK["second"], "bias": np.zeros(6, np.float32)}}
    settings = options(bits=4, coarse=(2, 3), grow_from="parent", rules=(("second", 0),))
    rules = qat.rules_of(options(bits=2, rules=(("second", 0),)))
    parent = quant.quantize_params(trained, rules)
    params = qat.init_params(settings, full, parent=parent)
    return settings, parent, params, qat.parent_indices(params, parent)


def test_nested_codebooks_train_in_turns_each_with_biases_of_its_own():
    settings, parent, params, cells = grown()
    assert list(cells) == ["first/kernel"]
    # Where the kernel is shared, biases begin as the parent has them; else in full precision.
    np.testing.assert_array_equal(params.latents["second"]["kernel"], parent["second"]["kernel"])
    first = {
        bits: (float(own["first"]["bias"][0]), float(own["second"]["bias"][0])) for bits, own in params.per_bits.items()
    }
    assert first == {"2": (2, 5), "3": (0, 5)}
    params.latents["first"]["bias"] = jnp.full(8, 4.0)
    params.per_bits["3"]["first"]["bias"] = jnp.full(8, 3.0)

    def weights(params, step):
        return qat.effective_weights(settings, params, cells, jnp.array(step))

    shipped = SpeakerModel("", {}, "", qat.packed_variables(params, cells))
    for step, bits in enumerate((3, 4, 3)):
        read = quant.dequantize_params(at_bits(shipped, bits).variables["params"], bits)
        np.testing.assert_array_equal(read["first"]["bias"], np.full(8, float(bits)))
        jax.tree.map(np.testing.assert_array_equal, weights(params, step), read)
        moved = jax.grad(lambda p, step=step: jnp.sum(weights(p, step)["first"]["bias"]))(params)
        for own, tree in {**moved.per_bits, "4": moved.latents}.items():
            np.testing.assert_array_equal(tree["first"]["bias"], np.full(8, float(own == str(bits))))


def test_the_parent_stays_as_it_is():
    _, parent, params, cells = grown()
    after = qat.keep_parent(params, jax.tree.map(lambda x: x + 0.1, params))
    shipped = at_bits(SpeakerModel("", {}, "", qat.packed_variables(after, cells)), 2).variables["params"]
    jax.tree.map(np.testing.assert_array_equal, quant.dequantize_params(shipped, 2), quant.dequantize_params(parent))
    # All the rest has moved.
    assert np.all(after.per_bits["3"]["first"]["bias"] != params.per_bits["3"]["first"]["bias"])
    assert np.all(after.latents["first"]["bias"] != params.latents["first"]["bias"])
    assert np.all(after.latents["first"]["kernel"] != params.latents["first"]["kernel"])
    books = (after.codebooks["first/kernel"], params.codebooks["first/kernel"])
    assert np.all(books[0].coarse[1] != books[1].coarse[1]) and np.all(books[0].centroids != books[1].centroids)


def gradient(settings, step, thaw):
    params = qat.init_params(settings, NETWORK)

    def loss(params):
        weights = qat.effective_weights(settings, params, {}, step, thaw)
        return sum(jnp.sum(jnp.sin(3 * kernel)) for kernel in jax.tree.leaves(weights))

    return jax.grad(loss)(params).codebooks["first/kernel"]


def test_scales_thaw_and_centroids_move_by_gradient_only_if_asked():
    assert np.all(gradient(options(), 4, 5.0).raw_scale == 0)
    assert np.any(gradient(options(), 5, 5.0).raw_scale != 0)
    assert np.any(gradient(options(), 0, 5.0).centroids != 0)
    for rest in ("lloyd", "fixed"):
        assert np.all(gradient(options(centroids=rest), 0, 5.0).centroids == 0)


@pytest.mark.parametrize("centroids", ["gradient", "lloyd", "fixed"])
def test_decay_moves_no_centroid_that_has_no_gradient_and_no_scale_before_it_thaws(centroids):
    task = Quantized(options(centroids=centroids, lloyd_every=100), thaw=5.0)
    before = qat.init_params(task.options, NETWORK)
    decayed = jax.tree.map(lambda x: 0.9 * x if jnp.issubdtype(x.dtype, jnp.floating) else x, before)
    for step, thawed in ((5, False), (6, True)):  # the fifth step is the last before they train
        after, _ = task.after_update(before, decayed, {}, jnp.array(step))
        for name, book in after.codebooks.items():
            old, given = before.codebooks[name], decayed.codebooks[name]
            np.testing.assert_array_equal(book.raw_scale, given.raw_scale if thawed else old.raw_scale)
            np.testing.assert_array_equal(book.centroids, (given if centroids == "gradient" else old).centroids)
        np.testing.assert_array_equal(after.latents["first"]["kernel"], decayed.latents["first"]["kernel"])


def test_a_scale_that_thaws_between_two_steps_is_held_exactly_as_long_as_it_has_no_gradient():
    task = Quantized(options(), thaw=2.5)
    before = qat.init_params(task.options, NETWORK)
    decayed = jax.tree.map(lambda x: 0.9 * x if jnp.issubdtype(x.dtype, jnp.floating) else x, before)
    for step in range(5):
        after, _ = task.after_update(before, decayed, {}, jnp.array(step + 1))
        held = np.array_equal(after.codebooks[NAMES[0]].raw_scale, before.codebooks[NAMES[0]].raw_scale)
        assert held == np.all(gradient(task.options, step, 2.5).raw_scale == 0) == (step < 3)


@pytest.mark.parametrize("rules", [(("first", 16),), (("first", 0),)])
def test_rules_that_quantize_nothing_are_a_mistake(rules):
    with pytest.raises(UserError, match=r"`quant.rules` \(=first,.*\) give no tensor a codebook"):
        Quantized(options(bits=0, rules=rules, multi_stage=True)).shapes(NETWORK)


def test_a_rule_of_sixteen_bits_is_trained_in_full_and_stored_in_half_precision():
    settings = options(rules=(("second", 16),))
    params = qat.init_params(settings, NETWORK)
    assert list(params.codebooks) == ["first/kernel"] and params.latents["second"]["kernel"].dtype == jnp.float32
    shipped = qat.packed_variables(params, {}, half=qat.half_rules(settings))["params"]
    assert shipped["second"]["kernel"].dtype == jnp.float16 and shipped["first"]["bias"].dtype == jnp.float32
    assert qat.half_rules(options()) == []


def test_biases_of_all_bits_are_stored_in_half_precision():
    _, _, params, cells = grown()
    shipped = qat.packed_variables(params, cells, half_biases=True)
    own = [shipped["params"]["first"]["bias"], *(shipped[PER_BITS][bits]["params/first/bias"] for bits in ("2", "3"))]
    assert [bias.dtype for bias in own] == [jnp.float16] * 3


def moved(params):
    """The parameters after something has moved the latents."""
    return dataclasses.replace(params, latents=jax.tree.map(lambda x: x + 0.2, params.latents))


def test_centroids_move_when_it_is_due_and_not_after_their_last_step():
    settings = options(centroids="lloyd", lloyd_every=3, lloyd_rate=1.0, lloyd_unused_rate=0.0)
    params = moved(qat.init_params(settings, NETWORK))
    name = "second/kernel"
    book, latents = params.codebooks[name], np.asarray(params.latents["second"]["kernel"])
    after = {step: qat.move_centroids(settings, params, {}, jnp.array(step), 6.0).codebooks[name] for step in (2, 3, 9)}
    np.testing.assert_array_equal(after[2].centroids, book.centroids)
    np.testing.assert_array_equal(after[9].centroids, book.centroids)
    indices = np.asarray(book.assigned(params.latents["second"]["kernel"]))
    for channel in range(6):
        for k in range(8):
            members = latents[indices[:, channel] == k, channel]
            if len(members):
                np.testing.assert_allclose(after[3].centroids[channel, k], members.mean(), rtol=1e-5, atol=1e-6)


def test_cached_indices_hold_until_new_ones_are_due():
    settings = options(reassign_every=4)
    params = qat.init_params(settings, NETWORK)
    cached = qat.nearest_indices(params)
    later = moved(params)
    same = qat.reassign(settings, later, cached, jnp.array(3))
    fresh = qat.reassign(settings, later, cached, jnp.array(4))
    latents = dict(named_leaves(later.latents))
    for name in NAMES:
        np.testing.assert_array_equal(same[name], cached[name])
        np.testing.assert_array_equal(fresh[name], later.codebooks[name].assigned(latents[name]))
        assert np.any(np.asarray(fresh[name]) != np.asarray(cached[name]))
    held = qat.effective_weights(settings, later, cached, jnp.array(1))
    shipped = quant.dequantize_params(qat.packed_variables(later, cached)["params"])
    np.testing.assert_array_equal(kernels(held)[0], kernels(shipped)[0])


def test_phases_quantize_the_fewest_bits_first():
    settings = options(bits=4, rules=(("first", 2),), multi_stage=True)
    params = qat.init_params(settings, NETWORK)
    phases = qat.phases_of(settings, params.codebooks)
    assert phases == [("first/kernel",), NAMES]
    early = kernels(qat.effective_weights(settings, params, {}, jnp.array(0), names=phases[0]))
    assert len(np.unique(early[0][..., 0])) <= 4
    np.testing.assert_allclose(early[1], NETWORK["second"]["kernel"], rtol=1e-6)
    # Trained meanwhile, the second is given a codebook of its own again; the first keeps what it has learnt.
    trained = moved(params)
    entered, indices = qat.enter_phase(settings, trained, {}, phases[1], phases[0])
    assert indices == {}
    np.testing.assert_array_equal(entered.latents["first"]["kernel"], trained.latents["first"]["kernel"])
    full = np.asarray(qat.weights_of_latents(trained.latents, trained.codebooks)["second"]["kernel"])
    expected = quant.dequantize_params(quant.quantize_params({"w": full}, quant.QuantSpec(4)))["w"]
    found = kernels(qat.effective_weights(settings, entered, {}, jnp.array(0), names=phases[1]))[1]
    np.testing.assert_allclose(found, expected, rtol=2e-2, atol=1e-3)
    assert qat.phases_of(options(), params.codebooks) == [NAMES]


@pytest.mark.parametrize("sections", [0, 2])
def test_a_budget_gives_the_more_sensitive_tensor_more_bits(sections):
    settings = options(bits=0, budget=0.5, budget_bits=(2, 6), sections=sections, hessian_draws=4)

    def loss(network):
        return jnp.sum(network["first"]["kernel"] ** 2) + 1e-4 * jnp.sum(network["second"]["kernel"] ** 2)

    network = jax.tree.map(jnp.asarray, NETWORK)
    bits = qat.allocate(settings, network, loss, jax.random.key(0))
    assert bits == {"first/kernel": 6, "second/kernel": 2}
    generous = dataclasses.replace(settings, budget=0.9)
    assert qat.allocate(generous, network, loss, jax.random.key(0)) == dict.fromkeys(NAMES, 6)
    books = qat.init_params(settings, NETWORK, bits).codebooks
    assert {name: book.bits for name, book in books.items()} == bits


def test_a_rule_that_matches_nothing_is_a_mistake():
    with pytest.raises(UserError, match="'frist' is the first match of no name"):
        qat.init_params(options(rules=(("frist", 2),)), NETWORK)


def test_groups_of_a_channel_may_be_trained_in_any_recipe():
    for recipe in ("normalized", "weights"):
        params = qat.init_params(options(recipe=recipe), NETWORK)
        full = qat.weights_of_latents(params.latents, params.codebooks)
        np.testing.assert_allclose(kernels(full)[0], NETWORK["first"]["kernel"], rtol=1e-5)
        assert not any(dataclasses.asdict(book)["indices"] for book in params.codebooks.values())


@pytest.mark.parametrize("cached", [False, True])
def test_a_state_comes_back_from_the_parts_of_its_checkpoint(cached):
    for network in (jax.tree.map(jnp.asarray, NETWORK), qat.init_params(options(), NETWORK)):
        params = Trainable(jnp.ones((2, 1, 6)), network)
        indices = qat.nearest_indices(network) if cached and isinstance(network, QatParams) else {}
        state = TrainState(jnp.array(3), params, {"mean": jnp.ones(2)}, optax.sgd(0.1, 0.9).init(params), indices)
        again = from_checkpoint(checkpoint_parts(state))
        assert jax.tree.structure(again) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, again, state)


def test_names_by_which_the_optimizer_groups_parameters():
    _, _, network, _ = grown()
    names = [name for name, _ in named_leaves(Trainable(jnp.ones((2, 1, 6)), network))]
    of = {
        "classifier": 1,
        r"/(bias|scale)$": 6,  # of the network, and at 2 and 3 bits
        r"raw_scale|centroids|coarse": 4,
        r"^network/latents/.*kernel$": 2,
    }
    found = {pattern: sum(bool(re.search(pattern, name)) for name in names) for pattern in of}
    assert found == of and sum(of.values()) == len(names)


def test_steps_with_rounded_activations_compute_with_what_is_shipped():
    settings = {"width": 4, "blocks": [1, 1, 1, 1], "embedding_size": 8}
    network = registry.build("wespeaker_resnet34", **settings)
    variables = registry.initialize(network, jax.random.key(0))
    reference = SpeakerModel("wespeaker_resnet34", settings, "wespeaker", variables)
    features = jax.random.normal(jax.random.key(1), (2, 60, 80))
    options = QatOptions(bits=4, activations=8, rules=((r"^stem/", 0),), biases="float32")
    task = Quantized(options, ranges=activations.measure(reference, features))
    params = qat.init_params(options, variables["params"])
    beside = task.beside(params, None)
    rounds = dict(named_leaves(beside[integers.COLLECTION]))
    assert "stage1/block0/conv1/input" in rounds and "stem/conv/input" not in rounds

    def embed(params, task=task):
        weights = task.weights(params, {}, jnp.zeros((), jnp.int32), None)
        used = {"params": weights, "batch_stats": variables["batch_stats"], **task.beside(params, None)}
        return network.apply(used, features, train=False)

    exact = jax.jit(embed)(params)

    state = TrainState(jnp.array(0), Trainable(jnp.ones((2, 1, 8)), params), variables["batch_stats"], ())
    shipped = task.variables(state)
    packed = {**shipped, "params": quant.dequantize_params(shipped["params"])}
    np.testing.assert_allclose(exact, jax.jit(network.apply)(packed, features), rtol=1e-5, atol=1e-6)
    plain = jax.jit(functools.partial(embed, task=dataclasses.replace(task, ranges=None)))(params)
    assert not np.allclose(exact, plain, rtol=1e-4, atol=1e-5)
    gradients = jax.jit(jax.grad(lambda p: jnp.square(embed(p)).sum()))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert np.abs(dict(named_leaves(gradients.latents))["stage1/block0/conv1/kernel"]).max() > 0
    model = dataclasses.replace(reference, variables=jax.device_get(shipped))
    wave = np.cumsum(np.random.default_rng(0).normal(size=9000)).astype(np.float32) * 1e-3
    ours, theirs = (embed_waves(model, [wave], engine=name)[0] for name in ("jax", "onnxruntime"))
    assert ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs) > 0.999


def test_rounded_activations_need_ranges_and_a_codebook_a_channel():
    for more in ({"granularity": "tensor"}, {"fit_crops": 0}, {"coarse": (2,), "grow_from": "runs/2bit"}):
        with pytest.raises(UserError, match="activations"):
            QatOptions(bits=4, activations=8, **more)
    with pytest.raises(UserError, match="activations"):
        QatOptions(bits=4, activations=4)
