"""The paper's memory table, every cell, counted on the shapes of both networks as they are packed here."""

import functools

import jax

from kmq_jax import quant
from kmq_jax.benchmarks.options import MemoryBench
from kmq_jax.benchmarks.timing import Figures
from kmq_jax.core.files import Json, write_json
from kmq_jax.core.tree import Variables
from kmq_jax.models import registry
from kmq_jax.ptq.quantize import with_half_biases

MIB = 1 << 20
CLASSIFIER = 5994 * 256 * 4
"""Bytes of the classifier in training, 5,994 speakers of 256 numbers in float32, which the published totals count."""

WITH, WITHOUT = "total with the classifier of training", "total"
PUBLISHED: dict[str, dict[int, dict[str, str]]] = {
    "resnet36": {
        32: {WITHOUT: "57.0"},
        4: {"indices": "7.102", "codebooks": "0.371", WITH: "13.535", WITHOUT: "7.68"},
        3: {"indices": "5.327", "codebooks": "0.186", WITH: "11.574", WITHOUT: "5.72"},
        2: {"indices": "3.551", "codebooks": "0.093", WITH: "9.706", WITHOUT: "3.85"},
    },
    "resnet200": {32: {WITHOUT: "229.0"}, 4: {WITHOUT: "30.83"}, 3: {WITHOUT: "22.91"}, 2: {WITHOUT: "15.39"}},
}
"""The table in MiB, by network, bits and what is counted, with the digits that are printed."""


@functools.cache
def shapes(name: str) -> Variables:
    """The variables of a network in full precision, as shapes."""
    return registry.shapes(registry.build(name))


def packed(name: str, bits: int, biases: str) -> Variables:
    """The variables of a network as they are packed, as shapes; 32 bits: in full precision."""
    variables = shapes(name)
    if bits == 32:
        return variables
    spec = quant.QuantSpec(bits, only_smaller=False)  # the paper counts every convolution
    params = quant.quantize_params(variables["params"], {r"/kernel$": spec})
    # Shapes alone: nothing is computed or allocated.
    params = jax.eval_shape(with_half_biases, params) if biases == "float16" else params
    return {**variables, "params": params}


def counted(variables: Variables) -> dict[str, float]:
    """Bytes by what is counted, as the paper does: indices at their bits, without filling up a channel's last byte."""
    size = quant.size_bytes(variables)
    indices = sum(tensor.size * tensor.bits / 8 for tensor in quant.codebook_tensors(variables["params"]))
    total = size.total - size.indices + indices  # `size.indices` counts whole bytes a channel
    return {"indices": indices, "codebooks": size.codebooks, WITHOUT: total, WITH: total + CLASSIFIER}


def measure(biases: str = "float16") -> list[Json]:
    """Every cell: `network, bits, what, published, mib, equal`; equal is to the digits that are printed."""
    rows = []
    for name, by_bits in PUBLISHED.items():
        for bits, cells in by_bits.items():
            found = counted(packed(name, bits, biases))
            for what, published in cells.items():
                mib = found[what] / MIB
                # Rounded to as many digits as are published.
                equal = f"{mib:.{len(published.partition('.')[2])}f}" == published
                row = {"network": name, "bits": bits, "what": what, "published": published, "mib": mib, "equal": equal}
                rows.append(row)
    return rows


def main(options: MemoryBench) -> None:
    """Prints the table."""
    rows = measure(options.biases)
    for row in rows:
        verdict = "equal" if row["equal"] else "differs"
        place = f"{row['network']:10} {row['bits']:2} bits  {row['what']:38}"
        print(f"{place} {row['published']:>7} {row['mib']:9.4f}  {verdict}")
    figures: Figures = {"kind": "memory", "biases": options.biases, "rows": rows}
    if options.json:
        write_json(options.json, figures)
