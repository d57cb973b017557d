"""Runtimes that a user would pick instead, from audio files to embeddings: ONNX Runtime, OpenVINO, both with int8.

Each peer runs the same full-precision network, or its own static int8 form of it made from utterances of training
speech. All sides are given the same work in the same way: recordings one by one, a worker for each processor, features
by kaldi-native-fbank where the engine has none of its own.
"""

import importlib.util
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kmq_jax.benchmarks.frontend import kaldi_fbank
from kmq_jax.benchmarks.timing import processors
from kmq_jax.core.errors import UserError
from kmq_jax.data import source
from kmq_jax.frontend import FrontEnd
from kmq_jax.models import onnx_export
from kmq_jax.models.speaker_model import SpeakerModel, frontend_of

if TYPE_CHECKING:
    from onnx import ModelProto

Run = Callable[[np.ndarray], np.ndarray]
CALIBRATION = 60
"""Utterances that the int8 forms are made from."""


def check(names: Sequence[str], has_speech: bool) -> None:
    """Finds before any work what peers lack.

    Args:
        names: of `PEERS`.
        has_speech: whether there is speech for int8.

    Raises:
        UserError: a package is missing, or an int8 peer has no speech.
    """
    for name in names:
        if name.endswith("-int8") and not has_speech:
            raise UserError(f"`peers` (={name}) needs `calibration`: speech that its ranges are measured on")
        for package in PACKAGES[name]:
            if importlib.util.find_spec(package) is None:
                raise UserError(f"`peers` (={name}): the package {package} is not installed")


def peer(name: str, reference: SpeakerModel, calibration: source.Utterances | None) -> tuple[Run, int]:
    """A peer, ready to run.

    Args:
        name: one of `PEERS`, checked before.
        reference: the full-precision model.
        calibration: speech for int8.

    Returns:
        From features `[1, frames, features]` to embeddings, callable from several threads; and the bytes of its file.
    """
    model = onnx_export.build(reference.network(), reference.variables, opset=18)
    return PEERS[name](model, _examples(reference, calibration))


def _examples(reference: SpeakerModel, calibration: source.Utterances | None) -> Iterator[np.ndarray]:
    fbank = frontend_of(reference.frontend)
    # A generator: peers without int8 decode nothing.
    for i in np.linspace(0, len(calibration) - 1, CALIBRATION).astype(int) if calibration else ():
        assert calibration is not None
        yield features(calibration.load(int(i)), fbank)


def features(wave: np.ndarray, fbank: FrontEnd) -> np.ndarray:
    """Mean-normalised features by kaldi-native-fbank, `[1, frames, features]`."""
    found = kaldi_fbank(wave, fbank)
    return np.asarray(found - found.mean(axis=0), np.float32)[None]


def _onnxruntime(model: "ModelProto", examples: Iterator[np.ndarray]) -> tuple[Run, int]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # `embed_all` has a worker for each processor
    options.log_severity_level = 3  # errors alone
    text = model.SerializeToString()
    session = onnxruntime.InferenceSession(text, options, providers=["CPUExecutionProvider"])
    return lambda feats: session.run(None, {"feats": feats})[0], len(text)


def _onnxruntime_int8(model: "ModelProto", examples: Iterator[np.ndarray]) -> tuple[Run, int]:
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            feats = next(examples, None)
            return None if feats is None else {"feats": feats}

    with tempfile.TemporaryDirectory() as folder:
        places = [str(Path(folder, name)) for name in ("float.onnx", "prepared.onnx", "int8.onnx")]
        onnx.save(model, places[0])
        quant_pre_process(places[0], places[1], skip_symbolic_shape=True)
        quantization.quantize_static(
            places[1],
            places[2],
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        return _onnxruntime(onnx.load(places[2]), examples)


def _openvino(model: "ModelProto", examples: Iterator[np.ndarray]) -> tuple[Run, int]:
    return _compiled(_read(model))


def _openvino_int8(model: "ModelProto", examples: Iterator[np.ndarray]) -> tuple[Run, int]:
    import nncf

    data = nncf.Dataset(list(examples))
    return _compiled(nncf.quantize(_read(model), data, subset_size=CALIBRATION))


def _read(model: "ModelProto") -> object:
    import openvino

    return openvino.Core().read_model(io.BytesIO(model.SerializeToString()))


def _compiled(network: object) -> tuple[Run, int]:
    import threading

    import openvino

    with tempfile.TemporaryDirectory() as folder:
        openvino.save_model(network, f"{folder}/m.xml", compress_to_fp16=False)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    settings = {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": str(processors()), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(network, "CPU", settings)
    own = threading.local()  # an inference request serves one thread at a time

    def run(feats: np.ndarray) -> np.ndarray:
        if not hasattr(own, "request"):
            own.request = compiled.create_infer_request()
        return np.array(own.request.infer([feats])[0])  # copied: the request reuses its output

    return run, size


def embed_all(run: Run, utterances: source.Utterances, fbank: FrontEnd) -> np.ndarray:
    """Embeds every utterance by a peer, a worker for each processor; `[utterances, dim]`."""

    def one(i: int) -> np.ndarray:
        return run(features(utterances.load(i), fbank))[0]

    with ThreadPoolExecutor(processors()) as pool:
        # Longest first, so that no worker is left with a long one at the end.
        order = np.argsort(-utterances.lengths(), kind="stable")
        found = list(pool.map(one, order.tolist()))
    embeddings = np.empty((len(found), found[0].shape[0]), np.float32)
    embeddings[order] = found  # back in the table's order
    return embeddings


PEERS: dict[str, Callable[["ModelProto", Iterator[np.ndarray]], tuple[Run, int]]] = {
    "onnxruntime": _onnxruntime,
    "onnxruntime-int8": _onnxruntime_int8,
    "openvino": _openvino,
    "openvino-int8": _openvino_int8,
}
PACKAGES: dict[str, tuple[str, ...]] = {
    "onnxruntime": ("onnxruntime", "kaldi_native_fbank"),
    "onnxruntime-int8": ("onnxruntime", "kaldi_native_fbank"),
    "openvino": ("openvino", "kaldi_native_fbank"),
    "openvino-int8": ("openvino", "nncf", "kaldi_native_fbank"),
}
"""What each peer needs beside the packages that always come along."""
