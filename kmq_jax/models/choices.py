"""What runs a network, and in which arithmetic: the choices of flags, whose help must not wait for JAX or numpy."""

from typing import Literal, get_args

Engine = Literal["auto", "jax", "onnxruntime"]
"""What runs a network; "auto" is ONNX Runtime on a CPU, JAX on accelerators."""

ENGINES: tuple[str, ...] = get_args(Engine)

Compute = Literal["float32", "bfloat16"]
"""The arithmetic of a network."""
