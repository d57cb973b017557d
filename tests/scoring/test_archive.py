"""Kaldi's archives of embeddings beside kaldiio's own reader and writer; and hostile ones."""

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import recordings
from commands import run

from kmq_jax.core.errors import UserError
from kmq_jax.scoring import extract
from kmq_jax.scoring.archive import check_archive
from kmq_jax.scoring.table import read_embeddings, write_embeddings

kaldiio = pytest.importorskip("kaldiio", reason="reads and writes Kaldi's archives")
IDS = ("a-1", "a-2", "b-1")
ROWS = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)


def test_a_sharded_run_finds_before_the_work_that_keys_cannot_be(tmp_path, monkeypatch):
    recordings.write(tmp_path / "a" / "one two.wav")
    monkeypatch.setattr("kmq_jax.models.speaker_model.load_model", lambda *_: None)  # nothing is embedded
    monkeypatch.setattr("kmq_jax.models.speaker_model.fingerprint", lambda _: "m")
    with pytest.raises(UserError, match="the id 'a/one two.wav' has a space"):
        extract.extract_shards("m", str(tmp_path), tmp_path / "e.ark", 2)
    assert not (tmp_path / "e.ark.shards").exists()


def test_what_is_written_is_what_kaldiio_and_we_read(tmp_path):
    for name in ("e.scp", "only.ark"):
        write_embeddings(tmp_path / name, IDS, ("x",) * 3, ("y",) * 3, ROWS, "model")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["e.ark", "e.scp", "only.ark"]
    theirs = [dict(kaldiio.load_scp(str(tmp_path / "e.scp"))), dict(kaldiio.load_ark(str(tmp_path / "only.ark")))]
    for found in theirs:
        assert tuple(found) == IDS
        np.testing.assert_array_equal(np.stack(list(found.values())), ROWS)
    for name in ("e.scp", "e.ark", "only.ark"):
        table = read_embeddings(tmp_path / name)
        assert (table.ids, table.paths, table.speakers, table.model) == (IDS, (), None, None)
        np.testing.assert_array_equal(table.embeddings, ROWS)


@pytest.mark.parametrize("form", [{}, {"text": True}])
@pytest.mark.parametrize("made", [ROWS, ROWS.astype(np.float64), ROWS[:, None, :]])
def test_every_form_that_toolkits_write_is_read(tmp_path, monkeypatch, form, made):
    kaldiio.save_ark(str(tmp_path / "e.ark"), dict(zip(IDS, made)), scp=str(tmp_path / "e.scp"), **form)
    relative = (tmp_path / "e.scp").read_text().replace(f"{tmp_path}/", "")
    (tmp_path / "relative.scp").write_text(relative)
    for name in ("e.ark", "e.scp", "relative.scp"):
        table = read_embeddings(tmp_path / name)
        assert table.ids == IDS
        np.testing.assert_allclose(table.embeddings, ROWS, rtol=1e-5 if form else 1e-7)


