"""What there is before the first step: data, network, task, optimizer, and the state, new or from a checkpoint."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

if TYPE_CHECKING:
    import grain

from kmq_jax.core import distributed, mesh
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json, read_object, sweep, write_json
from kmq_jax.core.locks import sole_writer
from kmq_jax.core.memory import require_memory
from kmq_jax.core.progress import progress
from kmq_jax.core.tree import Params, Variables
from kmq_jax.data import pipeline, source
from kmq_jax.models import registry
from kmq_jax.models.checkpoint import Checkpoints
from kmq_jax.models.speaker_model import SpeakerModel, fingerprint, frontend_of
from kmq_jax.nn import integers
from kmq_jax.ptq import activations, moments
from kmq_jax.training import qat
from kmq_jax.training import step as steps
from kmq_jax.training.feed import on_devices
from kmq_jax.training.from_models import describe, load_parent, load_start, load_teacher
from kmq_jax.training.options import TrainOptions
from kmq_jax.training.state import Trainable, TrainState, checkpoint_parts, from_checkpoint
from kmq_jax.training.tasks import Phase, Quantized, Speech
from kmq_jax.training.validation import Validation, open_validation
from kmq_jax.training.workdir import Settings, check_same_inputs, check_same_run, inputs_of


@dataclasses.dataclass(frozen=True)
class Data:
    """The training data.

    Attributes:
        utterances: the recordings.
        classes: speakers, those that other speeds make included.
        epoch_steps: steps an epoch.
        failures: recordings that could not be read: the reason, by place. Filled as they are read.
        batches: an endless grain iterator, on the devices ahead of the steps. Its position is that of the batch used
            last.
    """

    utterances: source.Utterances
    classes: int
    epoch_steps: int
    failures: MutableMapping[str, str]
    batches: "grain.DatasetIterator"


@dataclasses.dataclass
class Run:
    """A run that is ready to take steps. Only `state` changes.

    Attributes:
        options: the run's.
        settings: the configuration as `config.json` holds it.
        workdir: the run's directory.
        model: the model without weights.
        recipe: what a step is made of.
        data: the training data.
        validation: trials that are scored as training goes.
        checkpoints: of the workdir.
        teacher: variables of the network to distil from, on the devices.
        shardings: how the state lies on the devices.
        state: the newest.
        inputs: what the settings name, as it is now; see `workdir.inputs_of`.
    """

    options: TrainOptions
    settings: Settings
    workdir: Path
    model: SpeakerModel
    recipe: steps.Recipe
    data: Data
    validation: Validation | None
    checkpoints: Checkpoints
    teacher: Variables | None
    shardings: TrainState
    state: TrainState
    inputs: Json

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.recipe.total_steps

    @property
    def speech(self) -> Speech:
        """The training data as it is listened to before and after training."""
        return speech_of(self.recipe.objective, self.data)

    def enter_phase(self, phase: Phase, before: Phase | None) -> None:
        """Begins a phase of the run: the first of all, or one with a new optimizer after the phase `before`."""
        task, state = self.recipe.task, self.state
        if before is not None:
            network, indices = task.enter_phase(state.params.network, state.indices, phase, before)
            params = dataclasses.replace(state.params, network=network)
            opt_state = self.recipe.optimizer.init(params)
            state = dataclasses.replace(state, params=params, indices=indices, opt_state=opt_state)
        if self.options.quant.bn_passes:
            # On the host, without the optimizer's state, which takes the most memory and is not used here.
            here = jax.device_get(distributed.local(dataclasses.replace(state, opt_state=())))
            model = dataclasses.replace(self.model, variables={"batch_stats": here.batch_stats})
            statistics = task.measure(model, here.params.network, here.indices, phase, self.speech)
            state = state if statistics is None else dataclasses.replace(state, batch_stats=statistics)
        if state is not self.state:
            self.state = jax.device_put(state, self.shardings)

    def trained(self) -> SpeakerModel:
        """The model of the newest state as it is shipped, whole in every process. All processes must call it.

        It holds no state of the optimizer.
        """
        # Taken to the host, so that nothing is compiled anew for arrays that lie on a mesh.
        state = jax.device_get(distributed.local(dataclasses.replace(self.state, opt_state=())))
        return dataclasses.replace(self.model, variables=self.recipe.task.variables(state))

    def save(self, step: int) -> None:
        """Writes a checkpoint."""
        self.checkpoints.save(step, **checkpoint_parts(self.state), data=self.data.batches)


def _check_sizes(options: TrainOptions, parameters: int) -> None:
    """Refuses networks and batches that this machine's memory cannot hold.

    It counts eight bytes for each parameter (float32, and its momentum) and for each sample of a batch (float32 on the
    device, 16 bits on the host, and as many of interference): of crops, or of the whole utterances that these are cut
    of on the devices.

    Raises:
        UserError: one of them does not fit.
    """
    require_memory(8 * parameters, f"`model` of {parameters:,} parameters")
    data, waves = options.data, options.batch_size // jax.process_count()
    seconds = data.utterance_seconds if data.normalize == "utterance" else data.crop_seconds
    samples = round(seconds * source.SAMPLE_RATE)
    require_memory(8 * waves * samples, f"`batch_size` (={options.batch_size}) of {seconds:g} s")


def prepare(options: TrainOptions, settings: Settings, workdir: Path, closing: contextlib.ExitStack) -> Run:
    """Prepares a run: at the newest checkpoint, else from `init_from`, else from random weights.

    Args:
        options: the run's.
        settings: the same as JSON values.
        workdir: the run's directory.
        closing: closes what is opened here.

    Raises:
        UserError: an option, file or value is at fault.
    """
    devices = mesh.make_mesh()
    if options.batch_size % devices.size:
        raise UserError(f"batch_size (={options.batch_size}) must divide over {devices.size} devices")
    model, fbank = describe(options), frontend_of(options.frontend)
    network = model.network(options.dtype).keeping(options.remat_keeps)
    steps.check_features(options, network, fbank)
    _check_sizes(options, registry.parameter_count(network))
    data, validation = open_data(options, devices), open_validation(options.validation)
    closing.callback(data.batches.close)
    objective = steps.make_objective(network, fbank, options, devices, data.epoch_steps)
    # Locked before `config.json` is compared: nobody else can then begin a run in between.
    if jax.process_index() == 0:  # for all processes of the run
        closing.enter_context(sole_writer(workdir))
        sweep(workdir)
    check_same_run(settings, workdir)
    inputs = inputs_of(data.utterances)
    check_same_inputs(inputs, workdir)
    keep = max(options.keep_checkpoints, options.average_last)  # the average is made of them
    checkpoints = Checkpoints(workdir / "checkpoints", keep, writes=True, due=objective.due_at)
    closing.callback(checkpoints.close)
    recipe, params, batch_stats, teacher = _start(objective, model, data, checkpoints, workdir)
    indices = recipe.task.init_indices
    resumes = bool(checkpoints.steps())
    # Shapes are enough where the values come from a checkpoint.
    held = jax.eval_shape(indices, params.network) if resumes else indices(params.network)
    init_state = functools.partial(steps.init_state, recipe)
    shapes = jax.eval_shape(init_state, params, batch_stats, held)
    shardings = mesh.tree_shardings(shapes, devices, options.sharding)
    if teacher is not None:
        inputs["teacher"] = fingerprint(dataclasses.replace(model, variables=teacher))
        check_same_inputs(inputs, workdir)
    teacher = jax.device_put(teacher, mesh.replicated(devices))
    if resumes:
        state = _restore(checkpoints, shapes, shardings, data.batches)
    else:
        state = jax.jit(init_state, out_shardings=shardings)(params, batch_stats, held)
    parts = (model, recipe, data, validation, checkpoints, teacher, shardings, state, inputs)
    return Run(options, settings, workdir, *parts)


def open_data(options: TrainOptions, devices: Mesh) -> Data:
    """Opens the training data, for steps on `devices`.

    Raises:
        UserError: it cannot be read, or is less than a batch.
    """
    utterances = source.open_sources(options.data.train)
    examples = len(utterances) * len(options.data.speeds)
    if not options.epoch_steps and examples < options.batch_size:
        raise UserError(f"data.train has {len(utterances)} utterances, fewer than batch_size (={options.batch_size})")
    failures: dict[str, str] = {}
    batches = on_devices(_batches(options, utterances, failures), devices, options.data.ahead)
    epoch_steps = options.epoch_steps or examples // options.batch_size
    classes = pipeline.num_speakers(utterances, options.data.speeds)
    return Data(utterances, classes, epoch_steps, failures, batches)


def _batches(
    options: TrainOptions, utterances: source.Utterances, failures: MutableMapping[str, str]
) -> "grain.IterDataset":
    """This process's part of the endless sequence of batches."""
    data = options.data

    def opened(place: str) -> source.Utterances | None:
        return source.open_sources(place, speakers=False) if place else None

    return pipeline.training_batches(
        utterances,
        batch_size=options.batch_size // jax.process_count(),
        crop_samples=data.crop_samples,
        whole_samples=round(data.utterance_seconds * source.SAMPLE_RATE) if data.normalize == "utterance" else 0,
        seed=options.seed,
        speeds=data.speeds,
        augment=data.augment,
        noise=opened(data.noise),
        music=opened(data.music),
        babble=opened(data.babble),
        rooms=opened(data.rooms),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        threads=data.threads,
        failures=failures,
    )


