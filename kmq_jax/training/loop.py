"""Training: prepare, loop, finish; and taking a run up again where it stopped."""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import jax
import ml_collections
import numpy as np

from kmq_jax.core import distributed
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json, Row, read_object, write_json
from kmq_jax.core.progress import Bar
from kmq_jax.core.signals import handled
from kmq_jax.models import registry
from kmq_jax.models.checkpoint import Checkpoints
from kmq_jax.models.runner import AVERAGED
from kmq_jax.models.speaker_model import SpeakerModel, save_model
from kmq_jax.training import step as steps
from kmq_jax.training.options import TrainOptions, steps_of
from kmq_jax.training.prepare import Run, prepare
from kmq_jax.training.runlog import RunLog
from kmq_jax.training.validation import in_words
from kmq_jax.training.workdir import finishes_alike, record_start, settings_of

Summary = Json
"""What `summary.json` holds."""


def train(config: ml_collections.ConfigDict, workdir: Path, tensorboard: bool = False, wandb: str = "") -> Summary:
    """Trains, or takes up training where it stopped.

    Args:
        config: from `training.config.default_config`, changed. Its section `study`, if it has one, is left out.
        workdir: gets `config.json`, `inputs.json`, `starts.json`, `metrics.jsonl`, `checkpoints/` and, at the end,
            `summary.json`.
        tensorboard: also write the metrics as event files, into `workdir/tensorboard`.
        wandb: also send them to this project of Weights & Biases.

    Returns:
        What `summary.json` holds: `steps`, `finished`, `loss`, `validation_eer` (percent), `examples_per_second`, ...

    Raises:
        UserError: a setting, file or value is at fault, or the loss became NaN; what was saved before stays.
    """
    options = TrainOptions.from_config(config)
    settings = settings_of(config)
    with contextlib.ExitStack() as closing:
        run = prepare(options, settings, workdir, closing)
        step = int(run.state.step)
        ended, alike = step == run.total_steps, finishes_alike(settings, workdir)
        if ended and alike and (summary := _finished(workdir, step)):
            return summary
        (workdir / AVERAGED).unlink(missing_ok=True)  # `load_model` takes it before any checkpoint
        events = workdir / "tensorboard" if tensorboard else None
        log = RunLog(workdir / "metrics.jsonl", step, events, wandb, settings)
        bar = Bar(run.total_steps, "training", "step", done=step, hidden=jax.process_index() != 0)
        closing.callback(bar.close)
        closing.callback(log.close)
        bar.say(_headline(run, step))
        loop = Loop(run, log, bar)
        loop.recall(log.kept, alike)
        loop.run()
        summary = finish(run, loop, bar)
        if ended and not alike:  # last: until then, another start does it again
            record_start(settings, workdir, step, run.inputs)
        return summary


def _finished(workdir: Path, steps: int) -> Summary | None:
    """The summary of a run that ended after so many steps; None where there is none, or that of a stopped start."""
    path = workdir / "summary.json"
    summary = read_object(path) if path.exists() else {}
    return summary if summary.get("finished") is True and summary.get("steps") == steps else None


def _headline(run: Run, step: int) -> str:
    objective, devices = run.recipe.objective, run.recipe.objective.mesh
    return (
        f"{run.options.model['name']}, {registry.parameter_count(objective.network):,} parameters, "
        f"{run.data.classes} classes; {len(run.data.utterances)} utterances; steps {step} to {run.total_steps} "
        f"({run.data.epoch_steps} an epoch) on {devices.size} {devices.devices.flat[0].device_kind} device(s)"
    )


