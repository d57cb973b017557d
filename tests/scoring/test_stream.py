"""Scoring in parts gives what scoring at once gives; shares of a list are the list; processes share one."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import commands
import numpy as np
import pytest

from kmq_jax.benchmarks.stream import make_list
from kmq_jax.core.errors import UserError
from kmq_jax.core.progress import say_once
from kmq_jax.data import trials as lists
from kmq_jax.data.trials import read_in_parts, read_trials
from kmq_jax.scoring import run, snorm, stream
from kmq_jax.scoring.options import ScoringOptions

OPTIONS = ScoringOptions(replicates=0, stream=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    place, rng = tmp_path_factory.mktemp("stream"), np.random.default_rng(0)
    ids = [f"s{speaker}-{take}" for speaker in range(10) for take in range(5)]
    centres = np.repeat(rng.standard_normal((10, 8)), 5, axis=0)
    rows = (centres + 0.8 * rng.standard_normal(centres.shape)).astype(np.float32)
    np.savez(place / "e.npz", embeddings=rows, ids=np.array(ids), speakers=np.array([i.split("-")[0] for i in ids]))
    cohort = rng.standard_normal((40, 8)).astype(np.float32)
    members = {"ids": np.array([f"c{i}" for i in range(40)]), "speakers": np.array([f"c{i // 2}" for i in range(40)])}
    np.savez(place / "c.npz", embeddings=cohort, **members)
    pairs = [(a, b) for i, a in enumerate(ids) for b in ids[i + 1 :]]
    text = "".join(f"{int(a.split('-')[0] == b.split('-')[0])} {a} {b}\n" for a, b in pairs)
    (place / "trials.txt").write_text(text)
    (place / "models.txt").write_text("".join(f"m{s} s{s}-0 s{s}-1\n" for s in range(10)))
    enrolled = [(s, t) for s in range(10) for t in ids if not t.endswith(("-0", "-1"))]
    (place / "enrolled.txt").write_text("".join(f"m{s} {t} {int(t.startswith(f's{s}-'))}\n" for s, t in enrolled))
    return place


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(lists, "_CHUNK", 700)


@pytest.mark.parametrize("form", ["cosine", "snorm", "means", "models"])
def test_the_same_scores_and_rates_as_at_once(files, tmp_path, form):
    cohort = files / "c.npz" if form in ("snorm", "means") else None
    models = files / "models.txt" if form == "models" else None
    trials = str(files / ("enrolled.txt" if models else "trials.txt"))
    options = dataclasses.replace(OPTIONS, cohort_speaker_means=form == "means")
    whole = run.score(files / "e.npz", trials, options, cohort=cohort, enrol_models=str(models) if models else None)
    about = {"cohort": cohort, "enrol_models": str(models) if models else None}
    found = stream.score_stream(files / "e.npz", trials, options, out=tmp_path / "s.txt", **about)
    stream.score_stream(files / "e.npz", trials, options, out=tmp_path / "s.npy", **about)
    for name in ("whole.txt", "whole.npy"):
        run.write_scores(tmp_path / name, whole.trials, whole.scores)
    np.testing.assert_array_equal(np.load(tmp_path / "whole.npy"), whole.scores)
    if form == "cosine":
        assert (tmp_path / "s.txt").read_text() == (tmp_path / "whole.txt").read_text()
    np.testing.assert_allclose(np.load(tmp_path / "s.npy"), whole.scores, rtol=1e-6, atol=1e-6)
    assert found["snorm"] == whole.metrics["snorm"]
    assert found["trials"] == whole.metrics["trials"] and found["targets"] == whole.metrics["targets"]
    low, high = found["eer_bounds"]
    assert low - 1e-9 <= whole.metrics["eer"] <= high + 1e-9
    assert found["min_dcf"] == pytest.approx(whole.metrics["min_dcf"], abs=1e-9)


_PEAK = """
import sys
from pathlib import Path
from kmq_jax.data import trials
from kmq_jax.scoring import stream
from kmq_jax.scoring.options import ScoringOptions
trials._CHUNK = 1 << 18
found = stream.score_stream(Path(sys.argv[1]), sys.argv[2], ScoringOptions(replicates=0, stream=True))
(most,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(found["trials"], most)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is told by Linux")
def test_memory_does_not_grow_with_the_list(files, tmp_path):
    """Ten times the trials: 900,000 more. Held at once, their rows and scores alone would take 18 MB, words more."""
    names = np.array([f"{u:03d}" for u in range(500)])
    rows = np.random.default_rng(0).standard_normal((500, 8)).astype(np.float32)
    np.savez(tmp_path / "e.npz", embeddings=rows, ids=names)
    letters = names.astype("S3").view(np.uint8).reshape(500, 3)
    peaks = []
    for count in (100_000, 1_000_000):
        make_list(tmp_path / "t.txt", count, letters, 10)
        words = [sys.executable, "-c", _PEAK, str(tmp_path / "e.npz"), str(tmp_path / "t.txt")]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        trials, peak = map(int, done.stdout.split())
        assert trials == count
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 9_000  # KiB


def test_shares_of_a_list_are_the_list(files):
    trials, ids = files / "trials.txt", tuple(commands.arrays_of(files / "e.npz")["ids"].tolist())
    whole = read_trials(trials, ids)
    for count in (1, 2, 3, 7):
        parts = [part for i in range(count) for part in read_in_parts(trials, ids, share=(i, count))]
        assert np.concatenate([part.enrol for part in parts]).tolist() == whole.enrol.tolist()
        assert np.concatenate([part.test for part in parts]).tolist() == whole.test.tolist()
        assert np.concatenate([part.label for part in parts]).tolist() == whole.label.tolist()
    many = 5 * trials.stat().st_size  # more shares than bytes: most are empty
    assert sum(len(part) for i in range(0, many, 5) for part in read_in_parts(trials, ids, share=(i, many))) <= len(
        whole
    )


def test_a_fault_in_a_later_part_names_its_line_and_leaves_no_file(files, tmp_path):
    lines = (files / "trials.txt").read_text().splitlines()
    lines[900] = "1 s1-0 nobody"
    (tmp_path / "t.txt").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="t.txt:901: unknown utterance nobody"):
        stream.score_stream(files / "e.npz", str(tmp_path / "t.txt"), OPTIONS, out=tmp_path / "s.txt")
    assert not (tmp_path / "s.txt").exists()


