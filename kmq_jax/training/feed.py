"""Batches on their way to the devices: put there ahead of the steps that use them."""

from typing import TYPE_CHECKING

from jax.sharding import Mesh

from kmq_jax.core import mesh
from kmq_jax.core.errors import needed

if TYPE_CHECKING:
    import grain


def on_devices(batches: "grain.IterDataset", devices: Mesh, ahead: int = 1) -> "grain.DatasetIterator":
    """Puts batches on devices ahead of the steps that use them, in a thread of its own.

    Args:
        batches: from `data.pipeline.training_batches`.
        devices: where they go, split along the first axis.
        ahead: batches that wait on the devices, while the thread holds one more; with 0 a batch is put there when it is
            asked for.

    Returns:
        An endless iterator over trees of global arrays, see `mesh.shard_batch`. Its position is that of the batch it
        gave last, however many were put ahead, and can be restored with another `ahead`. It must be closed.

    Raises:
        UserError: from `next`: a batch cannot be made, or does not divide over this process's devices.
    """
    grain = needed("grain", "training")
    put = batches.map(lambda batch: mesh.shard_batch(batch, devices))
    return iter(grain.experimental.ThreadPrefetchIterDataset(put, prefetch_buffer_size=ahead))
