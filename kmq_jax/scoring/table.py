"""The embedding file, as `extract` writes it: `ids`, `paths`, `speakers`, `embeddings`, `model` and `vad` in an .npz.

Where a name ends in .ark or .scp it is one of Kaldi's archives instead (`scoring.archive`): ids and embeddings alone.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import atomic_write
from kmq_jax.core.npz import read_npz
from kmq_jax.core.progress import say_once
from kmq_jax.scoring.archive import is_archive, read_archive, write_archive
from kmq_jax.scoring.cosine import lengths, unusable


@dataclass(frozen=True, eq=False)
class EmbeddingTable:
    """Embeddings of utterances and the names trial lists may use for them.

    Attributes:
        ids: `[utterances]`, unique.
        paths: `[utterances]`, or empty where unknown.
        speakers: `[utterances]` speaker names, or None where unknown.
        embeddings: `[utterances, dim]` float32, finite and none of them zero.
        source: the file, for messages.
        model: fingerprint of the model that made them, where known.
        vad: whether what is not speech was left out of the recordings; None where that is not known.
    """

    ids: tuple[str, ...]
    paths: tuple[str, ...]
    speakers: tuple[str, ...] | None
    embeddings: np.ndarray
    source: str
    model: str | None = None
    vad: bool | None = None

    def __len__(self) -> int:
        return len(self.ids)


def write_embeddings(
    path: str | os.PathLike[str],
    ids: Sequence[str],
    paths: Sequence[str],
    speakers: Sequence[str],
    embeddings: np.ndarray,
    model: str,
    vad: bool = False,
) -> None:
    """Writes an embedding file.

    Args:
        path: the .npz; or Kaldi's .ark or .scp, which have ids and embeddings alone.
        ids: `[utterances]`.
        paths: `[utterances]`.
        speakers: `[utterances]`.
        embeddings: `[utterances, dim]` float32.
        model: fingerprint of the model that made them.
        vad: whether what is not speech was left out of the recordings.

    Raises:
        UserError: the file cannot be written, or an archive cannot hold these ids (`archive.check_archive`).
    """
    if is_archive(path):
        write_archive(Path(path), ids, embeddings)
        return
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            ids=np.array(ids),
            paths=np.array(paths),
            speakers=np.array(speakers),
            embeddings=embeddings,
            model=np.array(model),
            vad=np.array(vad),
        )


def read_embeddings(path: str | os.PathLike[str]) -> EmbeddingTable:
    """Reads an embedding file. `paths`, `speakers`, `model` and `vad` may be missing. Pickled objects are refused.

    Raises:
        UserError: the file is missing or of another kind, shapes do not fit, an id occurs twice, or an embedding is
            zero or not finite; the message names the file.
    """
    path = Path(path)
    names: dict[str, tuple[str, ...]]
    if is_archive(path):
        ids, embeddings = read_archive(path)
        names, model, vad = {}, None, None
    else:
        arrays = _read_arrays(path)
        _check_arrays(path, arrays)
        embeddings, model = np.asarray(arrays.pop("embeddings"), np.float32), arrays.pop("model", None)
        vad = arrays.pop("vad", None)
        names = {name: tuple(values.tolist()) for name, values in arrays.items()}
        ids = names["ids"]
    if len(set(ids)) < len(ids):
        raise UserError(f"{path}: the id {_first_repeated(ids)} occurs twice")
    bad = unusable(lengths(embeddings))
    if bad.any():
        others = f", and {bad.sum() - 1} more" if bad.sum() > 1 else ""
        raise UserError(f"{path}: the embedding of {ids[int(np.argmax(bad))]} is zero or not finite{others}")
    about = None if model is None else str(model), None if vad is None else bool(vad)
    return EmbeddingTable(ids, names.get("paths", ()), names.get("speakers"), embeddings, str(path), *about)


def warn_of_vad(*tables: EmbeddingTable) -> None:
    """Warns where some embeddings are of speech alone and others of whole recordings: they differ by more than bits."""
    known = {table.vad: table.source for table in tables}
    if known.keys() >= {True, False}:
        say_once(f"warning: {known[True]} was embedded with vad, {known[False]} without")


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an embedding file, by name, not yet checked."""
    return read_npz(path, ("ids", "embeddings"), ("paths", "speakers", "model", "vad"), "embeddings")


def _check_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Refuses arrays of other types or shapes than an embedding file has."""
    for name, values in arrays.items():
        if not isinstance(values, np.ndarray):
            raise UserError(f"{path} is not an .npz file of embeddings: {name} is not an array")
    embeddings, model = arrays["embeddings"], arrays.get("model")
    if model is not None and (model.shape != () or model.dtype.kind != "U"):
        raise UserError(f"{path}: model must be one string, got {model.dtype} of shape {model.shape}")
    if (vad := arrays.get("vad")) is not None and (vad.shape != () or vad.dtype.kind != "b"):
        raise UserError(f"{path}: vad must be one truth value, got {vad.dtype} of shape {vad.shape}")
    if embeddings.ndim != 2 or 0 in embeddings.shape or not np.issubdtype(embeddings.dtype, np.floating):
        raise UserError(
            f"{path}: embeddings must be floating point [utterances, dim], got {embeddings.dtype} {embeddings.shape}"
        )
    for name, values in arrays.items():
        if name in ("embeddings", "model", "vad"):
            continue
        if values.shape != embeddings.shape[:1] or values.dtype.kind != "U":
            raise UserError(
                f"{path}: {name} must be {len(embeddings)} strings, got {values.dtype} of shape {values.shape}"
            )


def _first_repeated(names: tuple[str, ...]) -> str:
    seen: set[str] = set()  # `add` gives None, so that the condition holds only for a name seen before
    return next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
