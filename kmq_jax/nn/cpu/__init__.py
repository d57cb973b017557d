"""Native kernels for training on CPUs."""