class Loop:
    """The steps of a run, and what is due between them: metrics, checkpoints, validation, the next phase.

    Attributes:
        first: steps done before this start.
        step: steps done in all.
        stopped_by: the name of the signal that asked the run to stop, or "another process"; None where none did.
        last: the newest metrics, means over the steps since those before.
        figures: of the newest validation.
        seconds: how long the steps of this start took.
    """

    def __init__(self, run: Run, log: RunLog, bar: Bar):
        """Compiles nothing yet."""
        self._run, self._log, self._bar = run, log, bar
        self.first = self.step = int(run.state.step)
        self.stopped_by: str | None = None
        self.last: dict[str, float] = {}
        self.figures: dict[str, float] = {}
        self.seconds = 0.0
        self._start = time.monotonic()
        self._pending: list[steps.Metrics] = []  # of the steps since they were last looked at
        self._due = False  # to be looked at once the next step is on the device, which would else run out of work
        self._rate = Rate(self.step, run.options.batch_size)
        self._phases = run.recipe.task.phases(run.state.params.network)
        # `min`: a run that is done has no next step.
        self._train_step = self._compile(run.recipe.phase_at(min(self.step, run.total_steps - 1)))

    def recall(self, lines: Sequence[Row], alike: bool = True) -> None:
        """Reads a finished run's figures from its log: it was killed after its last checkpoint, before its summary.

        Args:
            lines: of the log.
            alike: whether figures of a validation are those that are asked for now; else it is done again.
        """
        if self.step < self._run.total_steps:
            return
        for line in lines:
            own = {name: value for name, value in line.items() if name != "step"}
            if "loss" in own:  # other lines are of validations
                self.last = own
            elif line["step"] == self.step and alike:
                self.figures = own
        self.seconds = self.last.get("seconds", 0.0)
        self.first = max(self.step - int(self.last.get("steps_taken", 0)), 0)
        if self._run.validation and not self.figures:
            self._validate()

    def run(self) -> None:
        """Takes steps to the end of the run, or until it is asked to stop."""
        if self.step == self._run.total_steps:
            return
        stop, self._start = StopRequest(), time.monotonic()
        with stop.listening():
            while self.step < self._run.total_steps and not self.stopped_by:
                self._enter_phase()
                self._take_step()
                # Several processes must stop at the same step: they agree on it where they wait for one another anyway.
                if jax.process_count() == 1 or self._every(self._run.options.log_every):
                    self.stopped_by = (stop.by or "another process") if distributed.anywhere(bool(stop.by)) else None
                self._report_and_save()
        self.seconds = time.monotonic() - self._start

    def _compile(self, phase: int) -> steps.Step:
        return steps.jit_train_step(self._run.recipe, self._run.shardings, self._phases[phase])

    def _enter_phase(self) -> None:
        """Begins a phase, where the next step is its first."""
        phase = self._run.recipe.phase_at(self.step)
        if self.step == 0:
            self._run.enter_phase(self._phases[0], None)
        elif phase != self._run.recipe.phase_at(self.step - 1):
            self._run.enter_phase(self._phases[phase], self._phases[phase - 1])
            self._train_step = self._compile(phase)

    def _take_step(self) -> None:
        run = self._run
        run.state, metrics = self._train_step(run.state, next(run.data.batches), run.teacher)
        if self._due:
            self._write_metrics()
        self._pending.append(metrics)
        self.step += 1
        if self.step == self.first + 1:  # compiled by now, so no setting can be wrong any more; rates begin here
            record_start(run.settings, run.workdir, self.first, run.inputs)
            jax.block_until_ready(metrics)
            self._rate.since_last(self.step)

    def _every(self, steps: int) -> bool:
        """Whether what happens every so many steps is due; 0 is never."""
        return bool(steps) and self.step % steps == 0

    def _report_and_save(self) -> None:
        run, options = self._run, self._run.options
        ends, epoch_steps = self.step == run.total_steps, run.data.epoch_steps
        saves = ends or bool(self.stopped_by) or self._every(steps_of(options.checkpoint_epochs, epoch_steps))
        validates = run.validation and (ends or self._every(steps_of(options.validation.epochs, epoch_steps)))
        # First, since it refuses to go on, and to save, once a value is not finite.
        if saves or validates:
            self._write_metrics()
        else:
            self._due = self._every(options.log_every)
        if saves:
            if run.recipe.task.saved_as:  # before the checkpoint: what loading the workdir gives
                save_once(run.workdir / run.recipe.task.saved_as, run.trained())
            run.save(self.step)
        if validates:
            self._validate()

    def _write_metrics(self) -> None:
        values = jax.device_get(self._pending)
        check_finite(values, self.step - len(values), self._run.checkpoints)
        self._pending, self._due = [], False
        self.last = {name: float(np.mean([v[name] for v in values])) for name in values[0]}
        # Schedules are told as they are now; a mean over steps says nothing of them.
        self.last |= {name: float(values[-1][name]) for name in ("learning_rate", "margin") if name in self.last}
        rate = self._rate.since_last(self.step)
        self.last |= {"epoch": self.step / self._run.data.epoch_steps, "examples_per_second": rate}
        # Of this start, for a summary that is written by another one.
        self.last |= {"seconds": time.monotonic() - self._start, "steps_taken": self.step - self.first}
        self._log.write(self.step, self.last)
        self._bar.show(self.step, f"loss {self.last['loss']:.4f}, {rate:.1f} examples/s")

    def _validate(self) -> None:
        run = self._run
        assert run.validation is not None
        self.figures = run.validation.figures(run.trained(), run.recipe.task.smaller_bits)
        self._log.write(self.step, self.figures)
        self._bar.say(f"step {self.step}: {in_words(self.figures)}")
        self._rate.since_last(self.step)  # the next rate does not count the time of validation


