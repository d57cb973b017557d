"""Models of other toolkits in (WeSpeaker, Kiwano), and ours out (ONNX)."""
