import json
import os
import struct
import subprocess
import sys

import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.training.runlog import RunLog, read_runlog

NO_EVENTS = "tensorboardX is not installed"


def test_lines_are_json_and_nan_is_null(tmp_path):
    log = RunLog(tmp_path / "m.jsonl", 0)
    log.write(1, {"loss": 2.5, "bad": float("nan")})
    log.close()
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 1, "loss": 2.5, "bad": None}


def test_resuming_drops_the_steps_that_will_come_again(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    log = RunLog(path, 2)
    log.write(3, {"loss": 1.0})
    log.close()
    assert read_runlog(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.0}]


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"m\.jsonl:2"):
        read_runlog(tmp_path / "m.jsonl")


def events(directory):
    """Reads TFRecord files: length, its checksum, an Event, its checksum."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2", reason=NO_EVENTS)
    for file in sorted(directory.iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_event_files_hold_what_the_lines_hold(tmp_path):
    pytest.importorskip("tensorboardX", reason=NO_EVENTS)
    for step, loss in ((0, 2.5), (1, 1.25)):  # begun, and taken up again after step 1
        log = RunLog(tmp_path / "m.jsonl", step, tmp_path / "events")
        log.write(step + 1, {"loss": loss, "bad": float("nan")})
        log.close()
    found = list(events(tmp_path / "events"))
    values = [(event.step, v.tag, v.simple_value) for event in found for v in event.summary.value]
    assert values == [(1, "loss", 2.5), (2, "loss", 1.25)]
    assert [event.step for event in found if event.session_log.status == event.session_log.START] == [1, 2]


def test_events_without_the_package_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with pytest.raises(UserError, match="extra `tensorboard`"):
        RunLog(tmp_path / "m.jsonl", 0, tmp_path / "events")
    RunLog(tmp_path / "m.jsonl", 0).close()


def test_weights_and_biases_get_each_line_of_one_run(tmp_path, monkeypatch):
    told = []

    class StandIn:
        def init(self, **settings):
            told.append(settings)
            return self

        def log(self, values, step):
            told.append((step, values))

        def finish(self):
            told.append("finished")

    monkeypatch.setitem(sys.modules, "wandb", StandIn())
    for step in (0, 1):  # begun, and taken up again
        log = RunLog(tmp_path / "run" / "m.jsonl", step, project="voices", settings={"seed": 3})
        log.write(step + 1, {"loss": 2.5, "bad": float("nan")})
        log.close()
    first, line, end, second, again, _ = told
    assert first == second and first["project"] == "voices" and first["resume"] == "allow"
    assert first["name"] == "run" and first["config"] == {"seed": 3} and len(first["id"]) == 16
    assert (line, again, end) == ((1, {"loss": 2.5, "bad": None}), (2, {"loss": 2.5, "bad": None}), "finished")


def test_weights_and_biases_without_a_network(tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed")
    code = """if True:
        from kmq_jax.training.runlog import RunLog
        log = RunLog("m.jsonl", 0, project="voices", settings={"seed": 3})
        log.write(1, {"loss": 2.5})
        log.close()
    """
    environment = {
        **os.environ,
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    (kept,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"loss" in kept.read_bytes()


def test_weights_and_biases_without_the_package_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--wandb needs the package wandb: pip install wandb"):
        RunLog(tmp_path / "m.jsonl", 0, project="voices")
    assert not list(tmp_path.iterdir())
