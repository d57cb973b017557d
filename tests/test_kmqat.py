"""The `quant` section's parts, on a tree of two kernels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kmq_jax import kmqat, model, quant
from kmq_jax.core.errors import UserError
from kmq_jax.train_config import default_config, quantized

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
@pytest.mark.parametrize("changes", [{}, {"coarse": (2,), "cycle": (2, 3)}, {"bits": 1, "symmetric": True}])
def test_a_step_computes_with_exactly_what_is_shipped(recipe, changes):
    settings = section(recipe=recipe, **changes)
    params = kmqat.start(settings, PARAMS)
    weights = jax.jit(lambda p, step: kmqat.weights(settings, p, {}, step, 0.0))
    for step, bits in enumerate(settings.cycle or (settings.bits,)):
        used = kernels(weights(params, step))
        shipped = kernels(quant.dequantize(kmqat.packed(params, {})["params"], bits if settings.coarse else None))
        for here, there in zip(used, shipped):
            np.testing.assert_array_equal(here, there)
        assert all(len(np.unique(used[0][..., c])) <= 2**bits for c in range(8))


def test_each_nested_width_trains_and_ships_biases_of_its_own():
    settings = section(bits=4, coarse=(2, 3), cycle=(3, 4, 2))
    params = kmqat.start(settings, PARAMS)
    params["network"]["first"]["bias"] = jnp.full(8, 4.0)
    params["narrow"] = {bits: {"first/bias": jnp.full(8, float(bits))} for bits in ("2", "3")}

    def bias(params, step):
        return kmqat.weights(settings, params, {}, jnp.array(step), 0.0)["first"]["bias"]

    shipped = model.SpeakerModel("", {}, "", kmqat.packed(params, {}))
    for step, bits in enumerate(settings.cycle):
        np.testing.assert_array_equal(bias(params, step), np.full(8, float(bits)))
        own = model.at_width(shipped, bits if bits < 4 else None).variables["params"]["first"]["bias"]
        np.testing.assert_array_equal(own, np.full(8, float(bits)))
        moved = jax.grad(lambda p, step=step: jnp.sum(bias(p, step)))(params)
        for width, gradient in {**moved["narrow"], "4": {"first/bias": moved["network"]["first"]["bias"]}}.items():
            np.testing.assert_array_equal(gradient["first/bias"], np.full(8, float(width == str(bits))))


def test_off_leaves_everything_as_it_is():
    assert kmqat.start(default_config("resnet18").quant, PARAMS) is PARAMS


def gradient(settings, step, thaw):
    params = kmqat.start(settings, PARAMS)

    def loss(params):
        return sum(jnp.sum(jnp.sin(3 * k)) for k in jax.tree.leaves(kmqat.weights(settings, params, {}, step, thaw)))

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
    params = moved(kmqat.start(settings, PARAMS))
    book = params["codebooks"]["second/kernel"]
    after = {
        step: kmqat.after_step(settings, params, {}, jnp.array(step), 6.0)[0]["codebooks"]["second/kernel"]
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
    params = kmqat.start(settings, PARAMS)
    cached = kmqat.assigned(params["network"], params["codebooks"])
    later = moved(params)
    same = kmqat.after_step(settings, later, cached, jnp.array(3), 0.0)[1]
    fresh = kmqat.after_step(settings, later, cached, jnp.array(4), 0.0)[1]
    for name in NAMES:
        np.testing.assert_array_equal(same[name], cached[name])
        expected = later["codebooks"][name].assigned(dict(quant_leaves(later))[name])
        np.testing.assert_array_equal(fresh[name], expected)
        assert np.any(np.asarray(fresh[name]) != np.asarray(cached[name]))
    held = kmqat.weights(settings, later, cached, jnp.array(1), 0.0)
    shipped = quant.dequantize(kmqat.packed(later, cached)["params"])
    np.testing.assert_array_equal(kernels(held)[0], kernels(shipped)[0])


def quant_leaves(params):
    return [
        ("first/kernel", params["network"]["first"]["kernel"]),
        ("second/kernel", params["network"]["second"]["kernel"]),
    ]


def test_stages_quantize_the_smallest_widths_first():
    settings = section(bits=4, rules=(("first", 2),), multi_stage=True)
    params = kmqat.start(settings, PARAMS)
    stages = kmqat.stages_of(settings, params)
    assert stages == [("first/kernel",), NAMES]
    early = kernels(kmqat.weights(settings, params, {}, jnp.array(0), 0.0, stages[0]))
    assert len(np.unique(early[0][..., 0])) <= 4
    np.testing.assert_allclose(early[1], PARAMS["network"]["second"]["kernel"], rtol=1e-6)
    # Trained meanwhile, the second is given a codebook of its own again; the first keeps what it has learnt.
    trained = moved(params)
    entered = kmqat.enter_stage(settings, trained, stages[1], stages[0])
    np.testing.assert_array_equal(entered["network"]["first"]["kernel"], trained["network"]["first"]["kernel"])
    full = np.asarray(kmqat.unquantized(trained["network"], trained["codebooks"])["second"]["kernel"])
    expected = quant.dequantize(quant.quantize({"w": full}, quant.QuantSpec(4)))["w"]
    found = kernels(kmqat.weights(settings, entered, {}, jnp.array(0), 0.0, stages[1]))[1]
    np.testing.assert_allclose(found, expected, rtol=2e-2, atol=1e-3)
    assert kmqat.stages_of(section(), params) == [NAMES]


@pytest.mark.parametrize("sections", [0, 2])
def test_a_budget_gives_the_more_sensitive_tensor_more_bits(sections):
    settings = section(bits=0, budget=0.13, widths=(2, 6), sections=sections, hessian_draws=4)

    def loss(network):
        return jnp.sum(network["first"]["kernel"] ** 2) + 1e-4 * jnp.sum(network["second"]["kernel"] ** 2)

    network = jax.tree.map(jnp.asarray, PARAMS["network"])
    widths = kmqat.allocate(settings, network, loss, jax.random.key(0))
    assert widths == {"first/kernel": 2, "second/kernel": 2} or widths["first/kernel"] >= widths["second/kernel"]
    generous = dict(settings, budget=0.9)
    assert kmqat.allocate(type(settings)(generous), network, loss, jax.random.key(0)) == dict.fromkeys(NAMES, 6)
    books = kmqat.start(settings, PARAMS, widths)["codebooks"]
    assert {name: book.bits for name, book in books.items()} == widths


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"centroids": "mean"}, "quant.centroids (='mean')"),
        ({"centroids": "lloyd", "lloyd_every": 0}, "quant.lloyd_every (=0)"),
        ({"reassign_every": -1}, "quant.reassign_every (=-1)"),
        ({"cycle": (2, 3)}, "quant.cycle names 2 bits"),
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
        kmqat.check(settings)
        kmqat.start(settings, PARAMS)
    assert message in str(error.value)


def test_groups_of_a_channel_may_be_trained_in_any_recipe():
    for recipe in ("normalized", "kmqat"):
        params = kmqat.start(section(recipe=recipe), PARAMS)
        full = kmqat.unquantized(params["network"], params["codebooks"])
        np.testing.assert_allclose(kernels(full)[0], PARAMS["network"]["first"]["kernel"], rtol=1e-5)
        assert not any(dataclasses.asdict(book)["indices"] for book in params["codebooks"].values())
