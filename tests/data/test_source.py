import pickle

import numpy as np
import pytest
import recordings

from kmq_jax.core.errors import UserError
from kmq_jax.data import audio
from kmq_jax.data.source import open_source, open_sources


def test_kaldi_directory(tmp_path):
    root = recordings.kaldi(tmp_path / "k")
    outside = recordings.write(tmp_path / "elsewhere" / "a b.wav")
    with (root / "wav.scp").open("a") as scp, (root / "utt2spk").open("a") as utt2spk:
        scp.write(f"\nfar {outside}\r\n")  # absolute, a space, a blank line before, CRLF
        utt2spk.write("far s9\r\n")
    (root / "spk2gender").write_text("s0 f\ns1 m\n")
    (root / "spk2age").write_text("s0 31\n")
    table = open_source(str(root))
    assert len(table) == 13
    assert table.ids[0] == "s0-u0" and table.paths[0] == "audio/s0-u0.wav"
    assert table.location(12) == outside
    assert table.speaker_names == ("s0", "s1", "s2", "s9")
    np.testing.assert_array_equal(table.labels, [0] * 4 + [1] * 4 + [2] * 4 + [3])
    assert table.genders == {"s0": "f", "s1": "m"} and table.ages == {"s0": 31.0}
    assert table.load(1).shape == (17600,)
    np.testing.assert_array_equal(table.lengths(), [16000, 17600, 19200, 20800] * 3 + [16000])


def test_kaldi_segments(tmp_path):
    root = recordings.kaldi(tmp_path / "k", 1, 1, seconds=3)
    (root / "segments").write_text("a s0-u0 0.5 1.5\nb s0-u0 2 9\n")
    (root / "utt2spk").write_text("a x\nb y\n")
    table = open_source(root)
    whole = audio.read_audio(root / "audio/s0-u0.wav")
    assert table.ids == ("a", "b") and table.speakers == ("x", "y")
    np.testing.assert_array_equal(table.load(0), whole[8000:24000])
    np.testing.assert_array_equal(table.load(1), whole[32000:])
    np.testing.assert_array_equal(table.lengths(), [16000, 16000])


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("wav.scp", "u1 sox a.wav -t wav - |\n", r"wav.scp:1: u1 is a command"),
        ("wav.scp", "u1 a.wav\nu1 b.wav\n", r"wav.scp:2: u1 was already given on line 1"),
        ("wav.scp", "u1 a.wav\n\nu2\n", r"wav.scp:3: expected two columns"),
        ("wav.scp", "", r"wav.scp: lists no utterance"),
        ("wav.scp", "u1 a.wav\nu9 b.wav\n", r"wav.scp:2: utterance u9 has no line in .*utt2spk"),
        ("utt2spk", "u1 s1 s2\n", r"utt2spk:1: expected one speaker"),
        ("utt2spk", "u1 s1\nu2 s2\nu1 s1\n", r"utt2spk:3: u1 was already given"),
        ("segments", "x u1 3 2\n", r"segments:1: a segment from 3 to 2"),
        ("segments", "x u1 1\n", r"segments:1: expected"),
        ("segments", "x nothing 1 2\n", r"segments:1: recording nothing is not in wav.scp"),
        ("segments", "x u1 one 2\n", r"segments:1: one and 2 must be seconds"),
    ],
)
def test_mistakes_in_a_kaldi_directory_name_file_and_line(tmp_path, file, text, message):
    (tmp_path / "wav.scp").write_text("u1 a.wav\n")
    (tmp_path / "utt2spk").write_text("u1 s1\nu2 s2\nx s1\n")
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=message):
        open_source(tmp_path)


def test_missing_utt2spk_and_wrong_encoding(tmp_path):
    (tmp_path / "wav.scp").write_bytes(b"u1 a.wav\nu2 \xff.wav\n")
    with pytest.raises(UserError, match=r"wav.scp:2: not UTF-8"):
        open_source(tmp_path)
    (tmp_path / "wav.scp").write_text("u1 a.wav\n")
    with pytest.raises(UserError, match=r"cannot read .*utt2spk"):
        open_source(tmp_path)


def test_missing_recording_names_the_line_that_lists_it(tmp_path):
    root = recordings.kaldi(tmp_path / "k")
    (root / "audio/s1-u0.wav").unlink()
    table = open_source(root)
    for read in (lambda: table.load(4), lambda: table.num_samples(4), table.lengths):
        with pytest.raises(audio.AudioError, match=r"wav.scp:5: .*s1-u0.wav: missing"):
            read()


@pytest.mark.parametrize("inner", ["", "wav", "dev/aac"])
def test_voxceleb_tree(tmp_path, inner):
    for name in ("id10002/video-B/00002.flac", "id10001/video_A/00001.wav", "id10001/video_A/00003.wav"):
        recordings.write(tmp_path / "vox" / inner / name)
    (tmp_path / "vox" / "vox1_meta.csv").write_text("VoxCeleb1 ID\tVGGFace1 ID\tGender\nid10001\tA\tf\nid10002\tB\tm\n")
    table = open_source(tmp_path / "vox")
    assert table.ids == ("id10001/video_A/00001.wav", "id10001/video_A/00003.wav", "id10002/video-B/00002.wav")
    assert table.paths[2] == "id10002/video-B/00002.flac"
    assert table.speakers == ("id10001", "id10001", "id10002")
    assert table.genders == {"id10001": "f", "id10002": "m"}
    assert table.load(2).shape == (16000,)


