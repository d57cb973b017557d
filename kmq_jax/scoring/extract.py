"""Embeddings of every utterance of a dataset, from a model to an embedding file."""

import dataclasses
from pathlib import Path

import numpy as np

from kmq_jax.core.errors import UserError
from kmq_jax.data import source, speech
from kmq_jax.data.table import Utterances
from kmq_jax.models import runner
from kmq_jax.scoring.archive import check_archive, is_archive
from kmq_jax.scoring.options import ExtractionOptions
from kmq_jax.scoring.table import write_embeddings

Place = str | Path


def extract_shards(
    model: Place, data: Place, out: Place, shards: int, options: ExtractionOptions | None = None
) -> bool:
    """Embeds a dataset as `extract` does, but shard by shard.

    Processes that are started with the same arguments share the shards. A run that was killed goes on where it stopped.

    Args:
        model: the MODEL.
        data: the DATA.
        out: the .npz, .ark or .scp to write. The shards lie in `OUT.shards/` beside it until the file is whole.
        shards: how many; the same number in all processes.
        options: how; the defaults where left out.

    Returns:
        Whether this process wrote the file; if not, another process did, now or in an earlier run.

    Raises:
        UserError: as `extract`; `vad` is set; or `out` has shards of another run.
    """
    from kmq_jax.models.speaker_model import embed_share, fingerprint, load_model
    from kmq_jax.scoring import shards as shard_by_shard

    how = options or ExtractionOptions()
    if how.vad:
        raise UserError("`vad` cannot be used with --shards: it reads every recording before the first is embedded")
    speaker_model = load_model(model, how.bits)
    utterances = _opened(data, out, how)
    utterances = dataclasses.replace(utterances, samples=utterances.lengths())  # once for all shards
    name, place = fingerprint(speaker_model), Path(out)

    def embed(share: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        about = how.compute, how.max_seconds, how.batch_size, how.max_frames, how.engine
        return embed_share(speaker_model, utterances, share, *about)

    def write(embeddings: np.ndarray) -> None:
        write_embeddings(place, utterances.ids, utterances.paths, utterances.speakers, embeddings, name)

    known = shard_by_shard.digest(utterances, name, how, shards)
    return shard_by_shard.run(place, len(utterances), known, shards, embed, write)


def extract(model: Place, data: Place, out: Place, options: ExtractionOptions | None = None) -> np.ndarray:
    """Embeds every utterance and writes the embedding file.

    Args:
        model: the MODEL.
        data: the DATA.
        out: the .npz to write; or Kaldi's .ark, or .scp with its .ark beside.
        options: how; the defaults where left out.

    Returns:
        `[utterances, dim]` float32, as written.

    Raises:
        UserError: the model or a recording cannot be read, or the file cannot be written.
    """
    how = options or ExtractionOptions()
    # A model that an earlier run converted for ONNX Runtime runs without JAX, which takes seconds to import.
    lean = None if how.max_frames else runner.at_hand(model, how.bits, how.engine, how.compute)
    utterances = None
    if lean:
        utterances = _opened(data, out, how)
        lengths = utterances.lengths()
        if how.max_seconds:
            lengths = np.minimum(lengths, int(how.max_seconds * source.SAMPLE_RATE))
        if lean.takes(lengths):
            embeddings = lean.embed_table(utterances.load, lengths)
            return _written(out, utterances, embeddings, lean.note.fingerprint, how.vad)
    return _by_jax(model, data, out, how, utterances)


def _by_jax(model: Place, data: Place, out: Place, how: ExtractionOptions, utterances: Utterances | None) -> np.ndarray:
    """As `extract`, for every model, length and engine; JAX takes a while to import. `utterances`: where opened."""
    from kmq_jax.models.speaker_model import embed_all, load_model, note

    leave = runner.noting(model, how.bits)  # before the model is read: it notes which file it was
    speaker_model = load_model(model, how.bits)
    # Opened once: with `vad` every recording is read for it, and told of.
    utterances = _opened(data, out, how) if utterances is None else utterances
    about = how.compute, how.max_seconds, how.batch_size, how.max_frames, how.engine
    embeddings = embed_all(speaker_model, utterances, *about)
    known = note(speaker_model)
    leave(known)
    return _written(out, utterances, embeddings, known.fingerprint, how.vad)


def _opened(data: Place, out: Place, how: ExtractionOptions) -> Utterances:
    """The utterances, where their ids can be written into `out`."""
    utterances = source.open_source(data)
    if is_archive(out):
        check_archive(Path(out), utterances.ids)
    return speech.of_table(utterances) if how.vad else utterances


def _written(out: Place, utterances: Utterances, embeddings: np.ndarray, fingerprint: str, vad: bool) -> np.ndarray:
    names = utterances.ids, utterances.paths, utterances.speakers
    write_embeddings(Path(out), *names, embeddings, fingerprint, vad)
    return embeddings
