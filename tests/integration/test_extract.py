"""Embeddings from a model on disk, by the command and by the library."""

import contextlib
import dataclasses
import signal
import subprocess
import sys
import time

import commands
import jax
import numpy as np
import pytest
import soundfile

from kmq_jax import frontend
from kmq_jax.cli import extract
from kmq_jax.core.errors import UserError
from kmq_jax.core.locks import if_free
from kmq_jax.data import source
from kmq_jax.models import registry
from kmq_jax.models.speaker_model import (
    SpeakerModel,
    embed_all,
    fingerprint,
    frontend_of,
    load_model,
    save_model,
)

DATA = "synthetic:dev?speakers=3&utterances=3"
SETTINGS = {"width": 8, "blocks": [1, 1, 1, 1], "embedding_size": 16}


@pytest.fixture(scope="module")
def speaker_model():
    variables = registry.initialize(registry.build("resnet36", **SETTINGS), jax.random.key(0))
    return SpeakerModel("resnet36", SETTINGS, "kiwano", jax.device_get(variables))


@pytest.fixture(scope="module")
def saved(speaker_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.kmq"
    save_model(path, speaker_model)
    return path


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["extract", *map(str, flags)])
    extract.main()


def test_the_file_has_names_paths_speakers_and_embeddings(saved, tmp_path, monkeypatch):
    run(monkeypatch, f"--model={saved}", f"--data={DATA}", f"--out={tmp_path}/e.npz")
    table = source.open_source(DATA)
    with np.load(tmp_path / "e.npz", allow_pickle=False) as file:
        assert tuple(file["ids"]) == table.ids and tuple(file["speakers"]) == table.speakers
        assert tuple(file["paths"]) == table.paths
        assert file["embeddings"].shape == (9, 16) and file["embeddings"].dtype == np.float32
        assert np.isfinite(file["embeddings"]).all()
        assert str(file["model"]) == fingerprint(load_model(saved))


def test_ids_that_an_archive_cannot_hold_are_told_before_any_recording_is_read(saved, tmp_path, monkeypatch):
    pytest.importorskip("kaldiio")
    (tmp_path / "list.csv").write_text("id,path,speaker\na b,missing.wav,s\n")
    with pytest.raises(UserError, match="the id 'a b' has a space"):
        run(monkeypatch, f"--model={saved}", f"--data={tmp_path}/list.csv", f"--out={tmp_path}/e.ark")


def test_a_fingerprint_tells_models_apart(speaker_model):
    other = jax.tree.map(np.copy, speaker_model.variables)
    other["params"]["stem"]["conv"]["kernel"][0, 0, 0, 0] += 1e-6
    changed = dataclasses.replace(speaker_model, variables=other)
    assert fingerprint(changed) != fingerprint(speaker_model)


def test_an_imported_directory_is_a_model_too(saved, speaker_model):
    loaded = load_model(saved.parent)
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, speaker_model.variables)


def test_an_embedding_does_not_depend_on_its_batch(speaker_model):
    table = source.open_source(DATA)
    together = embed_all(speaker_model, table, batch_size=4)
    for i in (0, 4, 8):
        alone = speaker_model.embed(table.load(i), 16000)
        np.testing.assert_allclose(together[i], alone, rtol=1e-4, atol=1e-5)


def test_other_rates_and_channels(speaker_model):
    wave = source.open_source(DATA).load(0)
    mono = speaker_model.embed(wave, 16000)
    np.testing.assert_allclose(speaker_model.embed(np.stack([wave, wave], 1), 16000), mono, atol=1e-5)
    doubled = speaker_model.embed(np.repeat(wave, 2), 32000)
    cosine = mono @ doubled / np.linalg.norm(mono) / np.linalg.norm(doubled)
    assert cosine > 0.95


def test_only_the_start_where_asked(speaker_model):
    table = source.open_source(DATA)
    cut = embed_all(speaker_model, table, max_seconds=1.0)
    np.testing.assert_allclose(cut[0], speaker_model.embed(table.load(0)[:16000], 16000), rtol=1e-4, atol=1e-5)


def test_the_first_frames_less_the_mean_of_all(speaker_model):
    """As the paper extracts: another embedding than that of a recording cut before its mean is taken."""
    table = source.open_source(DATA)
    most = 98  # the frames of a second
    found = embed_all(speaker_model, table, max_frames=most)
    wave, fbank = table.load(0), frontend_of(speaker_model.frontend)
    features = np.asarray(frontend.fbank(wave[None], fbank))
    features = features - features.mean(axis=1, keepdims=True)
    network = speaker_model.network()
    expected = network.apply(speaker_model.variables, features[:, :most], np.array([most]), train=False)
    np.testing.assert_allclose(found[0], np.asarray(expected)[0], rtol=1e-4, atol=1e-5)
    assert np.abs(found - embed_all(speaker_model, table, max_seconds=1.0)).max() > 1e-3
    # Two compiled programs: equal but for rounding.
    whole, all_frames = embed_all(speaker_model, table), embed_all(speaker_model, table, max_frames=9999)
    np.testing.assert_allclose(all_frames, whole, rtol=1e-4, atol=1e-5)


