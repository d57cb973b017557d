"""A converted model, run by ONNX Runtime; and the same without JAX, where a `.kmq` file was converted before.

Nothing here imports JAX. `engine` converts models and keeps the converted form beside them. Whoever embeds by a file
that is read for the first time leaves a note beside it, under a name that holds the file's own hash: which converted
file belongs to it, and how long its recordings may be. From then on `extract` and `verify` run with numpy, libsndfile
and ONNX Runtime alone, and start in a fraction of the time and the memory. Another file, other bits or another form of
conversion have no such note, and what needs more than the note allows is left to JAX, too.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kmq_jax.core.errors import UserError, first_line
from kmq_jax.core.files import read_object, write_json
from kmq_jax.core.hub import is_place
from kmq_jax.core.memory import accelerator_at_hand
from kmq_jax.core.progress import progress

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

PACKED, AVERAGED = "model.kmq", "averaged.kmq"
"""Files of a directory that is a MODEL: a packed network; the mean of a run's last checkpoints, which goes first."""
_FORM = 2  # of the converted files and notes; another number makes kept ones stale
_owner: int | None = None  # the process that embedded first


class Runner:
    """A converted model: from waves to embeddings."""

    def __init__(self, model: bytes | str, size: int):
        """Takes the converted model, or the path of its file, and how many values its embeddings have."""
        self._model, self._size = model, size

    def embed(self, wave: np.ndarray) -> np.ndarray:
        """Embeds one recording, float32 `[samples]` at 16 kHz, by all processors; `[dim]`."""
        return _embed(wave, self._wide)

    def embed_all(self, load: Callable[[int], np.ndarray], rows: Iterable[int], count: int) -> np.ndarray:
        """Embeds recordings, each by one processor, as many at a time as there are.

        Args:
            load: gives the samples of a recording by its number.
            rows: the numbers, 0 to `count` - 1, in the order in which they are begun.
            count: how many there are.

        Returns:
            float32 `[count, dim]`, by number.
        """
        embeddings = np.zeros((count, self._size), np.float32)

        def one(row: int) -> None:
            embeddings[row] = _embed(load(row), self._narrow)

        with ThreadPoolExecutor(processors()) as pool:
            for done in _few_ahead(pool, one, rows):
                done.result()
        return embeddings

    @cached_property
    def _wide(self) -> "InferenceSession":
        return self._opened(processors())

    @cached_property
    def _narrow(self) -> "InferenceSession":
        return self._opened(1)

    def _opened(self, threads: int) -> "InferenceSession":
        return session_of(self._model, threads)


def _embed(wave: np.ndarray, run: "InferenceSession") -> np.ndarray:
    embedding: np.ndarray = run.run(None, {"wave": np.ascontiguousarray(wave, np.float32)[None]})[0][0]
    return embedding


@dataclasses.dataclass(frozen=True)
class Note:
    """What must be known of a converted model to run it.

    Attributes:
        fingerprint: the model's.
        size: values of an embedding.
        fewest: samples that a recording must have.
        most: samples that it may have.
    """

    fingerprint: str
    size: int
    fewest: int
    most: int


class Lean:
    """A model that runs without JAX.

    Attributes:
        note: what is known of it.
    """

    def __init__(self, note: Note, file: Path):
        """Takes what is known of a model, and its converted file."""
        self.note, self._runner = note, Runner(str(file), note.size)

    def takes(self, lengths: np.ndarray) -> bool:
        """Whether recordings of these lengths, in samples, are all neither too short for the model nor long."""
        return bool(np.all((self.note.fewest <= lengths) & (lengths <= self.note.most)))

    def embed(self, waves: list[np.ndarray]) -> np.ndarray:
        """Embeds recordings in memory, `[waves, dim]`."""
        check_process()
        if len(waves) == 1:
            return self._runner.embed(waves[0])[None]
        # The longest first, so that no processor is left with one at the end.
        order = sorted(range(len(waves)), key=lambda i: -len(waves[i]))
        return self._runner.embed_all(waves.__getitem__, order, len(waves))

    def embed_table(self, load: Callable[[int], np.ndarray], lengths: np.ndarray) -> np.ndarray:
        """Embeds recordings that `load` reads, cut to these lengths `[count]`; `[count, dim]`."""
        order = progress(np.argsort(-lengths, kind="stable").tolist(), desc="embedding", unit="recording")
        return self._runner.embed_all(lambda row: load(row)[: lengths[row]], order, len(lengths))


