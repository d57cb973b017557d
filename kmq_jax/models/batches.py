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
from kmq_jax.models.protocol import SpeakerNetwork

LONG = 75 * source.SAMPLE_RATE
"""Samples of a long recording: a longer one shares its batch with fewer others, so that memory is bounded."""


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


def usable_lengths(
    network: SpeakerNetwork,
    fbank: frontend.FrontEnd,
    utterances: source.Utterances,
    max_seconds: float = 0.0,
    max_frames: int = 0,
) -> np.ndarray:
    """Samples of each utterance that are used, `[utterances]`.

    Args:
        network: what embeds them.
        fbank: its filterbank.
        utterances: the table.
        max_seconds: only so much from the start of each recording; 0 takes all.
        max_frames: how many frames the network sees of each at most; 0: all.

    Raises:
        UserError: a recording is too short for the network, and the message names it; or so are `max_frames`.
    """
    if max_frames and max_frames < network.least_frames():
        raise UserError(f"max_frames (={max_frames}): the network needs at least {network.least_frames()}")
    lengths = utterances.lengths()
    if max_seconds:
        lengths = np.minimum(lengths, int(max_seconds * source.SAMPLE_RATE))
    check_lengths(network, fbank, lengths, utterances.where)
    return lengths


def check_lengths(
    network: SpeakerNetwork, fbank: frontend.FrontEnd, lengths: np.ndarray, name: Callable[[int], str]
) -> None:
    """Refuses recordings of fewer frames than a network needs, before any of them is read.

    Args:
        network: what embeds them.
        fbank: its filterbank.
        lengths: `[recordings]` samples.
        name: gives a recording's name by its number, for the message.

    Raises:
        UserError: the first that is too short, by its name.
    """
    frames, least = frontend.num_frames(lengths, fbank), network.least_frames()
    short = np.flatnonzero(frames < least)
    if not short.size:
        return
    first = int(short[0])
    if frames[first] < 1:
        raise UserError(f"{name(first)}: shorter than one analysis frame")
    raise UserError(f"{name(first)}: {frames[first]} frames, but the network needs at least {least}")


def plan_batches(
    network: SpeakerNetwork, fbank: frontend.FrontEnd, lengths: np.ndarray, batch_size: int, **limits: int
) -> list[buckets.Batch]:
    """Decides which recordings share a batch, the longest first.

    A network that masks gets recordings of like length, padded to one of a few shapes. One that cannot tell padded
    frames from real ones gets recordings of exactly as many frames: a compilation for each number of frames there is.

    Args:
        network: what embeds the batches.
        fbank: its filterbank.
        lengths: `[recordings]` samples.
        batch_size: recordings in a batch.
        **limits: passed to `buckets.length_buckets`, which makes batches of a few fixed shapes. Without any,
            `buckets.tight_batches` keeps padding small. Only networks that mask use them.

    Returns:
        Batches: the padded length in samples, and the recordings' numbers, -1 for rows without one.

    >>> from kmq_jax.models import registry
    >>> network, lengths = registry.build("wespeaker_resnet34", width=4), np.array([16000, 31000, 15000])
    >>> [(batch.size, batch.indices.tolist()) for batch in plan_batches(network, frontend.WESPEAKER, lengths, 2)]
    [(31200, [1]), (16000, [0]), (15200, [2])]
    """
    if network.masks_lengths:
        if limits:
            plan = buckets.length_buckets(lengths, batch_size, **limits)
            return [part for batch in plan for part in _of_bounded_size(batch)]
        return buckets.tight_batches(lengths, batch_size)
    frames = frontend.num_frames(lengths, fbank)
    plan = []
    for count in np.unique(frames)[::-1]:
        rows = np.flatnonzero(frames == count).astype(np.int32)
        # Recordings of as many frames differ by less than one frame shift: padding to the longest adds no frame.
        size = int(lengths[rows].max())
        # No more samples in a batch than `batch_size` recordings of length `LONG` have.
        most = max(min(batch_size, batch_size * LONG // size), 1)
        plan += [buckets.Batch(size, rows[start : start + most]) for start in range(0, len(rows), most)]
    return plan


def _of_bounded_size(batch: buckets.Batch) -> list[buckets.Batch]:
    """A batch in parts, all of one shape, that hold no more samples than one of recordings of length `LONG`."""
    most = max(len(batch.indices) * LONG // batch.size, 1)
    if len(batch.indices) <= most:
        return [batch]
    indices = batch.indices[batch.indices >= 0]
    parts = [indices[start : start + most] for start in range(0, len(indices), most)]
    return [buckets.Batch(batch.size, np.pad(p, (0, most - len(p)), constant_values=-1)) for p in parts]


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
        plan: which recordings go together, from `plan_batches` (perhaps within `progress`).
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
        # Rows without a recording count as full, so that no statistic is one of nothing.
        wave, samples = np.zeros((rows, batch.size), np.float32), np.full(rows, batch.size, np.int32)
        for row, i in enumerate(members):
            recording = load(int(i))[: lengths[i]]
            wave[row, : len(recording)], samples[row] = recording, len(recording)
            if seen is not None:
                seen(int(i), recording)
        yield PaddedBatch(members, **mesh.shard_batch({"wave": wave, "samples": samples}, devices))