def test_score_takes_an_index(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    ids = [f"id1000{s}/v/{u}.wav" for s in range(4) for u in range(3)]
    rows = (np.repeat(rng.normal(size=(4, 8)), 3, axis=0) + rng.normal(size=(12, 8))).astype(np.float32)
    for name in ("e.npz", "e.scp"):
        write_embeddings(tmp_path / name, ids, ids, [one[:8] for one in ids], rows, "model")
    pairs = [(a, b) for i, a in enumerate(ids) for b in ids[:i]]
    (tmp_path / "t.txt").write_text("".join(f"{int(a[:8] == b[:8])} {a} {b}\n" for a, b in pairs))
    for name in ("e.npz", "e.scp"):
        flags = f"--embeddings={tmp_path}/{name}", f"--trials={tmp_path}/t.txt", f"--out={tmp_path}/{name}.txt"
        assert run(monkeypatch, "score", *flags, "--replicates=0") == 0
    assert (tmp_path / "e.npz.txt").read_text() == (tmp_path / "e.scp.txt").read_text()


def test_a_command_of_an_index_is_not_run(tmp_path, monkeypatch):
    (tmp_path / "ok.ark").write_bytes(b"")
    for command in (
        f"touch {tmp_path}/ran |",
        f"| touch {tmp_path}/ran",
        f"cat {tmp_path}/ok.ark; touch {tmp_path}/ran|",
    ):
        (tmp_path / "e.scp").write_text(f"a {command}\n")
        with pytest.raises(UserError, match=r"e.scp:1: a is a command .*, which is not run"):
            read_embeddings(tmp_path / "e.scp")
    assert not (tmp_path / "ran").exists()


class Bomb:
    def __reduce__(self):
        return print, ("the pickle was loaded",)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (b"PKL" + pickle.dumps(Bomb()), "e.ark: a is no vector of Kaldi"),
        (b"NPY\x01\x02", "is no vector of Kaldi"),
        (b"RIFF....WAVE", "is no vector of Kaldi"),
        (b"\0BCM " + bytes(20), "is no vector of floating point"),
        (b"\0B\4\4" + bytes(20), "is no vector of floating point"),
        (b"\0BFV \4" + struct.pack("<i", 1 << 30), "more than an embedding has"),
        (b"\0BFV \4" + struct.pack("<i", -5), "claims -5 numbers"),
        (b"\0BFV \4" + struct.pack("<i", 5) + bytes(19), "claims more than is left of the file"),
        (b"\0BFV \4\1", "was cut short"),
        (b"\0BFM \4" + struct.pack("<i", 1 << 20) + b"\4" + struct.pack("<i", 1 << 20), "claims more than is left"),
        (b"\0BFM \4" + struct.pack("<i", 2) + b"\4" + struct.pack("<i", 1) + bytes(8), r"is of shape \(2, 1\)"),
        (b" [ 1.0 2.0 3.0\n", "its bracket is not closed"),
        (b" [ 1.0 x ]\n", "is no vector of Kaldi"),
        (b" [ 1.0 2.0 ] b [ 1.0 2.0 ]\n", "follows its bracket"),
        (b" [\n 1 2\n 3 4 ]\n", r"is of shape \(2, 2\)"),
        (b" [ " + b"1 " * (1 << 20) + b"1 ]\n", "over 1048576 numbers"),
        (b" [ 1 2 ]\n b  [ 3 4 ]\n", "a space where a key should begin, at byte 11"),
        (
            b"\0BFV \4" + struct.pack("<iff", 2, 1, 2) + b" b \0BFV \4" + struct.pack("<iff", 2, 3, 4),
            "a space where a key should begin, at byte 20",
        ),
        (b"\0BFV \4" + struct.pack("<i", 2) + bytes(8), "the embedding of a is zero or not finite"),
    ],
)
def test_hostile_vectors_are_refused(tmp_path, capsys, held, message):
    (tmp_path / "e.ark").write_bytes(b"a " + held)
    with pytest.raises(UserError, match=message) as caught:
        read_embeddings(tmp_path / "e.ark")
    assert "\n" not in str(caught.value) and str(tmp_path / "e.ark") in str(caught.value)
    assert "pickle was loaded" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a none.ark:3", "e.scp:1: cannot read .*none.ark: No such file"),
        ("a good.ark:99999", "begins behind the end"),
        ("a good.ark:5[0:2]", "part of a matrix"),
        ("a /dev/zero:0", "it is a pipe or a device"),
        ("a good.ark:0", "is no vector of Kaldi"),
    ],
)
def test_other_places_are_named_by_their_line(tmp_path, line, message):
    kaldiio.save_ark(str(tmp_path / "good.ark"), {"a": ROWS[0]})
    (tmp_path / "e.scp").write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        read_embeddings(tmp_path / "e.scp")


def test_archives_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    kaldiio.save_ark(str(tmp_path / "e.ark"), {"a": ROWS[0], "b": ROWS[1][:3]})
    with pytest.raises(UserError, match="b has 3 dimensions, those before it 5"):
        read_embeddings(tmp_path / "e.ark")
    (tmp_path / "empty.ark").write_bytes(b"")
    with pytest.raises(UserError, match="holds no embedding"):
        read_embeddings(tmp_path / "empty.ark")
    (tmp_path / "long.ark").write_bytes(b"a" * 5000)
    with pytest.raises(UserError, match="a key has over 4096 letters"):
        read_embeddings(tmp_path / "long.ark")
    with pytest.raises(UserError, match="the id 'a b' has a space"):
        write_embeddings(tmp_path / "x.scp", ["a b"], [""], [""], ROWS[:1], "m")
    with pytest.raises(UserError, match=r"b'caf\\xe9' is not UTF-8, as names in Kaldi's files must be"):
        check_archive(tmp_path / "x.ark", ["caf\udce9"])  # before anything is embedded
    assert not (tmp_path / "x.scp").exists() and not (tmp_path / "x.ark").exists()
    monkeypatch.setitem(__import__("sys").modules, "kaldiio", None)
    with pytest.raises(UserError, match=r'pip install "kmq_jax\[kaldi\]"'):
        read_embeddings(tmp_path / "e.ark")


@pytest.mark.parametrize("end", ["\n", "\r\n", " \n", ""])
def test_numbers_in_text_need_not_begin_with_a_point_or_end_by_a_bare_newline(tmp_path, end):
    (tmp_path / "e.ark").write_bytes(
        f"a  [ 1 0.5 ]{end or chr(10)}b  [ 0 0.25 ]{end or chr(10)}c  [ 1e-05 2 ]{end}".encode()
    )
    table = read_embeddings(tmp_path / "e.ark")
    assert table.ids == ("a", "b", "c")
    np.testing.assert_array_equal(table.embeddings, np.float32([[1, 0.5], [0, 0.25], [1e-5, 2]]))


@pytest.mark.parametrize("name", ["ark,scp:x.ark,x.scp", "x.ark,x.scp", "ark:x.ark", "ark,t:x.ark"])
def test_kaldi_s_names_for_several_files_are_told_what_to_write(name):
    with pytest.raises(UserError, match="give the .scp alone, whose .ark is written beside it$"):
        check_archive(Path(name), ["a"])
