"""k-means low-bit quantization for speaker verification in JAX/Flax.

qtree = kmq_jax.quantize_params(params, rules)     # any tree of parameters: codebooks and packed indices
params = kmq_jax.dequantize_params(qtree)
model = kmq_jax.load("runs/quickstart-2bit.kmq")   # a speaker model
embedding = model.embed(wave, sample_rate)         # numpy in, numpy out
cascade = kmq_jax.load_cascade("runs/cascade")     # several widths, each trial at the least that suffices
result = cascade.verify("a.wav", "b.wav")          # decision, score, width used
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Loaded when first asked for: quantization needs neither Flax nor audio, and commands start sooner.
_HOMES = {
    "CodebookTensor": ("kmq_jax.quant", "CodebookTensor"),
    "QuantRule": ("kmq_jax.quant", "QuantRule"),
    "QuantSpec": ("kmq_jax.quant", "QuantSpec"),
    "dequantize_params": ("kmq_jax.quant", "dequantize_params"),
    "fake_quantize": ("kmq_jax.quant", "fake_quantize"),
    "init_codebooks": ("kmq_jax.quant", "init_codebooks"),
    "partition": ("kmq_jax.quant", "partition"),
    "quantize_params": ("kmq_jax.quant", "quantize_params"),
    "size_bytes": ("kmq_jax.quant", "size_bytes"),
    "SpeakerModel": ("kmq_jax.models.speaker_model", "SpeakerModel"),
    "load": ("kmq_jax.models.speaker_model", "load_model"),
    "load_cascade": ("kmq_jax.cascade.verifier", "load_cascade"),
}

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kmq_jax' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
