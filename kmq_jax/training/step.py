"""The training step: one pure function from a state and a batch to the next state."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from kmq_jax import frontend, losses
from kmq_jax.core import mesh
from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import Params, Variables
from kmq_jax.models import registry
from kmq_jax.models.protocol import SpeakerNetwork
from kmq_jax.training.optim import Schedule, make_optimizer, make_schedule
from kmq_jax.training.options import TrainOptions, steps_of
from kmq_jax.training.state import Trainable, TrainState
from kmq_jax.training.tasks import FullPrecision, Phase, Quantized, Task

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Step = Callable[[TrainState, Batch, Variables | None], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What the loss of a batch is made of; everything in it is fixed during a run.

    Attributes:
        network: a Linen module from `models.registry`.
        fbank: the filterbank.
        margin: by step.
        mesh: the devices.
        options: the run's.
        epoch_steps: steps an epoch.
    """

    network: SpeakerNetwork
    fbank: frontend.FrontEnd
    margin: losses.MarginSchedule
    mesh: Mesh
    options: TrainOptions
    epoch_steps: int

    @property
    def phase_steps(self) -> int:
        """Steps of each phase; all but multi-stage training has one."""
        return steps_of(self.options.epochs, self.epoch_steps)

    def due_at(self, step: int) -> bool:
        """Whether a checkpoint after so many steps of the run is one of the schedule, and not one of a stopped run."""
        every = steps_of(self.options.checkpoint_epochs, self.epoch_steps)
        return step % self.phase_steps == 0 or (every > 0 and step % every == 0)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a training step is made of; everything in it is fixed during a run.

    Attributes:
        objective: the loss.
        task: what is done to the network's parameters.
        optimizer: optax transformation, learning rate included.
        learning_rate: by step of a phase.
        phases: how many the run has; all but multi-stage training has one.
    """

    objective: Objective
    task: Task
    optimizer: optax.GradientTransformation
    learning_rate: Schedule
    phases: int

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.phases * self.objective.phase_steps

    def phase_at(self, step: int) -> int:
        """The phase that a step of the run belongs to, from 0."""
        return step // self.objective.phase_steps

    def in_phase(self, step: jax.Array) -> jax.Array:
        """A step of the run as its phase counts: from 0 again in each, as the phase's new optimizer does."""
        return step if self.phases == 1 else step % self.objective.phase_steps

    def rate_at(self, step: jax.Array) -> jax.Array:
        """The learning rate of a step of the run, float32 scalar."""
        return self.learning_rate(self.in_phase(step))


def init_params(network: SpeakerNetwork, options: TrainOptions, classes: int) -> tuple[Trainable, Params]:
    """Draws parameters and running statistics from the options' seed.

    Returns:
        Classifier and network, and the running statistics: empty where the network has none.
    """
    key_network, key_classifier = jax.random.split(jax.random.key(options.seed))
    variables = registry.initialize(network, key_network)
    centres = losses.init_centres(key_classifier, classes, options.loss.sub_centres, network.embedding_size)
    return Trainable(centres, variables["params"]), variables.get("batch_stats", {})


def check_features(options: TrainOptions, network: SpeakerNetwork, fbank: frontend.FrontEnd) -> None:
    """Checks that the network takes the features that the front end gives.

    Raises:
        UserError: it does not.
    """
    features = network.features
    if fbank.num_features != features:
        raise UserError(
            f"model.features (={features}) must be {fbank.num_features}, the features of frontend {options.frontend!r}"
        )


def make_objective(
    network: SpeakerNetwork, fbank: frontend.FrontEnd, options: TrainOptions, mesh: Mesh, epoch_steps: int
) -> Objective:
    """Gathers network, front end and margin."""
    loss = options.loss
    margin = losses.MarginSchedule(loss.margin, loss.margin_start * epoch_steps, loss.margin_end * epoch_steps)
    return Objective(network, fbank, margin, mesh, options, epoch_steps)


