import jax
import jax.numpy as jnp
import numpy as np

from kmq_jax.losses import jeffreys


def by_the_formula(logits, y, c1, c2):
    """PAPER's formula, term by term in float64."""
    p = np.exp(logits - logits.max())
    p /= p.sum()
    total = 0.0
    for k in range(len(p)):
        target = 1 - c1 - c2 if k == y else c1 / (len(p) - 1)
        total -= target * np.log(p[k])
    wrong = sum(p[k] * np.log(p[k]) for k in range(len(p)) if k != y)
    return total + c2 * wrong / (1 - p[y])


def test_the_formula():
    logits = np.random.default_rng(0).normal(size=(6, 5)) * 3
    labels = np.arange(6) % 5
    expected = [by_the_formula(row, y, 0.1, 0.025) for row, y in zip(logits, labels)]
    np.testing.assert_allclose(jeffreys(jnp.float32(logits), jnp.array(labels)), expected, rtol=1e-5)


def test_without_smoothing_or_spread_it_is_cross_entropy():
    logits = jnp.array([[0.0, np.log(3.0)]])
    np.testing.assert_allclose(jeffreys(logits, jnp.array([0]), 0.0, 0.0), [np.log(4.0)], rtol=1e-6)


def test_a_sure_example_has_a_finite_loss_and_gradient():
    logits, labels = jnp.array([[200.0, 0.0, -50.0]]), jnp.array([0])
    value, gradient = jax.value_and_grad(lambda x: jeffreys(x, labels).sum())(logits)
    assert np.isfinite(value) and np.isfinite(gradient).all()