def test_options_of_a_cohort_need_one(files):
    options = dataclasses.replace(OPTIONS, top_n=5)
    with pytest.raises(UserError, match="need a cohort"):
        stream.score_stream(files / "e.npz", str(files / "trials.txt"), options)


def test_doubtful_trials_are_counted(files, tmp_path, capsys):
    lines = (files / "trials.txt").read_text().splitlines()
    wrong = ["0" + line[1:] if number in (0, 1) else line for number, line in enumerate(lines)]  # two targets
    (tmp_path / "t.txt").write_text("\n".join([*wrong, "1 s3-1 s3-1"]) + "\n")
    stream.score_stream(files / "e.npz", str(tmp_path / "t.txt"), OPTIONS)
    said = capsys.readouterr().err
    assert "2 labels contradict the speakers' names" in said and "1 recordings are compared with themselves" in said
    stream.score_stream(files / "e.npz", str(files / "trials.txt"), OPTIONS)
    assert "warning" not in capsys.readouterr().err


def test_recordings_compared_with_a_model_of_themselves_are_counted(files, tmp_path, capsys):
    lines = (files / "enrolled.txt").read_text() + "m3 s3-1 1\nm4 s4-0 1\nm4 s3-0 0\n"
    (tmp_path / "t.txt").write_text(lines)
    for score in (run.score, stream.score_stream):
        score(files / "e.npz", str(tmp_path / "t.txt"), OPTIONS, enrol_models=str(files / "models.txt"))
        assert "2 recordings are compared with themselves" in capsys.readouterr().err
        score(files / "e.npz", str(files / "enrolled.txt"), OPTIONS, enrol_models=str(files / "models.txt"))
        assert "warning" not in capsys.readouterr().err


def test_utterances_that_no_trial_compares_do_not_count_for_snorm(files, tmp_path, capsys):
    """As the cohort, the speakers of the same file that the trials leave out; and an utterance like none of them."""
    arrays = commands.arrays_of(files / "e.npz")
    ids, rows = arrays["ids"].tolist(), arrays["embeddings"].copy()
    cohort = {name: values[25:] for name, values in arrays.items()}
    cohort["embeddings"] = rows[25:] * (np.arange(8) > 0)
    np.savez(tmp_path / "c.npz", **cohort)
    rows[-1] = np.arange(8) == 0
    np.savez(tmp_path / "e.npz", **arrays | {"embeddings": rows})
    lines = (files / "trials.txt").read_text().splitlines(keepends=True)
    half = set(ids[:25])
    (tmp_path / "t.txt").write_text("".join(line for line in lines if half.issuperset(line.split()[1:])))
    about = tmp_path / "e.npz", str(tmp_path / "t.txt"), OPTIONS
    whole = run.score(*about, cohort=tmp_path / "c.npz")
    found = stream.score_stream(*about, cohort=tmp_path / "c.npz")
    assert found["snorm"] == whole.metrics["snorm"] and found["snorm"]["shared_speakers"] == 0
    assert found["eer_bounds"][0] <= whole.metrics["eer"] <= found["eer_bounds"][1]
    assert "warning" not in capsys.readouterr().err
    (tmp_path / "t.txt").write_text(f"1 {ids[-2]} {ids[-1]}\n0 {ids[-2]} {ids[0]}\n")
    for score in (run.score, stream.score_stream):
        with pytest.raises(UserError, match="the top 25 cohort scores of embedding 49 are all the same"):
            score(*about, cohort=tmp_path / "c.npz")


