#!/usr/bin/env python3
r"""Exported files in the runtimes that others deploy with: do they open, how near are their embeddings, what runs?

    launch/runtimes.py --model=W4A8=r34-w4a8.kmq --model=W2A8=r34-w2a8.kmq --data=words/dev \
        --json=.github/results/runtimes.json

Each MODEL is exported in three forms: the smallest, without types of under 4 bits (`--indices=uint4`), and by plain
arithmetic (`--opset=18`). ONNX Runtime and OpenVINO are given our features, of one length; sherpa-onnx makes its own.
The cosine is to our JAX embeddings of the same features, for sherpa-onnx those of its own kind (a povey window, filters
up to 7,600 Hz, frames beyond the edges); a second one tells how near it comes to embeddings of our features.
Convolutions are counted that run in 8 bits. Needs openvino, sherpa-onnx and kaldi-native-fbank; a runtime that cannot
open a file says why.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import onnx

from kmq_jax import frontend, quant
from kmq_jax.data import source
from kmq_jax.interop.export import export_model
from kmq_jax.models.speaker_model import SpeakerModel, frontend_of, load_model

SAMPLES = 48_000  # of each recording; one shape, so that JAX compiles once
FORMS = {"smallest": {}, "--indices=uint4": {"indices": "uint4"}, "--opset=18": {"opset": 18}}
RATE = source.SAMPLE_RATE


def by_onnxruntime(file: Path, features: np.ndarray, waves: np.ndarray) -> tuple[np.ndarray, int]:
    """Embeddings `[recordings, dim]`, and how many convolutions run in 8 bits."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(file.with_suffix(".optimized"))
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node
    found = [session.run(None, {"feats": one[None]})[0][0] for one in features]
    return np.stack(found), sum(node.op_type == "QLinearConv" for node in nodes)


def by_openvino(file: Path, features: np.ndarray, waves: np.ndarray) -> tuple[np.ndarray, int]:
    """The same by OpenVINO, without its bfloat16."""
    import openvino

    compiled = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    told = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    kinds = [(one["layerType"].astype(str), one["runtimePrecision"].astype(str)) for one in told if "layerType" in one]
    found = [np.array(compiled([one[None]])[0][0]) for one in features]
    return np.stack(found), sum(kind == "Convolution" and precision in ("i8", "u8") for kind, precision in kinds)


def by_sherpa_onnx(file: Path, features: np.ndarray, waves: np.ndarray) -> tuple[np.ndarray, int | None]:
    """The same by sherpa-onnx from waves `[recordings, samples]`; it does not say what it runs."""
    import sherpa_onnx

    settings = sherpa_onnx.SpeakerEmbeddingExtractorConfig(model=str(file), num_threads=1)
    extractor, found = sherpa_onnx.SpeakerEmbeddingExtractor(settings), []
    for wave in waves:
        stream = extractor.create_stream()
        stream.accept_waveform(sample_rate=RATE, waveform=wave)
        stream.input_finished()
        found.append(np.array(extractor.compute(stream)))
    return np.stack(found), None


RUNTIMES = {"onnxruntime": by_onnxruntime, "openvino": by_openvino, "sherpa-onnx": by_sherpa_onnx}


def sherpa_features(wave: np.ndarray) -> np.ndarray:
    """Mean-normalised features `[frames, 80]` as sherpa-onnx makes them."""
    import kaldi_native_fbank as knf

    options = knf.FbankOptions()
    options.frame_opts.dither, options.frame_opts.snip_edges = 0, False
    options.mel_opts.num_bins, options.mel_opts.high_freq = 80, -400
    fbank = knf.OnlineFbank(options)
    fbank.accept_waveform(RATE, (wave * 32768).tolist())
    fbank.input_finished()
    features = np.stack([fbank.get_frame(i) for i in range(fbank.num_frames_ready)])
    return (features - features.mean(axis=0)).astype(np.float32)


def by_jax(model: SpeakerModel) -> Callable[[np.ndarray], np.ndarray]:
    """From features `[recordings, frames, bands]` to embeddings, by ours."""
    network, variables = model.network(), quant.dequantize_params(model.variables, model.bits, np.float32)
    run = jax.jit(lambda features: network.apply(variables, features, train=False))
    return lambda features: np.concatenate([np.asarray(run(one[None])) for one in features])


def nearness(theirs: np.ndarray, ours: np.ndarray) -> dict[str, float]:
    """Mean and least cosine."""
    cosine = np.sum(theirs * ours, 1) / np.linalg.norm(theirs, axis=1) / np.linalg.norm(ours, axis=1)
    return {"mean": float(cosine.mean()), "least": float(cosine.min())}


def rows_of(name: str, place: str, waves: np.ndarray, folder: Path) -> list[dict[str, object]]:
    """A row for each form and runtime."""
    model, rows = load_model(place), []
    fbank, run = frontend_of(model.frontend), by_jax(model)
    features = np.stack([np.asarray(frontend.features_of(jnp.asarray(wave)[None], fbank))[0] for wave in waves])
    ours, on_theirs = run(features), run(np.stack([sherpa_features(wave) for wave in waves]))
    for form, how in FORMS.items():
        file = folder / f"{name}{len(rows)}.onnx"
        export_model(place, file, compare=False, **how)
        for runtime, embed in RUNTIMES.items():
            row: dict[str, object] = {"model": name, "form": form, "bytes": file.stat().st_size, "runtime": runtime}
            try:
                theirs, row["integer_convolutions"] = embed(file, features, waves)
            except Exception as error:  # each runtime has exceptions of its own
                row["refused"] = " ".join(str(error).replace(str(folder), "").split())[:200]
            else:
                row["cosine"] = nearness(theirs, on_theirs if runtime == "sherpa-onnx" else ours)
                if runtime == "sherpa-onnx":
                    row["cosine_to_our_features"] = nearness(theirs, ours)
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    """Prints a row for each model, form and runtime."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, action="append", help="NAME=MODEL; repeatable")
    parser.add_argument("--data", required=True, help="DATA")
    parser.add_argument("--recordings", type=int, default=8, help="evenly over the data (default: 8)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    table = source.open_source(args.data)
    places = np.linspace(0, len(table) - 1, args.recordings).astype(int).tolist()
    waves = np.stack([np.resize(table.load(i), SAMPLES) for i in places])
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for model in args.model:
            rows += rows_of(*model.split("=", 1), waves, Path(folder))
    if args.json:
        versions = {name: version(name.replace("-", "_")) for name in RUNTIMES}
        about = {"kind": "runtimes", "versions": versions, "recordings": args.recordings, "rows": rows}
        args.json.write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
