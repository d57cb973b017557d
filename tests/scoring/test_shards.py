"""Shards of a list: the bytes of a run in one piece, however many processes, kills and starts it took."""

import dataclasses
import os
import threading

import numpy as np
import pytest
import recordings

from kmq_jax.core.errors import UserError
from kmq_jax.core.locks import if_free
from kmq_jax.data.prepared import _Records
from kmq_jax.data.source import open_source
from kmq_jax.data.speech import _SpeechOf
from kmq_jax.data.table import Utterances, concatenate
from kmq_jax.scoring import shards
from kmq_jax.scoring.options import ExtractionOptions

COUNT, SHARDS = 23, 5
WHOLE = np.arange(COUNT * 4, dtype=np.float32).reshape(COUNT, 4)


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


class Run:
    """A run with a stand-in for the network, which may be killed at its n-th shard."""

    def __init__(self, out, killed_at=None):
        self.out, self.killed_at, self.made = out, killed_at, []

    def __call__(self, source="a"):
        return shards.run(self.out, COUNT, source, SHARDS, self.embed, lambda rows: np.save(self.out, rows))

    def embed(self, share):
        if len(self.made) == self.killed_at:
            raise Killed
        self.made.append(share[0])
        rows = np.arange(COUNT)[share[0] :: share[1]]
        return rows, WHOLE[rows]


def left(out):
    return sorted(os.listdir(f"{out}.shards"))


def test_a_recording_in_another_ones_place_makes_another_run(tmp_path):
    table = open_source(recordings.kaldi(tmp_path, speakers=2, each=2))
    table = dataclasses.replace(table, samples=table.lengths())
    how = ExtractionOptions()
    before = shards.digest(table, "m", how, 3)
    assert shards.digest(table, "m", how, 3) == before
    path = table.location(1)
    path.write_bytes(path.read_bytes()[::-1])  # as long as it was
    os.utime(path, (1, 1))
    assert shards.digest(table, "m", how, 3) != before


def test_a_dataset_that_was_prepared_anew_makes_another_run(tmp_path):
    """Its recordings lie in shards: under the same names, as long as they were, they may sound otherwise."""
    shard, length = tmp_path / "set-train.array_record-00000-of-00001", np.array([16000])
    shard.write_bytes(b"one")
    table = Utterances(("a",), ("a.wav",), ("s",), tmp_path, samples=length)
    table = dataclasses.replace(table, reader=_Records(tmp_path, "train", {"a": 0}, length))
    tables = table, concatenate([table, open_source("synthetic:dev?speakers=2&utterances=2")]), heard(table)

    def digests():
        return [shards.digest(one, "m", ExtractionOptions(), 3) for one in tables]

    before = digests()
    (tmp_path / "embeddings.npz").write_bytes(b"")  # what is written beside it does not count
    assert digests() == before
    shard.write_bytes(b"two")
    os.utime(shard, (1, 1))
    assert not set(before) & set(digests())


def heard(table):
    """The table as `speech.of_table` makes it."""
    return dataclasses.replace(table, reader=_SpeechOf(table, {"a": 0}, (np.ones(34, bool),)))


@pytest.mark.parametrize("killed_at", [0, 1, 4])
def test_a_killed_run_goes_on_by_shard(tmp_path, killed_at):
    out = tmp_path / "e.npy"
    first, second = Run(out, killed_at), Run(out)
    with pytest.raises(Killed):
        first()
    assert not out.exists() and len([name for name in left(out) if name.endswith(".npz")]) == killed_at
    assert second() is True
    assert sorted(first.made + second.made) == list(range(SHARDS))  # none twice
    np.testing.assert_array_equal(np.load(out), WHOLE)
    assert left(out) == ["plan.json"]
    late = Run(out)
    assert late() is False and late.made == []  # a process that comes late
    np.save(out, WHOLE[:3])  # but not where the file became another
    assert late() is True and len(late.made) == SHARDS


def test_processes_share_them_and_wait_for_one_another(tmp_path):
    out = tmp_path / "e.npy"
    together = threading.Barrier(3)
    runs, results = [Run(out) for _ in range(3)], []

    def work(run):
        together.wait()
        results.append(run())

    threads = [threading.Thread(target=work, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False, False, True]
    assert sorted(shard for run in runs for shard in run.made) == list(range(SHARDS))
    np.testing.assert_array_equal(np.load(out), WHOLE)


def test_another_runs_shards_are_refused(tmp_path):
    out = tmp_path / "e.npy"
    with pytest.raises(Killed):
        Run(out, 2)()
    other = Run(out)
    with pytest.raises(UserError, match="holds shards of another run"):
        other(source="b")
    assert other.made == [] and len(left(out)) == 3
    Run(out)()
    assert other(source="b") is True  # a finished one hinders nobody


def test_shards_that_do_not_fit_are_made_again(tmp_path):
    out = tmp_path / "e.npy"
    with pytest.raises(Killed):
        Run(out, 4)()
    (missing,) = {f"{i:05d}.npz" for i in range(SHARDS)} - set(left(out))
    np.savez(f"{out}.shards/{missing}", rows=np.arange(3), embeddings=WHOLE[:3], source=np.array("b"))
    with pytest.raises(UserError, match=f"{missing} was no shard of this list: it is removed"):
        Run(out)()
    again = Run(out)
    assert again() is True and len(again.made) == 1
    np.testing.assert_array_equal(np.load(out), WHOLE)


def test_a_lock_that_is_held_is_told(tmp_path):
    with if_free(tmp_path / "a") as one:
        with if_free(tmp_path / "a") as two:
            assert (one, two) == (True, False)
        with if_free(tmp_path / "b") as three:
            assert three
    assert os.listdir(tmp_path) == []


def test_a_run_that_begins_while_another_one_finishes_keeps_its_shards(tmp_path, monkeypatch):
    """The second begins as soon as the plan says that the first has finished, before that one clears its shards."""
    out = tmp_path / "e.npy"
    first = shards._Work(tmp_path / "e.npy.shards", out, "a", SHARDS)
    second = shards._Work(first.place, out, "b", SHARDS)
    assert first.begin()
    np.save(out, WHOLE)
    write, threads = shards.write_json, []

    def begin():
        second.begin()
        second.file(0).write_bytes(b"a shard")

    def meanwhile(path, value):
        write(path, value)
        if "finished" in value:
            threads.append(threading.Thread(target=begin))
            threads[0].start()
            threads[0].join(0.2)  # it waits, or else it is done by now

    monkeypatch.setattr(shards, "write_json", meanwhile)
    first.finish()
    threads[0].join()
    assert second.file(0).is_file() and second.left() == list(range(1, SHARDS))


def test_an_index_without_its_archive_is_not_finished(tmp_path):
    work = shards._Work(tmp_path / "e.scp.shards", tmp_path / "e.scp", "a", SHARDS)
    assert work.begin()
    for name in ("e.scp", "e.ark"):
        (tmp_path / name).write_text(name)
    work.finish()
    assert work.is_finished()
    (tmp_path / "e.ark").write_text("another")
    assert not work.is_finished()
    (tmp_path / "e.ark").unlink()
    assert not work.is_finished()
