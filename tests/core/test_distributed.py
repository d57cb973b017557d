"""What processes that work together do when one of them fails; the other processes are stood in for."""

import errno

import pytest

from kmq_jax.core import distributed
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import atomic_write


@pytest.fixture
def told(monkeypatch):
    """What this process told the others, in order."""
    flags = []
    monkeypatch.setattr(distributed, "anywhere", lambda flag: flags.append(flag) or flag)
    return flags


@pytest.mark.parametrize("error", [UserError("a score"), OSError(errno.ENOSPC, "full"), ValueError("a bug")])
def test_the_others_are_told_of_any_error(told, error):
    with pytest.raises(type(error)) as caught, distributed.all_or_none():
        raise error
    assert caught.value is error and told == [True]


class Failing:
    """A context that fails on entering or on leaving."""

    def __init__(self, where):
        self.where = where

    def __enter__(self):
        if self.where == "enter":
            raise OSError(errno.ENOSPC, "full")

    def __exit__(self, *about):
        if self.where == "leave":
            raise OSError(errno.ENOSPC, "full")


@pytest.mark.parametrize(
    ("where", "said"), [("enter", [True]), ("leave", [False, False, True]), ("", [False, False, False])]
)
def test_the_others_are_told_of_a_file_that_cannot_be_opened_or_closed(told, where, said):
    if where:
        with pytest.raises(OSError, match="full"), distributed.entered_by_all(Failing(where)):
            pass
    else:
        with distributed.entered_by_all(Failing(where)):
            pass
    assert told == said


def test_what_another_process_could_not_finish_leaves_no_file_here(monkeypatch, tmp_path):
    answers = iter([False, True])
    monkeypatch.setattr(distributed, "anywhere", lambda flag: next(answers))
    with (
        pytest.raises(UserError, match="another process failed"),
        distributed.entered_by_all(atomic_write(tmp_path / "a")) as temporary,
    ):
        temporary.write_text("mine")
    assert not list(tmp_path.iterdir())


def test_an_error_without_a_text_is_named_by_its_class(monkeypatch):
    def refuse():
        raise RuntimeError

    monkeypatch.setattr("jax.distributed.initialize", refuse)
    monkeypatch.setenv(distributed.CLUSTER, "1")
    with pytest.raises(UserError, match="cannot join the other processes: RuntimeError"):
        distributed.join()
