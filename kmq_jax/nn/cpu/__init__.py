"""Native kernels for training on CPUs. Inference there is ONNX Runtime's; nothing in here serves it alone."""
