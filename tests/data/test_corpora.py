"""Official layouts, in miniature."""

import sys

import numpy as np
import pytest
import recordings

from kmq_jax.core.errors import UserError
from kmq_jax.data import corpora
from kmq_jax.data.source import open_source
from kmq_jax.data.trials import read_models, read_trials

tfds = pytest.importorskip("tensorflow_datasets")


def make_voxceleb1(root):
    for name in ("id10001/vidA/00001.wav", "id10001/vidA/00002.wav", "id10002/vidB/00001.wav"):
        recordings.write(root / "vox1_dev_wav" / "wav" / name)
    for name in ("id10270/vidC/00001.wav", "id10271/vidD/00001.wav", "id10270/vidE/00001.wav"):
        recordings.write(root / "vox1_test_wav" / "wav" / name)
    (root / "vox1_meta.csv").write_text("VoxCeleb1 ID\tVGGFace1 ID\tGender\nid10001\tA\tm\nid10270\tB\tf\n")
    (root / "veri_test2.txt").write_text(
        "1 id10270/vidC/00001.wav id10270/vidE/00001.wav\n0 id10270/vidC/00001.wav id10271/vidD/00001.wav\n"
    )
    (root / "list_test_all2.txt").write_text(
        "1 id10001/vidA/00001.wav id10001/vidA/00002.wav\n0 id10001/vidA/00001.wav id10270/vidC/00001.wav\n"
    )
    (root / "list_test_hard2.txt").write_text("0 id10002/vidB/00001.wav id10271/vidD/00001.wav\n")
    return root


def names(corpus, rows):
    return [corpus.utterances.ids[i] for i in rows]


def test_voxceleb1_and_its_three_lists(tmp_path):
    corpus = corpora.voxceleb1(make_voxceleb1(tmp_path))
    assert {name: len(table) for name, table in corpus.splits.items()} == {"dev": 3, "test": 3}
    assert list(corpus.lists) == ["O", "E", "H"]
    trials = corpus.trials("O")
    assert names(corpus, trials.test) == ["id10270/vidE/00001.wav", "id10271/vidD/00001.wav"]
    np.testing.assert_array_equal(trials.label, [True, False])
    assert names(corpus, corpus.trials("E").test) == ["id10001/vidA/00002.wav", "id10270/vidC/00001.wav"]  # both parts
    assert len(corpus.trials("H")) == 1
    assert corpus.utterances.genders == {"id10001": "m", "id10270": "f"}
    with pytest.raises(UserError, match="no trial list 'X' here; found: O, E, H"):
        corpus.trials("X")


def test_voxceleb1_in_one_tree(tmp_path):
    for name in ("id10001/vidA/00001.wav", "id10270/vidC/00001.wav"):
        recordings.write(tmp_path / "wav" / name)
    assert {name: table.ids for name, table in corpora.voxceleb1(tmp_path).splits.items()} == {
        "train": ("id10001/vidA/00001.wav", "id10270/vidC/00001.wav")
    }


def test_voxceleb2(tmp_path):
    for name in ("dev/aac/id00012/vid/00001.m4a", "aac/id00017/vid/00002.m4a"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"m4a")
    splits = corpora.voxceleb2(tmp_path).splits
    assert splits["dev"].ids == ("id00012/vid/00001.wav",) and splits["dev"].paths == ("id00012/vid/00001.m4a",)
    assert splits["test"].speakers == ("id00017",)


def test_cnceleb_enrols_models_of_several_recordings(tmp_path):
    corpus = corpora.cnceleb(recordings.cnceleb(tmp_path))
    assert {name: len(table) for name, table in corpus.splits.items()} == {"dev": 2, "train2": 1, "eval": 5}
    assert set(corpus.splits["eval"].speakers) == {"id00800", "id00801"}
    trials = corpus.trials("eval")
    (model,) = trials.models
    assert names(corpus, model) == ["id00800/singing-01-001.wav", "id00800/interview-01-002.wav"]
    assert names(corpus, trials.test) == ["test/id00800-singing-01-005.wav", "test/id00801-movie-01-001.wav"]
    np.testing.assert_array_equal(trials.enrol, [0, 0])
    np.testing.assert_array_equal(trials.label, [True, False])
    assert corpus.utterances.load(int(model[1])).shape == (16000,)


def test_cnceleb_without_a_map_enrols_the_joined_recording(tmp_path):
    corpus = corpora.cnceleb(recordings.cnceleb(tmp_path, with_map=False))
    (model,) = corpus.trials("eval").models
    assert names(corpus, model) == ["enroll/id00800-enroll.wav"]
    with pytest.raises(UserError, match="no CN-Celeb release"):
        corpora.cnceleb(tmp_path / "CN-Celeb2_flac")


def test_cnceleb_as_data_is_what_its_lists_name(tmp_path):
    root = recordings.cnceleb(tmp_path)
    place = root / "CN-Celeb_flac" / "eval"
    table, corpus = open_source(place), corpora.cnceleb(root)
    assert sorted(table.ids) == sorted(corpus.splits["eval"].ids) and len(table) == 5
    assert dict(zip(table.ids, table.speakers))["id00800/singing-01-001.wav"] == "id00800"
    assert dict(zip(table.ids, table.speakers))["test/id00801-movie-01-001.wav"] == "id00801"
    trials = read_trials(place / "lists/trials.lst", table.ids, table.paths, read_models(place / "lists/enroll.map"))
    (model,) = trials.models
    assert [table.ids[i] for i in model] == ["id00800/singing-01-001.wav", "id00800/interview-01-002.wav"]
    joined = read_models(place / "lists/enroll.lst")  # the other way to give the models: one joined recording each
    assert read_trials(place / "lists/trials.lst", table.ids, table.paths, joined).models[0].tolist() == [
        table.ids.index("enroll/id00800-enroll.wav")
    ]