def test_voxceleb_tree_with_an_utterance_in_two_formats(tmp_path):
    for name in ("id10001/v/00001.wav", "id10001/v/00001.flac"):
        recordings.write(tmp_path / name)
    with pytest.raises(UserError, match=r"id10001/v/00001 is there twice"):
        open_source(tmp_path)


def test_folder(tmp_path):
    for name in ("bob/a.wav", "ann/day1/x/b.flac", "ann/.hidden.wav", ".cache/c.wav"):
        recordings.write(tmp_path / name)
    (tmp_path / "ann" / "notes.txt").write_text("not audio")
    table = open_source(tmp_path)
    assert table.ids == table.paths == ("ann/day1/x/b.flac", "bob/a.wav")
    assert table.speakers == ("ann", "bob")


def test_flat_folder_of_noise_is_one_speaker(tmp_path):
    for name in ("rain.wav", "dog.wav"):
        recordings.write(tmp_path / "noise" / name)
    assert open_source(tmp_path / "noise").speakers == ("noise", "noise")


def test_csv(tmp_path):
    recordings.write(tmp_path / "wavs" / "a,b.wav")
    (tmp_path / "list.csv").write_text(
        'speaker, path,extra,gender,age\nann,"wavs/a,b.wav",x,Female,30\nbob,/far/c.wav,,,\n'
    )
    table = open_source(tmp_path / "list.csv")
    assert table.ids == ("wavs/a,b.wav", "/far/c.wav") and table.speakers == ("ann", "bob")
    assert table.genders == {"ann": "f"} and table.ages == {"ann": 30.0}
    assert table.load(0).shape == (16000,)
    with pytest.raises(audio.AudioError, match=r"list.csv:3: /far/c.wav: missing"):
        table.load(1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,speaker\na,b\n", r"list.csv:1: the header must name the columns path and speaker"),
        ("", r"list.csv:1: the header"),
        ("path,speaker\n", r"lists no utterance"),
        ("path,speaker\na.wav,s\nb.wav\n", r"list.csv:3: expected 2 fields"),
        ("path,speaker\na.wav,s,t\n", r"list.csv:2: expected 2 fields"),
        ("path,speaker\na.wav,\n", r"list.csv:2: path or speaker is empty"),
        ("path,speaker\na.wav,s\na.wav,t\n", r"list.csv:3: utterance a.wav was already given on line 2"),
        ("path,speaker,age\na.wav,s,old\n", r"list.csv:2: age 'old'"),
    ],
)
def test_mistakes_in_a_csv(tmp_path, text, message):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / "list.csv")


def test_what_is_no_data(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "half" / ".prepare").mkdir(parents=True)
    (tmp_path / "tfds").mkdir()
    (tmp_path / "tfds" / "dataset_info.json").write_text("{")
    for name, message in [
        ("nothing", "no such file"),
        ("a.txt", "is a file"),
        ("empty", "holds no audio file"),
        ("half", "unfinished prepare_data"),
        ("tfds", "no dataset that tfds can read"),
    ]:
        with pytest.raises(UserError, match=message):
            open_source(tmp_path / name)


def test_several_sources_keep_equal_names_apart(tmp_path):
    a = recordings.kaldi(tmp_path / "a", 2, 2)
    b = recordings.kaldi(tmp_path / "b", 1, 2, seconds=2)
    table = open_sources(f"{a},{b}")
    assert table.speaker_names == ("1:s0", "s0", "s1")
    assert table.ids[-2:] == ("1:s0-u0", "1:s0-u1")
    np.testing.assert_array_equal(table.load(4), open_source(b).load(0))
    assert open_sources(str(a)).ids == open_source(a).ids
    (b / "segments").write_text("part s0-u0 0.5 1.5\n")  # tables of different kinds
    (b / "utt2spk").write_text("part s0\n")
    mixed = pickle.loads(pickle.dumps(open_sources(f"{a},{b}")))
    np.testing.assert_array_equal(mixed.load(4), open_source(b).load(0))
    np.testing.assert_array_equal(mixed.lengths()[[0, 4]], [16000, 16000])


def test_selection(tmp_path):
    table = open_source(recordings.kaldi(tmp_path))
    part = table.select([5, 2])
    assert part.ids == ("s1-u1", "s0-u2") and part.speaker_names == ("s0", "s1")
    assert part.where(0).startswith(f"{tmp_path / 'wav.scp'}:6: ")
    np.testing.assert_array_equal(part.load(1), table.load(2))


def test_shared_sets(shared):
    for name, utterances, speakers in [("so762/dev", 1250, 60), ("words/train", 819, 41)]:
        table = open_source(shared / "data" / name)
        assert (len(table), len(table.speaker_names)) == (utterances, speakers)
        assert np.isfinite(table.load(7)).all()
    assert len(open_source(shared / "data/noise/dev")) == 161
