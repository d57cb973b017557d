import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kmq_jax.core import mesh
from kmq_jax.core.errors import UserError


def test_a_batch_is_split_along_its_first_axis():
    devices = mesh.make_mesh()
    batch = mesh.shard_batch({"x": np.arange(8.0).reshape(8, 1)}, devices)
    assert len(batch["x"].sharding.device_set) == jax.device_count() == 4
    assert [float(s.data[0, 0]) for s in batch["x"].addressable_shards] == [0, 2, 4, 6]


def test_a_batch_that_does_not_divide_is_named():
    with pytest.raises(UserError, match=r"batch of 6 \(x\)"):
        mesh.shard_batch({"x": np.zeros(6)}, mesh.make_mesh())


def test_indexing_with_sharded_indices_works():
    devices = mesh.make_mesh()
    index = mesh.shard_batch(np.arange(4) % 2, devices)
    assert jax.jit(lambda i: jnp.array([5.0, 7.0])[i])(index).tolist() == [5, 7, 5, 7]


def test_rules_decide_what_is_split():
    tree = {"classifier": jnp.zeros((3, 8)), "kernel": jnp.zeros((5, 5))}
    shardings = mesh.tree_shardings(tree, mesh.make_mesh(), [("classifier", 1)])
    assert shardings["classifier"].shard_shape((3, 8)) == (3, 2)
    assert shardings["kernel"].is_fully_replicated
    for axis in (0, 2):
        with pytest.raises(UserError, match=f"classifier.*axis {axis}"):
            mesh.tree_shardings(tree, mesh.make_mesh(), [("classifier", axis)])
