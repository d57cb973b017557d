"""k-means low-bit quantization for speaker verification in JAX/Flax."""

__version__ = "0.1.0"
