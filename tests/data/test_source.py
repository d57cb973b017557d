import dataclasses
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import recordings

from kmq_jax.core.errors import UserError
from kmq_jax.data import audio
from kmq_jax.data.source import open_source, open_sources, require_data
from kmq_jax.data.table import Utterances, concatenate


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
    (root / "segments").write_text("a s0-u0 0.5 1.5\nb s0-u0 2 3.4\nc s0-u0 2 -1\nd s0-u0 2 9\n")
    (root / "utt2spk").write_text("a x\nb y\nc y\nd y\n")
    table = open_source(root)
    whole = audio.read_audio(root / "audio/s0-u0.wav")
    assert table.ids == ("a", "b", "c", "d") and table.speakers == ("x", "y", "y", "y")
    np.testing.assert_array_equal(table.load(0), whole[8000:24000])
    for row in (1, 2):  # a few frames too far, and -1: to the end
        np.testing.assert_array_equal(table.load(row), whole[32000:])
        assert table.num_samples(row) == 16000
    for read in (table.load, table.num_samples):
        with pytest.raises(audio.AudioError, match=r"segments:4: .* ends at 9 s, but the recording at 3.00 s"):
            read(3)


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


def test_several_voxceleb_trees_in_one_directory_are_refused(tmp_path):
    for place in ("dev/wav/id10001", "test/wav/id10002"):
        recordings.write(tmp_path / place / "video" / "00001.wav")
    with pytest.raises(UserError, match=r"several VoxCeleb trees: name one of .*dev/wav and .*test/wav"):
        open_source(tmp_path)
    assert open_source(tmp_path / "dev").speakers == ("id10001",)


def test_voxceleb_tree_with_an_utterance_in_two_formats(tmp_path):
    for name in ("id10001/v/00001.wav", "id10001/v/00001.flac"):
        recordings.write(tmp_path / name)
    with pytest.raises(UserError, match=r"id10001/v/00001 is there twice"):
        open_source(tmp_path)
    recordings.write(tmp_path / "id10001/v/00001.m.wav")  # stands between them
    with pytest.raises(UserError, match=r"id10001/v/00001 is there twice, as .*00001.flac and .*00001.wav"):
        open_source(tmp_path)


def test_what_a_voxceleb_tree_holds_besides_is_left_out_with_a_line(tmp_path, capsys):
    for name in ("id10001/v/1.wav", "alice/v/1.wav", "id10001/v/deep/2.wav"):
        recordings.write(tmp_path / name)
    assert open_source(tmp_path).ids == ("id10001/v/1.wav",)
    assert "2 recordings are left out: not id*/video/utterance, as alice/v/1.wav" in capsys.readouterr().err


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
        ("path,speaker,path,,\na.wav,ann,b.wav,,\n", r"list.csv:1: the header names the column path twice"),
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
        ("tfds", "dataset_info.json is not valid JSON"),
    ]:
        with pytest.raises(UserError, match=message):
            open_source(tmp_path / name)


@pytest.mark.parametrize("text", ["", " "])
def test_empty_data_is_not_the_current_directory(text):
    for take in (open_source, open_sources, require_data):
        with pytest.raises(UserError, match=rf"DATA \(='{text}'\) is empty"):
            take(text)


def test_lengths_of_joined_tables_are_had_without_decoding(tmp_path, monkeypatch):
    recordings.write(tmp_path / "a.wav", np.concatenate([np.zeros(16000, np.float32), recordings.tone(2)]))
    (tmp_path / "a.csv").write_text("path,speaker,start,stop\na.wav,s,0,1\na.wav,s,1,3\n")
    one = open_source(tmp_path / "a.csv")
    joined = concatenate([one, dataclasses.replace(one, ids=("x", "y"))])
    monkeypatch.setattr(audio, "read_audio", None)
    assert joined.select([3, 0, 1]).lengths().tolist() == [32000, 16000, 32000]


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


def test_tables_that_were_joined_before_keep_names_apart():
    one, two, three = (Utterances(("x",), ("x",), ("s",), root=Path(place)) for place in "abc")
    table = concatenate([concatenate([one, two]), three])
    assert table.ids == ("x", "1:x", "1:1:x") and table.speakers == ("s", "1:s", "1:1:s")
    quiet = [dataclasses.replace(part, reader=lambda _: 0.1 * recordings.tone()) for part in (one, two)]
    loud = dataclasses.replace(three, reader=lambda _: recordings.tone())
    read = concatenate([concatenate(quiet), loud])
    np.testing.assert_array_equal(read.load(1), 0.1 * recordings.tone())


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


def test_genders_and_ages_that_are_unknown_are_left_out(tmp_path):
    root = recordings.kaldi(tmp_path / "kaldi", speakers=4, each=1)
    (root / "spk2gender").write_text("s0 F\ns1 male\ns2 unknown\n")
    (root / "spk2age").write_text("s0 31\ns1 -1\ns2 nan\ns3 old\n")
    (tmp_path / "list.csv").write_text(
        "path,speaker,gender,age\na.wav,s0,F,31\nb.wav,s1,male,-1\nc.wav,s2,unknown,nan\nd.wav,s3,,\n"
    )
    for data in (root, tmp_path / "list.csv"):
        table = open_source(data)
        assert table.genders == {"s0": "f", "s1": "m"} and table.ages == {"s0": 31.0}