def first_batch(options: TrainOptions, data: Data) -> steps.Batch:
    """This process's part of the batch that training begins with, on the host; training's own position stays."""
    alone = dataclasses.replace(options, data=dataclasses.replace(options.data, threads=0))  # nothing is made ahead
    batch: steps.Batch = next(iter(_batches(alone, data.utterances, data.failures)))
    return batch


def speech_of(objective: steps.Objective, data: Data) -> Speech:
    """The training data without augmentation, for what is measured before and after training."""
    options = objective.options
    clean = dataclasses.replace(options, data=dataclasses.replace(options.data, augment=False), spec_augment=0.0)
    own = _on_own_devices(dataclasses.replace(objective, options=clean))
    features = jax.jit(functools.partial(steps.features_of, own))

    def passes(count: int) -> Iterator[jax.Array]:
        batches, total = iter(_batches(clean, data.utterances, data.failures)), count * data.epoch_steps
        others = jax.process_index() > 0  # the first alone shows its progress
        for batch in progress(itertools.islice(batches, total), total, "batch normalisation", "batch", hidden=others):
            yield features(jax.random.key(0), mesh.shard_batch(batch, own.mesh))

    return Speech(lambda: random_crops(options, data.utterances), passes)


def _on_own_devices(objective: steps.Objective) -> steps.Objective:
    """The objective on this process's devices alone: outside steps, each process measures its own part of the data."""
    return dataclasses.replace(objective, mesh=mesh.make_mesh(jax.local_devices()))


