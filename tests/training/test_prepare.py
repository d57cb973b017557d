"""What a run was begun with: measured or chosen for a new one, and read again by one that goes on."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import own_network  # noqa: F401  # registers the network
import pytest

from kmq_jax.core import mesh
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import read_object, write_json
from kmq_jax.data.source import open_source
from kmq_jax.models.speaker_model import frontend_of
from kmq_jax.training import prepare
from kmq_jax.training import step as steps
from kmq_jax.training.config import default_config, smoke
from kmq_jax.training.options import TrainOptions
from kmq_jax.training.workdir import check_same_inputs, inputs_of

OBJECTIVE = steps.Objective(None, None, None, None, SimpleNamespace(seed=0, quant=None), 1)
PARAMS = SimpleNamespace(network={}, classifier=None)


def measured(workdir, resumes):
    return prepare.measured_ranges(OBJECTIVE, workdir, None, SimpleNamespace(utterances=None), resumes)


def chosen(workdir, resumes):
    return prepare.allocate(OBJECTIVE, workdir, PARAMS, {}, None, None, resumes)


@pytest.mark.parametrize(
    ("make", "name", "stale", "new"),
    [
        (measured, "ranges.json", {"conv": [0.25, 5]}, {"conv": (0.5, 3)}),
        (chosen, "bits.json", {"conv": 2}, {"conv": 4}),
    ],
)
def test_what_a_start_without_a_step_has_left_counts_for_nothing(tmp_path, monkeypatch, make, name, stale, new):
    monkeypatch.setattr(prepare, "random_crops", lambda *given: None)
    monkeypatch.setattr(prepare, "first_batch", lambda *given: {})
    monkeypatch.setattr(prepare.activations, "measure", lambda *given: {"conv": (0.5, 3.0)})
    monkeypatch.setattr(prepare.steps, "features_of", lambda *given: None)
    monkeypatch.setattr(prepare.qat, "allocate", lambda *given: {"conv": 4})
    with pytest.raises(UserError, match=rf"{name} is missing: the run was begun with it"):
        make(tmp_path, resumes=True)
    write_json(tmp_path / name, stale)
    assert make(tmp_path, resumes=True) == {place: tuple(v) if v == [0.25, 5] else v for place, v in stale.items()}
    assert make(tmp_path, resumes=False) == new == make(tmp_path, resumes=True)
    assert list(read_object(tmp_path / name)) == ["conv"]


def test_all_processes_give_a_tensor_the_bits_that_the_first_gave_it(tmp_path, monkeypatch):
    """Each lists tensors by the sensitivity that it found on its own batch."""
    found, sent = iter([{"second": 4, "first": 2}, {"first": 3, "second": 2}]), []
    monkeypatch.setattr(prepare, "_on_own_devices", lambda objective: objective)
    monkeypatch.setattr(prepare, "first_batch", lambda *given: {})
    monkeypatch.setattr(prepare.steps, "features_of", lambda *given: None)
    monkeypatch.setattr(prepare.qat, "allocate", lambda *given: next(found))
    monkeypatch.setattr(prepare.distributed, "of_first", lambda values: sent.append(values) or sent[0])
    processes = [chosen(tmp_path, resumes=False) for _ in range(2)]
    assert processes == [{"first": 2, "second": 4}] * 2


def test_what_the_settings_name_must_be_what_it_was(tmp_path):
    speech = open_source("synthetic:dev?speakers=4&utterances=2")
    now = inputs_of(speech) | {"teacher": "a"}
    check_same_inputs(now, tmp_path)  # of a new run nothing is known
    write_json(tmp_path / "inputs.json", now)
    check_same_inputs(now, tmp_path)
    check_same_inputs(inputs_of(speech), tmp_path)
    with pytest.raises(UserError, match="holds a run with another teacher than distill.teacher or init_from hold now"):
        check_same_inputs(now | {"teacher": "b"}, tmp_path)
    parts = [[0.0, 1.0]] * len(speech)
    for other in (speech.select([1, 0, *range(2, 8)]), dataclasses.replace(speech, spans=np.array(parts))):
        with pytest.raises(UserError, match="8 utterances of 4 speakers in data.train, which now has others"):
            check_same_inputs(inputs_of(other), tmp_path)


def test_what_is_measured_outside_steps_lies_on_devices_of_the_process(tmp_path, monkeypatch):
    """Steps run on four devices, of which a process may have two: it cannot compute on the others by itself."""
    options, everywhere = TrainOptions.from_config(smoke(default_config("own_tdnn"))), mesh.make_mesh()
    objective = steps.make_objective(None, frontend_of(options.frontend), options, everywhere, epoch_steps=2)
    own = jax.local_devices()[:2]
    assert everywhere.size == 4
    monkeypatch.setattr(jax, "local_devices", lambda: own)
    data = SimpleNamespace(utterances=open_source(options.data.train), failures={}, epoch_steps=2)
    (first, second) = prepare.speech_of(objective, data).passes(1)
    # `allocate` gives its loss features; here the loss is these.
    found = []
    monkeypatch.setattr(prepare.steps, "total_loss", lambda *given: (given[4], None))

    def allocate(section, network, loss, key):
        found.append(loss(network))
        return {"conv": 4}

    monkeypatch.setattr(prepare.qat, "allocate", allocate)
    prepare.allocate(objective, tmp_path, PARAMS, {}, None, data, resumes=False)
    for features in (first, second, *found):
        assert features.shape == (8, 98, 81) and features.devices() <= set(own)
