"""The training loop: data, state, steps, checkpoints, validation; and taking a run up again where it stopped."""

import contextlib
import dataclasses
import functools
import json
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from kmq_jax import quant
from kmq_jax.core import distributed, mesh
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import read_json, write_json
from kmq_jax.core.provenance import provenance
from kmq_jax.core.tree import named_leaves
from kmq_jax.data import pipeline, source, trials
from kmq_jax.metrics import detection
from kmq_jax.models import registry
from kmq_jax.models.checkpoint import Checkpoints
from kmq_jax.models.speaker_model import SpeakerModel, at_bits, embed_all, frontend_of, load_model, save_model
from kmq_jax.ptq import moments
from kmq_jax.scoring import cosine
from kmq_jax.training import qat
from kmq_jax.training import step as steps
from kmq_jax.training.config import steps_of
from kmq_jax.training.runlog import RunLog


class StopRequest:
    """Whether the process was asked to stop: SIGTERM (pre-emption) or Ctrl-C. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        """Nothing was asked yet."""
        self.by: str | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Listens to the signals within the block."""

        def handle(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and self.by:
                raise KeyboardInterrupt
            self.by = signal.Signals(number).name

        before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclasses.dataclass(frozen=True)
class Validation:
    """EER on a trial list, measured as training goes."""

    utterances: source.Utterances
    trials: trials.Trials

    def eer(self, speaker_model: SpeakerModel) -> float:
        """Equal error rate in percent (cosine of raw embeddings)."""
        embeddings = embed_all(speaker_model, self.utterances)
        scores = cosine.cosine_scores(embeddings, embeddings, self.trials.enrol, self.trials.test)
        return 100 * detection.eer(scores, self.trials.label)[0]

    def figures(self, speaker_model: SpeakerModel, coarse: Sequence[int] = ()) -> dict[str, float]:
        """`validation_eer`, and `validation_eer_2bit` and so on for the smaller widths of nested codebooks."""
        narrow = {f"validation_eer_{b}bit": self.eer(at_bits(speaker_model, b)) for b in coarse}
        return {"validation_eer": self.eer(speaker_model), **narrow}


class Display:
    """The run on the terminal: a progress bar, or a plain line now and then where there is no terminal."""

    def __init__(self, step: int, total: int, batch_size: int, interval: float = 10.0):
        """Starts the clock of a run that stands at `step` of `total`."""
        self._first, self._total, self._batch_size, self._interval = step, total, batch_size, interval
        self._start = self._last_time = self._shown = time.monotonic()
        self._last_step = step
        self._bar = None
        if sys.stderr.isatty() and jax.process_index() == 0:
            from tqdm import tqdm

            self._bar = tqdm(initial=step, total=total, unit="step", dynamic_ncols=True)

    def rate(self, step: int) -> float:
        """Examples a second since the last call."""
        now = time.monotonic()
        rate = (step - self._last_step) * self._batch_size / max(now - self._last_time, 1e-9)
        self._last_step, self._last_time = step, now
        return rate

    def show(self, step: int, metrics: dict[str, float]) -> None:
        """Shows how far the run is and its newest figures."""
        figures = f"loss {metrics['loss']:.4f}, {metrics['examples_per_second']:.1f} examples/s"
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(figures)
        elif jax.process_index() == 0 and (now - self._shown >= self._interval or step == self._total):
            self._shown = now
            left = (now - self._start) / max(step - self._first, 1) * (self._total - step)
            self.say(f"step {step}/{self._total}: {figures}, {left:.0f} s left")

    def say(self, line: str) -> None:
        """Prints a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        elif jax.process_index() == 0:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()


PACKED = "model.kmq"
"""The packed network of a quantized run, in its workdir: what the newest checkpoint holds, ready to be shipped."""

# What may differ when a run is taken up again: it changes what is seen of the run, not the run.
_FREE = ("log_every", "checkpoint_epochs", "keep_checkpoints", "average_last", "validation", "data.threads")


def check_config(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Checks that the run which `config.json` describes, if there is one, is the same.

    Raises:
        UserError: the workdir holds a run with other settings; the message names the first that differs.
    """
    path = workdir / "config.json"
    new = json.loads(config.to_json())
    if path.exists():
        before, after = _flat(read_json(path)), _flat(new)
        for key in sorted(before.keys() | after.keys()):
            if before.get(key) != after.get(key) and not key.startswith(_FREE):
                raise UserError(
                    f"--workdir={workdir} holds a run with {key}={before.get(key)!r}, not {after.get(key)!r}: "
                    "use another directory"
                )


def record_start(config: ml_collections.ConfigDict, workdir: Path, step: int) -> None:
    """Writes `config.json`, and adds to `starts.json` what the run is computed with from `step` on.

    Once a step has run, so that a mistake in the settings leaves nothing to be undone.
    """
    if jax.process_index() == 0:
        write_json(workdir / "config.json", json.loads(config.to_json()))
        path = workdir / "starts.json"
        write_json(path, [*(read_json(path) if path.exists() else ()), {"step": step, **provenance()}])


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def check_finite(metrics: list[dict[str, Any]], first_step: int, checkpoints: Checkpoints) -> None:
    """Raises on the first step whose loss, gradient or new parameters are not finite.

    Looked at when metrics are logged and before every checkpoint, not every step: the loop never waits for the device.

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


def train(config: ml_collections.ConfigDict, workdir: Path, tensorboard: bool = False) -> dict[str, Any]:
    """Trains, or takes up training where it stopped.

    Args:
        config: from `train_config.default_config`, changed.
        workdir: gets `config.json`, `starts.json`, `metrics.jsonl`, `checkpoints/` and, at the end, `summary.json`.
        tensorboard: also write the metrics as event files, into `workdir/tensorboard`.

    Returns:
        What `summary.json` holds: `steps`, `finished`, `loss`, `validation_eer` (percent), `examples_per_second`, ...

    Raises:
        UserError: a setting, file or value is at fault, or the loss became NaN; what was saved before stays.
    """
    config = config.copy_and_resolve_references()
    if "study" in config:  # a run may go on though what a study does with the network has changed
        with config.unlocked():
            del config.study
    with contextlib.ExitStack() as closing:
        return _train(config, workdir, tensorboard, closing)


def _train(
    config: ml_collections.ConfigDict, workdir: Path, tensorboard: bool, closing: contextlib.ExitStack
) -> dict[str, Any]:
    devices = mesh.make_mesh()
    if config.batch_size % devices.size:
        raise UserError(f"batch_size (={config.batch_size}) must divide over {devices.size} devices")

    # 1. Data.
    utterances = source.open_sources(config.data.train)
    speeds = tuple(config.data.speeds)
    classes = pipeline.num_speakers(utterances, speeds)
    if not config.epoch_steps and len(utterances) * len(speeds) < config.batch_size:
        raise UserError(f"data.train has {len(utterances)} utterances, fewer than batch_size (={config.batch_size})")
    epoch_steps = config.epoch_steps or len(utterances) * len(speeds) // config.batch_size
    total_steps = steps_of(config.epochs, epoch_steps)
    validation = open_validation(config)
    quantized = qat.is_on(config.quant)
    qat.check(config.quant)
    if quantized and config.average_last > 1:
        raise UserError(f"average_last (={config.average_last}) cannot be used with quant: indices have no average")

    # 2. Network, objective, optimizer.
    described = describe(config)
    network = described.network(config.dtype)
    fbank = frontend_of(config.frontend)
    params, batch_stats = steps.init_params(network, config, classes)
    failures: dict[str, str] = {}
    batches = iter(
        pipeline.training_batches(
            utterances,
            batch_size=config.batch_size // jax.process_count(),
            crop_samples=int(config.data.crop_seconds * source.SAMPLE_RATE),
            seed=config.seed,
            speeds=speeds,
            augment=config.data.augment,
            noise=source.open_sources(config.data.noise) if config.data.noise else None,
            music=source.open_sources(config.data.music) if config.data.music else None,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            threads=config.data.threads,
            failures=failures,
        )
    )

    # 3. State: the newest checkpoint, else `init_from`, else fresh. Laid out on the mesh by rule.
    workdir.mkdir(parents=True, exist_ok=True)
    check_config(config, workdir)
    checkpoints = Checkpoints(workdir / "checkpoints", max(config.keep_checkpoints, config.average_last, 1))
    closing.callback(checkpoints.close)
    resumes = bool(checkpoints.steps())
    if config.init_from and not resumes:
        params, batch_stats = adopt(config, params, batch_stats, utterances)
    teacher = load_teacher(config, params["network"], batch_stats)
    narrow = load_model(config.quant.grow_from).variables["params"] if config.quant.grow_from else None
    cells: dict[str, jax.Array] = {}
    named = jax.eval_shape(functools.partial(qat.start, config.quant, narrow=narrow), params)
    recipe = steps.make_recipe(network, fbank, config, devices, named, epoch_steps)
    if quantized:
        full = dataclasses.replace(described, variables={"params": params["network"], "batch_stats": batch_stats})
        widths = allocate(recipe, workdir, params, batch_stats, teacher, batches) if config.quant.budget else None
        if resumes:
            params = jax.eval_shape(functools.partial(qat.start, config.quant, widths=widths, narrow=narrow), params)
        else:
            count, seconds = config.quant.recalibrate, config.data.crop_seconds
            crops = moments.random_features(fbank, utterances, count, seconds) if count else None
            params, batch_stats = qat.begin(config.quant, full, params, crops, widths, narrow)
        if narrow is not None:
            cells = qat.cells(params, narrow)
    make_state = functools.partial(steps.init_state, recipe)
    shapes = jax.eval_shape(make_state, params, batch_stats, cells)
    shardings = mesh.tree_shardings(shapes, devices, [(p, int(axis)) for p, axis in config.sharding])
    teacher = jax.device_put(teacher, mesh.replicated(devices))
    if resumes:
        state = restore(checkpoints, checkpoints.steps()[-1], shapes, shardings, batches)
    else:
        state = jax.jit(make_state, out_shardings=shardings)(params, batch_stats, cells)

    # 4. Steps.
    start = step = int(state.step)
    if start == total_steps and (workdir / "summary.json").exists():
        return read_json(workdir / "summary.json")
    (workdir / "averaged.kmq").unlink(missing_ok=True)
    stages = qat.stages_of(config.quant, params)
    stage_steps = -(-total_steps // len(stages))
    train_step = steps.jit_train_step(recipe, shardings, stages[min(step, total_steps - 1) // stage_steps])
    log = RunLog(workdir / "metrics.jsonl", step, workdir / "tensorboard" if tensorboard else None)
    display = Display(step, total_steps, config.batch_size)
    closing.callback(display.close)
    closing.callback(log.close)
    display.say(
        f"{config.model.name}, {registry.parameter_count(network):,} parameters, {classes} classes; "
        f"{len(utterances)} utterances; steps {step} to {total_steps} ({epoch_steps} an epoch) on {devices.size} "
        f"{devices.devices.flat[0].device_kind} device(s)"
    )
    every_checkpoint = steps_of(config.checkpoint_epochs, epoch_steps)
    every_validation = steps_of(config.validation.epochs, epoch_steps)
    stop = StopRequest()
    began = time.monotonic()
    pending: list[dict[str, Any]] = []
    last: dict[str, float] = {}
    figures: dict[str, float] = {}
    stopping = False
    with stop.listening():
        while step < total_steps and not stopping:
            if step and step % stage_steps == 0:
                names = stages[step // stage_steps]
                entered = qat.enter_stage(config.quant, state.params, names, stages[step // stage_steps - 1])
                state = jax.device_put(dataclasses.replace(state, params=entered), shardings)
                train_step = steps.jit_train_step(recipe, shardings, names)
            state, metrics = train_step(state, mesh.shard_batch(next(batches), devices), teacher)
            pending.append(metrics)
            step += 1
            if step == start + 1:  # compiled by now, so no setting can be wrong any more; rates begin here
                record_start(config, workdir, start)
                jax.block_until_ready(metrics)
                display.rate(step)
            if jax.process_count() == 1 or step % config.log_every == 0:  # where they wait for one another anyway
                stopping = distributed.anywhere(stop.by is not None)
            saves = step == total_steps or stopping or (every_checkpoint and step % every_checkpoint == 0)
            validates = validation and (step == total_steps or (every_validation and step % every_validation == 0))
            if step % config.log_every == 0 or saves or validates:
                values = jax.device_get(pending)
                check_finite(values, step - len(values), checkpoints)
                pending = []
                last = {name: float(np.mean([v[name] for v in values])) for name in values[0]}
                last |= {name: float(values[-1][name]) for name in ("learning_rate", "margin") if name in last}
                last |= {"epoch": step / epoch_steps, "examples_per_second": display.rate(step)}
                log.write(step, last)
                display.show(step, last)
            if saves:
                if quantized:  # what loading the workdir gives; before the checkpoint
                    save_once(workdir / PACKED, dataclasses.replace(described, variables=variables_of(state)))
                checkpoints.save(step, **parts_of(state), data=batches)
            if validation and validates:
                trained = dataclasses.replace(described, variables=variables_of(state))
                figures = validation.figures(trained, config.quant.coarse)
                log.write(step, figures)
                display.say(f"step {step}: {_in_words(figures)}")
                display.rate(step)  # the next rate does not count the time of validation
    seconds = time.monotonic() - began
    if stopping:
        display.say(
            f"stopped by {stop.by or 'another process'} at step {step}, saved; the same command goes on from there"
        )

    # 5. The final model and the summary.
    finished = step == total_steps
    if finished and config.average_last > 1:
        final = average_checkpoints(described, checkpoints, config.average_last)
        save_once(workdir / "averaged.kmq", final)
        if validation:
            figures = validation.figures(final)
            display.say(f"average of the last {config.average_last} checkpoints: {_in_words(figures)}")
    if finished and quantized and config.quant.recalibrate and batch_stats:
        crops = moments.random_features(fbank, utterances, config.quant.recalibrate, config.data.crop_seconds)
        trained = dataclasses.replace(described, variables=variables_of(state))
        final = moments.own_statistics(trained, crops)
        save_once(workdir / PACKED, final)
        if validation:
            figures = validation.figures(final, config.quant.coarse)
            display.say(f"with batch normalisation measured afresh: {_in_words(figures)}")
    summary = {
        "finished": finished,
        "steps": step,
        "epochs": step / epoch_steps,
        "loss": last.get("loss"),
        "validation_eer": None,
        **figures,
        "parameters": registry.parameter_count(network),
        "classes": classes,
        "utterances": len(utterances),
        "unreadable": failures,
        "seconds": seconds,
        "examples_per_second": (step - start) * config.batch_size / max(seconds, 1e-9),
        "device": f"{devices.size} x {devices.devices.flat[0].device_kind}",
        "jax": jax.__version__,
    }
    if jax.process_index() == 0:
        write_json(workdir / "summary.json", summary)
    return summary


def _in_words(figures: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ').replace('eer', 'EER')} {eer:.2f} %" for name, eer in figures.items())


def open_validation(config: ml_collections.ConfigDict) -> Validation | None:
    """Opens the validation set, if the configuration names one.

    Raises:
        UserError: it cannot be read.
    """
    section = config.validation
    if not section.data:
        return None
    utterances = source.open_source(section.data)
    return Validation(utterances, trials.open_trials(section.trials, utterances))


def describe(config: ml_collections.ConfigDict) -> SpeakerModel:
    """The model that a configuration describes, without weights."""
    settings = config.model.to_dict()
    return SpeakerModel(settings.pop("name"), settings, config.frontend, None)


def save_once(path: Path, trained: SpeakerModel) -> None:
    """Writes a model that every process has."""
    if jax.process_index() == 0:
        save_model(path, trained)


def variables_of(state: steps.TrainState) -> dict[str, Any]:
    """What the network needs of a state, whole in every process; in quantization-aware training, its packed form."""
    # Taken to the host, so that nothing is compiled anew for arrays that lie on a mesh.
    params, batch_stats, indices = jax.device_get(distributed.local((state.params, state.batch_stats, state.indices)))
    shipped = qat.packed(params, indices) if "codebooks" in params else {"params": params["network"]}
    return {**shipped, "batch_stats": batch_stats}


def parts_of(state: steps.TrainState) -> dict[str, Any]:
    """A state as the parts of a checkpoint, apart so that a model is read without the optimizer."""
    rest = {"step": state.step, "opt_state": state.opt_state}
    if "codebooks" in state.params:
        rest |= {"indices": state.indices, **{name: state.params[name] for name in qat.PARTS if name in state.params}}
    return {
        "network": {"params": state.params["network"], "batch_stats": state.batch_stats},
        "classifier": {"centres": state.params["classifier"]},
        "training": rest,
    }


def state_of(parts: dict[str, Any]) -> steps.TrainState:
    """The inverse of `parts_of`."""
    network, rest = parts["network"], parts["training"]
    params = {"network": network["params"], "classifier": parts["classifier"]["centres"]}
    params |= {name: rest[name] for name in qat.PARTS if name in rest}
    return steps.TrainState(rest["step"], params, network["batch_stats"], rest["opt_state"], rest.get("indices", {}))


def restore(
    checkpoints: Checkpoints,
    step: int,
    shapes: steps.TrainState,
    shardings: steps.TrainState,
    batches: Any,
) -> steps.TrainState:
    """Restores a state onto the mesh, and moves the data to the same position."""
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return state_of(checkpoints.restore(step, **parts_of(target), data=batches))


def adopt(
    config: ml_collections.ConfigDict, params: Any, batch_stats: Any, utterances: source.Utterances
) -> tuple[Any, Any]:
    """Starts from the network of the MODEL `init_from`, and from its classifier where it is a run that had one.

    A classifier with more classes is cut: speed perturbation puts the speakers at their own speed first, so that
    fine-tuning without it goes on from their centres. Without one, centres begin where the network puts the speakers;
    those of other speeds at random.

    Raises:
        UserError: the networks differ; the message names the first parameter that does.
    """
    path = Path(config.init_from)
    given = _load_like("init_from", config.init_from, params["network"], batch_stats)
    classifier, centres = params["classifier"], None
    if (path / "checkpoints").is_dir():
        with Checkpoints(path / "checkpoints") as checkpoints:
            centres = checkpoints.load(checkpoints.steps()[-1], "classifier")["centres"]
    if centres is not None and centres.shape[0] >= classifier.shape[0] and centres.shape[1:] == classifier.shape[1:]:
        classifier = jnp.asarray(centres[: classifier.shape[0]])
    elif config.loss.weight:
        means = speaker_means(dataclasses.replace(describe(config), variables=given), utterances, config)
        classifier = classifier.at[: len(means), 0].set(means)
    return {"network": given["params"], "classifier": classifier}, given["batch_stats"]


def speaker_means(
    speaker_model: SpeakerModel, utterances: source.Utterances, config: ml_collections.ConfigDict, each: int = 4
) -> np.ndarray:
    """Mean embeddings `[speakers, dim]`, of length one before the mean, of up to `each` recordings a speaker."""
    by_speaker = np.split(np.argsort(utterances.labels, kind="stable"), np.cumsum(np.bincount(utterances.labels))[:-1])
    few = utterances.select(np.concatenate([part[:: -(-len(part) // each)] for part in by_speaker]))
    embeddings = embed_all(speaker_model, few, config.dtype, config.data.crop_seconds, config.batch_size)
    sums = np.zeros((len(by_speaker), embeddings.shape[1]), np.float32)
    np.add.at(sums, few.labels, cosine.unit_rows(embeddings))
    return sums / np.bincount(few.labels)[:, None]


def _load_like(flag: str, path: str, params: Any, batch_stats: Any) -> dict[str, Any]:
    """The variables of a MODEL in full precision, which must be of the given shapes."""
    given = quant.dequantize_params(at_bits(load_model(path), None).variables)
    for part, fresh in (("params", params), ("batch_stats", batch_stats)):
        here, there = dict(named_leaves(fresh)), dict(named_leaves(given.get(part, {})))
        for name in sorted(here.keys() | there.keys()):
            if name not in here or name not in there or here[name].shape != there[name].shape:
                raise UserError(f"{flag}={path}: {part}/{name} has another shape there, or is in one network only")
    return {part: jax.tree.map(jnp.asarray, given.get(part, {})) for part in ("params", "batch_stats")}


def load_teacher(config: ml_collections.ConfigDict, params: Any, batch_stats: Any) -> dict[str, Any] | None:
    """The variables of the network to distil from, or None where there is none.

    Raises:
        UserError: a teacher is wanted but not named, or it is another network.
    """
    if not config.distill.weight:
        return None
    path = config.distill.teacher or config.init_from
    if not path:
        raise UserError("distill.weight is above zero, so distill.teacher or init_from must name a MODEL")
    return _load_like("distill.teacher" if config.distill.teacher else "init_from", path, params, batch_stats)


def allocate(
    recipe: steps.Recipe, workdir: Path, params: Any, batch_stats: Any, teacher: Any, batches: Any
) -> dict[str, int]:
    """The widths of mixed precision: those in `workdir/widths.json`, or chosen by the loss's curvature on one batch."""
    path = workdir / "widths.json"
    if path.exists():
        return {name: int(bits) for name, bits in read_json(path).items()}
    seed = recipe.config.seed
    state = batches.get_state()
    batch = jax.tree.map(jnp.asarray, next(batches))
    batches.set_state(state)
    features = steps.features_of(recipe, jax.random.key(seed), batch)

    def loss(values: Any) -> jax.Array:
        step = jnp.zeros((), jnp.int32)
        return steps.total_loss(recipe, params, values, batch_stats, features, batch["speaker"], step, teacher)[0]

    widths = qat.allocate(recipe.config.quant, params["network"], loss, jax.random.key(seed))
    chosen = distributed.of_first(np.array(list(widths.values()), np.int32))  # each process saw another batch
    widths = {name: int(bits) for name, bits in zip(widths, chosen)}
    if jax.process_index() == 0:
        write_json(path, widths)
    return widths


def average_checkpoints(described: SpeakerModel, checkpoints: Checkpoints, count: int) -> SpeakerModel:
    """The mean of the networks, running statistics included, of the last `count` checkpoints."""
    trees = [checkpoints.load(step, "network") for step in checkpoints.steps()[-count:]]
    return dataclasses.replace(described, variables=steps.average(trees))
