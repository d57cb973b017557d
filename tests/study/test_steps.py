import functools
import hashlib
import json
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import kmq_jax
from kmq_jax.core.errors import UserError
from kmq_jax.study import steps
from kmq_jax.study.options import StudyOptions
from kmq_jax.study.plan import USUAL, planned, seconds_left
from kmq_jax.study.report import KINDS
from kmq_jax.study.steps import Steps, Work, stamp


class Job:
    """Two steps, the second of which reads the first's output."""

    def __init__(self, directory):
        self.directory, self.done = directory, []

    def run(self, first=1, second=1, fail=False):
        steps = Steps(self.directory)

        def make(path):
            self.done.append("first")
            path.write_text(f"{first}")

        def use(path):
            self.done.append("second")
            path.mkdir(exist_ok=True)
            (path / "begun").write_text("")
            if fail:
                raise RuntimeError("the machine went away")
            (path / "value").write_text((self.directory / "a.txt").read_text() + f"{second}")

        steps.run("first", {"first": first}, (), "a.txt", make)
        return (steps.run("second", {"second": second}, ("first",), "b", use) / "value").read_text()


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path / "job")


def test_what_is_done_is_not_repeated(job):
    assert job.run() == job.run() == "11"
    assert job.done == ["first", "second"]


def test_a_changed_setting_repeats_what_depends_on_it(job):
    job.run()
    assert job.run(second=2) == "12"
    assert job.done == ["first", "second", "second"]
    assert job.run(first=2, second=2) == "22"
    assert job.done[3:] == ["first", "second"]
    assert job.run() == "11"  # going back is a change too


def test_lost_output_is_made_again(job):
    job.run()
    (job.directory / "a.txt").unlink()
    job.run()
    assert job.done == ["first", "second", "first"]


def test_an_interrupted_step_finds_what_it_had_and_a_changed_one_does_not(job):
    with pytest.raises(RuntimeError):
        job.run(fail=True)
    mark = job.directory / "b" / "begun"
    mark.write_text("half")
    inode = mark.stat().st_ino
    assert job.run() == "11" and mark.stat().st_ino == inode
    with pytest.raises(RuntimeError):
        job.run(second=5, fail=True)
    (job.directory / "b" / "stale").write_text("")
    assert job.run(second=6) == "16" and not (job.directory / "b" / "stale").exists()


@pytest.fixture
def counted(tmp_path):
    """Runs one step with what it depends on; returns how often it has been done."""
    done = []

    def run(**depends):
        Steps(tmp_path / "job").run(
            "embed", {}, (), "out", lambda path: (done.append(1), path.write_text("")), **depends
        )
        return len(done)

    return run


def test_a_step_is_done_again_when_the_code_has_changed(counted, monkeypatch):
    assert counted() == counted() == 1
    assert counted(recipe=2) == 2
    monkeypatch.setattr(kmq_jax, "__version__", "9.9.9")
    assert counted(recipe=2) == counted(recipe=2) == 3


def test_a_step_is_done_again_when_its_data_has_changed(counted, tmp_path):
    data, trials = tmp_path / "voices", tmp_path / "trials.txt"
    (data / "alice").mkdir(parents=True)
    recording = data / "alice" / "1.wav"
    recording.write_bytes(b"123")
    trials.write_text("1 a b\n")
    places = {"data": [str(data), str(trials), "synthetic:dev"]}
    assert counted(**places) == counted(**places) == 1
    recording.write_bytes(b"1234")
    assert counted(**places) == 2
    os.utime(recording, (1, 1))  # copied again: what it holds is the same
    assert counted(**places) == 2
    recording.write_bytes(b"1235")
    assert counted(**places) == 3
    trials.write_text("0 a b\n")
    assert counted(**places) == counted(**places) == 4
    os.utime(trials, (1, 1))
    assert counted(**places) == 4


def test_much_data_is_known_by_sizes_and_times_and_lists_in_it_by_content(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "_READ", 4)
    monkeypatch.setattr(steps, "_SHORT", 8)
    (tmp_path / "one.wav").write_bytes(b"12345")
    before = stamp(str(tmp_path))
    os.utime(tmp_path / "one.wav", (1, 1))
    assert stamp(str(tmp_path)) != before
    (tmp_path / "wav.scp").write_text("u a.wav\n")  # 8 bytes
    before = stamp(str(tmp_path))
    os.utime(tmp_path / "wav.scp", (1, 1))
    assert stamp(str(tmp_path)) == before
    (tmp_path / "wav.scp").write_text("u b.wav\n")
    assert stamp(str(tmp_path)) != before


