"""Recordings of unlike length as padded batches on the devices."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from kmq_jax import frontend
from kmq_jax.core import mesh
from kmq_jax.core.errors import UserError
from kmq_jax.data import buckets, source


@dataclass(frozen=True, eq=False)
class PaddedBatch:
    """Recordings padded to one length, on the devices.

    Attributes:
        members: `[real rows]`, the recordings' numbers. Rows beyond are padding.
        wave: float32 `[rows, longest]`, 0 behind each recording.
        samples: int32 `[rows]`, real samples; padding rows count as full.
    """

    members: np.ndarray
    wave: jax.Array
    samples: jax.Array


def usable_lengths(utterances: source.Utterances, fbank: frontend.FbankConfig, max_seconds: float = 0.0) -> np.ndarray:
    """Samples of each utterance that are used, `[utterances]`.

    Args:
        utterances: the table.
        fbank: the filterbank, which needs at least one frame.
        max_seconds: only so much from the start of each recording; 0 takes all.

    Raises:
        UserError: a recording is too short; the message names it.
    """
    lengths = utterances.lengths()
    if max_seconds:
        lengths = np.minimum(lengths, int(max_seconds * source.SAMPLE_RATE))
    short = np.flatnonzero(frontend.num_frames(lengths, fbank) < 1)
    if short.size:
        raise UserError(f"{utterances.where(short[0])}: shorter than one analysis frame")
    return lengths


def padded_batches(
    plan: Iterable[buckets.Batch],
    lengths: np.ndarray,
    load: Callable[[int], np.ndarray],
    devices: Mesh,
    *,
    seen: Callable[[int, np.ndarray], None] | None = None,
) -> Iterator[PaddedBatch]:
    """Reads recordings and puts them on the devices, batch by batch, split along the first axis.

    Args:
        plan: which recordings go together, from `buckets.length_buckets` (perhaps within `progress`).
        lengths: `[recordings]` samples; what a recording has beyond is cut.
        load: gives the samples of a recording by its number.
        devices: the mesh. Rows are added until they divide evenly over it.
        seen: called with each recording's number and its samples, as they are read.

    Raises:
        UserError: as `load`.
    """
    for batch in plan:
        members = batch.indices[batch.indices >= 0]
        rows = -(-len(batch.indices) // devices.size) * devices.size
        wave, samples = np.zeros((rows, batch.size), np.float32), np.full(rows, batch.size, np.int32)
        for row, i in enumerate(members):
            recording = load(int(i))[: lengths[i]]
            wave[row, : len(recording)], samples[row] = recording, len(recording)
            if seen is not None:
                seen(int(i), recording)
        yield PaddedBatch(members, **mesh.shard_batch({"wave": wave, "samples": samples}, devices))
