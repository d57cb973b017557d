"""ONNX Runtime beside JAX: the same embeddings, whole and in chunks; what is kept beside a model."""

import dataclasses
import threading

import jax
import numpy as np
import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.models import engine, registry
from kmq_jax.models.speaker_model import SpeakerModel, embed_waves, fingerprint, load_model, save_model

SETTINGS = {"width": 4, "blocks": [1, 1, 1, 1], "embedding_size": 8, "norm": "bias"}


def model_of(name="wespeaker_resnet34", frontend="wespeaker"):
    network = registry.build(name, **SETTINGS)
    return SpeakerModel(name, SETTINGS, frontend, registry.initialize(network, jax.random.key(0)))


def waves_of(*lengths):
    rng = np.random.default_rng(0)
    return [np.cumsum(rng.normal(size=n)).astype(np.float32) * 1e-3 for n in lengths]


@pytest.fixture(scope="module")
def wespeaker():
    return model_of()


@pytest.mark.parametrize("frontend", ["wespeaker", "kiwano"])
def test_engines_agree_on_any_length(frontend, wespeaker):
    model = wespeaker if frontend == "wespeaker" else model_of("resnet36", "kiwano")
    waves = waves_of(400, 7777, 16000, 12345)
    waves[2][4000:9000] = 0.25  # a constant: what is left of it lies at the floor
    ours, theirs = (embed_waves(model, waves, engine=name) for name in ("jax", "onnxruntime"))
    assert np.abs(ours).max() > 1e-3
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4 * np.abs(ours).max())
    alone = embed_waves(model, waves[1:2], engine="onnxruntime")
    np.testing.assert_allclose(alone, theirs[1:2], rtol=0, atol=1e-5 * np.abs(ours).max())


def test_the_converted_model_is_kept_and_belongs_to_its_weights(tmp_path, wespeaker):
    save_model(tmp_path / "a.kmq", wespeaker)
    (wave,) = waves_of(8000)
    first = load_model(tmp_path / "a.kmq")
    kept = engine.kept_file(tmp_path / "a.kmq", fingerprint(first))
    runs = [load_model(tmp_path / "a.kmq") for _ in range(3)]
    found = [None] * 3

    def run(i):
        found[i] = embed_waves(runs[i], [wave], engine="onnxruntime")

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".onnx"] == [kept.name]
    np.testing.assert_array_equal(found[0], found[1])
    changed = kept.stat().st_mtime_ns
    np.testing.assert_array_equal(embed_waves(load_model(tmp_path / "a.kmq"), [wave], engine="onnxruntime"), found[0])
    assert kept.stat().st_mtime_ns == changed  # read, not made again
    good = kept.read_bytes()
    kept.write_bytes(good[: len(good) // 2])  # damaged, or of a version that the runtime at hand cannot read
    np.testing.assert_array_equal(embed_waves(load_model(tmp_path / "a.kmq"), [wave], engine="onnxruntime"), found[0])
    assert kept.read_bytes() == good
    other = dataclasses.replace(first, variables=jax.tree.map(lambda x: x * 1.1, first.variables))
    assert not np.allclose(embed_waves(other, [wave], engine="onnxruntime"), found[0])


def test_what_engine_is_taken(monkeypatch):
    assert engine.chosen("auto") == "onnxruntime"  # tests run on a CPU
    assert engine.chosen("auto", "bfloat16") == "jax"
    with pytest.raises(UserError, match="compute"):
        engine.chosen("onnxruntime", "bfloat16")
    with pytest.raises(UserError, match="engine"):
        engine.chosen("torch")
    monkeypatch.setattr(engine.jax, "default_backend", lambda: "gpu")
    assert engine.chosen("auto") == "jax"
    monkeypatch.undo()
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    assert engine.chosen("auto") == "jax"
    with pytest.raises(UserError, match="needs the packages"):
        engine.chosen("onnxruntime")
