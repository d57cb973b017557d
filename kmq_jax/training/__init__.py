"""Training and quantization-aware training."""