def test_parts_in_a_csv(tmp_path):
    whole = audio.read_audio(recordings.write(tmp_path / "a.wav", recordings.tone(3)))
    (tmp_path / "list.csv").write_text("path,speaker,start,stop\na.wav,s1 ,0,1.0\na.wav,s1,1.5,\na.wav, s2,,\n")
    table = open_source(tmp_path / "list.csv")
    assert table.speaker_names == ("s1", "s2") and table.ids == ("a.wav:0-1.0", "a.wav:1.5-", "a.wav")
    for row, part in enumerate((whole[:16000], whole[24000:], whole)):
        np.testing.assert_array_equal(table.load(row), part)
    np.testing.assert_array_equal(table.lengths(), [16000, 24000, 48000])
    (tmp_path / "list.csv").write_text("path,speaker,start,stop\na.wav,s1,2,1\n")
    with pytest.raises(UserError, match=r"list.csv:2: a part from 2 to 1"):
        open_source(tmp_path / "list.csv")


@pytest.mark.parametrize(
    ("names", "speakers"),
    [
        (("train-clean-100/103/1240/103-1240-0000.flac", "dev-clean/84/121123/84-121123-0001.flac"), ("103", "84")),
        (("TRAIN/DR1/FCJF0/SA1.WAV", "TEST/DR2/MABC0/SX12.WAV"), ("FCJF0", "MABC0")),
        (
            ("wav48_silence_trimmed/p225/p225_001_mic1.flac", "wav48_x/s5/s5_001_mic1.flac"),
            ("p225", "s5"),
        ),
    ],
    ids=["LibriSpeech", "TIMIT", "VCTK"],
)
def test_corpora_whose_first_directory_is_no_speaker(tmp_path, names, speakers):
    for name in names:
        recordings.write(tmp_path / name)
    assert sorted(open_source(tmp_path).speakers) == sorted(speakers)


def test_a_folder_whose_directories_are_no_speakers_is_refused(tmp_path, capsys):
    for name in ("16k/a.wav", "8k/b.wav"):
        recordings.write(tmp_path / "rates" / name)
    with pytest.raises(UserError, match="the first directories should be speakers, but 16k is none"):
        open_source(tmp_path / "rates")
    for name in ("train/a.wav", "test/b.wav"):
        recordings.write(tmp_path / name)
    with pytest.raises(UserError, match="the first directories should be speakers, but test is none"):
        open_source(tmp_path)
    assert len(open_source(tmp_path, speakers=False)) == 4  # noise has no speakers
    recordings.write(tmp_path / "test" / "ann" / "c.wav")
    (tmp_path / "test" / "ann" / "d.wma").write_bytes(b"0")
    open_source(tmp_path / "test" / "ann")
    said = capsys.readouterr().err
    assert "1 recordings of 1 speaker (ann)" in said and "1 other files are left out (1 .wma)" in said


def test_links_that_loop_and_names_of_any_bytes(tmp_path, capsys):
    recordings.write(tmp_path / "ann" / "a.wav")
    (tmp_path / "ann" / "again").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "bob").symlink_to(tmp_path / "ann", target_is_directory=True)  # no loop
    odd = os.fsdecode(bytes(tmp_path / "ann") + b"/\xff\xfe.wav")
    os.rename(tmp_path / "ann" / "a.wav", odd)
    table = open_source(tmp_path)
    assert table.speakers == ("ann", "bob") and len(table.load(0)) == table.num_samples(1) == 16000
    assert f"warning: {tmp_path}/bob is a link to ann: what lies there is read twice" in capsys.readouterr().err


def test_links_that_lead_to_one_another_are_followed_once(tmp_path):
    for name, other in (("ann", "bob"), ("bob", "ann")):
        recordings.write(tmp_path / name / "a.wav")
        (tmp_path / name / "to").symlink_to(tmp_path / other, target_is_directory=True)
    assert open_source(tmp_path).ids == ("ann/a.wav", "ann/to/a.wav", "bob/a.wav", "bob/to/a.wav")


def test_a_directory_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    for name in ("ann", "bob", "cy"):
        recordings.write(tmp_path / name / "a.wav")
    listed = os.scandir

    def refuse(place):  # as the superuser, who runs many tests, may read any directory
        if os.fspath(place) == str(tmp_path / "bob"):
            raise PermissionError(13, "Permission denied", str(place))
        return listed(place)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="^cannot read .*/bob: Permission denied$"):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "x/" * 3000])
def test_places_that_cannot_be(name):
    with pytest.raises(UserError, match="no data at"):
        open_source(name)
    with pytest.raises(audio.AudioError, match="missing|unreadable"):
        audio.read_audio(name + ".wav")