def test_half_precision_is_close(speaker_model):
    table = source.open_source(DATA)
    exact, half = embed_all(speaker_model, table), embed_all(speaker_model, table, "bfloat16")
    cosines = np.sum(exact * half, 1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(half, axis=1)
    assert (exact != half).any() and cosines.min() > 0.995


@pytest.mark.parametrize("wave", [np.zeros(100, np.float32), np.full(16000, np.nan, np.float32)])
def test_what_cannot_be_embedded_is_told(speaker_model, wave):
    with pytest.raises(UserError, match="frame|finite"):
        speaker_model.embed(wave, 16000)


def test_a_model_is_read_at_bits_it_has(saved):
    with pytest.raises(UserError, match="cannot be read at 2 bits"):
        load_model(saved, bits=2)


def test_what_is_no_model_is_told(tmp_path):
    with pytest.raises(UserError, match="is no model"):
        load_model(tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"model": {"name": "resnet36"}, "frontend": "kiwano"}')
    with pytest.raises(UserError, match="no finished checkpoint"):
        load_model(tmp_path)


def test_bad_data_is_one_line_and_leaves_nothing(saved, tmp_path, monkeypatch, capsys):
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(size=16000) * 0.1, 16000)
    (tmp_path / "wav.scp").write_text("a a.wav\nb b.wav\n")
    (tmp_path / "utt2spk").write_text("a s\nb s\n")
    flags = [f"--model={saved}", f"--data={tmp_path}", f"--out={tmp_path}/e.npz"]
    assert commands.run(monkeypatch, "extract", *flags) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    last = told.strip().splitlines()[-1]
    assert "wav.scp:2" in last and "b.wav" in last
    assert not list(tmp_path.glob("*.npz"))


@pytest.mark.parametrize("engine", ["onnxruntime", "jax"])
def test_shards_are_the_run_in_one_piece(saved, tmp_path, monkeypatch, capsys, engine):
    """The same bytes; a list of which a part is long, and batches that several recordings share."""
    monkeypatch.setattr("kmq_jax.models.long.LONG", 2.4)  # some of the synthetic recordings are longer
    for note in saved.parent.glob(f".{saved.name}-*.json"):
        note.unlink()  # of a run that took them whole
    flags = [f"--model={saved}", f"--data={DATA}", f"--engine={engine}", "--batch_size=2"]
    run(monkeypatch, *flags, f"--out={tmp_path}/whole.npz")
    run(monkeypatch, *flags, f"--out={tmp_path}/parts.npz", "--shards=3")
    assert (tmp_path / "parts.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert "3 shards, put together" in capsys.readouterr().out
    run(monkeypatch, *flags, f"--out={tmp_path}/parts.npz", "--shards=3")
    assert "which another process put together" in capsys.readouterr().out


@pytest.mark.slow  # four processes that each start a whole command
def test_two_processes_share_shards_and_a_killed_one_goes_on(saved, tmp_path):
    """Processes of their own. The killed one is started again; the file has the bytes of a run in one piece."""
    words = [sys.executable, "-m", "kmq_jax", "extract", f"--model={saved}", f"--data={DATA}", "--batch_size=2"]
    parts = [*words, f"--out={tmp_path}/parts.npz", "--shards=9"]
    subprocess.run([*words, f"--out={tmp_path}/whole.npz"], check=True)
    place = tmp_path / "parts.npz.shards"
    place.mkdir()
    with contextlib.ExitStack() as kept:
        with if_free(place / ".00004.lock") as free:  # one shard cannot be made: so neither is done too early
            assert free
            killed, other = (kept.enter_context(subprocess.Popen(parts)) for _ in range(2))
            kept.callback(other.kill)
            deadline = time.monotonic() + 480
            while not list(place.glob("*.npz")) and time.monotonic() < deadline:
                time.sleep(0.005)
            killed.kill()
            assert killed.wait() == -signal.SIGKILL
            again = kept.enter_context(subprocess.Popen(parts))
            kept.callback(again.kill)
            while len(list(place.glob("*.npz"))) < 8 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert sorted(path.stem for path in place.glob("*.npz")) == [f"{i:05d}" for i in range(9) if i != 4]
            assert not (tmp_path / "parts.npz").exists()
        assert [process.wait(timeout=120) for process in (other, again)] == [0, 0]
    assert (tmp_path / "parts.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert [path.name for path in place.iterdir()] == ["plan.json"]


def test_what_makes_shards_others(saved, tmp_path, monkeypatch):
    """Of another list, model or setting they are refused, and nothing is embedded."""
    from kmq_jax.scoring import extract as library
    from kmq_jax.scoring import shards
    from kmq_jax.scoring.options import ExtractionOptions

    table, options = source.open_source(DATA), ExtractionOptions()
    table = dataclasses.replace(table, samples=table.lengths())
    usual = shards.digest(table, "m", options, 3)
    longer = dataclasses.replace(table, samples=table.samples + 1)
    others = [
        shards.digest(table.select(range(8)), "m", options, 3),
        shards.digest(longer, "m", options, 3),
        shards.digest(table, "n", options, 3),
        shards.digest(table, "m", ExtractionOptions(max_frames=100), 3),
        shards.digest(table, "m", options, 4),
    ]
    assert len({usual, *others}) == 6 and usual == shards.digest(table, "m", options, 3)
    monkeypatch.setattr("kmq_jax.models.speaker_model.embed_share", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        library.extract_shards(saved, DATA, tmp_path / "e.npz", 3)
    with pytest.raises(UserError, match=r"e\.npz\.shards holds shards of another run"):
        library.extract_shards(saved, DATA, tmp_path / "e.npz", 4)
    with pytest.raises(UserError, match="cannot be used with --shards"):
        library.extract_shards(saved, DATA, tmp_path / "e.npz", 3, ExtractionOptions(vad=True))
