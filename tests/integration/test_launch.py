"""Launch scripts: sound shell, and the commands they give."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), *(ROOT / "launch").glob("*.sbatch")])


def launch(script, *arguments, **environment):
    return subprocess.run(
        ["bash", f"launch/{script}", *arguments],
        cwd=ROOT,
        env={**os.environ, **{name: str(value) for name, value in environment.items()}},
        capture_output=True,
        text=True,
        check=False,
    )


def stand_in(directory, name, text):
    """Puts a program of that name first on a PATH, and returns the PATH."""
    program = directory / name
    program.write_text(f"#!/usr/bin/env bash\n{text}\n")
    program.chmod(0o755)
    return f"{directory}:{os.environ['PATH']}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound_strict_and_explained(script):
    text = script.read_text()
    assert "set -euo pipefail" in text and "\n# Example: " in text and os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


STUDY = """#!/usr/bin/env bash
if [[ "$*" == *--only=list* ]]; then printf 'fp32\\ndistilled-2\\ndistilled-nested\\nkmqat-2\\n'; exit; fi
echo "$*" >>"$LOG"
[[ "$*" != *"--only=${FAIL:-none}"* ]]
"""


def test_the_networks_of_a_study_are_made_beside_each_other_and_then_measured(tmp_path):
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(STUDY)
    python.chmod(0o755)

    def run(*words, **environment):
        log.write_text("")
        more = {"PYTHON": python, "LOG": log, "CONFIG": "configs/x.py:compare", "WORKDIR": "runs/s", **environment}
        result = launch("study_jobs.sh", *words, **more)
        return result, [line.removeprefix("-m kmq_jax.study ") for line in log.read_text().splitlines()]

    study = "--config=configs/x.py:compare --workdir=runs/s --config.seed=1"
    _, made = run("--config.seed=1", JOBS=1)
    assert made == [f"{study} --only={name}" for name in ("fp32", "distilled-2", "kmqat-2")] + [study]
    _, made = run("--config.seed=1", SLURM_ARRAY_TASK_ID=3)
    assert made == [f"{study} --only=kmqat-2"]
    assert run(SLURM_ARRAY_TASK_ID=9)[1] == []
    result, made = run(JOBS=1, FAIL="distilled-2")
    assert result.returncode and not any(line.endswith("--workdir=runs/s") for line in made)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    found = subprocess.run(["shellcheck", *SCRIPTS], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_one_host_names_the_run_after_its_configuration():
    run = launch("one_host.sh", "--config.seed=1", PYTHON="echo", CONFIG="configs/quickstart.py:smoke")
    assert run.stdout.split() == [
        *("-m", "kmq_jax.train", "--config=configs/quickstart.py:smoke"),
        *("--workdir=runs/quickstart", "--config.seed=1"),
    ]


@pytest.mark.parametrize(("status", "again"), [(0, ""), (75, "requeue 7\n"), (2, "")])
def test_a_slurm_job_that_was_stopped_goes_back_in_the_queue(status, again, tmp_path):
    stand_in(tmp_path, "srun", f"exit {status}")
    path = stand_in(tmp_path, "scontrol", 'echo "$@"')
    run = launch("slurm.sbatch", PATH=path, SLURM_SUBMIT_DIR=ROOT, SLURM_JOB_ID=7)
    assert run.returncode == status and run.stdout == again


GCLOUD = """
echo "$@" >> "$LOG"
case "$*" in
  *"describe kmq-jax --format"*) n=$(wc -l < "$LOG"); [ "$n" -gt 4 ] && echo "${STATE:-ACTIVE}" || echo PROVISIONING ;;
  *describe*) exit 1 ;;
esac
"""


def test_a_tpu_slice_is_asked_for_awaited_and_installed(tmp_path):
    path, log = stand_in(tmp_path, "gcloud", GCLOUD), tmp_path / "log"
    assert "ZONE must" in launch("tpu_pod.sh", "up", PATH=path, LOG=log).stderr
    run = launch("tpu_pod.sh", "up", PATH=path, LOG=log, ZONE="z", BUCKET="my-bucket", SPOT=1, POLL=0)
    assert run.returncode == 0, run.stderr
    calls = log.read_text().split("compute tpus ")[1:]
    assert calls[1].startswith("queued-resources create kmq-jax --node-id=kmq-jax --accelerator-type=v5litepod-16")
    assert "--spot --zone=z" in calls[1] and "waiting for v5litepod-16: PROVISIONING" in run.stderr
    assert calls[-2].startswith("tpu-vm scp") and "kmq-jax:kmq_jax.tar.gz --worker=all" in calls[-2]
    assert calls[-1].startswith("tpu-vm ssh kmq-jax --worker=all") and "'my-bucket' /mnt/bucket" in calls[-1]
    remote = calls[-1].split("--command=")[1].rpartition(" --zone=z")[0]
    assert subprocess.run(["bash", "-n"], input=remote, text=True, check=False).returncode == 0


def test_a_request_for_a_slice_that_failed_ends_the_wait(tmp_path):
    path = stand_in(tmp_path, "gcloud", GCLOUD)
    run = launch("tpu_pod.sh", "up", PATH=path, LOG=tmp_path / "log", ZONE="z", BUCKET="b", POLL=0, STATE="FAILED")
    assert run.returncode == 1 and "the request is FAILED" in run.stderr


def test_training_on_a_slice_is_one_service_on_all_hosts(tmp_path):
    path, log = stand_in(tmp_path, "gcloud", GCLOUD), tmp_path / "log"
    launch("tpu_pod.sh", "train", "--config.data.train=/mnt/bucket/a b", PATH=path, LOG=log, ZONE="z")
    (call,) = log.read_text().splitlines()
    assert "ssh kmq-jax --worker=all" in call and "--unit=kmq_jax" in call and "KMQ_DISTRIBUTED=1" in call
    assert r"--workdir=/mnt/bucket/runs/quickstart --config.data.train=/mnt/bucket/a\ b --zone=z" in call


def test_the_gke_job_has_its_settings_and_arguments():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    run = launch("gke.sh", """--config.data.train=/mnt/a "b'""", BUCKET="b", IMAGE="i", HOSTS=2, DRY_RUN=1)
    assert run.returncode == 0, run.stderr
    job = yaml.safe_load(run.stdout)["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert job["parallelism"] == job["completions"] == 2
    assert container["args"][1:] == ["--workdir=/mnt/bucket/runs/quickstart", """--config.data.train=/mnt/a "b'"""]
    assert container["image"] == "i" and container["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "b"
    assert "BUCKET must" in launch("gke.sh", IMAGE="i", DRY_RUN=1).stderr
