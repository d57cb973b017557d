"""Extraction without a network: what is read how often. Embeddings are tested with whole commands."""

from types import SimpleNamespace

import numpy as np

from kmq_jax.scoring import extract
from kmq_jax.scoring.options import ExtractionOptions
from kmq_jax.scoring.table import read_embeddings


def test_recordings_that_a_kept_model_does_not_take_are_looked_through_once(tmp_path, monkeypatch):
    heard = []
    model = "kmq_jax.models.speaker_model"
    monkeypatch.setattr(f"{model}.load_model", lambda *_: None)
    monkeypatch.setattr(f"{model}.embed_all", lambda _, table, *rest: np.ones((len(table), 2), np.float32))
    monkeypatch.setattr(f"{model}.note", lambda _: SimpleNamespace(fingerprint="m"))
    monkeypatch.setattr(extract.runner, "at_hand", lambda *_: SimpleNamespace(takes=lambda lengths: False))
    monkeypatch.setattr(extract.runner, "noting", lambda *_: lambda note: None)
    monkeypatch.setattr(extract.speech, "of_table", lambda table: heard.append(len(table)) or table)
    data = "synthetic:dev?speakers=2&utterances=1"
    assert extract.extract("m", data, tmp_path / "e.npz", ExtractionOptions(vad=True)).shape == (2, 2)
    assert heard == [2]
    assert read_embeddings(tmp_path / "e.npz").vad is True