def random_crops(options: TrainOptions, utterances: source.Utterances) -> jax.Array:
    """Features `[batch, time, mel]` of `quant.fit_crops` random clean crops, each less its own mean.

    So it is where `data.normalize` is "utterance" too: what is fitted without training has no other features either.
    """
    fbank = frontend_of(options.frontend)
    return moments.random_features(fbank, utterances, options.quant.fit_crops, options.data.crop_seconds)


def _start(
    objective: steps.Objective, model: SpeakerModel, data: Data, checkpoints: Checkpoints, workdir: Path
) -> tuple[steps.Recipe, Trainable, Params, Variables | None]:
    """The recipe, and what training starts with: parameters, running statistics and teacher.

    Where a checkpoint holds the parameters, those of a quantized network are shapes only. Others are random ones, of
    which the shapes alone are used.
    """
    options, resumes = objective.options, bool(checkpoints.steps())
    params, batch_stats = steps.init_params(objective.network, options, data.classes)
    if options.init_from and not resumes:
        params, batch_stats = load_start(options, params, batch_stats, data.utterances)
    teacher = load_teacher(options, params.network, batch_stats)
    task = steps.make_task(options, data.epoch_steps, load_parent(options))
    reference = dataclasses.replace(model, variables={"params": params.network, "batch_stats": batch_stats})
    if isinstance(task, Quantized) and options.quant.activations:
        task = dataclasses.replace(task, ranges=measured_ranges(objective, workdir, reference, data, resumes))
    # Groups of the optimizer match names, so shapes are enough. Made before bits are chosen, which takes long: a
    # pattern that matches nothing is told first.
    named = dataclasses.replace(params, network=task.shapes(params.network))
    recipe = steps.make_recipe(objective, task, named)
    if isinstance(task, Quantized) and options.quant.mixed:
        bits = allocate(objective, workdir, params, batch_stats, teacher, data, resumes)
        task = dataclasses.replace(task, allocation=bits)
        named = dataclasses.replace(params, network=task.shapes(params.network))
        recipe = steps.make_recipe(objective, task, named)  # whose phases are known now
    if resumes:
        network = task.shapes(params.network)
    else:
        network, batch_stats = task.init(reference, speech_of(objective, data))
    return recipe, dataclasses.replace(params, network=network), batch_stats, teacher


