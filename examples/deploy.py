"""Are two recordings of one speaker? An exported model with numpy and ONNX Runtime alone.

kmq-jax export --model=runs/r34-4bit.kmq --features=inside --out=r34.onnx
python deploy.py r34.onnx alice.wav unknown.wav
"""

import sys
import wave

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])


def embed(path):
    """The embedding of a recording, of length one."""
    with wave.open(path) as file:  # 16 kHz, 16 bits a sample
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16).reshape(-1, file.getnchannels())
    (embedding,) = session.run(None, {"wave": np.float32(samples.mean(axis=1) / 32768)[None]})[0]
    return embedding / np.linalg.norm(embedding)


print(f"cosine {embed(sys.argv[2]) @ embed(sys.argv[3]):.6f}")
