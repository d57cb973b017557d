import concurrent.futures
import csv
import json
import os
import pickle
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import recordings

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import read_json
from kmq_jax.data import audio, writer
from kmq_jax.data.source import Utterances, concatenate, open_source

tfds = pytest.importorskip("tensorflow_datasets")


def in_process(tasks, workers, total):
    """Stands for the worker processes, whose start takes seconds."""

    class Count:
        value = 0

        def get_lock(self):
            return threading.Lock()

    writer._written = Count()
    for task in tasks:
        writer._write_shard(task)


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(writer, "_run", in_process)
    monkeypatch.setattr(writer, "_LEAST_ROWS", 5)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_tfds_reads_what_was_written_without_tensorflow(tmp_path, fast):
    root = recordings.kaldi(tmp_path / "k")
    (root / "spk2gender").write_text("s0 f\ns1 m\ns2 f\n")
    table = open_source(root)
    summary = writer.prepare(table, tmp_path / "My-Set")
    assert {key: summary[key] for key in ("utterances", "speakers", "rejected")} == {
        "utterances": 12,
        "speakers": 3,
        "rejected": 0,
    }
    assert summary["hours"] == pytest.approx(table.lengths().sum() / 16000 / 3600, abs=1e-4)
    assert read_json(tmp_path / "My-Set" / "summary.json") == summary
    names = [path.name for path in sorted((tmp_path / "My-Set").glob("*array_record*"))]
    assert names == [f"my_set-train.array_record-0000{i}-of-00003" for i in range(3)]

    records = tfds.builder_from_directory(tmp_path / "My-Set").as_data_source(split="train")
    assert len(records) == 12
    for i in (0, 4, 5, 11):
        record = records[i]
        assert record["audio"].dtype == np.int16
        np.testing.assert_array_equal(record["audio"], audio.to_int16(table.load(i)))
        assert (record["id"], record["speaker"]) == (table.ids[i].encode(), table.speakers[i].encode())
        assert record["path"] == table.paths[i].encode()
    assert "tensorflow" not in sys.modules


def test_a_prepared_set_opens_as_data(tmp_path, fast):
    root = recordings.kaldi(tmp_path / "k")
    (root / "spk2gender").write_text("s0 f\n")
    (root / "spk2age").write_text("s0 41\n")
    table = open_source(root)
    writer.prepare(table, tmp_path / "out")
    opened = pickle.loads(pickle.dumps(open_source(tmp_path / "out")))
    assert (opened.ids, opened.paths, opened.speakers) == (table.ids, table.paths, table.speakers)
    assert (opened.genders, opened.ages) == ({"s0": "f"}, {"s0": 41.0})
    np.testing.assert_array_equal(opened.lengths(), table.lengths())
    for i in (3, 8):
        np.testing.assert_array_equal(opened.load(i), table.load(i))
        stored = opened.load_int16(i)
        assert stored.dtype == np.int16
        np.testing.assert_array_equal(stored, audio.to_int16(opened.load(i)))
        np.testing.assert_array_equal(stored, table.load_int16(i))
    opened.reader.__dict__["_plain"] = False  # as for a dataset of other features, which tfds decodes
    np.testing.assert_array_equal(opened.load_int16(8), stored)
    both = concatenate([opened, table])
    np.testing.assert_array_equal(both.load_int16(8), stored)