def make_task(options: TrainOptions, epoch_steps: int, parent: Params | None = None) -> Task:
    """What the options do to the network's parameters; `parent` is the network that nested codebooks grow from."""
    if not options.quant.on:
        return FullPrecision(options.average_last)
    phase_steps = steps_of(options.epochs, epoch_steps)
    thaw, last_move = options.quant.thaw_epochs * epoch_steps, options.quant.lloyd_until * phase_steps
    measured = options.batch_norm == "batch"
    return Quantized(options.quant.in_steps(epoch_steps), thaw, last_move, parent=parent, measured=measured)


def make_recipe(objective: Objective, task: Task, params: Trainable) -> Recipe:
    """Adds optimizer and schedule.

    Args:
        objective: the loss.
        task: what is done to the network's parameters.
        params: what the optimizer moves, or its shapes.

    Raises:
        UserError: a pattern of `optimizer.groups` is the first match of no name.
    """
    options, phases = objective.options, len(task.phases(params.network))

    def schedule(peak: float | None) -> Schedule:
        own = options.learning_rate if peak is None else dataclasses.replace(options.learning_rate, peak=peak)
        return make_schedule(own, objective.epoch_steps, objective.phase_steps)

    return Recipe(objective, task, make_optimizer(options.optimizer, schedule, params), schedule(None), phases)


def init_state(
    recipe: Recipe, params: Trainable, batch_stats: Params, indices: Mapping[str, jax.Array] | None = None
) -> TrainState:
    """The state before the first step; `indices` are those of `Task.init_indices`."""
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, recipe.optimizer.init(params), indices or {})


def features_of(objective: Objective, key: jax.Array, batch: Batch) -> jax.Array:
    """Augmented, mean-normalised and masked features `[batch, time, mel]` of a training batch."""
    options = objective.options
    key_wave, key_mask = jax.random.split(key)
    if options.data.augment:
        wave = frontend.augment_batch(key_wave, batch, frontend.RoomConfig(), objective.mesh)
    else:
        wave = frontend.from_int16(batch["wave"])
    whole = options.data.normalize == "utterance"  # then the waves are whole utterances, cropped only as features
    waves = (wave, batch["length"]) if whole else (wave,)
    # Each device of its own waves. Left to XLA, one that takes them row by row, as a CPU does, is sent all of them.
    spec = mesh.batch_sharding(objective.mesh).spec
    features = jax.shard_map(
        lambda own, *samples: frontend.features_of(own, objective.fbank, *samples),
        mesh=objective.mesh,
        in_specs=(spec,) * len(waves),
        out_specs=spec,
    )(*waves)
    if whole:
        lengths = frontend.num_frames(batch["length"], objective.fbank)
        wanted = frontend.num_frames(options.data.crop_samples, objective.fbank)
        features = frontend.crop_frames(features, lengths, batch["place"], wanted)
    if options.spec_augment:
        masks = frontend.SpecAugmentConfig(probability=options.spec_augment)
        features = frontend.spec_augment(key_mask, features, masks)
    return features


def classification(
    objective: Objective, classifier: jax.Array, embeddings: jax.Array, labels: jax.Array, step: jax.Array
) -> Metrics:
    """Mean loss and accuracy of embeddings `[batch, dim]` under a classifier and the margin of a step."""
    loss, margin = objective.options.loss, objective.margin(step)
    cosines = losses.class_cosines(embeddings, classifier)
    logits = losses.margin_logits(cosines, labels, margin, loss.scale, loss.kind)
    if loss.jeffreys:
        each = losses.jeffreys(logits, labels, loss.smoothing, loss.spread)
    else:
        each = losses.cross_entropy(logits, labels)
    return {"loss": each.mean(), "accuracy": (cosines.argmax(-1) == labels).mean(), "margin": margin}


