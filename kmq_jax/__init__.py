"""k-means low-bit quantization for speaker verification in JAX/Flax.

qtree = kmq_jax.quantize(params, rules)            # any tree of parameters: codebooks and packed indices
params = kmq_jax.dequantize(qtree)
model = kmq_jax.load("runs/quickstart-2bit.kmq")   # a speaker model
embedding = model.embed(wave, sample_rate)         # numpy in, numpy out
cascade = kmq_jax.load_cascade("runs/cascade")     # several widths, each trial at the least that suffices
result = cascade.verify("a.wav", "b.wav")          # decision, score, width used
"""

import importlib
import sys
import types
from typing import Any

__version__ = "0.1.0"

# Loaded when first asked for: quantization needs neither Flax nor audio, and commands start sooner.
_HOMES = {
    "CodebookTensor": "kmq_jax.quant",
    "QuantRule": "kmq_jax.quant",
    "QuantSpec": "kmq_jax.quant",
    "dequantize": "kmq_jax.quant",
    "fake_quantize": "kmq_jax.quant",
    "init_codebooks": "kmq_jax.quant",
    "partition": "kmq_jax.quant",
    "quantize": "kmq_jax.quant",
    "size_bytes": "kmq_jax.quant",
    "SpeakerModel": "kmq_jax.model",
    "load": "kmq_jax.model",
    "load_cascade": "kmq_jax.verifier",
}

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604


class _Package(types.ModuleType):
    """Keeps `kmq_jax.quantize` the function when the command of that name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute, but for a submodule that would hide a name of `_HOMES`."""
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kmq_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
