"""Embeddings by ONNX Runtime: any length without compiling, integers where the model has them.

A model is converted once. The graph goes from a wave to its embedding and is kept beside the model's file, under a name
that holds the model's fingerprint: another model never takes it, and writers at the same time write the same bytes.
Recordings are embedded one by one, so nothing is padded. Long ones go through the network in overlapping chunks, whose
statistics are put together exactly.
"""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from kmq_jax import frontend
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import atomic_write
from kmq_jax.core.tree import Variables
from kmq_jax.models import onnx_export, walk
from kmq_jax.models.protocol import SpeakerNetwork

Engine = Literal["auto", "jax", "onnxruntime"]
ENGINES = ("auto", "jax", "onnxruntime")
LONG = 60.0
"""Seconds from which a recording is embedded in chunks."""
_CHUNK = 1500  # frames
_FORM = 1  # of the converted files; another number makes kept ones stale


def chosen(engine: Engine, compute: str = "float32") -> str:
    """The engine to use: "auto" is ONNX Runtime on a CPU where it is installed, else JAX.

    Args:
        engine: what was asked for.
        compute: "bfloat16" is JAX's alone.

    Raises:
        UserError: ONNX Runtime is asked for and not installed, or cannot compute so.
    """
    if engine not in ENGINES:
        raise UserError(f"`engine` (={engine}) must be one of {', '.join(ENGINES)}")
    there = importlib.util.find_spec("onnxruntime") is not None and importlib.util.find_spec("onnx") is not None
    if engine == "auto":
        usable = there and compute == "float32" and jax.default_backend() == "cpu"
        return "onnxruntime" if usable else "jax"
    if engine == "onnxruntime" and not there:
        raise UserError("`engine` (=onnxruntime) needs the packages onnx and onnxruntime")
    if engine == "onnxruntime" and compute != "float32":
        raise UserError(f"`compute` (={compute}) needs `engine` jax: ONNX Runtime computes in float32 or integers")
    return engine


