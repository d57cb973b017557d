import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.losses import margin


def test_the_schedule_is_zero_then_rises_then_stays():
    schedule = margin.MarginSchedule(0.3, start=10, end=20)
    assert [round(float(schedule(jnp.float32(s))), 6) for s in (0, 10, 15, 20, 99)] == [0, 0, 0.15, 0.3, 0.3]


def test_a_schedule_without_a_rise_is_constant():
    assert float(margin.MarginSchedule(0.2)(jnp.int32(0))) == pytest.approx(0.2)
    assert float(margin.MarginSchedule(0.2, 5, 5)(jnp.int32(4))) == 0.0


def test_cosines_take_the_nearest_sub_centre():
    embeddings = jnp.array([[3.0, 0.0], [0.0, 2.0]])
    centres = jnp.array([[[1.0, 0.0], [0.0, 5.0]], [[-1.0, 0.0], [1.0, 1.0]]])
    expected = [[1.0, np.sqrt(0.5)], [1.0, np.sqrt(0.5)]]
    np.testing.assert_allclose(margin.class_cosines(embeddings, centres), expected, rtol=1e-6)


@pytest.mark.parametrize("angle", [0.3, 1.2, 2.0, 2.9])
def test_aam_adds_to_the_angle_up_to_pi_and_goes_on_falling(angle):
    m, scale = 0.4, 30.0
    cosines = jnp.array([[np.cos(angle), 0.1]])
    logits = margin.margin_logits(cosines, jnp.array([0]), m, scale, "aam")
    hard = np.cos(angle + m) if angle + m < np.pi else np.cos(angle) - m * np.sin(m)
    np.testing.assert_allclose(logits, [[scale * hard, scale * 0.1]], rtol=1e-4)


def test_am_subtracts_from_the_cosine_of_the_true_class_only():
    logits = margin.margin_logits(jnp.array([[0.5, 0.2]]), jnp.array([1]), 0.3, 10.0, "am")
    np.testing.assert_allclose(logits, [[5.0, -1.0]], atol=1e-6)


@pytest.mark.parametrize("kind", margin.KINDS)
def test_without_a_margin_all_kinds_agree(kind):
    cosines = jnp.array([[0.9, -0.4], [0.2, 0.3]])
    logits = margin.margin_logits(cosines, jnp.array([0, 1]), 0.0, 2.0, kind)
    np.testing.assert_allclose(logits, 2 * cosines, atol=1e-6)


@pytest.mark.parametrize("kind", margin.KINDS)
def test_gradients_are_finite_where_an_embedding_meets_its_centre_and_at_zero(kind):
    def loss(embeddings):
        centres = jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]])
        cosines = margin.class_cosines(embeddings, centres)
        return margin.cross_entropy(
            margin.margin_logits(cosines, jnp.array([0, 1]), 0.2, 30.0, kind), jnp.array([0, 1])
        ).sum()

    for embeddings in ([[1.0, 0.0], [0.0, -1.0]], [[0.0, 0.0], [0.0, 0.0]]):
        assert np.isfinite(jax.grad(loss)(jnp.array(embeddings))).all()


def test_cross_entropy_by_hand():
    got = margin.cross_entropy(jnp.array([[0.0, np.log(3.0)]]), jnp.array([0]))
    np.testing.assert_allclose(got, [np.log(4.0)], rtol=1e-6)


def test_an_unknown_kind_is_named():
    with pytest.raises(UserError, match="'arc'"):
        margin.margin_logits(jnp.zeros((1, 2)), jnp.array([0]), 0.1, 30.0, "arc")


def test_centres_are_spread_within_glorots_limit():
    centres = np.asarray(margin.init_centres(jax.random.key(0), 50, 2, 28))
    assert centres.shape == (50, 2, 28)
    limit = np.sqrt(6 / 128)
    assert 0.95 * limit < np.abs(centres).max() <= limit
