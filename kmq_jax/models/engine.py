"""Embeddings by ONNX Runtime: any length without compiling, integers where the model has them.

A model is converted once. The graph goes from a wave to its embedding and is kept beside the model's file, under a name
that holds the model's fingerprint: another model never takes it, and writers at the same time write the same bytes.
Recordings are embedded one by one, so nothing is padded. Long ones go through the network in chunks (`models.long`).
"""

import contextlib
import importlib.util
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from kmq_jax import frontend
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import atomic_write
from kmq_jax.core.tree import Variables
from kmq_jax.data import source
from kmq_jax.models import long, onnx_export
from kmq_jax.models.choices import ENGINES, Engine
from kmq_jax.models.protocol import SpeakerNetwork
from kmq_jax.models.runner import Note, Runner, processors, session_of
from kmq_jax.nn.whole import Moments

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


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


class OnnxModel(Runner):
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
        self._kept = kept
        there = kept is not None and kept.is_file()
        super().__init__(str(kept) if there else self._converted(), network.embedding_size)

    def _converted(self) -> bytes:
        """The model converted, and kept where that is asked for."""
        build = onnx_export.build(self._network, self._variables, None, self._bits, fbank=self._fbank)
        model: bytes = build.SerializeToString()
        if self._kept is not None:
            _keep(self._kept, model)
        return model

    def _opened(self, threads: int) -> "InferenceSession":
        """A session of it; a kept file that cannot be opened any more is made anew."""
        try:
            return super()._opened(threads)
        except UserError:
            if isinstance(self._model, bytes):
                raise
            self._model = self._converted()
            return super()._opened(threads)

    def embed_long(self, read: Callable[[], np.ndarray]) -> np.ndarray:
        """Embeds the recording that `read` gives in chunks, where `long.can_be_cut`."""
        assert isinstance(self._fbank, frontend.FbankConfig)
        return long.embed(self._pieces, self._network, self._fbank, read)

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
        session = self._sessions.get(name)
        if session is None:  # held here: another thread may drop it from the table meanwhile
            session = session_of(getattr(self._pieces, name).SerializeToString(), processors())
            self._sessions[name] = session
        return session

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
        # Without the batch axis, that of time is one less.
        return np.moveaxis(seen[name][0], whole.axis - 1, 0)[slice(*own)]

    return long.moments_of(rows(whole.frames), None if whole.logits is None else rows(whole.logits))


def note_of(network: SpeakerNetwork, fbank: frontend.FrontEnd, fingerprint: str) -> Note:
    """What must be known of a model to run its converted form without JAX."""
    frames = network.least_frames()
    # One window, and a shift for each further frame; centred frames get `margin` samples by padding. At least a window.
    fewest = max(fbank.length + (frames - 1) * fbank.shift - fbank.margin, fbank.length)
    assert frontend.num_frames(fewest, fbank) >= frames
    return Note(fingerprint, network.embedding_size, fewest, int(long.LONG * source.SAMPLE_RATE))


def _keep(kept: Path, model: bytes) -> None:
    # A directory that cannot be written to costs a conversion each time, no more.
    with contextlib.suppress(UserError), atomic_write(kept) as temporary:
        temporary.write_bytes(model)