def test_why_a_step_is_done_again_is_told(job, tmp_path, capsys):
    trials = tmp_path / "trials.txt"
    trials.write_text("1 a b\n")

    def told(settings=1, recipe=1):
        made = Steps(tmp_path / "told")
        made.run("a", settings, (), "a", lambda path: path.write_text(""), data=[str(trials)], recipe=recipe)
        made.run("b", 0, ("a",), "b", lambda path: path.write_text(""))
        return re.findall(r"^(. ?[^:]*): (.*begins.*)$", capsys.readouterr().err, re.M)

    assert told() == [("a", "begins"), ("b", "begins")]
    assert told() == []
    trials.write_text("0 a b\n")
    assert told() == [("a", f"begins again (changed: data {trials})"), ("b", "begins again (changed: step a)")]
    assert told(settings=2, recipe=2)[0] == ("a", "begins again (changed: recipe, settings)")


def test_names_of_recordings_are_any_bytes(tmp_path):
    before = stamp(str(tmp_path))
    (tmp_path / "caf\udce9.wav").write_bytes(b"1")
    assert stamp(str(tmp_path)) != before


def test_recordings_behind_links_are_looked_at(tmp_path):
    data, elsewhere = tmp_path / "voices", tmp_path / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    data.mkdir()
    (data / "alice").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(data)
    (elsewhere / "deep" / "1.wav").write_bytes(b"123")
    before = stamp(str(data))
    (elsewhere / "deep" / "1.wav").write_bytes(b"1234")
    assert stamp(str(data)) != before


def test_a_directory_that_moves_keeps_what_was_done(tmp_path, monkeypatch):
    done = []

    def run(directory):
        steps = Steps(directory)
        made = steps.run("fp32", {}, (), "fp32", lambda path: (done.append("fp32"), path.write_text("")))
        settings = {"init_from": str(made), "lists": [f"{directory}/a.txt"], "loss": "runs"}
        steps.run("d", settings, ("fp32",), "d", lambda path: (done.append("d"), path.write_text("")))
        return len(done)

    monkeypatch.chdir(tmp_path)
    assert run(Path("runs")) == run(tmp_path / "runs") == 2
    (tmp_path / "runs").rename(tmp_path / "moved")
    assert run(Path("moved")) == 2


def test_a_directory_from_before_it_could_move_keeps_what_was_done(tmp_path):
    def run():
        Steps(tmp_path).run("a", {"from": f"{tmp_path}/b"}, (), "a", lambda path: done.append(path.write_text("")))
        return len(done)

    done = []
    about = [kmq_jax.__version__, 1, {"from": f"{tmp_path}/b"}, [], []]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    (tmp_path / "a").write_text("")
    (tmp_path / "steps.json").write_text(json.dumps({"a": {"digest": digest, "done": True}}))
    assert run() == 0


def test_a_kaldi_directory_is_known_by_its_lists(tmp_path):
    (tmp_path / "wav.scp").write_text("u a.wav\n")
    (tmp_path / "audio").mkdir()
    before = stamp(str(tmp_path))
    (tmp_path / "audio" / "a.wav").write_bytes(b"1")
    assert stamp(str(tmp_path)) == before
    (tmp_path / "utt2spk").write_text("u s\n")
    assert stamp(str(tmp_path)) != before
    assert stamp(f"{tmp_path},synthetic:dev") == f"{stamp(str(tmp_path))},synthetic:dev"


def test_what_another_process_does_is_waited_for_and_found_done(tmp_path, capsys):
    begun, go_on, done = threading.Event(), threading.Event(), []

    def slow(path):
        begun.set()
        assert go_on.wait(20)
        done.append("first")
        path.write_text("")

    def quick(path):
        done.append("again")

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(Steps(tmp_path).run, "a", 1, (), "a.txt", slow)
        assert begun.wait(20)
        other = pool.submit(Steps(tmp_path).run, "a", 1, (), "a.txt", quick)
        while "waits for another process" not in capsys.readouterr().err:
            assert not other.done()
        go_on.set()
        assert one.result() == other.result() and done == ["first"]


def test_many_processes_steps_are_all_remembered(tmp_path):
    def make(number):
        Steps(tmp_path).run(f"step-{number}", number, (), f"{number}.txt", lambda path: path.write_text(""))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(make, range(24)))
    known = json.loads((tmp_path / "steps.json").read_text())
    assert len(known) == 24 and all(step["done"] for step in known.values())
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_step_says_what_it_lacks(tmp_path):
    with pytest.raises(UserError, match="grown needs distilled-2, which was not made yet"):
        Steps(tmp_path).run("grown", 1, ("distilled-2",), "grown", print)


