"""The training step: state, its initialisation, and one pure function from a batch to the next state."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh

from kmq_jax import frontend, losses
from kmq_jax.core.errors import UserError
from kmq_jax.models import registry
from kmq_jax.models.protocol import SpeakerNetwork
from kmq_jax.training import qat
from kmq_jax.training.config import steps_of
from kmq_jax.training.optim import Schedule, make_optimizer, make_schedule

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "batch_stats", "opt_state", "indices"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes during training. Margin, learning rate and random keys derive from `step`.

    Attributes:
        step: steps done, int32 scalar.
        params: `{"network": tree, "classifier": [classes, sub-centres, dim]}`, float32; in quantization-aware training
            the network's kernels are latents and there are `"codebooks"`, see `kmqat`.
        batch_stats: running statistics of the network's normalisation.
        opt_state: the optimizer's.
        indices: cached assignments of latents to centroids, by name; empty where each step assigns afresh. Where
            codebooks nest, those at the smallest width.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    indices: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a training step is made of; everything in it is fixed during a run.

    Attributes:
        network: a Linen module from `models.registry`.
        fbank: the filterbank.
        optimizer: optax transformation, learning rate included.
        learning_rate: by step.
        margin: by step.
        mesh: the devices.
        config: the run's configuration.
        epoch_steps: steps an epoch.
    """

    network: SpeakerNetwork
    fbank: frontend.FbankConfig
    optimizer: optax.GradientTransformation
    learning_rate: Schedule
    margin: losses.MarginSchedule
    mesh: Mesh
    config: ml_collections.FrozenConfigDict
    epoch_steps: int

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return steps_of(self.config.epochs, self.epoch_steps)


def init_params(network: SpeakerNetwork, config: ml_collections.ConfigDict, classes: int) -> tuple[Any, Any]:
    """Draws `(params, batch_stats)` from the configuration's seed."""
    key_network, key_classifier = jax.random.split(jax.random.key(config.seed))
    variables = registry.initialize(network, key_network)
    centres = losses.init_centres(key_classifier, classes, config.loss.sub_centres, network.embedding_size)
    return {"network": variables["params"], "classifier": centres}, variables.get("batch_stats", {})


def make_recipe(
    network: SpeakerNetwork,
    fbank: frontend.FbankConfig,
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    params: Any,
    epoch_steps: int,
) -> Recipe:
    """Gathers network, front end, optimizer and schedules.

    Args:
        network: from the registry.
        fbank: its filterbank.
        config: the run's configuration.
        mesh: the devices.
        params: parameters (or their shapes), for the optimizer's groups.
        epoch_steps: steps an epoch.

    Raises:
        UserError: a setting has a value that cannot be used.
    """
    if fbank.num_features != config.model.features:
        raise UserError(
            f"model.features (={config.model.features}) must be {fbank.num_features}, the features of frontend "
            f"{config.frontend!r}"
        )
    loss = config.loss
    schedule = make_schedule(config.learning_rate, epoch_steps, steps_of(config.epochs, epoch_steps))
    margins = losses.MarginSchedule(loss.margin, loss.margin_start * epoch_steps, loss.margin_end * epoch_steps)
    return Recipe(
        network,
        fbank,
        make_optimizer(config.optimizer, schedule, params),
        schedule,
        margins,
        mesh,
        ml_collections.FrozenConfigDict(config),
        epoch_steps,
    )


def init_state(
    recipe: Recipe, params: Any, batch_stats: Any, indices: Mapping[str, jax.Array] | None = None
) -> TrainState:
    """The state before the first step; `indices` are those of `qat.cells`, where codebooks nest."""
    if recipe.config.quant.reassign_every and "codebooks" in params:
        indices = qat.assigned(params["network"], params["codebooks"])
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, recipe.optimizer.init(params), indices or {})


def features_of(recipe: Recipe, key: jax.Array, batch: Batch) -> jax.Array:
    """Augmented, mean-normalised and masked features `[batch, time, mel]` of a training batch."""
    key_wave, key_mask = jax.random.split(key)
    wave = batch["wave"]
    if recipe.config.data.augment:
        wave = frontend.augment_batch(key_wave, batch, frontend.RoomConfig(), recipe.mesh)
    features = frontend.mean_normalize(frontend.fbank(wave, recipe.fbank), None)
    if recipe.config.spec_augment:
        features = frontend.spec_augment(
            key_mask, features, frontend.SpecAugmentConfig(probability=recipe.config.spec_augment)
        )
    return features


