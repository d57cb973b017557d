"""A model in memory or by its path: what is known of it, what is embedded, what is refused."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.models import registry, runner
from kmq_jax.models.embedder import Embedder
from kmq_jax.models.speaker_model import SpeakerModel, embed_waves, fingerprint, save_model

SETTINGS = {"width": 4, "blocks": [1, 1, 1, 1], "embedding_size": 8, "norm": "bias"}
WAVE = np.cumsum(np.random.default_rng(0).normal(size=9000)).astype(np.float32) * 1e-3


@pytest.fixture(scope="module")
def model():
    weights = registry.initialize(registry.build("wespeaker_resnet34", **SETTINGS), jax.random.key(0))
    return SpeakerModel("wespeaker_resnet34", SETTINGS, "wespeaker", weights)


@pytest.mark.parametrize("engine", ["jax", "onnxruntime"])
def test_a_path_and_a_model_in_memory_give_the_same(tmp_path, model, engine):
    save_model(tmp_path / "a.kmq", model)
    told = embed_waves(model, [WAVE, WAVE[:8000]], engine=engine)
    for given in (model, tmp_path / "a.kmq", str(tmp_path / "a.kmq")):
        embedder = Embedder(given, engine=engine)
        assert (embedder.fingerprint, embedder.size, embedder.bits) == (fingerprint(model), 8, None)
        # The second time by what the first left beside the file: ONNX Runtime alone.
        for _ in range(2):
            np.testing.assert_allclose(Embedder(given, engine=engine).embed([WAVE, WAVE[:8000]]), told, atol=1e-5)
    assert (runner.at_hand(tmp_path / "a.kmq", None, engine) is None) == (engine == "jax")


def test_a_file_is_hashed_once_where_nothing_is_converted(tmp_path, model, monkeypatch):
    save_model(tmp_path / "a.kmq", model)
    hashed, real = [], runner._note_file
    monkeypatch.setattr(runner, "_note_file", lambda *about: hashed.append(about) or real(*about))
    embedder = Embedder(tmp_path / "a.kmq", engine="jax")
    for _ in range(3):
        embedder.embed([WAVE])
    assert len(hashed) == 1


def test_a_place_is_absolute_or_of_the_hub(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Embedder("a.kmq").place == str(tmp_path / "a.kmq")
    assert Embedder("hf://me/tiny").place == "hf://me/tiny"
    assert Embedder(Path("hf://me/tiny")).place == "hf:/me/tiny"  # which is the same
    assert Embedder(model).place is None
    assert Embedder(dataclasses.replace(model, origin=Path("b.kmq"))).place == str(tmp_path / "b.kmq")


def test_a_file_that_changes_while_it_is_in_use_is_refused(tmp_path, model):
    file = tmp_path / "a.kmq"
    save_model(file, model)
    Embedder(file).embed([WAVE])
    embedder = Embedder(file)
    embedder.embed([WAVE])  # without JAX
    other = dataclasses.replace(model, variables=jax.tree.map(lambda x: x * 1.1, model.variables))
    save_model(file, other)
    with pytest.raises(UserError, match=r"a\.kmq was changed by another process"):
        embedder.embed([WAVE[:399]])  # too short for what needs no JAX, which is left to JAX
    assert Embedder(file).fingerprint == fingerprint(other)


def test_what_is_no_model_is_told_when_it_is_needed(tmp_path):
    embedder = Embedder(tmp_path / "absent.kmq")
    with pytest.raises(UserError, match="is no model"):
        _ = embedder.fingerprint
