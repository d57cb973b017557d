"""The benchmark of a training step: both sides compute the same thing, and say so when one is missing."""

import json
from unittest import mock

import numpy as np
import pytest

from kmq_jax.benchmarks import train
from kmq_jax.benchmarks.options import TrainBench
from kmq_jax.core.errors import UserError

SMALL = {"batch": 2, "frames": 16, "repeats": 1, "threads": 1}


def test_torch_has_the_same_network():
    torch = pytest.importorskip("torch")
    step = train.torch_step(TrainBench(**SMALL), channels_last=False)
    network = next(cell.cell_contents for cell in step.__closure__ if isinstance(cell.cell_contents, torch.nn.Module))
    count = sum(p.numel() for name, p in network.named_parameters() if name != "centres")
    from kmq_jax.models import registry

    assert count == registry.parameter_count(registry.build("wespeaker_resnet34"))
    assert np.isfinite(step())


@pytest.mark.slow
def test_ours_alone_without_torch(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    train.main(TrainBench(**SMALL, json=tmp_path / "figures.json"))
    assert "ours is measured alone" in capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures["sides"]) == ["ours"]
    assert figures["sides"]["ours"]["seconds"] > 0
    assert "ratio" not in figures


@pytest.mark.parametrize("error", [EOFError, ConnectionResetError, BrokenPipeError])
def test_a_worker_that_has_ended_is_named(error, monkeypatch):
    pipe, worker = mock.Mock(), mock.Mock()
    getattr(pipe, "send" if error is BrokenPipeError else "recv").side_effect = error
    context = mock.Mock(**{"Pipe.return_value": (pipe, mock.Mock()), "Process.return_value": worker})
    monkeypatch.setattr(train.multiprocessing, "get_context", lambda way: context)
    with pytest.raises(UserError, match="the process of 'ours' ended: its message stands above"):
        train.measure(["ours"], TrainBench(**SMALL))
    worker.terminate.assert_called_once()