def test_bad_files_are_listed_with_their_reasons_and_left_out(tmp_path, fast):
    root = recordings.kaldi(tmp_path / "k")
    (root / "audio/s0-u0.wav").unlink()
    (root / "audio/s0-u1.wav").write_bytes(b"")
    (root / "audio/s0-u2.wav").write_text("words\n" * 40)
    whole = (root / "audio/s0-u3.wav").read_bytes()
    (root / "audio/s0-u3.wav").write_bytes(whole[:9000])
    recordings.write(root / "audio/s1-u0.wav", np.zeros(16000))
    recordings.write(root / "audio/s1-u1.wav", recordings.tone(0.3))
    recordings.write(root / "audio/s1-u2.wav", recordings.tone(rate=6000), 6000)
    recordings.write(root / "audio/s1-u3.wav", np.stack((recordings.tone(), recordings.tone()), axis=1))  # stereo: fine
    recordings.write(root / "audio/s2-u0.wav", recordings.tone(rate=44100), 44100)  # resampled
    summary = writer.prepare(open_source(root), tmp_path / "out")
    assert (summary["utterances"], summary["speakers"], summary["rejected"]) == (5, 2, 7)
    with (tmp_path / "out/rejected.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [f"audio/s0-u{i}.wav" for i in range(4)] + [
        f"audio/s1-u{i}.wav" for i in range(3)
    ]
    assert [row["reason"].split(" (")[0] for row in rows] == [
        "missing",
        "empty",
        "unreadable",
        "truncated",
        "silent",
        "too short",
        "sample rate 6000 Hz is outside 8000-384000 Hz",
    ]
    assert open_source(tmp_path / "out").ids == ("s1-u3", "s2-u0", "s2-u1", "s2-u2", "s2-u3")


class Stopped(Exception):
    pass


@pytest.mark.parametrize("calls", [1, 2, 6, 9, 11, 13, 14])
def test_interrupted_anywhere_it_goes_on_and_the_result_is_the_same(tmp_path, fast, monkeypatch, calls):
    table = open_source(recordings.kaldi(tmp_path / "k"))
    (tmp_path / "a").mkdir()
    writer.prepare(table, tmp_path / "a" / "set")

    # Everything that appears under a final name does so by os.replace or Path.replace: stop at one of them.
    left = calls
    originals = os.replace, Path.replace

    def counted(original):
        def replace(*args, **settings):
            nonlocal left
            left -= 1
            if left == 0:
                raise Stopped
            return original(*args, **settings)

        return replace

    monkeypatch.setattr(os, "replace", counted(originals[0]))
    monkeypatch.setattr(Path, "replace", counted(originals[1]))
    with pytest.raises(Stopped):
        writer.prepare(table, tmp_path / "set")
    assert not (tmp_path / "set" / "dataset_info.json").exists()
    monkeypatch.setattr(os, "replace", originals[0])
    monkeypatch.setattr(Path, "replace", originals[1])
    if (tmp_path / "set").exists():
        with pytest.raises(UserError, match="unfinished prepare_data"):
            open_source(tmp_path / "set")
    writer.prepare(table, tmp_path / "set")
    assert contents(tmp_path / "set") == contents(tmp_path / "a" / "set")


def test_finished_shards_are_not_written_again(tmp_path, fast, monkeypatch):
    table = open_source(recordings.kaldi(tmp_path / "k"))
    written = []
    write_shard = writer._write_shard

    def stop_at_the_third(task):
        if len(written) == 2:
            raise Stopped
        written.append(task.shard.name)
        write_shard(task)

    monkeypatch.setattr(writer, "_write_shard", stop_at_the_third)
    with pytest.raises(Stopped):
        writer.prepare(table, tmp_path / "out")
    written.append("again")
    monkeypatch.setattr(writer, "_write_shard", lambda task: (written.append(task.shard.name), write_shard(task)))
    writer.prepare(table, tmp_path / "out")
    assert written == ["00000.array_record", "00001.array_record", "again", "00002.array_record"]
    assert not (tmp_path / "out" / ".prepare").exists()


