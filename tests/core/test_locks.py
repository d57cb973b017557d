import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from kmq_jax.core import locks
from kmq_jax.core.errors import UserError
from kmq_jax.core.locks import NAME, in_turn, sole_writer

HOLD = """
import sys, time
from kmq_jax.core.locks import sole_writer
with sole_writer(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_writer_and_a_killed_one_hinders_nobody(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        message = rf"--workdir=.* is being written to by process {other.pid} on "
        with pytest.raises(UserError, match=message) as caught, sole_writer(tmp_path):
            pass
        assert "\n" not in str(caught.value)
        other.send_signal(signal.SIGKILL)
    assert (tmp_path / NAME).exists()
    time.sleep(0.01)
    with sole_writer(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_two_in_one_process_and_a_directory_that_cannot_be(tmp_path):
    with sole_writer(tmp_path / "new"), pytest.raises(UserError, match=str(os.getpid())), sole_writer(tmp_path / "new"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out=.*file cannot be written to"), sole_writer(tmp_path / "file", "out"):
        pass


def test_a_command_line_is_any_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kmq-jax", "--source=caf\udce9"])
    with sole_writer(tmp_path / "out"):
        assert b"--source=caf\xe9" in (tmp_path / "out" / NAME).read_bytes()


def test_those_who_share_keep_out_who_wants_it_alone(tmp_path):
    with sole_writer(tmp_path, shared=True):
        with sole_writer(tmp_path, shared=True):
            pass
        assert (tmp_path / NAME).exists()
        with pytest.raises(UserError, match="is being written to by process"), sole_writer(tmp_path):
            pass
    assert os.listdir(tmp_path) == []
    with sole_writer(tmp_path), pytest.raises(UserError, match="is being written"), sole_writer(tmp_path, shared=True):
        pass


def test_a_directory_that_goes_while_its_lock_is_waited_for(tmp_path, monkeypatch):
    place, lock = tmp_path / "a", locks.lock
    place.mkdir()

    def wait(held, **how):
        shutil.rmtree(place, ignore_errors=True)
        lock(held, **how)

    monkeypatch.setattr(locks, "lock", wait)
    before = os.listdir("/dev/fd")
    with pytest.raises(FileNotFoundError), in_turn(place / ".lock"):
        pytest.fail("ran without the lock")
    assert os.listdir("/dev/fd") == before


def test_the_lock_of_the_next_one_is_left_to_it(tmp_path):
    path = tmp_path / ".lock"
    with in_turn(path):
        path.unlink()
        path.write_text("another's")
    assert path.read_text() == "another's"


def test_without_locks_the_block_runs_all_the_same(tmp_path, monkeypatch):
    def none(held, **how):
        raise OSError

    monkeypatch.setattr(locks, "lock", none)
    with in_turn(tmp_path / ".lock"):
        ran = True
    assert ran