def total_loss(
    objective: Objective,
    classifier: jax.Array,
    network: Params,
    batch_stats: Params,
    features: jax.Array,
    labels: jax.Array,
    step: jax.Array,
    teacher: Variables | None = None,
    beside: Variables | None = None,
) -> tuple[jax.Array, tuple[Metrics, Params]]:
    """The weighted sum of classification loss and distillation.

    Args:
        objective: what the loss is made of.
        classifier: centres of the speakers.
        network: the parameters to compute with.
        batch_stats: running statistics.
        features: `[batch, time, mel]`.
        labels: speakers, int `[batch]`.
        step: of the run.
        teacher: variables of the full-precision network, where `distill.weight` is above zero.
        beside: variables of the network beside parameters and statistics, see `Task.beside`.

    Returns:
        The loss, and with it metrics and the updated running statistics.
    """
    distill, weight = objective.options.distill.weight, objective.options.loss.weight
    variables = {"params": network, "batch_stats": batch_stats, **(beside or {})}
    parts = objective.network.distilled_parts() if distill else ()
    # By running statistics the network runs as in use (`train=False`), and they stay as they are.
    by_batch = objective.options.batch_norm == "batch"
    embeddings, outputs, updates = objective.network.taps(
        variables, features, train=by_batch, names=parts, mutable=["batch_stats"] if by_batch else []
    )
    metrics: Metrics = {"loss": jnp.zeros(())}
    if weight:  # else distillation alone: the labels are not looked at
        metrics = classification(objective, classifier, embeddings, labels, step)
    loss = weight * metrics["loss"]
    if distill:
        taught, taught_outputs, _ = jax.lax.stop_gradient(objective.network.taps(teacher, features, names=parts))
        stages, taught_stages = ([found[name] for name in parts] for found in (outputs, taught_outputs))
        metrics["teacher_cosine"] = 1 - losses.cosine_distance(embeddings, taught)
        loss += distill * losses.distillation(embeddings, stages, taught, taught_stages)
    return loss, ({**metrics, "loss": loss}, updates.get("batch_stats", {}) if by_batch else batch_stats)


def train_step(
    recipe: Recipe, state: TrainState, batch: Batch, teacher: Variables | None = None, phase: Phase | None = None
) -> tuple[TrainState, Metrics]:
    """One step of stochastic gradient descent.

    Args:
        recipe: what the step is made of.
        state: before.
        batch: from `data.pipeline`: `wave` and `interference` int16 `[batch, samples]`, `snr_db`, `reverb`, `speaker`
            `[batch]`, and more where whole utterances or given rooms are asked for.
        teacher: see `total_loss`.
        phase: the tensors that are quantized already; None is all.

    Returns:
        The state after, and scalars: `loss`, `gradient_norm`, `parameter_norm` (after), `learning_rate`; `accuracy` (of
        the cosines, without margin) and `margin` where there is a classification loss; `teacher_cosine` where there is
        a teacher.
    """
    objective, task, step = recipe.objective, recipe.task, recipe.in_phase(state.step)
    # By the step, so that a resumed run draws the same; `seed` itself has drawn the first parameters.
    key = jax.random.fold_in(jax.random.key(objective.options.seed + 1), state.step)
    features = features_of(objective, key, batch)
    if objective.options.sharding:
        # Else XLA takes a split classifier's axis for the whole program: every device would do the whole batch.
        features = jax.lax.with_sharding_constraint(features, mesh.batch_sharding(objective.mesh))

    def loss_of(params: Trainable) -> tuple[jax.Array, tuple[Metrics, Params]]:
        network = task.weights(params.network, state.indices, step, phase)
        labels, beside = batch["speaker"], task.beside(params.network, phase)
        return total_loss(
            objective, params.classifier, network, state.batch_stats, features, labels, state.step, teacher, beside
        )

    gradients, (metrics, batch_stats) = jax.grad(loss_of, has_aux=True)(state.params)
    updates, opt_state = recipe.optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    network, indices = task.after_update(state.params.network, params.network, state.indices, step + 1)
    params = Trainable(params.classifier, network)
    metrics |= {
        "gradient_norm": optax.tree.norm(gradients),
        "parameter_norm": optax.tree.norm(params),
        "learning_rate": recipe.rate_at(state.step),
    }
    return TrainState(state.step + 1, params, batch_stats, opt_state, indices), metrics


def jit_train_step(recipe: Recipe, shardings: TrainState, phase: Phase | None = None) -> Step:
    """The step for a mesh, compiled when first called. The state keeps its shardings.

    The state that is passed in is donated: its arrays cannot be used afterwards.
    """
    step = functools.partial(train_step, recipe, phase=phase)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
