"""Models of other toolkits in, from PyTorch checkpoints and ONNX files; and ours out, as ONNX files."""
