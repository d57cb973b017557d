import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import atomic_write, cache_directory, read_json, write_json


def test_written_whole_under_the_final_name(tmp_path):
    with atomic_write(tmp_path / "new" / "a.txt") as temporary:
        temporary.write_text("all of it")
        assert not (tmp_path / "new" / "a.txt").exists()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.txt"]
    assert (tmp_path / "new" / "a.txt").read_text() == "all of it"


def test_a_failure_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_clear_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(UserError, match=r"cannot write .*a\.json: No space left"), atomic_write(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"), atomic_write(tmp_path / "file" / "a.txt"):
        pass


def test_finished_files_are_readable_by_others(tmp_path):
    with atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("x")
    assert (tmp_path / "a").stat().st_mode & 0o044


def test_json_round_trip_and_errors(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, None]})
    assert read_json(tmp_path / "a.json") == {"x": [1, None]} == json.loads((tmp_path / "a.json").read_text())
    with pytest.raises(UserError, match=r"cannot write .*b\.json: a figure is infinite or not a number"):
        write_json(tmp_path / "b.json", float("nan"))
    (tmp_path / "c.json").write_text("{\n,")
    with pytest.raises(UserError, match=r"c\.json is not valid JSON.*line 2"):
        read_json(tmp_path / "c.json")
    with pytest.raises(UserError, match="d.json"):
        read_json(tmp_path / "d.json")


def test_links_are_followed_and_devices_written_to(tmp_path):
    real, link = tmp_path / "elsewhere" / "real.json", tmp_path / "link.json"
    link.symlink_to(real)
    for value in (1, 2):  # a link to what is not there yet, and to what is
        write_json(link, value)
        assert link.is_symlink() and read_json(real) == value and not real.is_symlink()
    os.mkfifo(tmp_path / "pipe")
    heard = []
    reader = threading.Thread(target=lambda: heard.append((tmp_path / "pipe").read_text()))
    reader.start()
    while True:  # until the reader has opened it
        try:
            write_json(tmp_path / "pipe", [3])
            break
        except UserError as error:
            assert "No such device or address" in str(error)
    reader.join()
    assert heard == ["[\n  3\n]\n"] and (tmp_path / "pipe").is_fifo()
    write_json("/dev/null", 4)
    assert not os.path.isfile("/dev/null")


def test_what_killed_commands_left_is_swept_and_what_others_write_is_not(tmp_path):
    code = (
        "import os, sys; from kmq_jax.core.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as temporary: temporary.write_text('half'); os._exit(9)"
    )
    path = tmp_path / "a.json"
    subprocess.run([sys.executable, "-c", code, path], check=False, cwd=os.getcwd())
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_write(path) as other:  # sweeps
        assert list(tmp_path.iterdir()) == [other]
        write_json(path, 1)  # leaves the other's alone
        assert other.exists()
        other.write_text("2")
    assert read_json(path) == 2 and list(tmp_path.iterdir()) == [path]


def test_json_of_anyone(tmp_path):
    path = tmp_path / "a.json"
    for text, message in (
        ("[" * 100_000, "nested too deeply"),
        ("[NaN]", "NaN is not a finite number"),
        ("[-Infinity]", "not a finite"),
        ('{"a": 1e400}', "not a finite"),
        ("1" * 5000, "not valid JSON"),
        ("\udcff", "not valid JSON"),
    ):
        path.write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(UserError, match=message):
            read_json(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="a pipe or a device"):
        read_json(tmp_path / "pipe")


def test_names_too_long_for_a_temporary_file_beside_them(tmp_path):
    name = "\u00e9" * 120 + ".json"
    write_json(tmp_path / name, 1)
    assert os.listdir(tmp_path) == [name]
    with pytest.raises(UserError, match="File name too long"):
        write_json(tmp_path / ("x" * 300), 1)


def test_another_file_that_fails_within_is_named(tmp_path):
    reason = rf"cannot write .*out: {tmp_path}/absent: No such file"
    with pytest.raises(UserError, match=reason), atomic_write(tmp_path / "out"):
        (tmp_path / "absent").read_text()


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    with pytest.raises(UserError, match="no cache directory .*: set HOME or XDG_CACHE_HOME"):
        cache_directory()
