"""k-means quantization of any parameter tree. Knows neither audio nor Flax modules."""
