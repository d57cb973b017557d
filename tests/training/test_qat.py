"""The `quant` section's parts, on a tree of two kernels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kmq_jax import quant
from kmq_jax.core.errors import UserError
from kmq_jax.models.speaker_model import SpeakerModel, at_bits
from kmq_jax.training import qat
from kmq_jax.training.config import default_config, quantized

RNG = np.random.default_rng(0)
PARAMS = {
    "network": {
        "first": {"kernel": RNG.standard_normal((3, 3, 4, 8)).astype(np.float32), "bias": np.zeros(8, np.float32)},
        "second": {"kernel": (0.1 * RNG.standard_normal((72, 6))).astype(np.float32)},
    },
    "classifier": np.ones((2, 1, 6), np.float32),
}
NAMES = ("first/kernel", "second/kernel")


def section(**changes):
    config = quantized(default_config("resnet18"), changes.pop("bits", 3))
    config.quant.update(changes)
    return config.quant


def kernels(tree):
    return np.asarray(tree["first"]["kernel"]), np.asarray(tree["second"]["kernel"])


@pytest.mark.parametrize("recipe", ["normalized", "kmqat"])
@pytest.mark.parametrize("changes", [{}, {"bits": 1, "symmetric": True}])
def test_a_step_computes_with_exactly_what_is_shipped(recipe, changes):
    settings = section(recipe=recipe, **changes)
    params = qat.start(settings, PARAMS)
    used = kernels(jax.jit(lambda p, step: qat.weights(settings, p, {}, step, 0.0))(params, 0))
    for here, there in zip(used, kernels(quant.dequantize_params(qat.packed(params, {})["params"]))):
        np.testing.assert_array_equal(here, there)
    assert all(len(np.unique(used[0][..., c])) <= 2**settings.bits for c in range(8))


def grown():
    """Wider widths of a narrow network whose second layer, here in full precision, was trained; what it was is told."""
    trained = {**PARAMS["network"], "first": {**PARAMS["network"]["first"], "bias": np.full(8, 2.0, np.float32)}}
    trained["second"] = {"kernel": trained["second"]["kernel"] + 1, "bias": np.full(6, 5.0, np.float32)}
    full = {**PARAMS["network"], "second": {**PARAMS["network"]["second"], "bias": np.zeros(6, np.float32)}}
    settings = section(bits=4, coarse=(2, 3), grow_from="narrow", rules=(("second", 0),))
    rules = qat.rules_of(section(bits=2, rules=(("second", 0),)))
    narrow = quant.quantize_params(trained, rules)
    params = qat.start(settings, {**PARAMS, "network": full}, narrow=narrow)
    return settings, narrow, params, qat.cells(params, narrow)


def test_nested_widths_train_in_turns_each_with_biases_of_its_own():
    settings, narrow, params, cells = grown()
    assert list(cells) == ["first/kernel"]
    # Where the kernel is shared, biases begin as the narrow network has them; else in full precision.
    np.testing.assert_array_equal(params["network"]["second"]["kernel"], narrow["second"]["kernel"])
    assert {b: (float(v["first/bias"][0]), float(v["second/bias"][0])) for b, v in params["narrow"].items()} == {
        "2": (2, 5),
        "3": (0, 5),
    }
    params["network"]["first"]["bias"] = jnp.full(8, 4.0)
    params["narrow"]["3"]["first/bias"] = jnp.full(8, 3.0)

    def weights(params, step):
        return qat.weights(settings, params, cells, jnp.array(step), 0.0)

    shipped = SpeakerModel("", {}, "", qat.packed(params, cells))
    for step, bits in enumerate((3, 4, 3)):
        read = quant.dequantize_params(at_bits(shipped, bits).variables["params"], bits)
        np.testing.assert_array_equal(read["first"]["bias"], np.full(8, float(bits)))
        jax.tree.map(np.testing.assert_array_equal, weights(params, step), read)
        moved = jax.grad(lambda p, step=step: jnp.sum(weights(p, step)["first"]["bias"]))(params)
        for width, gradient in {**moved["narrow"], "4": {"first/bias": moved["network"]["first"]["bias"]}}.items():
            np.testing.assert_array_equal(gradient["first/bias"], np.full(8, float(width == str(bits))))


def test_what_the_narrow_network_shares_is_kept():
    _, narrow, params, cells = grown()
    after = qat.kept(params, jax.tree.map(lambda x: x + 0.1, params))
    shipped = at_bits(SpeakerModel("", {}, "", qat.packed(after, cells)), 2).variables["params"]
    jax.tree.map(np.testing.assert_array_equal, quant.dequantize_params(shipped, 2), quant.dequantize_params(narrow))
    # All the rest has moved.
    assert np.all(after["narrow"]["3"]["first/bias"] != params["narrow"]["3"]["first/bias"])
    assert np.all(after["network"]["first"]["bias"] != params["network"]["first"]["bias"])
    assert np.all(after["network"]["first"]["kernel"] != params["network"]["first"]["kernel"])
    books = (after["codebooks"]["first/kernel"], params["codebooks"]["first/kernel"])
    assert np.all(books[0].coarse[1] != books[1].coarse[1]) and np.all(books[0].centroids != books[1].centroids)


def test_off_leaves_everything_as_it_is():
    assert qat.start(default_config("resnet18").quant, PARAMS) is PARAMS


def gradient(settings, step, thaw):
    params = qat.start(settings, PARAMS)

    def loss(params):
        return sum(jnp.sum(jnp.sin(3 * k)) for k in jax.tree.leaves(qat.weights(settings, params, {}, step, thaw)))

    return jax.grad(loss)(params)["codebooks"]["first/kernel"]


def test_scales_thaw_and_centroids_move_by_gradient_only_if_asked():
    assert np.all(gradient(section(), 4, 5.0).raw_scale == 0)
    assert np.any(gradient(section(), 5, 5.0).raw_scale != 0)
    assert np.all(gradient(section(learn_scale=False), 5, 5.0).raw_scale == 0)
    assert np.any(gradient(section(), 0, 5.0).centroids != 0)
    for rest in ("lloyd", "fixed"):
        assert np.all(gradient(section(centroids=rest), 0, 5.0).centroids == 0)


def moved(params):
    """The parameters after something has moved the latents."""
    return {**params, "network": jax.tree.map(lambda x: x + 0.2, params["network"])}


def test_lloyd_updates_when_due_and_not_after_their_end():
    settings = section(centroids="lloyd", lloyd_every=3, lloyd_rate=1.0, lloyd_unused_rate=0.0)
    params = moved(qat.start(settings, PARAMS))
    book = params["codebooks"]["second/kernel"]
    after = {
        step: qat.after_step(settings, params, {}, jnp.array(step), 6.0)[0]["codebooks"]["second/kernel"]
        for step in (2, 3, 9)
    }
    np.testing.assert_array_equal(after[2].centroids, book.centroids)
    np.testing.assert_array_equal(after[9].centroids, book.centroids)
    latents, indices = (
        np.asarray(params["network"]["second"]["kernel"]),
        np.asarray(book.assigned(params["network"]["second"]["kernel"])),
    )
    for channel in range(6):
        for k in range(8):
            members = latents[indices[:, channel] == k, channel]
            if len(members):
                np.testing.assert_allclose(after[3].centroids[channel, k], members.mean(), rtol=1e-5, atol=1e-6)


def test_cached_assignments_hold_until_they_are_due():
    settings = section(reassign_every=4)
    params = qat.start(settings, PARAMS)
    cached = qat.assigned(params["network"], params["codebooks"])
    later = moved(params)
    same = qat.after_step(settings, later, cached, jnp.array(3), 0.0)[1]
    fresh = qat.after_step(settings, later, cached, jnp.array(4), 0.0)[1]
    for name in NAMES:
        np.testing.assert_array_equal(same[name], cached[name])
        expected = later["codebooks"][name].assigned(dict(quant_leaves(later))[name])
        np.testing.assert_array_equal(fresh[name], expected)
        assert np.any(np.asarray(fresh[name]) != np.asarray(cached[name]))
    held = qat.weights(settings, later, cached, jnp.array(1), 0.0)
    shipped = quant.dequantize_params(qat.packed(later, cached)["params"])
    np.testing.assert_array_equal(kernels(held)[0], kernels(shipped)[0])


def quant_leaves(params):
    return [
        ("first/kernel", params["network"]["first"]["kernel"]),
        ("second/kernel", params["network"]["second"]["kernel"]),
    ]


def test_stages_quantize_the_smallest_widths_first():
    settings = section(bits=4, rules=(("first", 2),), multi_stage=True)
    params = qat.start(settings, PARAMS)
    stages = qat.stages_of(settings, params)
    assert stages == [("first/kernel",), NAMES]
    early = kernels(qat.weights(settings, params, {}, jnp.array(0), 0.0, stages[0]))
    assert len(np.unique(early[0][..., 0])) <= 4
    np.testing.assert_allclose(early[1], PARAMS["network"]["second"]["kernel"], rtol=1e-6)
    # Trained meanwhile, the second is given a codebook of its own again; the first keeps what it has learnt.
    trained = moved(params)
    entered = qat.enter_stage(settings, trained, stages[1], stages[0])
    np.testing.assert_array_equal(entered["network"]["first"]["kernel"], trained["network"]["first"]["kernel"])
    full = np.asarray(qat.unquantized(trained["network"], trained["codebooks"])["second"]["kernel"])
    expected = quant.dequantize_params(quant.quantize_params({"w": full}, quant.QuantSpec(4)))["w"]
    found = kernels(qat.weights(settings, entered, {}, jnp.array(0), 0.0, stages[1]))[1]
    np.testing.assert_allclose(found, expected, rtol=2e-2, atol=1e-3)
    assert qat.stages_of(section(), params) == [NAMES]


@pytest.mark.parametrize("sections", [0, 2])
def test_a_budget_gives_the_more_sensitive_tensor_more_bits(sections):
    settings = section(bits=0, budget=0.13, widths=(2, 6), sections=sections, hessian_draws=4)

    def loss(network):
        return jnp.sum(network["first"]["kernel"] ** 2) + 1e-4 * jnp.sum(network["second"]["kernel"] ** 2)

    network = jax.tree.map(jnp.asarray, PARAMS["network"])
    widths = qat.allocate(settings, network, loss, jax.random.key(0))
    assert widths == {"first/kernel": 2, "second/kernel": 2} or widths["first/kernel"] >= widths["second/kernel"]
    generous = dict(settings, budget=0.9)
    assert qat.allocate(type(settings)(generous), network, loss, jax.random.key(0)) == dict.fromkeys(NAMES, 6)
    books = qat.start(settings, PARAMS, widths)["codebooks"]
    assert {name: book.bits for name, book in books.items()} == widths


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"centroids": "mean"}, "quant.centroids (='mean')"),
        ({"centroids": "lloyd", "lloyd_every": 0}, "quant.lloyd_every (=0)"),
        ({"reassign_every": -1}, "quant.reassign_every (=-1)"),
        ({"coarse": (2,)}, "quant.coarse and quant.grow_from"),
        ({"grow_from": "runs/2bit"}, "quant.coarse and quant.grow_from"),
        ({"coarse": (2,), "grow_from": "runs/2bit", "reassign_every": 5}, "quant.reassign_every cannot be used"),
        ({"budget": 0.1}, "quant.budget chooses widths itself"),
        ({"rules": (("first",),)}, "quant.rules: ('first',)"),
        ({"rules": (("frist", 2),)}, "'frist' is the first match of no name"),
        ({"recipe": "mean"}, "recipe (='mean')"),
        ({"bits": 9}, "bits (=9)"),
    ],
)
def test_mistakes(changes, message):
    settings = section(**changes)
    with pytest.raises(UserError) as error:
        qat.check(settings)
        qat.start(settings, PARAMS)
    assert message in str(error.value)


def test_groups_of_a_channel_may_be_trained_in_any_recipe():
    for recipe in ("normalized", "kmqat"):
        params = qat.start(section(recipe=recipe), PARAMS)
        full = qat.unquantized(params["network"], params["codebooks"])
        np.testing.assert_allclose(kernels(full)[0], PARAMS["network"]["first"]["kernel"], rtol=1e-5)
        assert not any(dataclasses.asdict(book)["indices"] for book in params["codebooks"].values())
