"""k-means low-bit quantization for speaker verification in JAX/Flax.

qtree = kmq_jax.quantize_params(params, bits=4)          # any tree of parameters: codebooks and packed indices
params = kmq_jax.dequantize_params(qtree)

latents, books = kmq_jax.init_codebooks(params, bits=4)  # to train through codebooks
weights = kmq_jax.fake_quantize(latents, books)          # what the network computes with; differentiable
qtree = kmq_jax.pack(latents, books)                     # exactly these weights, packed

model = kmq_jax.load("runs/quickstart-2bit.kmq")         # a speaker model
embedding = model.embed("a.wav")                         # or an array and its sample rate, or a list of either
cascade = kmq_jax.load_cascade("runs/cascade")           # several bits, each trial at the fewest that suffice
result = cascade.verify("a.wav", "b.wav")                # decision, score, bits used
store = kmq_jax.SpeakerStore("runs/people", model)       # enrolled speakers: enrol, verify, identify
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; at run time `_HOMES` says the same
    from kmq_jax.cascade.verifier import load_cascade as load_cascade
    from kmq_jax.models.speaker_model import SpeakerModel as SpeakerModel
    from kmq_jax.models.speaker_model import load_model as load  # noqa: F401
    from kmq_jax.quant import CodebookTensor as CodebookTensor
    from kmq_jax.quant import QuantRule as QuantRule
    from kmq_jax.quant import QuantSpec as QuantSpec
    from kmq_jax.quant import combine as combine
    from kmq_jax.quant import dequantize_params as dequantize_params
    from kmq_jax.quant import fake_quantize as fake_quantize
    from kmq_jax.quant import init_codebooks as init_codebooks
    from kmq_jax.quant import pack as pack
    from kmq_jax.quant import partition as partition
    from kmq_jax.quant import quantize_params as quantize_params
    from kmq_jax.quant import size_bytes as size_bytes
    from kmq_jax.speakers.store import SpeakerStore as SpeakerStore

__version__ = "0.1.0"

# Imported on first use: `import kmq_jax` alone does not need JAX, and quantization needs no audio library.
_HOMES = {
    "CodebookTensor": ("kmq_jax.quant", "CodebookTensor"),
    "QuantRule": ("kmq_jax.quant", "QuantRule"),
    "QuantSpec": ("kmq_jax.quant", "QuantSpec"),
    "SpeakerModel": ("kmq_jax.models.speaker_model", "SpeakerModel"),
    "SpeakerStore": ("kmq_jax.speakers.store", "SpeakerStore"),
    "combine": ("kmq_jax.quant", "combine"),
    "dequantize_params": ("kmq_jax.quant", "dequantize_params"),
    "fake_quantize": ("kmq_jax.quant", "fake_quantize"),
    "init_codebooks": ("kmq_jax.quant", "init_codebooks"),
    "load": ("kmq_jax.models.speaker_model", "load_model"),
    "load_cascade": ("kmq_jax.cascade.verifier", "load_cascade"),
    "pack": ("kmq_jax.quant", "pack"),
    "partition": ("kmq_jax.quant", "partition"),
    "quantize_params": ("kmq_jax.quant", "quantize_params"),
    "size_bytes": ("kmq_jax.quant", "size_bytes"),
}

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kmq_jax' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value  # the next access finds it and does not come here
    return value


def __dir__() -> list[str]:
    # What is offered, and the dunders; not `importlib` and the like.
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
