"""The tensors of a model, and its size in bytes, parameters and multiplications."""

from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np

from kmq_jax import quant
from kmq_jax.core.tree import Variables, named_leaves
from kmq_jax.models import registry
from kmq_jax.models.speaker_model import SpeakerModel

FRAMES = 300
"""Frames of the recording that multiplications are counted for."""


class TensorRow(TypedDict):
    """One tensor of a model.

    Attributes:
        name: its path.
        shape: such as "3x3x64x64".
        bits: of an index, or of an entry where the tensor is not quantized.
        used: codebook entries that some weight points to, averaged over the codebooks; None where there are none.
        indices: bytes of packed indices.
        codebooks: bytes of codebooks.
        other: bytes of anything else.
    """

    name: str
    shape: str
    bits: int
    used: float | None
    indices: int
    codebooks: int
    other: int


def rows_of(variables: Variables) -> list[TensorRow]:
    """One row a tensor, in the order of their names."""
    rows: list[TensorRow] = []
    for name, leaf in named_leaves(variables, is_leaf=quant.is_codebook_tensor):
        size = quant.size_bytes(leaf)
        packed = quant.is_codebook_tensor(leaf)
        rows.append(
            {
                "name": name,
                "shape": "x".join(map(str, leaf.shape)),
                "bits": leaf.bits if packed else leaf.dtype.itemsize * 8,
                "used": entries_used(leaf) if packed else None,
                "indices": size.indices,
                "codebooks": size.codebooks,
                "other": size.other,
            }
        )
    return rows


def entries_used(tensor: quant.CodebookTensor) -> float:
    """How many of a codebook's entries some weight points to, averaged over the codebooks."""
    groups = tensor.groups
    indices = np.asarray(quant.indices_of(tensor))
    # A group, that is a codebook, in each row.
    rows = indices.reshape(1, -1) if tensor.axis is None else np.moveaxis(indices, tensor.axis, 0).reshape(groups, -1)
    entries = 1 << tensor.bits
    # Each codebook's indices get a range of their own, so that one count serves all.
    counts = np.bincount((rows + entries * np.arange(groups)[:, None]).ravel(), minlength=groups * entries)
    return float((counts > 0).sum() / groups)


def totals_of(model: SpeakerModel) -> dict[str, int]:
    """A model's parameters, bytes by kind, and multiplications for 300 frames."""
    size = quant.size_bytes(model.variables)
    leaves = [leaf for _, leaf in named_leaves(model.variables["params"], is_leaf=quant.is_codebook_tensor)]
    return {
        "parameters": sum(leaf.size for leaf in leaves),
        "quantized_weights": sum(leaf.size for leaf in leaves if quant.is_codebook_tensor(leaf)),
        "index_bytes": size.indices,
        "codebook_bytes": size.codebooks,
        "other_bytes": size.other,
        "total_bytes": size.total,
        "macs_per_300_frames": registry.macs(model.network(), FRAMES),
    }


def describe(rows: Sequence[TensorRow], totals: Mapping[str, int]) -> str:
    """The rows as a table, and the totals below it."""
    longest = max(len(row["name"]) for row in rows)
    lines = [
        f"{'name':{longest}}  {'shape':>16} {'bits':>4} {'used':>6} {'indices':>10} {'codebooks':>9} {'other':>10}"
    ]
    for row in rows:
        used = f"{row['used']:.2f}" if row["used"] is not None else ""
        lines.append(
            f"{row['name']:{longest}}  {row['shape']:>16} {row['bits']:>4} {used:>6} {row['indices']:>10,} "
            f"{row['codebooks']:>9,} {row['other']:>10,}"
        )
    return "\n".join([*lines, "", *(f"{name.replace('_', ' ')}: {value:,}" for name, value in totals.items())])