def test_steps_are_counted_and_the_time_left_is_told_from_those_before(tmp_path, capsys):
    plan = [Work("fp32", 2), Work("distilled", 1), Work("embed")]

    def run():
        steps = Steps(tmp_path, plan, functools.partial(seconds_left, plan))
        for name in ("fp32", "distilled-2", "embed-fp32", "fp32"):
            steps.run(name, 1, (), f"{name}.txt", lambda path: path.write_text(""))
        return steps.costs(), capsys.readouterr().err.splitlines()

    costs, lines = run()
    assert lines[0] == "[1/3] fp32: begins" and lines[1].startswith("[1/3] fp32: took ")
    assert lines[2].startswith("[2/3] distilled-2: begins, about ") and lines[2].endswith(" left")
    assert len(lines) == 6 and list(costs) == ["fp32", "distilled-2", "embed-fp32"]
    assert all(one["seconds"] >= 0 and one["memory_mb"] > 10 for one in costs.values())
    (start,) = json.loads((tmp_path / "starts.json").read_text())
    assert start["cores"] == os.cpu_count() and start["devices"].endswith("cpu")
    again, lines = run()
    assert again == costs and lines == [f"[{i}/3] {name}: done before" for i, name in enumerate(costs, 1)]
    assert len(json.loads((tmp_path / "starts.json").read_text())) == 1  # a run that did nothing is none


def test_steps_that_are_done_further_on_do_not_count_as_left(tmp_path, capsys):
    plan = [Work("fp32", 1, "fp32"), *(Work("distilled", 1, f"distilled-{bits}") for bits in (4, 3, 2)), Work("embed")]
    told = []

    def begun(names, settings=1):
        """The numbers of the steps that are behind when each of these begins."""
        told.clear()
        steps = Steps(tmp_path, plan, lambda behind, done: told.append(set(behind)))
        for name in names:
            needs = ("fp32",) if name != "fp32" else ()
            steps.run(name, settings, needs, f"{name}.txt", lambda path: path.write_text(""))
        return told

    begun(["fp32", "distilled-3"])  # a job of its own
    assert begun(["fp32", "distilled-4"]) == [{0, 2}]
    (tmp_path / "distilled-4.txt").unlink()
    assert begun(["fp32", "distilled-4", "distilled-3", "distilled-2"]) == [{0, 2}, {0, 1, 2}]
    # Another full precision: what was made of the one before is to be done again.
    assert begun(["fp32"], settings=2) == [set()]
    assert "fp32: begins again (changed: settings)" in capsys.readouterr().err


def test_a_plan_names_the_steps_that_a_study_takes():
    """Those of mixed precision, of figures, diagnosis and cascades have no names before they are reached."""
    place = {"data": "synthetic:dev", "trials": "synthetic:dev"}
    given = {"bits": (4, 2), "nested": True, "epochs": {"2": 1.0, "nested": 1.0}, "evaluate": {"a": place, "b": place}}
    plan = planned(StudyOptions.of(given), epochs=3.0)
    names = [work.name for work in plan if work.name]
    assert names[:5] == ["fp32", "embed-fp32-32-a", "embed-fp32-32-b", "score-fp32-32-a", "score-fp32-32-b"]
    assert [name for name in names if "-a" not in name and "-b" not in name] == [
        "fp32", "ptq-4", "ptq-2", "distilled-2", "ptq-nested", "distilled-nested",
    ]  # fmt: skip
    assert names[names.index("distilled-nested") + 1 :][-4:] == [
        "score-distilled-nested-2-a", "score-distilled-nested-2-b",
        "compare-distilled-nested-2-a", "compare-distilled-nested-2-b",
    ]  # fmt: skip
    assert all(not work.name or work.name.startswith(work.kind) for work in plan)


def test_what_an_earlier_version_did_is_not_done_again(tmp_path):
    def make(path):
        path.write_text("")

    Steps(tmp_path).run("a", 1, (), "a.txt", make)
    file = tmp_path / "steps.json"
    step = json.loads(file.read_text())["a"]
    file.write_text(json.dumps({"a": {key: step[key] for key in ("digest", "done")}}))  # before times were kept
    steps = Steps(tmp_path)
    steps.run("a", 1, (), "a.txt", lambda path: pytest.fail("done again"))
    assert steps.costs() == {"a": {"seconds": None, "memory_mb": None, "device_mb": None}}


def test_every_kind_of_step_has_its_usual_time_and_its_place_in_the_report():
    assert {kind for kinds in KINDS.values() for kind in kinds} == USUAL.keys()
