"""Enrolled speakers: what is kept and compared, and what a store refuses."""

import contextlib
import hashlib
import multiprocessing
import sqlite3
import subprocess
import sys

import jax
import numpy as np
import pytest
from recordings import tone, write

from kmq_jax.core.errors import UserError
from kmq_jax.core.progress import say_once
from kmq_jax.models import registry
from kmq_jax.models.speaker_model import SpeakerModel, save_model
from kmq_jax.speakers import database
from kmq_jax.speakers.store import SpeakerStore, false_accept_rate

SETTINGS = {"width": 4, "blocks": [1, 1, 1, 1], "embedding_size": 8}


def made(key: int) -> SpeakerModel:
    variables = registry.initialize(registry.build("wespeaker_resnet34", **SETTINGS), jax.random.key(key))
    return SpeakerModel("wespeaker_resnet34", SETTINGS, "wespeaker", jax.device_get(variables))


@pytest.fixture(scope="module")
def model():
    return made(0)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Six recordings, a second each."""
    place = tmp_path_factory.mktemp("recordings")
    return [write(place / f"{i}.wav", tone(hertz=120 + 90 * i, seed=i)) for i in range(6)]


@pytest.fixture
def store(tmp_path, model):
    return SpeakerStore(tmp_path / "store", model, engine="jax")


def bytes_of(store):
    return store._file.read_bytes()


def test_a_speaker_is_compared_by_the_mean_of_unit_embeddings(store, model, files):
    store.enrol("alice", files[:2])
    store.enrol("alice", files[2:3])
    store.enrol("bob", files[3:4])
    rows = np.stack([model.embed(file, engine="jax") for file in files]).astype(np.float64)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    expected = {}
    for name, mean in (("alice", unit[:3].mean(axis=0)), ("bob", unit[3])):
        expected[name] = float(mean @ unit[4] / np.linalg.norm(mean))
    found = store.identify(files[4])
    assert [match.speaker for match in found] == sorted(expected, key=expected.get, reverse=True)
    for match in found:
        assert match.score == pytest.approx(expected[match.speaker], abs=1e-5) and match.decision is None
        assert store.verify(match.speaker, files[4]).score == pytest.approx(match.score, abs=1e-6)


def test_the_threshold_decides_and_belongs_to_those_accepted(store, files):
    store.enrol("alice", files[:1])
    score = store.verify("alice", files[1]).score
    assert store.verify("alice", files[1], score).decision
    assert not store.verify("alice", files[1], float(np.nextafter(np.float32(score), np.float32(2)))).decision
    store.enrol("bob", files[2:3])
    assert len(store.identify(files[1], top=1)) == 1 and len(store.identify(files[1], top=9)) == 2


def test_recordings_are_added_replaced_and_removed(store, files):
    assert store.enrol("alice", files[:2]).recordings == 2
    assert store.enrol("alice", files[2:3]).recordings == 3
    store.enrol("Zoë", files[3:4])
    assert [(one.name, one.recordings) for one in store.speakers()] == [("Zoë", 1), ("alice", 3)]
    assert store.speakers()[1].seconds == pytest.approx(3.0)
    # A recording that was the speaker's own may come again.
    assert store.enrol("alice", files[1:2], replace=True).recordings == 1
    assert store.remove("alice") == 1
    assert [one.name for one in store.speakers()] == ["Zoë"]
    with pytest.raises(UserError, match="has no speaker 'alice'"):
        store.remove("alice")


def test_who_is_removed_leaves_no_trace(store, files, model):
    store.enrol("alice", files[:1])
    store.enrol("bob", files[1:2])
    traces = [model.embed(files[0], engine="jax").astype("<f4").tobytes(), b"alice", b"0.wav"]
    assert all(trace in bytes_of(store) for trace in traces)
    store.remove("alice")
    assert not any(trace in bytes_of(store) for trace in traces)


def test_what_fails_changes_nothing(store, files, tmp_path):
    with pytest.raises(UserError, match="missing"):
        store.enrol("alice", [files[0], tmp_path / "absent.wav"])
    assert not store._file.parent.exists()
    store.enrol("alice", files[:2])
    before = bytes_of(store)
    short = write(tmp_path / "short.wav", tone(0.05))
    for name, given, why in (
        ("alice", files[:1], "0.wav is enrolled already, as a recording of alice"),
        ("bob", [files[3], files[1]], "1.wav is enrolled already, as a recording of alice"),
        ("bob", [files[3], files[3]], "3.wav is enrolled already, as a recording of bob"),
        ("bob", [files[3], short], "short.wav: too short"),
        ("bob", [], "no recording"),
        ("two\nlines", files[3:4], "printable"),
        ("\udce9", files[3:4], "printable"),
    ):
        with pytest.raises(UserError, match=why):
            store.enrol(name, given, replace=name == "bob")
        assert bytes_of(store) == before
    with pytest.raises(UserError, match="has no speaker 'bob'"):
        store.verify("bob", files[3])


def test_another_model_is_refused_until_all_is_embedded_again(store, files, model):
    store.enrol("alice", files[:2])
    before, other = bytes_of(store), made(1)
    moved = SpeakerStore(store._file.parent, other, engine="jax")
    for refused in (lambda: moved.enrol("bob", files[3:4]), lambda: moved.verify("alice", files[4])):
        with pytest.raises(UserError, match="is not the one of .*--again"):
            refused()
    assert bytes_of(store) == before
    assert moved.enrol_again() == 2
    rows = np.stack([other.embed(file, engine="jax") for file in (*files[:2], files[4])])
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    mean = unit[:2].mean(axis=0)
    assert moved.verify("alice", files[4]).score == pytest.approx(mean @ unit[2] / np.linalg.norm(mean), abs=1e-5)
    with pytest.raises(UserError, match="is not the one of"):
        store.verify("alice", files[4])


def test_embedding_again_needs_every_recording_as_it_was(store, model, tmp_path):
    own = [write(tmp_path / f"{i}.wav", tone(hertz=200 + 50 * i, seed=i)) for i in range(2)]
    store.enrol("alice", own)
    before, moved = bytes_of(store), SpeakerStore(store._file.parent, made(1), engine="jax")
    kept = own[1].read_bytes()
    own[1].unlink()
    with pytest.raises(UserError, match="1.wav, a recording of alice, is missing: nothing was changed"):
        moved.enrol_again()
    write(own[1], tone(hertz=500))
    with pytest.raises(UserError, match="1.wav, a recording of alice, is another file"):
        moved.enrol_again()
    assert bytes_of(store) == before
    own[1].write_bytes(kept)
    assert moved.enrol_again() == 2


def test_embedding_again_tells_that_another_process_enrolled_meanwhile(store, files, monkeypatch):
    store.enrol("alice", files[:1])
    moved = SpeakerStore(store._file.parent, made(1), engine="jax")
    embed = moved._embed

    def meanwhile(network, path):
        store.enrol("bob", files[1:2])
        return embed(network, path)

    monkeypatch.setattr(moved, "_embed", meanwhile)
    with pytest.raises(UserError, match="changed by another process"):
        moved.enrol_again()
    assert store.verify("bob", files[1]).score == pytest.approx(1, abs=1e-5)


def test_the_store_remembers_where_its_model_lies(tmp_path, model, files):
    save_model(tmp_path / "a.kmq", model)
    SpeakerStore(tmp_path / "store", tmp_path / "a.kmq", engine="jax").enrol("alice", files[:1])
    later = SpeakerStore(tmp_path / "store", engine="jax")
    assert later.verify("alice", files[0]).score == pytest.approx(1, abs=1e-5)
    assert later.enrol("bob", files[1:2]).recordings == 1
    save_model(tmp_path / "a.kmq", made(1))
    with pytest.raises(UserError, match="a.kmq as it was then"):
        SpeakerStore(tmp_path / "store", engine="jax").verify("alice", files[0])
    with pytest.raises(UserError, match="`model` must be given"):
        SpeakerStore(tmp_path / "new", engine="jax").enrol("alice", files[:1])


def test_a_store_that_is_none(tmp_path, files, model):
    store = SpeakerStore(tmp_path, model, engine="jax")
    for ask in (store.speakers, lambda: store.verify("a", files[0]), lambda: store.identify(files[0])):
        with pytest.raises(UserError, match="holds no speakers yet"):
            ask()
    assert not list(tmp_path.iterdir())


def enrol_many(place, model, number, files, gate):
    store = SpeakerStore(place, model, engine="jax")
    gate.wait()
    for name, file in zip(("both", f"own {number}", "both"), files):
        store.enrol(name, [file])


def test_processes_enrol_at_once_and_nothing_is_lost(tmp_path, model, files):
    save_model(tmp_path / "a.kmq", model)
    context = multiprocessing.get_context("spawn")
    gate, workers = context.Barrier(2), []
    for number in range(2):
        own = files[3 * number : 3 * number + 3]
        arguments = (tmp_path / "store", str(tmp_path / "a.kmq"), number, own, gate)
        workers.append(context.Process(target=enrol_many, args=arguments))
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    found = SpeakerStore(tmp_path / "store").speakers()
    assert {one.name: one.recordings for one in found} == {"both": 4, "own 0": 1, "own 1": 1}


KILLED = """if True:
    import os, sys
    from pathlib import Path
    from kmq_jax.speakers.database import writing
    with writing(Path(sys.argv[1])) as database:
        assert database.remove("alice") == 2
        os._exit(9)