def test_what_is_in_the_way(tmp_path, fast, capsys):
    table = open_source(recordings.kaldi(tmp_path / "k"))
    other = open_source(recordings.kaldi(tmp_path / "k2", 2, 2))
    writer.prepare(table, tmp_path / "out")
    before = contents(tmp_path / "out")
    assert writer.prepare(table, tmp_path / "out")["utterances"] == 12
    assert "was complete before; its recordings are not looked at again" in capsys.readouterr().err
    with pytest.raises(UserError, match="already holds another dataset"):
        writer.prepare(other, tmp_path / "out")
    with pytest.raises(UserError, match="already holds another dataset"):
        writer.prepare(table, tmp_path / "out", min_seconds=0.7)
    assert contents(tmp_path / "out") == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        writer.prepare(table, tmp_path / "full")
    (tmp_path / "half" / ".prepare").mkdir(parents=True)
    (tmp_path / "half" / ".prepare" / "plan.json").write_text('{"source": "another"}')
    with pytest.raises(UserError, match="unfinished dataset of another source"):
        writer.prepare(table, tmp_path / "half")


def test_nothing_usable(tmp_path, fast):
    root = recordings.kaldi(tmp_path / "k", 1, 2)
    good = {path: path.read_bytes() for path in (root / "audio").iterdir()}
    for path in good:
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"no recording could be used; .*rejected.csv says why \(empty"):
        writer.prepare(open_source(root), tmp_path / "out")
    assert len((tmp_path / "out/rejected.csv").read_text().splitlines()) == 3
    for path, data in good.items():
        path.write_bytes(data)
    assert writer.prepare(open_source(root), tmp_path / "out")["utterances"] == 2  # mended, it works


