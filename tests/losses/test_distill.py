import jax.numpy as jnp
import numpy as np
import pytest

from kmq_jax.losses import distill


def test_a_perfect_student_has_no_loss():
    embeddings, stages = jnp.array([[1.0, 2.0]]), [jnp.ones((1, 2, 2, 1))]
    assert float(distill.distillation(embeddings, stages, embeddings, stages)) == pytest.approx(0, abs=1e-6)


def test_cosine_distance_by_hand():
    got = distill.cosine_distance(jnp.array([[2.0, 0.0], [0.0, -1.0]]), jnp.array([[1.0, 1.0], [0.0, 3.0]]))
    assert float(got) == pytest.approx(1 - (np.sqrt(0.5) - 1) / 2)


def test_relative_error_does_not_depend_on_magnitude():
    values, teacher = jnp.array([[1.0, 2.0]]), jnp.array([[2.0, 2.0]])
    assert float(distill.relative_error(values, teacher)) == pytest.approx(1 / 8)
    assert float(distill.relative_error(100 * values, 100 * teacher)) == pytest.approx(1 / 8)


def test_weights_add_the_parts():
    student, teacher = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])
    stages, targets = [jnp.zeros((1, 1, 1, 1)), jnp.full((1, 1, 1, 1), 2.0)], [jnp.ones((1, 1, 1, 1))] * 2
    got = distill.distillation(student, stages, teacher, targets, cosine=1.0, embedding=0.5, stage=3.0)
    assert float(got) == pytest.approx(1.0 + 0.5 * 2.0 + 3.0 * (1 + 1) / 2)


def test_a_silent_teacher_gives_a_finite_loss():
    zero = jnp.zeros((1, 2))
    assert np.isfinite(distill.distillation(zero, [zero], zero, [zero]))


def test_embeddings_alone():
    student, teacher = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])
    assert float(distill.distillation(student, [], teacher, [])) == pytest.approx(1.0 + 0.5 * 2.0)
