import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.training import qat
from kmq_jax.training.optim import make_optimizer, make_schedule
from kmq_jax.training.options import OptimizerOptions, QatOptions, ScheduleOptions, steps_of
from kmq_jax.training.state import Trainable


def rates(steps, **settings):
    schedule = make_schedule(ScheduleOptions(**settings), epoch_steps=10, total_steps=100)
    return [float(schedule(jnp.int32(s))) for s in steps]


def test_warmup_is_linear_and_cosine_ends_at_final():
    got = rates((0, 5, 10, 55, 100), kind="cosine", start=0.0, peak=1.0, final=0.2, warmup_epochs=1.0)
    np.testing.assert_allclose(got, [0, 0.5, 1.0, 0.6, 0.2], rtol=1e-6)


def test_exponential_halves_by_the_half():
    got = rates((0, 50, 100), kind="exponential", start=1.0, peak=1.0, final=0.25, warmup_epochs=0.0)
    np.testing.assert_allclose(got, [1.0, 0.5, 0.25], rtol=1e-6)


def test_steps_as_in_the_paper():
    got = rates(
        (0, 50, 189, 190, 289, 290),
        kind="step", start=1e-5, peak=0.2, warmup_epochs=5.0, flat_until=19.0, every=10.0, factor=5.0,
    )  # fmt: skip
    np.testing.assert_allclose(got, [1e-5, 0.2, 0.2, 0.04, 0.04, 0.008], rtol=1e-5)


@pytest.mark.parametrize("epoch_steps", [10, 49, 107, 2132])
def test_a_drop_comes_at_its_step_in_a_compiled_program_too(epoch_steps):
    options = ScheduleOptions(kind="step", peak=0.2, warmup_epochs=5.0, flat_until=19.0, every=10.0, factor=5.0)
    schedule = jax.jit(make_schedule(options, epoch_steps, 51 * epoch_steps))  # a training step compiles it likewise
    drops = np.array([19, 29, 39]) * epoch_steps
    before, at = ([float(schedule(jnp.int32(step + later))) for step in drops] for later in (-1, 0))
    np.testing.assert_allclose(before, [0.2, 0.04, 0.008], rtol=1e-5)
    np.testing.assert_allclose(at, [0.04, 0.008, 0.0016], rtol=1e-5)


def updates(params, gradients, steps=1, **settings):
    optimizer = make_optimizer(OptimizerOptions(**settings), lambda peak: lambda step: jnp.float32(0.1), params)
    state = optimizer.init(params)
    for _ in range(steps):
        update, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, update)
    return params


PARAMS = {"conv": {"kernel": jnp.ones(1), "bias": jnp.ones(1)}, "classifier": jnp.ones(1)}
ONES = {"conv": {"kernel": jnp.ones(1), "bias": jnp.ones(1)}, "classifier": jnp.ones(1)}


def test_decay_spares_biases_and_classifier():
    new = updates(PARAMS, ONES, name="sgd", momentum=0.0, weight_decay=0.5)
    assert float(new["conv"]["kernel"][0]) == pytest.approx(1 - 0.1 * 1.5)
    assert float(new["conv"]["bias"][0]) == float(new["classifier"][0]) == pytest.approx(0.9)


@pytest.mark.parametrize("groups", [(), (("bias", 1.0, 0.0),), (("kernel$", {"momentum": 0.5}),)], ids=str)
def test_decay_moves_no_scale_and_no_centroid_unless_a_group_says_so(groups):
    """Nothing has a gradient here: decay alone moves."""
    kernel = {"conv": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}}
    network = qat.init_params(QatOptions(bits=1), kernel)
    params = Trainable(jnp.ones((3, 1, 2)), network)
    settings = {"name": "sgd", "momentum": 0.0, "weight_decay": 0.5}
    new = updates(params, jax.tree.map(jnp.zeros_like, params), **settings, groups=groups)
    jax.tree.map(np.testing.assert_array_equal, new.network.codebooks, network.codebooks)
    np.testing.assert_allclose(new.network.latents["conv"]["kernel"], 0.95 * network.latents["conv"]["kernel"])
    new = updates(params, jax.tree.map(jnp.zeros_like, params), **settings, groups=(("centroids", 1.0, 2.0), *groups))
    book, old = new.network.codebooks["conv/kernel"], network.codebooks["conv/kernel"]
    np.testing.assert_allclose(book.centroids, 0.9 * old.centroids, rtol=1e-6)
    np.testing.assert_array_equal(book.raw_scale, old.raw_scale)


def test_momentum_adds_up_over_two_steps():
    new = updates(PARAMS, ONES, steps=2, name="sgd", momentum=0.9, weight_decay=0.0)
    assert float(new["conv"]["bias"][0]) == pytest.approx(1 - 0.1 - 0.19)


@pytest.mark.parametrize("groups", [(), (("conv", {"momentum": 0.9}),)], ids=["one state", "groups"])
def test_momentum_by_nesterov_looks_a_step_ahead(groups):
    """Its sums are 1 and 1.9; a step goes by the gradient and 0.9 of the new sum."""
    new = updates(PARAMS, ONES, steps=2, name="sgd", momentum=0.9, nesterov=True, weight_decay=0.0, groups=groups)
    assert float(new["conv"]["bias"][0]) == pytest.approx(1 - 0.1 * (1 + 0.9) - 0.1 * (1 + 0.9 * 1.9))


def test_a_group_has_its_own_rate():
    new = updates(PARAMS, ONES, name="sgd", momentum=0.0, weight_decay=0.0, groups=(("conv/kernel", 10.0, 1.0),))
    assert float(new["conv"]["kernel"][0]) == pytest.approx(0.0)
    assert float(new["conv"]["bias"][0]) == pytest.approx(0.9)


def test_adamw_decays_outside_the_normalised_gradient():
    new = updates(PARAMS, ONES, name="adamw", weight_decay=0.5)
    assert float(new["conv"]["bias"][0]) == pytest.approx(0.9, abs=1e-5)
    assert float(new["conv"]["kernel"][0]) == pytest.approx(1 - 0.1 * 1.5, abs=1e-5)


def test_clipping_bounds_the_global_norm():
    big = {"conv": {"kernel": 300 * jnp.ones(1), "bias": 400 * jnp.ones(1)}, "classifier": jnp.zeros(1)}
    new = updates(PARAMS, big, name="sgd", momentum=0.0, weight_decay=0.0, clip=5.0)
    assert float(new["conv"]["kernel"][0]) == pytest.approx(1 - 0.1 * 3.0)


def test_groups_decay_apart_and_what_is_in_none_by_the_whole_rate():
    groups = (("kernel", 1.0, 0.5), ("bias", 1.0, 0.0))
    new = updates(PARAMS, ONES, name="sgd", momentum=0.0, weight_decay=0.5, groups=groups)
    expected = {"kernel": 1 - 0.1 * 1.25, "bias": 0.9, "classifier": 1 - 0.1 * 1.5}
    assert {**new["conv"], "classifier": new["classifier"]} == {k: pytest.approx(v) for k, v in expected.items()}


def test_a_group_of_nothing_is_a_mistake():
    with pytest.raises(UserError, match="first match of no name"):
        updates(PARAMS, ONES, groups=(("nothing", 1.0, 1.0),))


def test_epochs_become_whole_steps():
    assert [steps_of(e, 10) for e in (0.0, 0.01, 0.5, 2.0)] == [0, 1, 5, 20]
    with pytest.raises(UserError, match="-1"):
        steps_of(-1.0, 10)
