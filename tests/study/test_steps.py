import pytest

from kmq_jax.study.steps import Steps


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
