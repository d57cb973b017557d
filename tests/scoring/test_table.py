"""Embedding files, good and hostile."""

import io
import zipfile

import numpy as np
import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.scoring.table import read_embeddings, warn_of_vad, write_embeddings


def arrays(**changes):
    good = {
        "ids": np.array(["a", "b", "c"]),
        "paths": np.array(["x/a.wav", "x/b.wav", "y/c.wav"]),
        "speakers": np.array(["x", "x", "y"]),
        "embeddings": np.eye(3, 4, dtype=np.float32),
    }
    return {name: value for name, value in {**good, **changes}.items() if value is not None}


def test_round_trip(tmp_path):
    np.savez(tmp_path / "e.npz", **arrays())
    table = read_embeddings(tmp_path / "e.npz")
    assert len(table) == 3
    assert (table.ids, table.speakers) == (("a", "b", "c"), ("x", "x", "y"))
    assert table.paths[2] == "y/c.wav"
    np.testing.assert_array_equal(table.embeddings, np.eye(3, 4))


def test_paths_and_speakers_may_be_missing_and_other_types_are_converted(tmp_path):
    np.savez_compressed(tmp_path / "e.npz", **arrays(paths=None, speakers=None, embeddings=np.eye(3)), extra=np.ones(2))
    table = read_embeddings(tmp_path / "e.npz")
    assert (table.paths, table.speakers, table.embeddings.dtype) == ((), None, np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": None}, "it lacks the array `ids`"),
        ({"embeddings": None}, "it lacks the array `embeddings`"),
        ({"ids": np.array(["a", "b", "a"])}, "the id a occurs twice"),
        ({"ids": np.array(["a", "b"])}, "ids must be 3 strings"),
        ({"speakers": np.array([1, 2, 3])}, "speakers must be 3 strings"),
        ({"paths": np.array([["a", "b", "c"]])}, "paths must be 3 strings"),
        ({"ids": np.array(["a", "b", None], object)}, "not an .npz file of embeddings"),  # a pickle
        ({"embeddings": np.ones(3, np.float32)}, "must be floating point"),
        ({"embeddings": np.ones((3, 0), np.float32)}, "must be floating point"),
        ({"embeddings": np.ones((3, 2), np.int32)}, "must be floating point"),
        ({"vad": np.array("yes")}, "vad must be one truth value"),
        ({"vad": np.array([True, False, True])}, "vad must be one truth value"),
        ({"embeddings": np.array([[1, 1], [np.nan, 1], [1, 1.0]])}, "the embedding of b is zero or not finite"),
        ({"embeddings": np.array([[1, 1], [0, 0], [np.inf, 1.0]])}, "the embedding of b is .* and 1 more"),
    ],
)
def test_broken_contents_are_named(tmp_path, changes, message):
    np.savez(tmp_path / "e.npz", **arrays(**changes))
    with pytest.raises(UserError, match=message) as caught:
        read_embeddings(tmp_path / "e.npz")
    assert str(tmp_path / "e.npz") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_embeddings_of_speech_alone_are_told_from_those_of_whole_recordings(tmp_path, capsys):
    tables = {}
    for vad in (True, False):
        write_embeddings(tmp_path / f"{vad}.npz", ["a"], ["a.wav"], ["x"], np.ones((1, 2), np.float32), "m", vad)
        tables[vad] = read_embeddings(tmp_path / f"{vad}.npz")
    np.savez(tmp_path / "older.npz", **arrays())
    older = read_embeddings(tmp_path / "older.npz")  # from before this was kept
    assert [tables[True].vad, tables[False].vad, older.vad] == [True, False, None]
    warn_of_vad(tables[True], older, tables[True])
    assert capsys.readouterr().err == ""
    warn_of_vad(tables[False], older, tables[True])
    assert "True.npz was embedded with vad" in (said := capsys.readouterr().err) and "False.npz without" in said


def lying_header():
    """A .npy that claims 10**12 rows and holds none."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (10**12, 256)})
    return head.getvalue()


def npz(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)
    return buffer.getvalue()


def plain(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an archive",
        plain(np.ones(3)),
        npz(ids=plain(np.array(["a"])), embeddings=lying_header()),
        npz(ids=plain(np.array(["a"])), embeddings=b""),
        npz(ids=plain(np.array(["a"])), embeddings=b"junk"),
        npz(ids=plain(np.array(["a"])), embeddings=plain(np.ones((1, 300)))[:-8]),
        npz(ids=plain(np.array(["a"])), embeddings=plain(np.ones((1, 300))))[:-200],
    ],
)
def test_other_files_are_refused(tmp_path, data):
    (tmp_path / "e.npz").write_bytes(data)
    with pytest.raises(UserError, match="e.npz"):
        read_embeddings(tmp_path / "e.npz")


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="cannot read .*No such file"):
        read_embeddings(tmp_path / "none.npz")
