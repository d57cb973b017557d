"""Embeds recordings held in memory: by a model in memory, or by a MODEL, of which no more is read than is needed.

Where a `.kmq` file was converted before (`models.runner`), JAX is not imported.
"""

import os
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from kmq_jax.core.errors import UserError
from kmq_jax.core.hub import is_place
from kmq_jax.models import runner
from kmq_jax.models.choices import Engine
from kmq_jax.models.runner import Lean, Note

if TYPE_CHECKING:
    from kmq_jax.models.speaker_model import SpeakerModel

Place = str | os.PathLike[str]


class Embedder:
    """Embeds recordings by one model.

    >>> import jax
    >>> from kmq_jax.models import registry
    >>> from kmq_jax.models.speaker_model import SpeakerModel
    >>> settings = {"width": 4, "blocks": [1, 1, 1, 1], "embedding_size": 8}
    >>> weights = registry.initialize(registry.build("wespeaker_resnet34", **settings), jax.random.key(0))
    >>> embedder = Embedder(SpeakerModel("wespeaker_resnet34", settings, "wespeaker", weights))
    >>> embedder.embed([np.random.default_rng(0).normal(size=16000)]).shape, len(embedder.fingerprint)
    ((1, 8), 20)
    """

    def __init__(self, model: "SpeakerModel | Place", bits: int | None = None, engine: Engine = "auto"):
        """Names the model; nothing is read yet.

        Args:
            model: in memory, or the MODEL to load.
            bits: at which a nested MODEL is read; None: the most it has.
            engine: what runs the network: "jax", "onnxruntime", or "auto", ONNX Runtime on a CPU.
        """
        self._engine: Engine = engine
        self._path: str | None = None
        self._given: SpeakerModel | None = None
        if isinstance(model, (str, os.PathLike)):
            self._path, self._bits = os.fspath(model), bits
        else:
            self._given, self._bits = model, model.bits

    @property
    def fingerprint(self) -> str:
        """The model's fingerprint; see `speaker_model.fingerprint`.

        Raises:
            UserError: the model cannot be read; so do `size` and `embed`.
        """
        return self._note.fingerprint

    @property
    def size(self) -> int:
        """Dimension of an embedding."""
        return self._note.size

    @property
    def bits(self) -> int | None:
        """The bits at which a nested model is read; None: the most it has."""
        return self._bits

    @property
    def place(self) -> str | None:
        """Where the model lies: an absolute path, or `hf://ORG/NAME`; None: only in memory."""
        place = self._given.origin if self._given else self._path
        if place is None:
            return None
        text = os.fspath(place)
        return text if is_place(text) else os.path.abspath(text)

    def embed(self, waves: list[np.ndarray]) -> np.ndarray:
        """Embeds recordings at 16 kHz, as `data.audio.read_recording` gives them; float32 `[waves, size]`.

        Raises:
            UserError: one is too short for the network, or the model's file was changed meanwhile.
        """
        # What the note does not allow is left to the whole model: it refuses short recordings and cuts long ones.
        if self._lean and self._lean.takes(np.array([len(wave) for wave in waves])):
            return self._lean.embed(waves)
        from kmq_jax.models.speaker_model import embed_waves

        network, leave = self._loaded
        rows = embed_waves(network, waves, engine=self._engine)
        leave(self._note)
        return rows

    @cached_property
    def _lean(self) -> Lean | None:
        return None if self._path is None else runner.at_hand(self._path, self._bits, self._engine)

    @cached_property
    def _note(self) -> Note:
        if self._lean:
            return self._lean.note
        from kmq_jax.models.speaker_model import note

        return note(self._loaded[0])

    @cached_property
    def _loaded(self) -> "tuple[SpeakerModel, Callable[[Note], None]]":
        """The network, and what leaves a note of it."""
        if self._path is None:
            assert self._given is not None
            return self._given, lambda note: None
        from kmq_jax.models.speaker_model import fingerprint, load_model

        leave = runner.noting(self._path, self._bits)
        network = load_model(self._path, self._bits)
        if self._lean and self._lean.note.fingerprint != fingerprint(network):
            raise UserError(f"{self._path} was changed by another process meanwhile: run this again")
        return network, leave
