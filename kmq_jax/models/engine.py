"""Embeddings by ONNX Runtime: any length without compiling, integers where the model has them.

A model is converted once. The graph goes from a wave to its embedding and is kept beside the model's file, under a name
that holds the model's fingerprint: another model never takes it, and writers at the same time write the same bytes.
Recordings are embedded one by one, so nothing is padded. Long ones go through the network in chunks (`models.long`).
"""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import jax
import numpy as np

from kmq_jax import frontend
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import atomic_write
from kmq_jax.core.tree import Variables
from kmq_jax.models import long, onnx_export
from kmq_jax.models.protocol import SpeakerNetwork
from kmq_jax.nn.whole import Moments

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Engine = Literal["auto", "jax", "onnxruntime"]
ENGINES = ("auto", "jax", "onnxruntime")
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

    def embed_long(self, read: Callable[[], np.ndarray]) -> np.ndarray:
        """Embeds the recording that `read` gives in chunks, where `long.can_be_cut`."""
        assert isinstance(self._fbank, frontend.FbankConfig)
        return long.embed(self._pieces, self._network, self._fbank, read)

    def _embed(self, wave: np.ndarray, run: "InferenceSession") -> np.ndarray:
        embedding: np.ndarray = run.run(None, {"wave": np.ascontiguousarray(wave, np.float32)[None]})[0][0]
        return embedding

    @cached_property
    def _wide(self) -> "InferenceSession":
        return _session(self._model, _processors())

    @cached_property
    def _narrow(self) -> "InferenceSession":
        return _session(self._model, 1)

    @cached_property
    def _pieces(self) -> "_OnnxPieces":
        assert isinstance(self._fbank, frontend.FbankConfig)
        return _OnnxPieces(onnx_export.build_pieces(self._network, self._variables, self._fbank, self._bits))


class _OnnxPieces:
    """A model's graphs as `long.Pieces`, each with a session from when it is first needed."""

    def __init__(self, pieces: onnx_export.Pieces):
        self._pieces = pieces
        self._sessions: dict[str, InferenceSession] = {}

    def features(self, wave: np.ndarray) -> np.ndarray:
        """See `long.Pieces`."""
        features: np.ndarray = self._session("filterbank").run(None, {"wave": np.float32(wave[None])})[0][0]
        return features

    def moments(self, features: np.ndarray, own: long.Own, given: long.Given) -> dict[str, Moments]:
        """See `long.Pieces`."""
        session = self._session("given" if given else "alone")
        if given:
            self._sessions.pop("alone", None)  # it ran for the first chunk, and its weights take room
        seen = dict(zip((one.name for one in session.get_outputs()), self._run(session, features, given)))
        return {whole.place: _moments(whole, seen, own[whole.place]) for whole in self._pieces.wholes}

    def embed(self, given: long.Given) -> np.ndarray:
        """See `long.Pieces`."""
        embedding: np.ndarray = self._run(self._session("head"), None, given)[0][0]
        return embedding

    def _session(self, name: str) -> "InferenceSession":
        if name not in self._sessions:
            self._sessions[name] = _session(getattr(self._pieces, name).SerializeToString(), _processors())
        return self._sessions[name]

    def _run(self, session: "InferenceSession", features: np.ndarray | None, given: long.Given) -> list[np.ndarray]:
        fed = {} if features is None else {"feats": features[None]}
        for whole in self._pieces.wholes if given else ():
            fed |= whole.values(given[whole.place])
        names = {one.name for one in session.get_inputs()}
        outputs: list[np.ndarray] = session.run(None, {name: value for name, value in fed.items() if name in names})
        return outputs


def _moments(whole: onnx_export.Whole, seen: dict[str, np.ndarray], own: tuple[int, int]) -> Moments:
    """The moments of a chunk's own frames."""

    def rows(name: str) -> np.ndarray:
        return np.moveaxis(seen[name][0], whole.axis - 1, 0)[slice(*own)]

    return long.moments_of(rows(whole.frames), None if whole.logits is None else rows(whole.logits))


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


def _session(model: bytes | str, threads: int) -> "InferenceSession":
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


def _few_ahead(pool: ThreadPoolExecutor, work: Callable[[int], None], rows: Iterable[int]) -> Iterator[Future[None]]:
    """Work on rows under way, the oldest first; no more wait than keep the pool busy."""
    waiting: list[Future[None]] = []
    for row in rows:
        waiting.append(pool.submit(work, row))
        if len(waiting) > 2 * _processors():
            yield waiting.pop(0)
    yield from waiting
