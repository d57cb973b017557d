"""The device mesh: one named axis, `data`, over every device; parameters replicated or sharded by rule."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import Leaf, Params, map_named, match_rules, named_leaves

AXIS = "data"


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh with the single axis `data` over `devices` (default: all of them, on every process)."""
    devices = jax.devices() if devices is None else list(devices)
    # jax.make_mesh defaults to Explicit axes, under which indexing with sharded indices raises.
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array split over devices along its first axis."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def shard_batch(batch: Params, mesh: Mesh) -> Params:
    """Puts this process's part of a batch on its devices, split along the first axis.

    Args:
        batch: tree of arrays `[local batch, ...]`.
        mesh: from `make_mesh`.

    Returns:
        The same tree of global arrays `[batch of all processes, ...]`.

    Raises:
        UserError: the batch does not divide evenly over this process's devices.
    """
    # A process puts its own part on its own devices, so the part must divide over these.
    local = len(mesh.local_devices)
    sharding = batch_sharding(mesh)

    def put(name: str, x: np.ndarray) -> jax.Array:
        if x.shape[0] % local:
            raise UserError(f"batch of {x.shape[0]} ({name}) does not divide over {local} devices")
        return jax.make_array_from_process_local_data(sharding, x)

    return map_named(put, batch)


def tree_shardings(tree: Params, mesh: Mesh, rules: Sequence[tuple[str, int]] = ()) -> Params:
    """Decides how each leaf lies on the mesh: replicated, or split along the axis its rule names.

    Args:
        tree: tree of arrays (or of their shapes).
        mesh: from `make_mesh`.
        rules: `(pattern on the leaf's name, axis to split)`; the first match wins.

    Returns:
        The same tree of `NamedSharding`.

    Raises:
        UserError: a rule names an axis that the leaf lacks or that does not divide by the number of devices, or is the
            first match of no leaf.
    """
    axes = match_rules(rules, [name for name, _ in named_leaves(tree)])

    def decide(name: str, leaf: Leaf) -> NamedSharding:
        axis = axes[name]
        if axis is None:
            return replicated(mesh)
        if not -leaf.ndim <= axis < leaf.ndim or leaf.shape[axis] % mesh.size:
            raise UserError(f"{name} of shape {leaf.shape} cannot be split along axis {axis} over {mesh.size} devices")
        spec: list[str | None] = [None] * leaf.ndim
        spec[axis] = AXIS
        return NamedSharding(mesh, PartitionSpec(*spec))

    return map_named(decide, tree)
