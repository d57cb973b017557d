"""Several processes train as one does: the same losses, one log, a common stop, and a resume."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kmq_jax.cli import config_flags, train
from kmq_jax.core import distributed
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import read_json
from kmq_jax.models.speaker_model import load_model
from kmq_jax.quant import codebook_tensors
from kmq_jax.training import loop
from kmq_jax.training.runlog import read_runlog

ROOT = Path(__file__).parents[2]
CONFIG = "tests/own_config.py"
SETTINGS = [
    "--config.dtype=float32",
    # Examples lie in another order, so sums are rounded otherwise. On so small a network that moves gradients by
    # percents within two steps of usual size; steps of this size change the loss by 1e-3, and rounding by 1e-6.
    "--config.optimizer.name=sgd",
    "--config.learning_rate.peak=1e-6",
    "--config.checkpoint_epochs=0.5",
    "--config.validation.epochs=2.0",
    '--config.sharding=(("classifier",0),)',  # split over the devices of both processes
]
# Training in which process 1 alone is asked to stop, when step 2 is saved.
STOPPED_AFTER_TWO = """
import os, signal
from kmq_jax.models import checkpoint
from kmq_jax.cli import train
from kmq_jax.cli import command

save = checkpoint.Checkpoints.save

def save_and_be_asked(self, step, **parts):
    save(self, step, **parts)
    if step == 2 and os.environ["JAX_PROCESS_ID"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)

checkpoint.Checkpoints.save = save_and_be_asked
command.run("train", train.main)
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(XLA_FLAGS="", **changes):
    # Quick compilation, as in all tests, but another number of devices.
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    inherited = {**os.environ, "XLA_FLAGS": f"{flags} {XLA_FLAGS}"}
    own = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT / "tests")}
    return {**inherited, **own, **changes}


def launch(workdir, config=CONFIG, settings=SETTINGS, **changes):
    """Trains in two processes by launch/processes.sh and returns the summary that it printed."""
    run = subprocess.run(
        ["launch/processes.sh", *settings],
        cwd=ROOT,
        env=environment(PYTHON=sys.executable, CONFIG=config, WORKDIR=str(workdir), **changes),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])  # the CPU's collectives print before it


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of ml_collections' way to load a file
def test_two_processes_of_two_devices_are_one_of_four(tmp_path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    whole = loop.train(config_flags.parse_flags(["train", f"--config={CONFIG}", f"--workdir={one}", *SETTINGS])[0], one)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    shared = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": "2",
    }
    command = [sys.executable, "-c", STOPPED_AFTER_TWO, f"--config={CONFIG}", f"--workdir={two}", *SETTINGS]
    pair = [
        subprocess.Popen(
            command, cwd=ROOT, env=environment(**shared, JAX_PROCESS_ID=str(i)), stdout=-1, stderr=-1, text=True
        )
        for i in range(2)
    ]
    said = [process.communicate() for process in pair]
    assert [process.returncode for process in pair] == [train.STOPPED] * 2, said
    assert "stopped by another process at step 3" in said[0][1] and "step" not in said[1][1]
    assert not read_json(two / "summary.json")["finished"] and "{" not in said[1][0]
    assert [line["step"] for line in read_runlog(two / "metrics.jsonl")] == [1, 2, 3]

    summary = launch(two)
    assert summary["finished"] and summary["device"] == whole["device"] == "4 x cpu"
    assert (two / "averaged.kmq").exists()
    assert summary["validation_eer"] == pytest.approx(whole["validation_eer"], abs=2.1)  # a trial or so of 48
    logs = [[line for line in read_runlog(d / "metrics.jsonl") if "loss" in line] for d in (one, two)]
    assert [line["step"] for line in logs[1]] == [1, 2, 3, 4]
    for name in ("loss", "gradient_norm", "parameter_norm"):
        ours, theirs = ([line[name] for line in log] for log in logs)
        np.testing.assert_allclose(theirs, ours, rtol=1e-3 if name == "gradient_norm" else 1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_mixed_precision_kmqat_of_two_processes_is_that_of_one(tmp_path, monkeypatch):
    def train(config, name, *settings):
        words = ["train", f"--config={config}", f"--workdir={tmp_path / name}", *settings]
        return loop.train(config_flags.parse_flags(words)[0], tmp_path / name)

    train(CONFIG, "full", *SETTINGS)
    settings = ["--config.dtype=float32", f"--config.init_from={tmp_path / 'full'}"]
    train(f"{CONFIG}:kmqat", "one", *settings)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    assert launch(tmp_path / "two", f"{CONFIG}:kmqat", settings)["finished"]

    models = [load_model(tmp_path / name) for name in ("one", "two")]
    bits = [[tensor.bits for tensor in codebook_tensors(model.variables)] for model in models]
    assert bits[0] == bits[1] and len(set(bits[0])) > 1
    ours, theirs = (read_runlog(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    losses = [{line["step"]: line["loss"] for line in log if "loss" in line} for log in (ours, theirs)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and list(losses[1]) == [1, 2, 3, 4]


def test_slurm_tasks_find_one_another(tmp_path):
    """A stand-in for srun starts two tasks as SLURM would; they join, and each has what the first decided."""
    (tmp_path / "srun").write_text(
        """#!/usr/bin/env bash
export SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=1 SLURM_STEP_NUM_TASKS=2 SLURM_NTASKS=2
here=$(dirname "$0")
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$PYTHON" -c '
import jax, numpy as np
from kmq_jax.core import distributed
distributed.join()
me = jax.process_index()
print(jax.process_count(), distributed.anywhere(me == 1), distributed.of_first(np.array([me])).tolist())
' > "$here/said$i" & done
wait
"""
    )
    (tmp_path / "srun").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    job = subprocess.run(
        ["bash", "launch/slurm.sbatch"],
        cwd=ROOT,
        env=environment(
            PATH=path,
            PYTHON=sys.executable,
            SLURM_SUBMIT_DIR=str(ROOT),
            SLURM_JOB_ID=str(os.getpid()),  # JAX takes a port above 61440 by it
        ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert job.returncode == 0, job.stderr
    assert all("2 True [0]" in (tmp_path / f"said{i}").read_text() for i in range(2))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "x:1"}, "JAX_NUM_PROCESSES and JAX_PROCESS_ID must be"),
        (
            {"JAX_COORDINATOR_ADDRESS": "x:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            r"JAX_PROCESS_ID \(=2\) must be a whole number below JAX_NUM_PROCESSES \(=2\)",
        ),
    ],
)
def test_variables_that_do_not_fit_are_named(given, message, monkeypatch):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        distributed.join()


def test_alone_there_is_nothing_to_join_and_nothing_to_agree_on(monkeypatch):
    monkeypatch.setattr("jax.distributed.initialize", lambda **_: pytest.fail("joined"))
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    distributed.join()
    assert distributed.anywhere(True) and not distributed.anywhere(False)
    assert distributed.of_first(np.array([3, 4])).tolist() == [3, 4]


@pytest.mark.parametrize("name", ["TPU_WORKER_HOSTNAMES", "KMQ_DISTRIBUTED"])
def test_the_hosts_of_a_tpu_slice_are_left_to_jax(name, monkeypatch):
    calls = []
    monkeypatch.setattr("jax.distributed.initialize", lambda **settings: calls.append(settings))
    monkeypatch.setenv(name, {"TPU_WORKER_HOSTNAMES": "a,b"}.get(name, "1"))
    distributed.join()
    assert calls == [{}]
