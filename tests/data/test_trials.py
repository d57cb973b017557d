import dataclasses
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import recordings

from kmq_jax.core.errors import UserError
from kmq_jax.data.draw import write_trials
from kmq_jax.data.source import open_source
from kmq_jax.data.trials import Trials, doubts, draw_trials, open_trials, read_models, read_trials, utterance_index
from kmq_jax.scoring.join import join
from kmq_jax.scoring.table import EmbeddingTable

IDS = ["u1", "u2", "u3"]
PATHS = ["a/1.wav", "a/2.wav", "b/3.wav"]


@pytest.mark.parametrize(
    "text",
    [
        "1 a/1.wav a/2.wav\n0 a/1.wav b/3.wav\n",
        "1 u1 u2\r\n\r\n0\tu1   u3",
        "\n\nu1 u2 target\nu1 u3 nontarget\n\n",
        "a/1.wav a/2.wav target\nu1 b/3.wav nontarget\n",
        "\ufeffu1 u2 1\nu1 u3 0\n",
        "\ufeff\nu1 u2 target\nu1 u3 nontarget\n",
        "\ufeff\r\nu1,u2,1\r\nu1,u3,0\r\n",
        "\u00a0\nu1 u2 target\nu1 u3 nontarget\n",
        "u1,u2,1\nu1,u3,0\n",
        "1; u1; u2\n0; u1; u3\n",
        "1 a/1.flac a/2.mp3\n0 a/1.wav b/3.WAV\n",
    ],
)
def test_every_form(tmp_path, text):
    path = tmp_path / "trials"
    path.write_bytes(text.encode())
    trials = read_trials(path, IDS, PATHS)
    assert trials.enrol.dtype == trials.test.dtype == np.int32 and trials.label.dtype == bool
    np.testing.assert_array_equal(trials.enrol, [0, 0])
    np.testing.assert_array_equal(trials.test, [1, 2])
    np.testing.assert_array_equal(trials.label, [True, False])
    assert trials.models is None and len(trials) == 2


def test_names_are_kept_as_written(tmp_path):
    path = tmp_path / "trials"
    path.write_text("1 a/1.wav u2\n0 u1 b/3.wav\n1 a/1.wav u2\n")
    trials = read_trials(path, IDS, PATHS)
    assert [trials.names[i] for i in trials.enrol_name] == ["a/1.wav", "u1", "a/1.wav"]
    assert [trials.names[i] for i in trials.test_name] == ["u2", "b/3.wav", "u2"]


def test_utterances_called_zero_and_one(tmp_path):
    path = tmp_path / "trials"
    path.write_text("1 0 1\n0 1 2\n")
    trials = read_trials(path, ["0", "1", "2"])
    np.testing.assert_array_equal(trials.enrol, [0, 1])
    np.testing.assert_array_equal(trials.test, [1, 2])
    np.testing.assert_array_equal(trials.label, [True, False])


def test_a_path_that_two_segments_share_names_neither():
    assert utterance_index(["a", "b", "c"], ["x.wav", "x.wav", "y.wav"]) == {"y.wav": 2, "a": 0, "b": 1, "c": 2}


def test_a_name_in_another_unicode_form_is_told(tmp_path):
    path = tmp_path / "trials"
    path.write_text("1 u2 jose\u0301.wav\n", encoding="utf-8")  # as macOS writes it
    with pytest.raises(UserError, match="trials:1: .*the same name is known with its accents written otherwise"):
        read_trials(path, ["u2", "jos\u00e9.wav"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 u1 u2\n0 u1 u9\n", r"trials:2: unknown utterance u9"),
        ("u1,u2,1\nu1,u9,0\n", r"trials:2: unknown utterance u9"),
        ("1 a/1.wav a/2.txt\n", r"trials:1: unknown utterance a/2.txt"),
        ("u1 u2 target\n\nu9 u1 nontarget\n", r"trials:3: unknown utterance u9"),
        ("1 u1 u2\n0 u1\n", r"trials:2: expected `label enrol test`, found 2 columns"),
        ("1 u1 u2 u3\n0 u1\n", r"trials:1: expected `label enrol test`, found 4 columns"),
        ("u1 u2 target\nu1 u2 tgt\n", r"trials:2: label 'tgt' is none of"),
        ("1 u1 u2\n2 u1 u2\n", r"trials:2: label '2' is none of"),
        ("1 u1 u2\n0,u1,u3\n", r"trials:2: expected `label enrol test`, found 1 columns"),
        ("\n \n", r"trials: lists no trial"),
        (b"1 u1 u2\n1 \xff u2\n", r"trials:2: not UTF-8"),
    ],
)
def test_mistakes_name_the_line(tmp_path, text, message):
    path = tmp_path / "trials"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        read_trials(path, IDS, PATHS)


def test_a_path_without_its_suffix_that_two_recordings_share_names_neither(tmp_path):
    (tmp_path / "trials").write_text("1 x.flac y.flac\n")
    with pytest.raises(UserError, match=r"unknown utterance x\.flac"):
        read_trials(tmp_path / "trials", ["a", "b", "c"], ["x.wav", "x.mp3", "y.wav"])