"""


def test_a_process_that_dies_within_a_change_has_changed_nothing(store, files):
    store.enrol("alice", files[:2])
    assert subprocess.run([sys.executable, "-c", KILLED, store._file], check=False).returncode == 9
    assert store.speakers()[0].recordings == 2


def test_false_accept_rate_by_counting():
    draws = np.random.default_rng(0).random((200_000, 5)) < 0.1
    assert false_accept_rate(0.1, 5) == pytest.approx(draws.any(axis=1).mean(), abs=0.005)
    assert false_accept_rate(0.1, 1) == pytest.approx(0.1) and false_accept_rate(0.0, 9) == 0


OF_THE_FILE = {
    "trigger": "CREATE TRIGGER t AFTER INSERT ON recording BEGIN DELETE FROM recording; END",
    "view": "CREATE VIEW v AS SELECT * FROM model",
    "table": "CREATE TABLE more (x)",
    "number": "PRAGMA application_id = 7",
    "short": "UPDATE recording SET embedding = x'00'",
    "huge": "UPDATE recording SET embedding = zeroblob(5000000)",
    "dim": "UPDATE model SET dim = 1000000000",
    "half": "UPDATE model SET dim = 4",
    "fingerprint": "UPDATE model SET fingerprint = x'ff'",
    "bits": "UPDATE model SET bits = 1000",
}
OF_A_ROW = {
    "nan": "UPDATE recording SET embedding = x'" + np.full(8, np.nan, "<f4").tobytes().hex() + "'",
    "zero": "UPDATE recording SET embedding = zeroblob(32)",
    "seconds": "UPDATE recording SET seconds = 'long'",
    "when": "UPDATE recording SET enrolled = 1e300",
    "name": "UPDATE recording SET speaker = CAST(x'ff' AS TEXT)",
    "escape": "UPDATE recording SET speaker = char(27) || '[2J'",
}


@pytest.mark.parametrize("change", [*OF_THE_FILE, *OF_A_ROW])
def test_a_file_that_was_tampered_with_is_one_clear_line(store, files, change):
    store.enrol("alice", files[:1])
    with sqlite3.connect(store._file) as raw:
        raw.execute((OF_THE_FILE | OF_A_ROW)[change])
    raw.close()
    before = bytes_of(store)
    asks = [store.speakers, lambda: store.identify(files[0])]
    # Who enrols bob does not read what is kept of alice.
    for ask in asks + ([lambda: store.enrol("bob", files[1:2])] if change in OF_THE_FILE else []):
        with pytest.raises(UserError, match=r"speakers.sqlite is no store of speakers") as error:
            ask()
        assert str(error.value).isprintable()
    assert bytes_of(store) == before


@pytest.mark.parametrize("what", ["text", "cut", "noise", "directory"])
def test_another_file_in_its_place_is_refused_and_left(store, files, what):
    store.enrol("alice", files[:1])
    whole = bytes_of(store)
    if what == "directory":
        store._file.unlink()
        store._file.mkdir()
    else:
        noise = np.random.default_rng(0).bytes(len(whole) - 200)
        store._file.write_bytes({"text": b"hello\n", "cut": whole[:5000], "noise": whole[:200] + noise}[what])
    held = None if what == "directory" else hashlib.sha256(bytes_of(store)).digest()
    for ask in (store.speakers, lambda: store.enrol("bob", files[1:2])):
        with pytest.raises(UserError, match="speakers.sqlite"):
            ask()
    assert held is None or hashlib.sha256(bytes_of(store)).digest() == held


def test_whether_recordings_were_cut_to_speech_is_remembered_and_told(store, model, files, monkeypatch, capsys):
    monkeypatch.setattr("kmq_jax.speakers.store.speech.only", lambda wave, where: wave[: len(wave) // 2])
    cut = SpeakerStore(store._file.parent, model, engine="jax", vad=True)
    assert cut.enrol("alice", files[:1]).seconds == pytest.approx(0.5)
    say_once.cache_clear()
    cut.verify("alice", files[1])
    assert capsys.readouterr().err == ""
    store.verify("alice", files[1])
    assert "0.wav of alice first, were enrolled with vad, now it is without" in capsys.readouterr().err
    assert store.enrol_again() == 1 and store.speakers()[0].seconds == pytest.approx(1.0)
    store.verify("alice", files[1])
    assert capsys.readouterr().err == ""
    cut.enrol("alice", files[2:3])
    assert "1 recordings, " in capsys.readouterr().err


def test_a_store_made_before_vad_was_kept_is_read_and_added_to(store, model, files, monkeypatch, capsys):
    monkeypatch.setattr("kmq_jax.speakers.store.speech.only", lambda wave, where: wave)
    store.enrol("alice", files[:1])
    score = store.verify("alice", files[1]).score
    with sqlite3.connect(store._file) as raw:
        raw.execute("ALTER TABLE recording DROP COLUMN vad")
    raw.close()
    before = bytes_of(store)
    for vad in (False, True):  # of neither is it known that it differs
        later = SpeakerStore(store._file.parent, model, engine="jax", vad=vad)
        assert later.verify("alice", files[1]).score == score and bytes_of(store) == before
    assert store.enrol("alice", files[2:3]).recordings == 2 and store.remove("alice") == 2
    assert capsys.readouterr().err == ""


def test_a_name_is_found_however_its_accents_were_typed(store, files):
    nfc, nfd = "Zo\u00eb", "Zoe\u0308"
    assert store.enrol(nfd, files[:1]).name == nfc
    assert store.enrol(nfc, files[1:2]).recordings == 2
    assert store.verify(nfd, files[2]).speaker == store.verify(nfc, files[2]).speaker == nfc
    with sqlite3.connect(store._file) as raw:  # as stores made before may have it
        raw.execute("UPDATE recording SET speaker = ? WHERE number = 1", (nfd,))
    raw.close()
    assert [(one.name, one.recordings) for one in store.speakers()] == [(nfc, 2)]
    assert store.remove(nfc) == 2


def test_what_is_no_threshold_and_no_count_is_refused(store, files):
    store.enrol("alice", files[:1])
    for threshold in (float("nan"), 5.0):
        with pytest.raises(UserError, match=r"`threshold` \(="):
            store.verify("alice", files[0], threshold=threshold)
    with pytest.raises(UserError, match=r"`top` \(=-1\) must be 1 or more"):
        store.identify(files[0], top=-1)


def test_a_store_that_cannot_be_looked_at_is_not_taken_for_an_empty_one(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot read .*speakers.sqlite: Not a directory"):
        SpeakerStore(tmp_path / "file").speakers()


def test_what_a_killed_process_left_of_a_new_store_is_no_other_database(tmp_path):
    """SQLite empties the file again, which by then is longer than nothing."""
    people = tmp_path / "people"
    people.mkdir()
    with contextlib.closing(sqlite3.connect(people / database.FILE)) as connection:
        connection.execute("PRAGMA user_version = 1")  # a page is written, and no table
    with pytest.raises(database.Empty, match="holds no speakers yet"), database.reading(people / database.FILE):
        pass
    with database.writing(people / database.FILE) as written:
        written.set_model(database.ModelRow(b"/m", None, "f", 2))
    with database.reading(people / database.FILE) as read:
        assert read.model().fingerprint == "f"
