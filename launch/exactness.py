#!/usr/bin/env python3
"""How near JAX's 8-bit integers come to ONNX Runtime's, beside how near ONNX Runtime comes to itself.

    launch/exactness.py --model=runs/r34-w4a8.kmq --data=words/dev --json=.github/results/exactness.json

The same features go through the same model in several ways: by ONNX Runtime with its integer kernels ("integers"), by
its own floating-point form of the same file, graph optimizations off ("its floats"), by JAX; and by the first and the
last with features that differ by a millionth. Cosines of the embeddings, mean and least, are printed for every pair.
"""

import argparse
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime

from kmq_jax import frontend, quant
from kmq_jax.data import source
from kmq_jax.models import onnx_export
from kmq_jax.models.speaker_model import frontend_of, load_model

SAMPLES = 48_000  # of each recording; one shape, so that JAX compiles once
NOISE = 1e-6


def session(model: bytes, level: onnxruntime.GraphOptimizationLevel) -> onnxruntime.InferenceSession:
    """Opens a model with graph optimizations up to `level`."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def embeddings(place: str, data: str, count: int) -> dict[str, np.ndarray]:
    """The embeddings `[count, dim]` of recordings, evenly over the data, by each way."""
    model, table = load_model(place), source.open_source(data)
    network, fbank = model.network(), frontend_of(model.frontend)
    exported = onnx_export.build(network, model.variables).SerializeToString()
    level = onnxruntime.GraphOptimizationLevel
    whole, plain = session(exported, level.ORT_ENABLE_ALL), session(exported, level.ORT_DISABLE_ALL)
    variables = quant.dequantize_params(model.variables, model.bits, np.float32)
    by_jax = jax.jit(lambda variables, features: network.apply(variables, features, train=False))
    rng, rows = np.random.default_rng(0), dict[str, list[np.ndarray]]()
    for row in np.linspace(0, len(table) - 1, count).astype(int).tolist():
        wave = np.resize(table.load(row), SAMPLES)
        features = np.asarray(frontend.features_of(jnp.asarray(wave)[None], fbank))
        moved = features + np.float32(NOISE) * rng.standard_normal(features.shape, np.float32)
        ways = {
            "ONNX Runtime, integers": whole.run(None, {"feats": features})[0],
            "ONNX Runtime, its floats": plain.run(None, {"feats": features})[0],
            "ONNX Runtime, integers, features moved": whole.run(None, {"feats": moved})[0],
            "JAX": np.asarray(by_jax(variables, features)),
            "JAX, features moved": np.asarray(by_jax(variables, moved)),
        }
        for name, found in ways.items():
            rows.setdefault(name, []).append(found[0])
    return {name: np.stack(found).astype(np.float64) for name, found in rows.items()}


def main() -> None:
    """Prints the cosines of all pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a .kmq file with 8-bit activations")
    parser.add_argument("--data", required=True, help="DATA")
    parser.add_argument("--recordings", type=int, default=4)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = embeddings(args.model, args.data, args.recordings)
    pairs = []
    for (one, a), (other, b) in itertools.combinations(found.items(), 2):
        cosine = np.sum(a * b, 1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        pairs.append({"one": one, "other": other, "mean": float(cosine.mean()), "least": float(cosine.min())})
        print(f"{one:40} {other:40} mean {cosine.mean():.6f}, least {cosine.min():.6f}")
    if args.json:
        about = {"onnxruntime": onnxruntime.__version__, "recordings": args.recordings, "pairs": pairs}
        args.json.write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