def test_missing_list(tmp_path):
    with pytest.raises(UserError, match="cannot read .*nothing"):
        read_trials(tmp_path / "nothing", IDS)


def test_enrolment_models(tmp_path):
    (tmp_path / "map").write_text("m1 u1 u2\nm2 u3\n")
    (tmp_path / "trials").write_text("m1 u3 0\nm2 u3 1\n")
    models = read_models(tmp_path / "map")
    trials = read_trials(tmp_path / "trials", IDS, models=models)
    np.testing.assert_array_equal(trials.enrol, [0, 1])
    assert [list(rows) for rows in trials.models] == [[0, 1], [2]]
    (tmp_path / "trials").write_text("m1 u3 0\nu3 u3 1\n")
    with pytest.raises(UserError, match=r"trials:2: unknown enrolment model u3"):
        read_trials(tmp_path / "trials", IDS, models=models)
    with pytest.raises(UserError, match="model m1 names the unknown utterance u8"):
        read_trials(tmp_path / "trials", IDS, models={"m1": ["u1", "u8"]})


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_a_list_of_voxceleb1_e_size(tmp_path):
    rng = np.random.default_rng(0)
    ids = [f"id{10000 + i % 1251}/abcdefghijk/{i:05d}.wav" for i in range(145000)]
    label, enrol, test = (
        rng.integers(2, size=580000),
        rng.integers(145000, size=580000),
        rng.integers(145000, size=580000),
    )
    path = tmp_path / "trials"
    path.write_text("".join(f"{k} {ids[a]} {ids[b]}\n" for k, a, b in zip(label, enrol, test)))
    start = time.process_time()
    trials = read_trials(path, ids, ids)
    seconds = time.process_time() - start
    np.testing.assert_array_equal(trials.enrol, enrol)
    np.testing.assert_array_equal(trials.test, test)
    np.testing.assert_array_equal(trials.label, label == 1)
    assert seconds < 8  # about 1.5 s on a busy core; a quadratic step would take minutes
    code = (
        "import sys; from kmq_jax.data.trials import read_trials; ids = open(sys.argv[2]).read().split();"
        "read_trials(sys.argv[1], ids, ids); print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    (tmp_path / "ids").write_text("\n".join(ids))
    done = subprocess.run([sys.executable, "-c", code, path, tmp_path / "ids"], capture_output=True, check=True)
    assert int(done.stdout) < 400_000  # KiB at most held, the libraries included


def test_drawn_trials(tmp_path):
    table = open_source(recordings.kaldi(tmp_path, speakers=4, each=5))
    trials = draw_trials(table, targets=30, nontargets=60)
    assert trials.label.sum() == 30 and (~trials.label).sum() == 60
    np.testing.assert_array_equal(table.labels[trials.enrol] == table.labels[trials.test], trials.label)
    pairs = {frozenset(pair) for pair in zip(trials.enrol.tolist(), trials.test.tolist())}
    assert len(pairs) == 90 and min(map(len, pairs)) == 2  # no pair twice, none with itself
    again = open_trials("", table)
    np.testing.assert_array_equal(again.enrol, draw_trials(table).enrol)
    assert again.label.sum() == 40  # all pairs of the same speaker there are
    with pytest.raises(UserError, match="two speakers"):
        draw_trials(table.select([0, 1, 2]))


@pytest.mark.parametrize("name", ["so762/dev", "words/dev"])
def test_both_forms_of_the_shared_lists_agree(shared, name):
    table = open_source(shared / "data" / name)
    by_path = read_trials(shared / "data" / name / "trials.txt", table.ids, table.paths)
    by_id = read_trials(shared / "data" / name / "trials.kaldi", table.ids, table.paths)
    for field in ("enrol", "test", "label"):
        np.testing.assert_array_equal(getattr(by_path, field), getattr(by_id, field))
    np.testing.assert_array_equal(table.labels[by_id.enrol] == table.labels[by_id.test], by_id.label)


def test_trials_of_the_embedded_corpus_follow_the_table():
    spec = "synthetic:dev?speakers=6&utterances=3"
    table = open_source(spec)
    trials = open_trials(spec, table)
    turned = open_trials(spec, table.select(range(len(table))[::-1]))
    np.testing.assert_array_equal(table.labels[trials.enrol] == table.labels[trials.test], trials.label)
    np.testing.assert_array_equal(turned.enrol, len(table) - 1 - trials.enrol)
    with pytest.raises(UserError, match="unknown utterance syn-dev-"):
        open_trials(spec, table.select([0, 1, 2]))


def test_too_few_matched_pairs_are_told(tmp_path, capsys):
    table = open_source(recordings.kaldi(tmp_path, speakers=6, each=3))
    known = dataclasses.replace(table, genders=dict.fromkeys(table.speaker_names[:2], "f"), ages={})
    draw_trials(known, nontargets=40, matched=0.1)
    assert capsys.readouterr().err == ""
    draw_trials(known, nontargets=40, matched=0.5)
    assert re.match(r"warning: [5-9] of 40 nontargets are sure to be of one gender", capsys.readouterr().err)


def test_a_list_holds_no_name_that_is_not_utf8(tmp_path):
    row = np.zeros(1, np.int32)
    with pytest.raises(UserError, match=r"b'caf\\xe9\.wav' is not UTF-8, as names in a trial list must be"):
        write_trials(tmp_path / "trials", Trials(row, row, row == 0, ("caf\udce9.wav",), row, row))
    assert not (tmp_path / "trials").exists()


def test_blank_lines_of_any_kind(tmp_path):
    path = tmp_path / "trials"
    path.write_bytes("\ufeff\n1 a b\n\u00a0\n0 a c\n\u2003 \n".encode())
    assert read_trials(path, ["a", "b", "c"]).label.tolist() == [True, False]
    path.write_bytes("1 a b\n\u00a0\n0 a\n".encode())
    with pytest.raises(UserError, match=r"trials:3: expected"):
        read_trials(path, ["a", "b", "c"])


def test_doubtful_lists_are_told_with_counts_and_lines(tmp_path):
    path = tmp_path / "trials"
    path.write_text("1 a b\n\n0 a c\n1 a c\n1 a a\n0 b a\n")
    trials = read_trials(path, ["a", "b", "c"])
    speaker = np.array([0, 0, 1])
    found = doubts(str(path), trials, speaker[trials.enrol], speaker[trials.test])
    assert [line.removeprefix(f"{path}:") for line in found] == [
        "4: 2 labels contradict the speakers' names; this is the first",
        "5: 1 recordings are compared with themselves; this is the first",
        "1: 4 trials are of pairs that have both labels; this is the first",
    ]
    path.write_text("1 a b\n0 a c\n0 c a\n1 a b\n")
    trials = read_trials(path, ["a", "b", "c"])
    found = doubts(str(path), trials, speaker[trials.enrol], speaker[trials.test])
    assert found == [f"{path}:3: 2 trials are of pairs that stand there before, and count again; this is the first"]
    path.write_text("1 a b\n0 a c\n")
    trials = read_trials(path, ["a", "b", "c"])
    assert doubts(str(path), trials, speaker[trials.enrol], speaker[trials.test]) == []


def test_people_s_lists(shared):
    from kmq_jax.scoring.join import join
    from kmq_jax.scoring.table import read_embeddings

    cases = shared / "cases"
    if not cases.is_dir():
        pytest.skip("no cases")
    for name in ("trials_blank_line/trials.txt", "trials_blank_line/trials_nbsp.txt"):
        table = read_embeddings(cases / "trials_blank_line/emb.npz")
        assert len(read_trials(cases / name, table.ids, table.paths)) == 60
    table = read_embeddings(cases / "trials_contradict/emb.npz")
    for name, words in {
        "inverted": "contradict",
        "shifted": "contradict",
        "self": "with themselves",
        "both_labels": "both labels",
        "trials_ok": "",
    }.items():
        path = str(cases / f"trials_contradict/{name}.txt")
        trials, sides = join(path, table, table)
        found = doubts(path, trials, sides.enrol_speaker, sides.test_speaker)
        assert any(words in line for line in found) if words else not found


def test_an_unknown_utterance_is_told_with_the_nearest_known(tmp_path):
    (tmp_path / "trials").write_text("1 id1/a.wav id1/b.wav\n0 id1/a.wav id2/bb.wav\n")
    with pytest.raises(UserError, match=r"trials:2: unknown utterance id2/bb.wav; the nearest known .*id2/b.wav"):
        read_trials(tmp_path / "trials", ["id1/a.wav", "id1/b.wav", "id2/b.wav"])
    (tmp_path / "trials").write_text("1 xx yy\n")
    with pytest.raises(UserError, match=r"unknown utterance xx; known is, for example, id1/a.wav"):
        read_trials(tmp_path / "trials", ["id1/a.wav", "id1/b.wav"])


def test_models_beside_trials_that_are_made_are_refused(tmp_path):
    (tmp_path / "models.txt").write_text("m nobody\n")
    models, spec = str(tmp_path / "models.txt"), "synthetic:dev?speakers=4&utterances=2"
    utterances = open_source(spec)
    embedded = EmbeddingTable(utterances.ids, (), None, np.eye(8, dtype=np.float32), "e.npz")
    assert len(join(spec, embedded, embedded)[0])
    with pytest.raises(UserError, match=r"`enrol_models` does not go with `trials` \(=synthetic:dev"):
        join(spec, embedded, embedded, models)
    with pytest.raises(UserError, match=r"`enrol_models` does not go with `trials` \(=synthetic:dev"):
        open_trials(spec, utterances, models)
    with pytest.raises(UserError, match="`enrol_models` does not go with trials drawn at random"):
        open_trials("", utterances, models)