def finish(run: Run, loop: Loop, bar: Bar) -> Summary:
    """Makes the final model, where the run was not stopped, and writes the summary."""
    finished, figures = loop.step == run.total_steps, loop.figures
    if loop.stopped_by and not finished:  # asked during the last step, it has nothing left to go on with
        bar.say(f"stopped by {loop.stopped_by} at step {loop.step}, saved; the same command goes on from there")
    task = run.recipe.task
    final = task.finish(run.trained(), run.checkpoints, run.speech) if finished else None
    if final:
        save_once(run.workdir / final.file, final.model)
        if run.validation:
            figures = run.validation.figures(final.model, task.smaller_bits)
            bar.say(f"{final.how}: {in_words(figures)}")
    devices = run.recipe.objective.mesh
    summary = {
        "finished": finished,
        "steps": loop.step,
        "epochs": loop.step / run.data.epoch_steps,
        "loss": loop.last.get("loss"),
        "validation_eer": None,  # unless a validation has found it
        **figures,
        "parameters": registry.parameter_count(run.recipe.objective.network),
        "classes": run.data.classes,
        "utterances": len(run.data.utterances),
        "unreadable": dict(run.data.failures),
        "seconds": loop.seconds,
        "examples_per_second": (loop.step - loop.first) * run.options.batch_size / max(loop.seconds, 1e-9),
        "device": f"{devices.size} x {devices.devices.flat[0].device_kind}",
        "jax": jax.__version__,
    }
    if jax.process_index() == 0:
        write_json(run.workdir / "summary.json", summary)
    return summary


class StopRequest:
    """Whether the process was asked to stop: SIGTERM (pre-emption) or Ctrl-C. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        """Nothing was asked yet."""
        self.by: str | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Listens to the signals within the block. Only the main thread can: elsewhere nothing stops the block."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and self.by:  # also the first Ctrl-C after a SIGTERM
                raise KeyboardInterrupt
            self.by = signal.Signals(number).name

        with handled((signal.SIGTERM, signal.SIGINT), handle):
            yield


class Rate:
    """Examples a second, over the steps between two calls."""

    def __init__(self, step: int, batch_size: int):
        """Starts the clock at a step."""
        self._step, self._batch_size, self._time = step, batch_size, time.monotonic()

    def since_last(self, step: int) -> float:
        """The rate since the last call, from which the clock starts again."""
        now = time.monotonic()
        rate = (step - self._step) * self._batch_size / max(now - self._time, 1e-9)
        self._step, self._time = step, now
        return rate


def check_finite(metrics: list[steps.Metrics], first_step: int, checkpoints: Checkpoints) -> None:
    """Raises on the first step whose loss, gradient or new parameters are not finite.

    Called when metrics are logged and before every checkpoint. After every step, the loop would wait for the device.

    Args:
        metrics: of consecutive steps, on the host.
        first_step: steps done before the first of them.
        checkpoints: of the run, for the message.

    Raises:
        UserError: names the step, and the last good checkpoint.
    """
    for i, step_metrics in enumerate(metrics):
        for name in ("loss", "gradient_norm", "parameter_norm"):
            value = float(step_metrics[name])
            if not math.isfinite(value):
                good = checkpoints.steps()
                kept = f"the last good checkpoint is step {good[-1]}" if good else "there was no checkpoint yet"
                raise UserError(f"{name} became {value} at step {first_step + i + 1}; {kept} ({checkpoints.directory})")


def save_once(path: Path, model: SpeakerModel) -> None:
    """Writes a model that every process holds: one of them writes it."""
    if jax.process_index() == 0:
        save_model(path, model)
