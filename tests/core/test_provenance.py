import subprocess
import sys

import jax

from kmq_jax.core import provenance


def git(directory, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", "-C", directory, *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_versions_are_those_that_run():
    made_with = provenance.provenance()
    assert made_with["python"] == sys.version.split()[0] and made_with["jax"] == jax.__version__


def test_the_revision_and_whether_the_source_was_changed(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("a = 1\n")
    assert provenance.revision_of(file) == (None, None)  # no checkout
    git(tmp_path, "init", "-q")
    assert provenance.revision_of(file) == (None, None)  # in a checkout, but not of it
    git(tmp_path, "add", "module.py")
    git(tmp_path, "commit", "-qm", "one")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert provenance.revision_of(file) == (head, False)
    (tmp_path / "notes.txt").write_text("untracked files are not part of the source")
    assert provenance.revision_of(file) == (head, False)
    file.write_text("a = 2\n")
    assert provenance.revision_of(file) == (head, True)


def test_without_git_nothing_is_claimed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.revision_of(provenance.SOURCE) == (None, None)
