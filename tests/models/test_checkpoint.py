from types import SimpleNamespace

import numpy as np
import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.models import checkpoint
from kmq_jax.models.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpoints(directory, keep=2, writes=True) as writer:
        for step in (1, 2, 3):
            writer.save(step, network={"kernel": np.full((2, 3), step, np.float32)})
    return directory


def test_readers_change_nothing(saved):
    under_way = saved / "4.orbax-checkpoint-tmp"  # as orbax calls one that is being written
    (under_way / "network").mkdir(parents=True)
    with Checkpoints(saved) as reader:
        assert reader.steps() == [2, 3]
        np.testing.assert_array_equal(reader.load(3, "network")["kernel"], np.full((2, 3), 3))
    assert (under_way / "network").is_dir()
    with Checkpoints(saved / "none") as reader:
        assert reader.steps() == []
    assert not (saved / "none").exists()
    with Checkpoints(saved, writes=True) as writer:
        assert writer.steps() == [2, 3]
    assert not under_way.exists()


def test_saving_never_skips_in_silence(saved):
    with Checkpoints(saved, keep=3, writes=True) as writer:
        writer.save(3, network={"kernel": np.zeros((2, 3), np.float32)})  # the one it goes on from
        with pytest.raises(UserError, match="has a checkpoint 2 that this run did not write"):
            writer.save(2, network={"kernel": np.zeros((2, 3), np.float32)})
        np.testing.assert_array_equal(writer.load(3, "network")["kernel"], np.full((2, 3), 3))


@pytest.mark.parametrize("text, told", [("Event loop is closed", 0), ("another", 1)])
def test_writes_that_go_on_after_their_failure_are_not_told_again(monkeypatch, text, told):
    """Threads of tensorstore end so on a full disk, by either hook, after the one line that says why."""
    heard = []
    monkeypatch.setattr(checkpoint, "_told_before", lambda *error: heard.append(error))
    monkeypatch.setattr(checkpoint, "_ignored_before", heard.append)
    error = RuntimeError(text)
    checkpoint._tell(RuntimeError, error, None)
    checkpoint._tell_ignored(SimpleNamespace(exc_value=error))
    assert len(heard) == 2 * told