class OnnxModel:
    """A model that ONNX Runtime runs, from waves to embeddings."""

    def __init__(
        self,
        network: SpeakerNetwork,
        variables: Variables,
        fbank: frontend.FrontEnd,
        bits: int | None = None,
        kept: Path | None = None,
    ):
        """Converts a model, or takes the file where that was done before.

        Args:
            network: the module.
            variables: its weights, packed or not.
            fbank: its filterbank.
            bits: at which nested tensors are read.
            kept: where the converted file is kept; None keeps none.

        Raises:
            UserError: the network has no ONNX form.
        """
        self._network, self._variables, self._fbank, self._bits = network, variables, fbank, bits
        if kept is not None and kept.is_file():
            self._model: bytes | str = str(kept)
            return
        model: bytes = onnx_export.build(network, variables, None, bits, fbank=fbank).SerializeToString()
        self._model = model
        if kept is not None:
            _keep(kept, model)

    def embed(self, wave: np.ndarray) -> np.ndarray:
        """Embeds one recording, float32 `[samples]` at 16 kHz, by all processors; `[dim]`."""
        return self._embed(wave, self._wide)

    def embed_all(self, load: Callable[[int], np.ndarray], rows: Iterable[int], count: int) -> np.ndarray:
        """Embeds recordings, each by one processor, as many at a time as there are.

        Args:
            load: gives the samples of a recording by its number.
            rows: the numbers, 0 to `count` - 1, in the order to begin with.
            count: how many there are.

        Returns:
            float32 `[count, dim]`, by number.
        """
        embeddings = np.zeros((count, self._network.embedding_size), np.float32)

        def one(row: int) -> None:
            embeddings[row] = self._embed(load(row), self._narrow)

        with ThreadPoolExecutor(_processors()) as pool:
            for done in _few_ahead(pool, one, rows):
                done.result()
        return embeddings

    def _embed(self, wave: np.ndarray, run: Any) -> np.ndarray:
        wave = np.ascontiguousarray(wave, np.float32)
        if len(wave) > LONG * self._fbank.sample_rate and self._pieces is not None:
            return self._in_chunks(wave)
        embedding: np.ndarray = run.run(None, {"wave": wave[None]})[0][0]
        return embedding

    @cached_property
    def _wide(self) -> Any:
        return _session(self._model, _processors())

    @cached_property
    def _narrow(self) -> Any:
        return _session(self._model, 1)

    @cached_property
    def _pieces(self) -> "tuple[onnx_export.Pieces, tuple[Any, Any, Any], int, int] | None":
        """The model in pieces, their sessions, its stride and how far it sees; None where it cannot be cut."""
        if not self._network.sees_near() or not isinstance(self._fbank, frontend.FbankConfig):
            return None
        pieces = onnx_export.build_pieces(self._network, self._variables, self._fbank, self._bits)
        sessions = tuple(
            _session(part.SerializeToString(), _processors())
            for part in (pieces.filterbank, pieces.frames, pieces.head)
        )
        stride = max(part.stride for part in self._network.parts())
        return pieces, sessions, stride, -(-_reach(self._network) // stride) * stride

    def _in_chunks(self, wave: np.ndarray) -> np.ndarray:
        assert self._pieces is not None
        pieces, (filterbank, network, head), stride, reach = self._pieces
        shift, length = self._fbank.shift, self._fbank.length
        frames = int(frontend.num_frames(len(wave), self._fbank))
        features = np.empty((frames, self._network.features), np.float32)
        for start in range(0, frames, _CHUNK):
            stop = min(start + _CHUNK, frames)
            part = wave[start * shift : (stop - 1) * shift + length]
            features[start:stop] = filterbank.run(None, {"wave": part[None]})[0][0]
        features -= features.mean(axis=0, dtype=np.float64).astype(np.float32)
        # Counts, means and sums of squares about them add up exactly (Chan et al., 1979), in float64.
        count, mean, squares = 0, np.zeros(pieces.values), np.zeros(pieces.values)
        core = _CHUNK // stride * stride
        for start in range(0, frames, core):
            low, stop = max(0, start - reach), min(start + core, frames)
            seen = network.run(None, {network.get_inputs()[0].name: features[None, low : stop + reach]})[0][0]
            own = seen[(start - low) // stride :][: -(-(stop - start) // stride)].astype(np.float64)
            its_mean = own.mean(axis=0)
            apart, total = its_mean - mean, count + len(own)
            squares += np.square(own - its_mean).sum(axis=0) + np.square(apart) * (count * len(own) / total)
            mean += apart * (len(own) / total)
            count = total
        deviation = np.sqrt(squares / max(count - 1, 1) + pieces.floor)
        pooled = np.concatenate([mean, deviation]).astype(np.float32)
        embedding: np.ndarray = head.run(None, {head.get_inputs()[0].name: pooled[None]})[0][0]
        return embedding


def kept_file(origin: Path, fingerprint: str) -> Path:
    """Where the converted form of a model is kept, beside its file or in its directory.

    >>> kept_file(Path("runs/a.kmq"), "0123").name
    '.a.kmq-0123-1.onnx'
    """
    folder = origin if origin.is_dir() else origin.parent
    return folder / f".{origin.name}-{fingerprint}-{_FORM}.onnx"


def _keep(kept: Path, model: bytes) -> None:
    # A directory that cannot be written to costs a conversion each time, no more.
    with contextlib.suppress(UserError), atomic_write(kept) as temporary:
        temporary.write_bytes(model)


def _reach(network: SpeakerNetwork) -> int:
    """Frames on either side that an output frame may depend on."""
    reach = 0
    for layer in walk.layers(network):
        if layer.window is not None:
            step = network.part_of(f"{layer.name}/kernel").stride // layer.window.strides[0]
            reach += layer.window.taps[0] // 2 * layer.window.dilations[0] * max(step, 1)
    return reach


def _session(model: bytes | str, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Each length has needs of its own: kept plans and arenas for all of them would only hold memory.
    options.enable_mem_pattern = False
    options.enable_cpu_mem_arena = False
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class of their own
        reason = str(error).split("\n")[0]
        raise UserError(f"ONNX Runtime cannot open the converted model: {reason}") from error


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _few_ahead(pool: ThreadPoolExecutor, work: Callable[[int], None], rows: Iterable[int]) -> Iterator[Any]:
    """Work on rows under way, the oldest first; no more wait than keep the pool busy."""
    waiting: list[Any] = []
    for row in rows:
        waiting.append(pool.submit(work, row))
        if len(waiting) > 2 * _processors():
            yield waiting.pop(0)
    yield from waiting
