"""Embeddings of every utterance of a dataset, from a model to an embedding file."""

from pathlib import Path

import numpy as np

from kmq_jax.data import source, speech
from kmq_jax.models.speaker_model import embed_all, fingerprint, load_model
from kmq_jax.scoring.archive import check_archive, is_archive
from kmq_jax.scoring.options import ExtractionOptions
from kmq_jax.scoring.table import write_embeddings

Place = str | Path


def extract(model: Place, data: Place, out: Place, options: ExtractionOptions | None = None) -> np.ndarray:
    """Embeds every utterance and writes the embedding file.

    Args:
        model: the MODEL.
        data: the DATA.
        out: the .npz to write.
        options: how; the defaults where left out.

    Returns:
        `[utterances, dim]` float32, as written.

    Raises:
        UserError: the model or a recording cannot be read, or the file cannot be written.
    """
    how = options or ExtractionOptions()
    speaker_model = load_model(model, how.bits)
    utterances = source.open_source(data)
    if is_archive(out):
        check_archive(Path(out), utterances.ids)
    utterances = speech.of_table(utterances) if how.vad else utterances
    embeddings = embed_all(
        speaker_model,
        utterances,
        how.compute,
        how.max_seconds,
        how.batch_size,
        max_frames=how.max_frames,
        engine=how.engine,
    )
    write_embeddings(
        Path(out), utterances.ids, utterances.paths, utterances.speakers, embeddings, fingerprint(speaker_model)
    )
    return embeddings
