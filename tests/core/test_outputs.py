import os
from pathlib import Path

import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.core.outputs import check_outputs
from kmq_jax.data.source import open_source


def test_what_cannot_be_written_is_found_and_nothing_is_left(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for place, message in (
        ("folder", "Is a directory"),
        ("file/a.json", "Not a directory"),
        ("x" * 256, "File name too long"),
        ("new/" + "x" * 256 + "/a", "File name too long"),
        ("a\0b", "null"),
    ):
        with pytest.raises(UserError, match=f"--out .*({message})"):
            check_outputs({"--out": tmp_path / place}, {}, {})
    with pytest.raises(UserError, match="--out .*Not a directory"):
        check_outputs({}, {"--out": tmp_path / "file"}, {})
    with pytest.raises(UserError, match="--out must name a file"):
        check_outputs({"--out": Path(" ")}, {}, {})
    check_outputs({"--out": tmp_path / "new" / "a.json", "--json": tmp_path / "file"}, {"--dir": tmp_path / "d"}, {})
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_read_only_place(tmp_path):
    if not os.path.isdir("/proc/self"):
        pytest.skip("no /proc")
    with pytest.raises(UserError, match="--out .* cannot be written"):
        check_outputs({"--out": Path("/proc/self/a.json")}, {}, {})


def test_outputs_that_are_equal_or_read(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "a.npz").write_text("")
    (tmp_path / "b.npz").symlink_to(tmp_path / "a.npz")
    for outputs, inputs in (
        ({"--out": tmp_path / "b.npz"}, {"--embeddings": [str(tmp_path / "a.npz")]}),
        ({"--out": tmp_path / "model" / "model.kmq"}, {"--model": [str(tmp_path / "model")]}),
        ({"--out": tmp_path / "x", "--json": tmp_path / "model" / ".." / "x"}, {}),
    ):
        with pytest.raises(UserError, match="they must differ"):
            check_outputs(outputs, {}, inputs)
    check_outputs({"--out": Path("/dev/null"), "--json": Path("/dev/null")}, {}, {"--data": ["synthetic:dev"]})


def test_buckets_are_no_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for files, folders in (({"--out": Path("gs://bucket/a.npz")}, {}), ({}, {"--workdir": Path("s3://bucket/run")})):
        with pytest.raises(UserError, match=r"--\w+ \(=\w+://bucket/\S+\) is no path: mount the bucket"):
            check_outputs(files, folders, {})
    assert not os.listdir(tmp_path)
    with pytest.raises(UserError, match=r"DATA \(=gs://bucket/data\) is no path"):
        open_source("gs://bucket/data")


def test_nothing_is_written_below_a_file(tmp_path):
    x, y = tmp_path / "x", tmp_path / "x" / "new" / "y"
    for files, folders in (
        ({"--out": x, "--json": y}, {}),
        ({"--json": y, "--out": x}, {}),
        ({"--out": x}, {"--json": y}),
    ):
        with pytest.raises(UserError, match=r"--json \(=.*y\) lies below --out \(=.*x\), which is a file"):
            check_outputs(files, folders, {})
    check_outputs({"--out": y}, {"--dir": x}, {})
