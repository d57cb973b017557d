"""Training as users start it, of the smallest network at hand: resume, pre-emption, NaN, mistakes."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import commands
import jax
import numpy as np
import own_network  # noqa: F401  # registers the network
import pytest

from kmq_jax.cli import config_flags
from kmq_jax.core import mesh
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import write_json
from kmq_jax.core.locks import sole_writer
from kmq_jax.data import pipeline, source
from kmq_jax.models.checkpoint import Checkpoints
from kmq_jax.models.speaker_model import frontend_of, load_model, save_model
from kmq_jax.training import from_models, loop
from kmq_jax.training import step as steps
from kmq_jax.training.config import default_config, smoke
from kmq_jax.training.from_models import describe
from kmq_jax.training.options import TrainOptions
from kmq_jax.training.runlog import read_runlog
from kmq_jax.training.state import load_classifier
from kmq_jax.training.validation import open_validation
from kmq_jax.training.workdir import inputs_of

ROOT = Path(__file__).parents[2]
VOICES = "synthetic:dev?speakers=8&utterances=4"


def tiny(**changes):
    """Four steps of a tiny network on synthetic voices, without validation."""
    config = smoke(default_config("own_tdnn"))
    config.validation.data = ""
    config.checkpoint_epochs = 0.5
    config.average_last = 0
    config.update(changes)
    return config


def plain(**changes):
    """The same without augmentation, most of what there is to compile."""
    config = tiny(**changes)
    config.data.augment, config.spec_augment = False, 0.0
    return config


def leaves(workdir):
    return jax.tree.leaves(load_model(workdir).variables)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run that others are compared with."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, loop.train(tiny(), workdir)


def stop_after(step, monkeypatch):
    """Sends SIGTERM to this process once training has done so many steps."""
    take = loop.Loop._take_step

    def take_and_stop(self):
        take(self)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.Loop, "_take_step", take_and_stop)


def test_what_a_run_leaves_behind(whole):
    workdir, summary = whole
    assert summary["finished"] and summary["steps"] == 4
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert json.loads((workdir / "config.json").read_text())["model"]["name"] == "own_tdnn"
    (start,) = json.loads((workdir / "starts.json").read_text())
    assert start["step"] == 0 and start["jax"] == jax.__version__ and {"revision", "dirty", "python"} <= start.keys()
    log = read_runlog(workdir / "metrics.jsonl")
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert {"loss", "accuracy", "learning_rate", "margin", "gradient_norm", "examples_per_second"} <= log[0].keys()
    assert all(np.isfinite(leaf).all() for leaf in leaves(workdir))


def test_a_finished_run_is_not_repeated(whole):
    workdir, summary = whole
    before = leaves(workdir)
    assert loop.train(tiny(), workdir) == summary
    assert all((a == b).all() for a, b in zip(before, leaves(workdir)))


def test_a_kill_between_the_last_checkpoint_and_the_summary_loses_no_figure(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    summary = loop.train(tiny(), tmp_path / "run")
    assert {name for name in summary if summary[name] != whole[1][name]} <= {"seconds", "examples_per_second"}
    assert summary["seconds"] > 0 and summary["examples_per_second"] > 0
    assert read_runlog(tmp_path / "run" / "metrics.jsonl") == read_runlog(whole[0] / "metrics.jsonl")


def test_the_summary_of_a_stopped_start_is_not_taken_for_that_of_the_run(whole, tmp_path):
    """It was stopped, went on, and was killed after its last checkpoint."""
    shutil.copytree(whole[0], tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text(json.dumps(whole[1] | {"finished": False, "steps": 2}))
    summary = loop.train(tiny(average_last=2), tmp_path / "run")
    assert summary["finished"] and summary["steps"] == 4 and (tmp_path / "run" / "averaged.kmq").exists()
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary


def test_a_finished_run_is_finished_anew_by_another_validation_and_average(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    config = tiny(average_last=2)
    config.validation.update(data=VOICES, trials=VOICES)
    summary = loop.train(config, tmp_path / "run")
    assert summary["finished"] and (tmp_path / "run" / "averaged.kmq").exists()
    expected = open_validation(TrainOptions.from_config(config).validation).eer(load_model(tmp_path / "run"))
    assert summary["validation_eer"] == expected
    assert loop.train(config, tmp_path / "run") == summary  # which is not repeated
    other = VOICES.replace("dev", "test")
    config.average_last = 0
    config.validation.update(data=other, trials=other)
    summary = loop.train(config, tmp_path / "run")
    expected = open_validation(TrainOptions.from_config(config).validation).eer(load_model(tmp_path / "run"))
    assert summary["validation_eer"] == expected and not (tmp_path / "run" / "averaged.kmq").exists()
    assert loop.train(tiny(), tmp_path / "run")["validation_eer"] is None


def test_other_data_at_the_same_place_are_refused(whole, monkeypatch):
    found = source.open_sources(tiny().data.train)
    renamed = dataclasses.replace(found, speakers=tuple(name.replace("0000", "9999") for name in found.speakers))
    for other, has in ((found.select(range(31)), "has 31 utterances of 8 speakers"), (renamed, "has others")):
        monkeypatch.setattr(source, "open_sources", lambda place, speakers=True, other=other: other)
        with pytest.raises(UserError, match=f"a run with 32 utterances of 8 speakers in data.train, which now {has}"):
            loop.train(tiny(), whole[0])


def test_two_runs_at_once_are_refused(whole):
    with sole_writer(whole[0]), pytest.raises(UserError, match="is being written to by process"):
        loop.train(tiny(), whole[0])


def test_a_stopped_run_goes_on_bit_exactly(whole, tmp_path, monkeypatch, capfd):
    saves = []
    save = Checkpoints.save

    def stop_after_two(self, step, **parts):
        save(self, step, **parts)
        saves.append(step)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Checkpoints, "save", stop_after_two)
    summary = loop.train(tiny(), tmp_path, tensorboard=importlib.util.find_spec("tensorboardX") is not None)
    assert not summary["finished"] and 2 <= summary["steps"] < 4 and saves[-1] == summary["steps"]
    monkeypatch.setattr(Checkpoints, "save", save)
    stop_after(4, monkeypatch)
    assert "goes on from there" in capfd.readouterr().err
    assert loop.train(tiny(), tmp_path)["finished"]
    assert "goes on from there" not in capfd.readouterr().err  # there is nothing left of it
    assert all((a == b).all() for a, b in zip(leaves(whole[0]), leaves(tmp_path), strict=True))
    losses = [[line["loss"] for line in read_runlog(d / "metrics.jsonl")] for d in (whole[0], tmp_path)]
    assert losses[0] == losses[1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of ml_collections' way to load a file
def test_a_killed_run_goes_on_bit_exactly(tmp_path):
    """Killed in a process of its own; this one, whose devices and compiler settings are the same, goes on."""
    command = [
        sys.executable,
        "-m",
        "kmq_jax.train",
        "--config=tests/own_config.py",
        f"--workdir={tmp_path / 'killed'}",
    ]
    command += [f"--config.{setting}" for setting in ("validation.data=", "epochs=6.0", "average_last=0")]
    command += ["--config.checkpoint_epochs=0.5"]
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT / "tests")}
    killed = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and killed.poll() is None and not (tmp_path / "killed/checkpoints/3").exists():
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    config = config_flags.parse_flags(command[2:])[0]
    for workdir in ("killed", "whole"):
        assert loop.train(config, tmp_path / workdir)["finished"]
    assert all((a == b).all() for a, b in zip(leaves(tmp_path / "killed"), leaves(tmp_path / "whole"), strict=True))
    steps = [line["step"] for line in read_runlog(tmp_path / "killed" / "metrics.jsonl")]
    assert steps == list(range(1, 13))


def test_nan_stops_the_run_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path):
    config = plain()
    config.learning_rate.update(kind="step", start=1e-3, peak=1e38, warmup_epochs=0.5, flat_until=9.0)
    with pytest.raises(UserError) as stopped:
        loop.train(config, tmp_path)
    message = r"became (?:nan|inf) at step (\d); the last good checkpoint is step (\d) \((.*)/checkpoints\)"
    told = re.search(message, str(stopped.value))
    assert told and int(told[2]) < int(told[1]) and told[3] == str(tmp_path)
    assert Checkpoints(tmp_path / "checkpoints").steps()[-1] == int(told[2])
    assert all(np.isfinite(leaf).all() for leaf in leaves(tmp_path))


def test_metrics_are_fetched_once_the_next_step_is_on_the_device(tmp_path, monkeypatch):
    """A line of the log waits for the step after it, but for the last; what it holds is of its own steps."""
    events, compiled, write = [], loop.Loop._compile, loop.RunLog.write

    def noted(self, phase):
        step = compiled(self, phase)

        def take(*args):
            events.append("step")
            return step(*args)

        return take

    def line(self, step, values):
        events.append(step)
        write(self, step, values)

    monkeypatch.setattr(loop.Loop, "_compile", noted)
    monkeypatch.setattr(loop.RunLog, "write", line)
    lines = {}
    for every, expected in (
        (1, ["step", "step", 1, "step", 2, "step", 3, 4]),
        (3, ["step", "step", "step", "step", 3, 4]),
    ):
        events.clear()
        loop.train(plain(log_every=every, checkpoint_epochs=0.0), tmp_path / str(every))
        assert events == expected
        lines[every] = read_runlog(tmp_path / str(every) / "metrics.jsonl")
    alone = [line["loss"] for line in lines[1]]
    assert lines[3][0]["loss"] == pytest.approx(np.mean(alone[:3]), rel=1e-6)  # of float32
    assert lines[3][0]["epoch"] == 1.5 and lines[3][1]["loss"] == alone[3]


def losses_on(devices, count=3):
    """Losses of a few steps of the same run on a mesh of these devices."""
    options = TrainOptions.from_config(plain())
    utterances = source.open_sources(options.data.train)
    network = describe(options).network()
    places = mesh.make_mesh(devices)
    params, stats = steps.init_params(network, options, len(utterances.speaker_names))
    objective = steps.make_objective(network, frontend_of("kiwano"), options, places, epoch_steps=4)
    recipe = steps.make_recipe(objective, steps.make_task(options, 4), params)
    state = steps.init_state(recipe, params, stats)
    shardings = mesh.tree_shardings(state, places, [("classifier", 0)])
    state = jax.device_put(state, shardings)
    step = steps.jit_train_step(recipe, shardings)
    batches = pipeline.training_batches(utterances, batch_size=8, crop_samples=16000, seed=0, threads=0)
    losses = []
    for _, batch in zip(range(count), batches):
        state, metrics = step(state, mesh.shard_batch(batch, places))
        losses.append(float(metrics["loss"]))
    return losses


def test_four_devices_give_the_losses_of_one():
    np.testing.assert_allclose(losses_on(jax.devices()[:4]), losses_on(jax.devices()[:1]), rtol=1e-5)


def test_fine_tuning_starts_from_network_and_classifier(whole, tmp_path):
    config = plain(init_from=str(whole[0]), epochs=0.5)
    config.learning_rate.update(start=0.0, peak=1e-12, warmup_epochs=2.0)
    config.loss.margin = 0.0
    loop.train(config, tmp_path)
    kernels = [load_model(d).variables["params"]["frame1"]["conv"]["kernel"] for d in (whole[0], tmp_path)]
    np.testing.assert_allclose(*kernels, rtol=1e-6)
    centres = [
        Checkpoints(d / "checkpoints").load(s, "classifier")["centres"] for d, s in ((whole[0], 4), (tmp_path, 1))
    ]
    np.testing.assert_allclose(*centres, rtol=1e-6)


def test_a_model_without_a_classifier_gets_one_from_its_embeddings_of_the_speakers(whole, tmp_path):
    save_model(tmp_path / "bare.kmq", load_model(whole[0]))
    config = plain(init_from=str(tmp_path / "bare.kmq"), epochs=0.5)
    config.learning_rate.update(start=0.0, peak=1e-12, warmup_epochs=2.0)
    loop.train(config, tmp_path / "run")
    centres = Checkpoints(tmp_path / "run" / "checkpoints").load(1, "classifier")["centres"][:, 0]

    utterances = source.open_source(config.data.train)
    expected = np.zeros_like(centres)
    for i, label in enumerate(utterances.labels):  # four a speaker, so all of them count
        wave = utterances.load(i)[: int(config.data.crop_seconds * source.SAMPLE_RATE)]
        embedding = load_model(tmp_path / "bare.kmq").embed(wave, source.SAMPLE_RATE)
        expected[label] += embedding / np.linalg.norm(embedding) / 4
    np.testing.assert_allclose(centres, expected, atol=1e-4)


def test_centres_are_those_of_the_same_speakers_at_the_same_speeds(tmp_path, monkeypatch):
    speech = source.open_source("synthetic:train?speakers=4&utterances=2")
    others = source.open_source("synthetic:dev?speakers=4&utterances=2")
    centres = np.arange(12.0).reshape(12, 1, 1)
    monkeypatch.setattr(from_models, "load_classifier", lambda checkpoints: centres)
    (tmp_path / "checkpoints").mkdir()
    write_json(tmp_path / "config.json", {"data": {"speeds": [0.9, 1.0, 1.1]}})
    for known in (False, True):  # an older version did not tell the speakers
        assert from_models.centres_of(tmp_path, speech, (1.0,)).ravel().tolist() == [4, 5, 6, 7]
        assert from_models.centres_of(tmp_path, speech, (1.0, 0.9)).ravel().tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
        assert from_models.centres_of(tmp_path, speech, (1.0, 0.8)) is None
        assert from_models.centres_of(tmp_path, speech.select(range(4)), (1.0,)) is None
        assert (from_models.centres_of(tmp_path, others, (1.0,)) is None) == known
        write_json(tmp_path / "inputs.json", inputs_of(speech))
    assert from_models.centres_of(tmp_path / "checkpoints", speech, (1.0,)) is None  # no run


def test_a_model_that_computes_otherwise_is_no_start_though_its_weights_fit(whole, tmp_path, monkeypatch):
    model = load_model(whole[0])
    monkeypatch.setattr(from_models, "load_model", lambda path: dataclasses.replace(model, frontend="wespeaker"))
    message = r"init_from=there sees features of frontend 'wespeaker', not 'kiwano'"
    with pytest.raises(UserError, match=message):
        loop.train(plain(init_from="there"), tmp_path)
    assert not list(tmp_path.glob("checkpoints/*"))
    options = TrainOptions(model={"name": "resnet50", "activation": "silu", "remat": True})
    other = describe(TrainOptions(model={"name": "resnet50", "activation": "relu"}))
    with pytest.raises(UserError, match=r"distill.teacher=x has model.activation=relu, not silu"):
        from_models.check_same_network("distill.teacher", "x", other, options)
    with pytest.raises(UserError, match=r"distill.teacher=x is of model resnet36, not resnet50"):
        from_models.check_same_network(
            "distill.teacher", "x", describe(TrainOptions(model={"name": "resnet36"})), options
        )
    from_models.check_same_network("distill.teacher", "x", describe(TrainOptions(model={"name": "resnet50"})), options)


def test_a_run_that_was_killed_before_its_first_checkpoint_has_no_classifier(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert load_classifier(checkpoints) is None


def test_outside_the_main_thread_no_signal_is_listened_to():
    found = []

    def listen():
        with loop.StopRequest().listening():
            found.append(True)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [True]


def test_the_average_of_checkpoints_is_their_mean(tmp_path):
    config = tiny(average_last=2)
    loop.train(config, tmp_path)
    assert (tmp_path / "averaged.kmq").exists()
    last = [Checkpoints(tmp_path / "checkpoints").load(s, "network")["params"] for s in (3, 4)]
    expected = jax.tree.map(lambda a, b: (a + b) / 2, *last)
    got = load_model(tmp_path).variables["params"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected)


def test_what_a_stop_has_saved_is_not_averaged(tmp_path, monkeypatch):
    config = plain(average_last=2, checkpoint_epochs=1.0)  # after steps 2 and 4
    loop.train(config, tmp_path / "whole")
    stop_after(3, monkeypatch)
    assert loop.train(config, tmp_path / "stopped")["steps"] == 3
    assert Checkpoints(tmp_path / "stopped" / "checkpoints").steps() == [2, 3]
    assert loop.train(config, tmp_path / "stopped")["finished"]
    assert Checkpoints(tmp_path / "stopped" / "checkpoints").steps() == [2, 4]
    averages = [(tmp_path / name / "averaged.kmq").read_bytes() for name in ("whole", "stopped")]
    assert averages[0] == averages[1]


def test_an_average_of_fewer_checkpoints_than_asked_for_is_told(tmp_path, capfd):
    loop.train(plain(average_last=5, checkpoint_epochs=1.0), tmp_path)
    assert "warning: `average_last` (=5): the run kept 2 checkpoints" in capfd.readouterr().err


MISTAKES = {
    "model.features (=80)": lambda c: c.model.update(features=80),
    "batch_size (=6)": lambda c: c.update(batch_size=6),
    "`loss.kind` (=arc)": lambda c: c.loss.update(kind="arc"),
    "`optimizer.name` (=lion)": lambda c: c.optimizer.update(name="lion"),
    "`learning_rate.kind` (=flat)": lambda c: c.learning_rate.update(kind="flat"),
    "frontend 'mfcc'": lambda c: c.update(frontend="mfcc"),
    "no data at": lambda c: c.data.update(train="nowhere"),
    "fewer than batch_size": lambda c: c.update(batch_size=64, epoch_steps=0),
    "first match of no name": lambda c: c.optimizer.update(groups=(("bais", 1.0, 0.0),)),
    "is no model": lambda c: c.update(init_from="nowhere"),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_told_before_any_step(message, tmp_path):
    config = tiny()
    MISTAKES[message](config)
    with pytest.raises(UserError) as error:
        loop.train(config, tmp_path)
    assert message in str(error.value)
    assert not list(tmp_path.glob("checkpoints/*"))
    assert not (tmp_path / "config.json").exists()  # the mended command may use the same directory


def test_another_run_in_the_same_directory_is_refused(whole):
    config = tiny()
    config.learning_rate.peak = 0.5
    with pytest.raises(UserError, match=r"learning_rate.peak=0.1, not 0.5"):
        loop.train(config, whole[0])


def test_a_full_disk_is_one_line_and_keeps_the_earlier_checkpoint(tmp_path, monkeypatch):
    from orbax.checkpoint import v1 as ocp

    save = ocp.training.Checkpointer.save_checkpointables

    def full(self, step, parts):
        if step == 2:
            raise OSError(28, "No space left on device")
        return save(self, step, parts)

    monkeypatch.setattr(ocp.training.Checkpointer, "save_checkpointables", full)
    with pytest.raises(UserError, match="cannot save checkpoint 2 .*No space left"):
        loop.train(tiny(), tmp_path)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [1]


@pytest.fixture
def told(monkeypatch, capsys):
    """Starts the command with flags that are a mistake; returns the line that it prints."""

    def call(*flags):
        assert commands.run(monkeypatch, "train", *flags) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "Traceback" not in said, said
        return said

    return call


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of ml_collections' way to load a file
@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--config.modle.width=3", "modle"),
        ("--config.epochs=many", "epochs"),
        ("--wrokdir=x", "wrokdir"),
        ("stray", "stray"),
        ("--workdir=gs://bucket/run", "mount the bucket"),
    ],
)
def test_a_wrong_flag_is_one_line_and_status_2(flag, named, tmp_path, told):
    config = f"--config={ROOT}/configs/voxceleb2_resnet36.py:smoke"
    assert named in told(config, *([] if "--workdir" in flag else [f"--workdir={tmp_path}/run"]), flag)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of ml_collections' way to load a file
def test_a_missing_config_and_a_missing_workdir(tmp_path, told):
    assert "nowhere.py" in told("--config=nowhere.py", f"--workdir={tmp_path}")
    assert "--workdir" in told(f"--config={ROOT}/configs/voxceleb2_resnet36.py:smoke")
