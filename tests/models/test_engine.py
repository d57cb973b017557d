"""ONNX Runtime beside JAX: the same embeddings, whole and in chunks; what is kept beside a model."""

import dataclasses
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
from commands import arrays_of

from kmq_jax.core.errors import UserError
from kmq_jax.frontend import num_frames
from kmq_jax.models import engine, registry, runner
from kmq_jax.models.embedder import Embedder
from kmq_jax.models.speaker_model import (
    SpeakerModel,
    embed_waves,
    fingerprint,
    frontend_of,
    load_model,
    save_model,
)
from kmq_jax.scoring.extract import extract
from kmq_jax.speakers.store import SpeakerStore

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
    kept = runner.kept_file(tmp_path / "a.kmq", fingerprint(first))
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


WITHOUT_JAX = """
import sys
sys.modules["jax"] = None
from kmq_jax.scoring.extract import extract
from kmq_jax.speakers.store import SpeakerStore
from kmq_jax.scoring.threshold import decide, read_threshold
from kmq_jax.speakers.store import SpeakerStore
extract("a.kmq", "recordings", "lean.npz")
one = ("recordings/s/0.wav", "recordings/s/1.wav")
print(decide("a.kmq", one[:1], one[1], read_threshold("0.5")).score)
store = SpeakerStore("people")
print(store.verify("alice", one[1]).score, store.identify(one[1])[0].score)
SpeakerStore("others", "a.kmq").enrol("bob", one[:1])
"""


def test_what_was_converted_runs_without_jax(tmp_path, wespeaker, monkeypatch):
    save_model(tmp_path / "a.kmq", wespeaker)
    (tmp_path / "recordings" / "s").mkdir(parents=True)
    for i, wave in enumerate(waves_of(8000, 9000)):
        soundfile.write(tmp_path / "recordings" / "s" / f"{i}.wav", wave, 16000, subtype="FLOAT")
    monkeypatch.chdir(tmp_path)
    assert runner.at_hand("a.kmq", None, "auto") is None
    assert SpeakerStore("people", "a.kmq").enrol("alice", ["recordings/s/0.wav"]).recordings == 1
    first = extract("a.kmq", "recordings", "first.npz")
    assert runner.at_hand("a.kmq", None, "auto").note.fingerprint == fingerprint(load_model("a.kmq"))
    environment = {"PYTHONPATH": str(Path(engine.__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", WITHOUT_JAX], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole, lean = arrays_of("first.npz"), arrays_of("lean.npz")
    assert list(whole) == list(lean)
    assert all(np.array_equal(whole[key], lean[key]) for key in lean)
    cosine = first[0] @ first[1] / np.linalg.norm(first, axis=1).prod()
    assert [float(score) for score in done.stdout.split()] == pytest.approx([cosine] * 3, abs=1e-6)


def test_what_runs_without_jax_is_no_other_file_nor_recording(tmp_path, wespeaker):
    file = tmp_path / "a.kmq"
    save_model(file, wespeaker)
    model = load_model(file)
    note = engine.note_of(model.network(), frontend_of(model.frontend), fingerprint(model))
    runner.noting(file, None)(note)
    assert runner.at_hand(file, None, "onnxruntime") is None  # never converted
    embed_waves(model, waves_of(8000), engine="onnxruntime")
    runner.noting(file, None)(note)
    lean = runner.at_hand(file, None, "onnxruntime")
    assert lean.note.fingerprint == fingerprint(model)
    least = model.network().least_frames()
    for samples in range(note.fewest - 1, note.fewest + 2):
        enough = num_frames(samples, frontend_of(model.frontend)) >= least
        assert lean.takes(np.array([16000, samples])) == enough
    assert lean.takes(np.array([60 * 16000])) and not lean.takes(np.array([60 * 16000 + 1]))
    assert not lean.takes(np.array([399]))
    for other in ((file, 2, "auto"), (file, None, "jax"), (file, None, "auto", "bfloat16"), (tmp_path, None, "auto")):
        assert runner.at_hand(*other) is None
    save_model(file, dataclasses.replace(model, variables=jax.tree.map(lambda x: x * 1.1, model.variables)))
    assert runner.at_hand(file, None, "onnxruntime") is None
    leave = runner.noting(file, None)
    save_model(file, wespeaker)  # the file changes while it is in use
    leave(note)
    assert len(list(tmp_path.glob(".a.kmq-*.json"))) == 1


def test_the_same_weights_in_another_network_are_another_model(wespeaker):
    (wave,) = waves_of(8000)
    settings = registry.smoke_settings("campplus")
    weights = registry.initialize(registry.build("campplus", **settings), jax.random.key(0))
    plain = SpeakerModel("campplus", settings, "wespeaker", weights)
    relu = dataclasses.replace(plain, settings={**settings, "activation": "relu"})
    assert embed_waves(plain, [wave], engine="onnxruntime").min() < 0
    assert embed_waves(relu, [wave], engine="onnxruntime").min() == 0
    theirs = dataclasses.replace(wespeaker, frontend="3dspeaker")
    first, other = (embed_waves(model, [wave], engine="onnxruntime") for model in (wespeaker, theirs))
    assert np.abs(other - first).max() > 1e-3 * np.abs(first).max()


def test_a_damaged_converted_file_of_the_same_size_is_made_anew(tmp_path, wespeaker):
    file = tmp_path / "a.kmq"
    save_model(file, wespeaker)
    (wave,) = waves_of(8000)
    first = Embedder(file, engine="onnxruntime").embed([wave])
    kept = runner.kept_file(file, fingerprint(wespeaker))
    good = kept.read_bytes()
    kept.write_bytes(bytes(len(good)))
    assert runner.at_hand(file, None, "onnxruntime") is None
    np.testing.assert_array_equal(Embedder(file, engine="onnxruntime").embed([wave]), first)
    assert kept.read_bytes() == good and runner.at_hand(file, None, "onnxruntime") is not None


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