def test_a_table_of_nothing_is_refused_before_the_work(tmp_path, fast):
    with pytest.raises(UserError, match=f"--out={tmp_path / 'out'}: there is no utterance to write"):
        writer.prepare(Utterances((), (), ()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_utterance_ticks_once_though_workers_go_on_counting():
    class Count:
        now = 0

        @property
        def value(self):
            self.now = min(self.now + 3, 10)
            return self.now

    count, futures = Count(), [concurrent.futures.Future() for _ in range(2)]
    ticks = writer._ticks(count, futures)
    first = next(ticks)
    for future in futures:
        future.set_result(None)
    assert len([first, *ticks]) == count.now


def test_shards_hold_samples_as_they_are(tmp_path, fast):
    """Compressed, most of the time of reading a record would go into unpacking it."""
    writer.prepare(open_source(recordings.kaldi(tmp_path / "k")), tmp_path / "set")
    table = open_source(tmp_path / "set")
    stored = b"".join(path.read_bytes() for path in (tmp_path / "set").glob("*array_record*"))
    # In the file a mark may cut a record in two, so half of one or the other half is looked for.
    for wave in map(table.load_int16, range(len(table))):
        half = len(wave) // 2
        assert wave[:half].tobytes() in stored or wave[half:].tobytes() in stored


def test_a_damaged_shard_is_told_by_its_utterance(tmp_path, fast):
    table = open_source(recordings.kaldi(tmp_path / "k", 1, 3))
    writer.prepare(table, tmp_path / "out")
    (shard,) = (tmp_path / "out").glob("*array_record*")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    shard.write_bytes(data)
    opened = open_source(tmp_path / "out")
    with pytest.raises(audio.AudioError, match="unreadable"):
        for i in range(3):
            opened.load(i)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_in_place_of_any_file_is_refused_at_once(tmp_path, fast):
    writer.prepare(open_source(recordings.kaldi(tmp_path / "k", 1, 3)), tmp_path / "set")
    for path in sorted((tmp_path / "set").iterdir()):
        kept = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        # Without its information a folder is taken for one of recordings.
        told = "holds no audio file" if path.name == "dataset_info.json" else f"{path.name}: it is a pipe"
        with pytest.raises(UserError, match=told):
            open_source(tmp_path / "set")
        path.unlink()
        path.write_bytes(kept)
    assert len(open_source(tmp_path / "set")) == 3


def test_a_listing_that_does_not_fit(tmp_path, fast):
    writer.prepare(open_source(recordings.kaldi(tmp_path / "k", 1, 3)), tmp_path / "out")
    listing = tmp_path / "out" / "utterances-train.csv"
    good = listing.read_bytes()
    header, first, *_ = good.decode().splitlines(keepends=True)
    for damaged, message in (
        (good.replace(b"s0", b"\xff"), "not a CSV in UTF-8"),
        (good.replace(first.encode(), b"a\n"), "csv:2: expected 6 fields"),
        (good.replace(b",16000,", b",x,"), "invalid literal"),
        (good.replace(b",16000,", b",-1,"), "an utterance of -1 samples"),
        (good.replace(b",16000,", b"," + b"9" * 30 + b","), "too large|too big"),
        (good.replace(b"s0-u1", b"s0-u0"), "already given on line 2"),
    ):
        listing.write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            open_source(tmp_path / "out")
    for samples in (b"15999", b"1000000000000"):  # what a recording is cut to, and what is allocated for it
        listing.write_bytes(good.replace(b",16000,", b"," + samples + b","))
        with pytest.raises(audio.AudioError, match="16000 samples, not 1"):
            open_source(tmp_path / "out").load(0)
    listing.write_bytes(good)
    listing.write_text("".join(listing.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="lists 2 utterances, but the split has 3 records"):
        open_source(tmp_path / "out")
    listing.unlink()
    with pytest.raises(UserError, match="cannot read .*utterances-train.csv"):
        open_source(tmp_path / "out")


def test_no_module_that_a_dataset_names_is_imported(tmp_path, fast, monkeypatch):
    writer.prepare(open_source(recordings.kaldi(tmp_path / "k", 1, 3)), tmp_path / "out")
    (tmp_path / "payload.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "out" / "features.json"
    good = json.loads(file.read_text())
    within = {"featuresDict": {"features": {"a": {"pythonClassName": "payload.X"}}}}
    hidden = {"sequence": {"jsonFeature": {"json": json.dumps({"feature": {"type": "payload.X"}})}}}
    for bad in ({**good, "pythonClassName": "payload.X"}, good | within, good | hidden):
        file.write_text(json.dumps(bad))
        with pytest.raises(UserError, match=r"features.json names the class payload.X"):
            open_source(tmp_path / "out")


def test_shards_stay_few():
    table = Utterances(ids=("a",) * 100_000, paths=("b",) * 100_000, speakers=("c",) * 100_000)
    tasks = writer._split(table, Path("w"), 0.5)
    assert len(tasks) <= 256 and sum(len(task.utterances) for task in tasks) == 100_000


def test_through_beam_the_shards_are_those_of_a_local_run(tmp_path, monkeypatch):
    """By Beam's own runner in this process; what a killed run has written before is kept."""
    pytest.importorskip("apache_beam", reason="needs the extra `beam`")
    monkeypatch.setattr(writer, "_LEAST_ROWS", 5)
    table = open_source(recordings.kaldi(tmp_path / "k"))
    (tmp_path / "k/audio/s1-u1.wav").write_bytes(b"")
    with monkeypatch.context() as local:
        local.setattr(writer, "_run", in_process)
        writer.prepare(table, tmp_path / "a" / "set")
        local.setattr(writer, "_finish", lambda *_: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            writer.prepare(table, tmp_path / "b" / "set")
    (tmp_path / "b/set/.prepare/00001.json").unlink()  # one shard is left to write
    for place in ("b", "c"):
        writer.prepare(table, tmp_path / place / "set", beam="--runner=DirectRunner")
        assert contents(tmp_path / place / "set") == contents(tmp_path / "a" / "set")
    with pytest.raises(UserError, match="Beam has no option --runer"):
        writer.prepare(table, tmp_path / "d" / "set", beam="--runer=DirectRunner")


def test_without_beam_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    table = open_source(recordings.kaldi(tmp_path / "k", speakers=1, each=1))
    with pytest.raises(UserError, match="`beam` needs the package apache_beam"):
        writer.prepare(table, tmp_path / "set", beam="")