def test_a_whole_cnceleb_release_is_no_data(tmp_path):
    """Its directories would pass for speakers."""
    root = recordings.cnceleb(tmp_path)
    told = r"holds all of CN-Celeb: give \S*/CN-Celeb_flac/eval to evaluate \(its trials: \S*/eval/lists/trials.lst, "
    for place in (root, root / "CN-Celeb_flac"):
        with pytest.raises(
            UserError, match=told + r"its enrolment models: \S*/eval/lists/enroll.map\), or \S*/data to"
        ):
            open_source(place)
    assert set(open_source(root / "CN-Celeb_flac" / "data").speakers) == {"id00010", "id00800"}
    recordings.write(tmp_path / "second" / "CN-Celeb2_flac" / "data" / "id10020" / "vlog-01-001.flac")
    with pytest.raises(UserError, match="first directories should be speakers, but CN-Celeb2_flac is none"):
        open_source(tmp_path / "second")


def test_voxtube(tmp_path):
    for name in ("UCabc/vid-1/segment_0.wav", "UCabc/vid-2/segment_11.mp3", "UCxyz/vid-3/segment_0.wav"):
        recordings.write(tmp_path / name)
    (tmp_path / "language_gender_meta.csv").write_text(
        "speaker_id,gender,language\nUCabc,female,english\nUCxyz,male,french\n"
    )
    (tmp_path / "trials.txt").write_text("1 UCabc/vid-1/segment_0.wav UCabc/vid-2/segment_11.mp3\n")
    corpus = corpora.voxtube(tmp_path)
    assert corpus.splits["train"].speakers == ("UCabc", "UCabc", "UCxyz")
    assert corpus.splits["train"].genders == {"UCabc": "f", "UCxyz": "m"}
    np.testing.assert_array_equal(corpus.trials("trials.txt").test, [1])


def test_lists_that_are_not_utf8_are_told_by_file_and_line(tmp_path):
    recordings.write(tmp_path / "v" / "UCabc/vid-1/segment_0.wav")
    (tmp_path / "v" / "language_gender_meta.csv").write_bytes(b"id,gender,language\nUCabc,female,fran\xe7ais\n")
    with pytest.raises(UserError, match=r"language_gender_meta.csv:2: not UTF-8 text"):
        corpora.voxtube(tmp_path / "v")
    recordings.cnceleb(tmp_path / "c")
    (tmp_path / "c" / "CN-Celeb_flac" / "dev" / "dev.lst").write_bytes(b"id00010\n\xe7\n")
    with pytest.raises(UserError, match=r"dev.lst:2: not UTF-8 text"):
        corpora.cnceleb(tmp_path / "c")


def test_commonbench_and_kaldi(tmp_path):
    root = recordings.kaldi(tmp_path / "k")
    (root / "trials").write_text("s0-u0 s0-u1 target\n")
    assert len(corpora.commonbench(root).trials("trials")) == len(corpora.kaldi(root).trials("trials")) == 1
    (root / "comparisons.txt").write_text("s0-u0,s0-u1,1\n")
    assert corpora.commonbench(root).trials("comparisons.txt").label.tolist() == [True]
    recordings.write(tmp_path / "tree" / "ann" / "a.wav")
    assert corpora.commonbench(tmp_path / "tree").splits["train"].speakers == ("ann",)


@pytest.mark.parametrize(
    ("builder", "make", "counts"),
    [
        ("KmqVoxCeleb1", make_voxceleb1, {"dev": 3, "test": 3}),
        ("KmqCnCeleb", recordings.cnceleb, {"dev": 2, "train2": 1, "eval": 5}),
        ("KmqVoxTube", lambda root: recordings.write(root / "UCabc/vid/segment_0.wav"), {"train": 1}),
        ("KmqCommonBench", lambda root: recordings.write(root / "ann/a.wav"), {"train": 1}),
        ("KmqVoxCeleb2", lambda root: recordings.write(root / "dev/aac/id00012/v/1.flac"), {"dev": 1}),
        ("KmqKaldi", recordings.kaldi, {"train": 12}),
    ],
)
def test_builders(tmp_path, monkeypatch, builder, make, counts):
    monkeypatch.setenv("TFDS_DISABLE_PROGRESS_BAR", "1")
    tfds.disable_progress_bar()
    from kmq_jax.data import builders

    make(tmp_path / "raw")
    made = getattr(builders, builder)(data_dir=tmp_path / "made")
    made.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=tmp_path / "raw"))
    assert {name: split.num_examples for name, split in made.info.splits.items()} == counts
    source = made.as_data_source(split=next(iter(counts)))
    assert source[0]["audio"].dtype == np.int16
    table = open_source(made.data_dir)
    assert len(table) == sum(counts.values())
    corpus = corpora.CORPORA[made.corpus](tmp_path / "raw")
    assert sorted(table.ids) == sorted(corpus.utterances.ids)
    for i in range(len(table)):
        raw = corpus.utterances
        np.testing.assert_array_equal(table.load(i), raw.load(raw.ids.index(table.ids[i])))
    assert made.MANUAL_DOWNLOAD_INSTRUCTIONS
    assert "tensorflow" not in sys.modules


def test_a_builder_leaves_out_what_it_cannot_read(tmp_path, caplog):
    from kmq_jax.data import builders

    root = recordings.kaldi(tmp_path / "raw", 1, 3)
    (root / "audio/s0-u1.wav").write_bytes(b"")
    made = builders.KmqKaldi(data_dir=tmp_path / "made")
    made.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=root))
    assert open_source(made.data_dir).ids == ("s0-u0", "s0-u2")
    assert "s0-u1.wav: empty" in caplog.text
