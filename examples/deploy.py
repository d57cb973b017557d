"""Are two recordings of one speaker? An exported model with numpy and ONNX Runtime alone.

Recordings are WAV at 16 kHz; with the package soundfile also FLAC, Ogg and what else it reads.

kmq-jax export --model=runs/r34-4bit.kmq --features=inside --out=r34.onnx
python deploy.py r34.onnx alice.wav unknown.wav
"""

import sys
import wave

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])


def read(path):
    """The samples of a recording at 16 kHz, its channels averaged, in [-1, 1)."""
    try:
        import soundfile
    except ImportError:
        with wave.open(path) as file:
            if file.getsampwidth() != 2:
                sys.exit(f"{path}: not 16 bits a sample, which needs soundfile")
            rate, samples = file.getframerate(), np.frombuffer(file.readframes(file.getnframes()), np.int16)
            samples = samples.reshape(-1, file.getnchannels()) / 32768
    else:
        samples, rate = soundfile.read(path, always_2d=True)
    if rate != 16000:
        sys.exit(f"{path}: {rate} Hz; resample it to 16000 Hz first")
    return np.float32(samples.mean(axis=1))


def embed(path):
    """The embedding of a recording, of length one."""
    (embedding,) = session.run(None, {"wave": read(path)[None]})[0]
    return embedding / np.linalg.norm(embedding)


print(f"cosine {embed(sys.argv[2]) @ embed(sys.argv[3]):.6f}")