def _restore(
    checkpoints: Checkpoints, shapes: TrainState, shardings: TrainState, batches: "grain.DatasetIterator"
) -> TrainState:
    """Restores the newest state onto the mesh, and moves the data to the same position."""
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    newest = checkpoints.steps()[-1]
    return from_checkpoint(checkpoints.restore(newest, **checkpoint_parts(target), data=batches))


def _begun_with(path: Path, resumes: bool) -> Json | None:
    """What a run that goes on was begun with; None for a new run, whatever a start before its first step has left.

    Raises:
        UserError: the run goes on, and the file is missing.
    """
    if resumes and not path.exists():
        raise UserError(f"{path} is missing: the run was begun with it, and cannot go on without it")
    return read_object(path) if resumes else None


def measured_ranges(
    objective: steps.Objective, workdir: Path, reference: SpeakerModel, data: Data, resumes: bool
) -> activations.Ranges:
    """The ranges of activations: measured of the full-precision network on crops, and kept in `workdir/ranges.json`.

    A run that `resumes` takes those in the file.

    Returns:
        Step and level of zero, by place.

    Raises:
        UserError: the file is missing, or holds something else.
    """
    path = workdir / "ranges.json"
    held = _begun_with(path, resumes)
    if held is None:
        found = activations.measure(reference, random_crops(objective.options, data.utterances))
        # Every process takes the first one's: they must round alike.
        grids = distributed.of_first(np.array(list(found.values()), np.float32))
        if jax.process_index() == 0:
            write_json(path, {place: grid.tolist() for place, grid in zip(found, grids)})
        return {place: (float(step), float(zero)) for place, (step, zero) in zip(found, grids)}
    for place, grid in held.items():
        numbers = isinstance(grid, list) and len(grid) == 2 and all(isinstance(n, int | float) for n in grid)
        if not numbers or not grid[0] > 0 or not 0 <= grid[1] <= integers.LEVELS:
            raise UserError(f"{path}: {place} must have a step above 0 and a level of zero")
    return {place: (float(grid[0]), float(grid[1])) for place, grid in held.items()}


def allocate(
    objective: steps.Objective,
    workdir: Path,
    params: Trainable,
    batch_stats: Params,
    teacher: Variables | None,
    data: Data,
    resumes: bool,
) -> dict[str, int]:
    """The bits of mixed precision: chosen by the loss's curvature on the first batch, kept in `workdir/bits.json`.

    A run that `resumes` takes those in the file.

    Returns:
        `{name: bits}`.

    Raises:
        UserError: the file is missing or holds something else, or even the fewest bits exceed the budget.
    """
    path = workdir / "bits.json"
    found = _begun_with(path, resumes)
    if found is not None:
        if not all(isinstance(bits, int) and not isinstance(bits, bool) for bits in found.values()):
            raise UserError(f"{path} does not give each tensor a whole number of bits")
        return found
    key = jax.random.key(objective.options.seed)
    objective = _on_own_devices(objective)
    batch = jax.tree.map(jnp.asarray, first_batch(objective.options, data))
    features = steps.features_of(objective, key, batch)

    def loss(network: Params) -> jax.Array:
        start = jnp.zeros((), jnp.int32)
        labels = batch["speaker"]
        return steps.total_loss(objective, params.classifier, network, batch_stats, features, labels, start, teacher)[0]

    allocation = qat.allocate(objective.options.quant, params.network, loss, key)
    names = sorted(allocation)  # given by sensitivity: each process saw another batch, and may have another order
    bits = distributed.of_first(np.array([allocation[name] for name in names], np.int32))
    allocation = dict(zip(names, bits.tolist()))
    if jax.process_index() == 0:
        write_json(path, allocation)
    return allocation
