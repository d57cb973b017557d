"""k-means quantization of any parameter tree. Knows neither audio nor networks."""

import kmq_jax.quant.serialization  # noqa: F401  (registers the types)
from kmq_jax.quant.kmeans import inertia, kmeans
from kmq_jax.quant.nested import nested_kmeans
from kmq_jax.quant.packing import pack_bits, unpack_bits
from kmq_jax.quant.rules import Rules, as_rules, decide
from kmq_jax.quant.sensitivity import allocate, allocate_sections, distortions, hessian_traces, phases, rules_of
from kmq_jax.quant.ste import (
    Codebook,
    adopt_codebooks,
    fake_quantize,
    grow_codebooks,
    init_codebooks,
    kmqat_codebook,
    kmqat_indices,
    lloyd_update,
    pack,
    reassign,
    straight_through,
)
from kmq_jax.quant.transform import (
    Size,
    combine,
    dequantize_params,
    indices_of,
    partition,
    quantize_params,
    size_bytes,
)
from kmq_jax.quant.types import CodebookTensor, QuantRule, QuantSpec, codebook_tensors, is_codebook_tensor

__all__ = [
    "Codebook",
    "CodebookTensor",
    "QuantRule",
    "QuantSpec",
    "Rules",
    "Size",
    "adopt_codebooks",
    "allocate",
    "allocate_sections",
    "as_rules",
    "codebook_tensors",
    "combine",
    "decide",
    "dequantize_params",
    "distortions",
    "fake_quantize",
    "grow_codebooks",
    "hessian_traces",
    "indices_of",
    "inertia",
    "init_codebooks",
    "is_codebook_tensor",
    "kmeans",
    "kmqat_codebook",
    "kmqat_indices",
    "lloyd_update",
    "nested_kmeans",
    "pack",
    "pack_bits",
    "partition",
    "phases",
    "quantize_params",
    "reassign",
    "rules_of",
    "size_bytes",
    "straight_through",
    "unpack_bits",
]
