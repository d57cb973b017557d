"""`kmq-jax summarize`: what a model is made of, layer by layer, and what it weighs."""

import argparse
from typing import Any

import numpy as np

from kmq_jax import quant
from kmq_jax.cli import command
from kmq_jax.core.files import write_json
from kmq_jax.core.tree import named_leaves
from kmq_jax.models import registry
from kmq_jax.models.speaker_model import SpeakerModel, load_model


def flags() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = command.parser(
        "summarize",
        "Prints a model's tensors: shape, bits, codebook entries in use, bytes; and totals.",
        "kmq-jax summarize --model=runs/quickstart-2bit.kmq --json=summary.json",
    )
    parser.add_argument("--model", required=True, help="MODEL to look at")
    parser.add_argument("--json", help="write the totals here")
    return parser


def rows_of(variables: Any) -> list[dict[str, Any]]:
    """One row a tensor: `name`, `shape`, `bits`, `used` (mean entries in use a codebook), and bytes by kind."""
    rows = []
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
    rows = indices.reshape(1, -1) if tensor.axis is None else np.moveaxis(indices, tensor.axis, 0).reshape(groups, -1)
    entries = 1 << tensor.bits
    counts = np.bincount((rows + entries * np.arange(groups)[:, None]).ravel(), minlength=groups * entries)
    return float((counts > 0).sum() / groups)


def totals_of(speaker_model: SpeakerModel) -> dict[str, int]:
    """The totals that `--json` writes."""
    size = quant.size_bytes(speaker_model.variables)
    leaves = [leaf for _, leaf in named_leaves(speaker_model.variables["params"], is_leaf=quant.is_codebook_tensor)]
    return {
        "parameters": sum(leaf.size for leaf in leaves),
        "quantized_weights": sum(leaf.size for leaf in leaves if quant.is_codebook_tensor(leaf)),
        "index_bytes": size.indices,
        "codebook_bytes": size.codebooks,
        "other_bytes": size.other,
        "total_bytes": size.total,
        "macs_per_300_frames": registry.macs(speaker_model.network(), 300),
    }


def main() -> None:
    """Runs the command."""
    args = flags().parse_args()
    speaker_model = load_model(args.model)
    rows = rows_of(speaker_model.variables)
    width = max(len(row["name"]) for row in rows)
    print(f"{'name':{width}}  {'shape':>16} {'bits':>4} {'used':>6} {'indices':>10} {'codebooks':>9} {'other':>10}")
    for row in rows:
        used = f"{row['used']:.2f}" if row["used"] is not None else ""
        print(
            f"{row['name']:{width}}  {row['shape']:>16} {row['bits']:>4} {used:>6} {row['indices']:>10,} "
            f"{row['codebooks']:>9,} {row['other']:>10,}"
        )
    totals = totals_of(speaker_model)
    print()
    for name, value in totals.items():
        print(f"{name.replace('_', ' ')}: {value:,}")
    if args.json:
        write_json(args.json, totals)