def test_a_cohort_of_another_model_is_warned_of(files, tmp_path, capsys):
    for name, model in (("e.npz", "r34 at 2 bits"), ("c.npz", "r34 at 4 bits"), ("own.npz", "r34 at 2 bits")):
        held = commands.arrays_of(files / name.replace("own", "c"))
        np.savez(tmp_path / name, model=np.array(model), **held)
    for score in (run.score, stream.score_stream):
        about = tmp_path / "e.npz", str(files / "trials.txt"), OPTIONS
        score(*about, cohort=tmp_path / "own.npz")
        score(*about, cohort=files / "c.npz")  # of which no model is known
        assert "warning" not in capsys.readouterr().err
        score(*about, cohort=tmp_path / "c.npz")
        assert f"warning: the cohort {tmp_path / 'c.npz'} is of another model" in capsys.readouterr().err


def test_two_processes_give_what_one_gives(files, tmp_path):
    cohort = files / "c.npz"
    one = stream.score_stream(
        files / "e.npz", str(files / "trials.txt"), OPTIONS, cohort=cohort, out=tmp_path / "one.npy"
    )
    flags = [f"--embeddings={files / 'e.npz'}", f"--trials={files / 'trials.txt'}"]
    flags += [f"--json={tmp_path / 'm.json'}", f"--out={tmp_path / 's.npy'}"]
    status, said = commands.pair("score", "--stream", *flags, f"--snorm_cohort={cohort}")
    assert status == [0, 0], said
    assert json.loads((tmp_path / "m.json").read_text()) == json.loads(json.dumps(one))
    halves = [np.load(tmp_path / f"s-{i}-of-2.npy") for i in range(2)]
    assert min(map(len, halves)) > 0
    np.testing.assert_array_equal(np.concatenate(halves), np.load(tmp_path / "one.npy"))


def test_a_fault_in_one_share_ends_both_processes_and_leaves_no_file(files, tmp_path):
    lines = (files / "trials.txt").read_text().splitlines()
    lines[-1] = "1 s1-0 nobody"  # the second process's
    (tmp_path / "t.txt").write_text("\n".join(lines) + "\n")
    flags = [f"--embeddings={files / 'e.npz'}", f"--trials={tmp_path / 't.txt'}", f"--out={tmp_path / 's.txt'}"]
    status, said = commands.pair("score", "--stream", *flags)
    assert status == [2, 2], said
    assert "another process failed" in said[0] and "unknown utterance nobody" in said[1]
    assert not list(tmp_path.glob("s*"))


@pytest.mark.parametrize("count", [2, 3])
def test_the_cohorts_blocks_are_shared_without_a_difference(count, monkeypatch):
    rng = np.random.default_rng(1)
    rows, cohort = rng.standard_normal((50, 8)), rng.standard_normal((40, 8))
    monkeypatch.setattr(snorm, "_CHUNK", 40 * 7)  # blocks of seven rows
    # Alone, a process keeps minus infinity in the others' places.
    parts = [stream._shared_statistics(rows, cohort, 10, (i, count)) for i in range(count)]
    assert all(np.isinf(part).any() for part in parts)
    np.testing.assert_array_equal(np.max(parts, axis=0), snorm.cohort_statistics(rows, cohort, 10))


def test_every_process_tells_the_shared_speakers_and_the_first_one_warns(files, monkeypatch, capsys):
    monkeypatch.setattr(stream, "_normalised", lambda scorer, *_: scorer)  # it would wait for the other process
    about = files / "e.npz", str(files / "trials.txt"), OPTIONS
    found = stream.score_stream(*about, cohort=files / "e.npz", share=(1, 2))["snorm"]
    assert found["shared_speakers"] > 0 and "are also in the cohort" not in capsys.readouterr().err


def test_models_of_several_speakers_are_warned_of(files, tmp_path, capsys):
    text = (files / "models.txt").read_text()
    (tmp_path / "mixed.txt").write_text(text.replace("m3 s3-0 s3-1", "m3 s3-0 s4-1"))
    about = files / "e.npz", str(files / "enrolled.txt"), OPTIONS
    for score in (run.score, stream.score_stream):
        say_once.cache_clear()
        score(*about, enrol_models=str(tmp_path / "mixed.txt"))
        assert "mixed.txt: 1 models are of several speakers' utterances; the first is m3" in capsys.readouterr().err
        score(*about, enrol_models=str(files / "models.txt"))
        assert "warning" not in capsys.readouterr().err