def objective(recipe: Recipe, params: Any, embeddings: jax.Array, labels: jax.Array, step: jax.Array) -> Metrics:
    """Mean loss and accuracy of embeddings `[batch, dim]` under the classifier and its margin."""
    loss = recipe.config.loss
    cosines = losses.class_cosines(embeddings, params["classifier"])
    logits = losses.margin_logits(cosines, labels, recipe.margin(step), loss.scale, loss.kind)
    each = (
        losses.jeffreys(logits, labels, loss.smoothing, loss.spread)
        if loss.jeffreys
        else (losses.cross_entropy(logits, labels))
    )
    return {"loss": each.mean(), "accuracy": (cosines.argmax(-1) == labels).mean(), "margin": recipe.margin(step)}


def total_loss(
    recipe: Recipe,
    params: Any,
    network: Any,
    batch_stats: Any,
    features: jax.Array,
    labels: jax.Array,
    step: jax.Array,
    teacher: Any = None,
) -> tuple[jax.Array, tuple[Metrics, Any]]:
    """The weighted sum of classification loss and distillation.

    Args:
        recipe: what the step is made of.
        params: for the classifier.
        network: the network's parameters to compute with.
        batch_stats: its running statistics.
        features: `[batch, time, mel]`.
        labels: speakers, int `[batch]`.
        step: of the run.
        teacher: variables of the full-precision network, where `distill.weight` is above zero.

    Returns:
        The loss, and with it metrics and the updated running statistics.
    """
    distill, weight = recipe.config.distill, recipe.config.loss.weight
    variables = {"params": network, "batch_stats": batch_stats}
    parts = recipe.network.distilled_parts() if distill.weight else ()
    embeddings, outputs, updates = recipe.network.taps(
        variables, features, train=True, names=parts, mutable=["batch_stats"]
    )
    metrics = objective(recipe, params, embeddings, labels, step) if weight else {"loss": jnp.zeros(())}
    loss = weight * metrics["loss"]
    if distill.weight:
        taught, wanted, _ = jax.lax.stop_gradient(recipe.network.taps(teacher, features, names=parts))
        stages, taught_stages = ([found[name] for name in parts] for found in (outputs, wanted))
        distance = losses.distillation(
            embeddings, stages, taught, taught_stages, distill.cosine, distill.embedding, distill.stage
        )
        metrics["teacher_cosine"] = 1 - losses.cosine_distance(embeddings, taught)
        loss += distill.weight * distance
    return loss, ({**metrics, "loss": loss}, updates.get("batch_stats", {}))


def train_step(
    recipe: Recipe, state: TrainState, batch: Batch, teacher: Any = None, names: tuple[str, ...] | None = None
) -> tuple[TrainState, Metrics]:
    """One step of stochastic gradient descent.

    Args:
        recipe: what the step is made of.
        state: before.
        batch: from `data.pipeline`: `wave` and `interference` `[batch, samples]`, `snr_db`, `reverb`, `speaker`
            `[batch]`.
        teacher: see `total_loss`.
        names: in multi-stage quantization, the tensors that are quantized already.

    Returns:
        The state after, and scalars: `loss`, `gradient_norm`, `parameter_norm` (after), `learning_rate`; `accuracy` (of
        the cosines, without margin) and `margin` where there is a classification loss; `teacher_cosine` where there is
        a teacher.
    """
    key = jax.random.fold_in(jax.random.key(recipe.config.seed + 1), state.step)
    features = features_of(recipe, key, batch)
    section = recipe.config.quant

    def loss_of(params: Any) -> tuple[jax.Array, tuple[Metrics, Any]]:
        network = params["network"]
        if "codebooks" in params:
            thaw = section.thaw_epochs * recipe.epoch_steps
            network = qat.weights(section, params, state.indices, state.step, thaw, names)
        labels = batch["speaker"]
        return total_loss(recipe, params, network, state.batch_stats, features, labels, state.step, teacher)

    gradients, (metrics, batch_stats) = jax.grad(loss_of, has_aux=True)(state.params)
    updates, opt_state = recipe.optimizer.update(gradients, state.opt_state, state.params)
    params, indices = optax.apply_updates(state.params, updates), state.indices
    if "codebooks" in params:
        until = section.lloyd_until * recipe.total_steps
        params, indices = qat.after_step(section, params, indices, state.step + 1, until)
        if section.grow_from:
            params = qat.kept(state.params, params)
    metrics |= {
        "gradient_norm": optax.tree.norm(gradients),
        "parameter_norm": optax.tree.norm(params),
        "learning_rate": recipe.learning_rate(state.step),
    }
    return TrainState(state.step + 1, params, batch_stats, opt_state, indices), metrics


def jit_train_step(
    recipe: Recipe, shardings: TrainState, names: tuple[str, ...] | None = None
) -> Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]]:
    """Compiles the step for a mesh: the state is donated and keeps its shardings."""
    step = functools.partial(train_step, recipe, names=names)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def average(trees: list[Any]) -> Any:
    """The mean of trees of arrays, leaf by leaf, in float32."""
    return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]) / len(leaves), *trees)