def at_hand(model: str | Path, bits: int | None, engine: str, compute: str = "float32") -> Lean | None:
    """A model that runs without JAX, where it was converted before, and ONNX Runtime on a CPU is what is wanted.

    Args:
        model: the MODEL.
        bits: at which a nested model is read; None is the most.
        engine: one of `choices.ENGINES`.
        compute: the network's arithmetic.
    """
    wanted = engine == "onnxruntime" or engine == "auto" and _on_a_cpu()
    file = packed_file(model)
    if not wanted or file is None or compute != "float32" or importlib.util.find_spec("onnxruntime") is None:
        return None
    path = _note_file(file, bits)
    if path is None or not path.is_file():
        return None
    try:
        found = read_object(path)
        numbers = [int(found[name]) for name in ("size", "fewest", "most")]
        note, digest = Note(str(found["fingerprint"]), *numbers), str(found["sha256"])
    except (UserError, KeyError, TypeError, ValueError):
        return None  # damaged: the model is opened in the ordinary way, and leaves another
    converted = kept_file(file, note.fingerprint)
    # The fingerprint becomes part of a file's name, so it must hold no path.
    if not note.fingerprint.isalnum() or not converted.is_file():
        return None
    # A damaged one as well is left to the ordinary way, which makes it anew.
    return Lean(note, converted) if _digest(converted) == digest else None


def noting(model: str | Path, bits: int | None) -> Callable[[Note], None]:
    """Gives a function that leaves a note of a model, to be called once the model has run.

    The model must be read after `noting` was called: a note is left only where its file is still what it was then.
    Only the first note is left.
    """
    file = packed_file(model)
    path = _note_file(file, bits) if file else None
    left: list[Note] = []

    def leave(note: Note) -> None:
        if left or file is None or path is None:
            return
        converted = kept_file(file, note.fingerprint)
        # In this order: JAX leaves no converted file, and then nothing need be hashed.
        if converted.is_file() and path == _note_file(file, bits):
            left.append(note)
            with contextlib.suppress(UserError):  # a directory that cannot be written to
                write_json(path, dataclasses.asdict(note) | {"sha256": _digest(converted)})

    return leave


def packed_file(model: str | Path) -> Path | None:
    """The `.kmq` file that a MODEL is read from, as `speaker_model.load_model` has it; None: it is another kind."""
    if is_place(str(model)):
        return None
    path = Path(model)
    return next((file for file in (path, path / AVERAGED, path / PACKED) if file.is_file()), None)


def kept_file(origin: Path, fingerprint: str) -> Path:
    """Where the converted form of a model is kept, beside its file or in its directory.

    >>> kept_file(Path("runs/a.kmq"), "0123").name
    '.a.kmq-0123-2.onnx'
    """
    folder = origin if origin.is_dir() else origin.parent
    return folder / f".{origin.name}-{fingerprint}-{_FORM}.onnx"


def _note_file(file: Path, bits: int | None) -> Path | None:
    """Where the note of a file with this content is; None: the file cannot be read."""
    digest = _digest(file, f"{_FORM} {bits}\n")
    return None if digest is None else file.parent / f".{file.name}-{digest[:32]}.json"


def _digest(file: Path, before: str = "") -> str | None:
    """SHA-256 of a text and a file's bytes; None: the file cannot be read."""
    digest = hashlib.sha256(before.encode())
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, lambda: digest).hexdigest()
    except OSError:
        return None


def _on_a_cpu() -> bool:
    """Whether JAX would compute on a CPU, as far as that can be told without it."""
    if sys.modules.get("jax") is not None:
        import jax

        return jax.default_backend() == "cpu"
    return os.environ.get("JAX_PLATFORMS", "").lower() in ("", "cpu") and not accelerator_at_hand()


def session_of(model: bytes | str, threads: int) -> "InferenceSession":
    """Opens a converted model, or the file of one.

    Raises:
        UserError: ONNX Runtime cannot.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors alone
    # Each length has needs of its own: kept plans and arenas for all of them would only hold memory.
    options.enable_mem_pattern = False
    options.enable_cpu_mem_arena = False
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class of their own
        raise UserError(f"ONNX Runtime cannot open the converted model: {first_line(error)}") from error


def check_process() -> None:
    """Refuses to compute in a process that was forked after its parent did: it would wait for the parent's threads.

    Raises:
        UserError: this is one.
    """
    global _owner
    if _owner not in (None, os.getpid()):
        raise UserError(
            "this process was forked from one that had embedded recordings, whose threads it lacks: start processes by "
            "`multiprocessing.get_context('spawn')`, or fork them before the first recording"
        )
    _owner = os.getpid()


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _few_ahead(pool: ThreadPoolExecutor, work: Callable[[int], None], rows: Iterable[int]) -> Iterator[Future[None]]:
    """Starts work on rows and yields it, the oldest first. Only as much waits as keeps the pool busy."""
    waiting: list[Future[None]] = []
    for row in rows:
        waiting.append(pool.submit(work, row))
        if len(waiting) > 2 * processors():
            yield waiting.pop(0)
    yield from waiting
