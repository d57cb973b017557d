"""Training steps as `train` takes them, with random data: what several benchmarks time."""

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from kmq_jax.core import mesh
from kmq_jax.core.tree import Params, map_named
from kmq_jax.models.speaker_model import frontend_of
from kmq_jax.quant import Codebook
from kmq_jax.training import step as steps
from kmq_jax.training.from_models import describe
from kmq_jax.training.options import TrainOptions
from kmq_jax.training.qat import Indices
from kmq_jax.training.state import QatParams, Trainable, TrainState
from kmq_jax.training.tasks import FullPrecision, Task

EPOCH_STEPS = 1000


@dataclass(frozen=True)
class Start:
    """A training step with the state before it.

    Attributes:
        recipe: what the step is made of.
        state: on the devices.
        shardings: how it lies there.
    """

    recipe: steps.Recipe
    state: TrainState
    shardings: TrainState


def start(options: TrainOptions, classes: int, devices: Mesh) -> Start:
    """Prepares training as `train` does, but with random weights and evenly spaced codebooks."""
    recipe, begun = _begin(options, classes, devices)
    init_state = functools.partial(steps.init_state, recipe)
    shardings = mesh.tree_shardings(jax.eval_shape(init_state, *begun), devices, options.sharding)
    # One program, not one for every shape of a tensor.
    return Start(recipe, jax.jit(init_state, out_shardings=shardings)(*begun), shardings)


def abstract(options: TrainOptions, classes: int, devices: Mesh) -> Start:
    """As `start`, but the state has shapes and shardings alone: enough to compile a step for many devices."""
    recipe, begun = _begin(options, classes, devices)
    state = jax.eval_shape(functools.partial(steps.init_state, recipe), *begun)
    shardings = mesh.tree_shardings(state, devices, options.sharding)
    return Start(recipe, jax.tree.map(placed, state, shardings), shardings)


def placed(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """A shape that says how its array lies on the devices."""
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _begin(
    options: TrainOptions, classes: int, devices: Mesh
) -> tuple[steps.Recipe, tuple[Trainable, Params, Indices]]:
    """The recipe, and parameters, statistics and indices before the first step."""
    network = describe(options).network(options.dtype).keeping(options.remat_keeps)
    params, batch_stats = steps.init_params(network, options, classes)
    objective = steps.make_objective(network, frontend_of(options.frontend), options, devices, EPOCH_STEPS)
    task = steps.make_task(options, EPOCH_STEPS)
    if not isinstance(task, FullPrecision):
        params = dataclasses.replace(params, network=even_codebooks(task, params.network))
    return steps.make_recipe(objective, task, params), (params, batch_stats, task.init_indices(params.network))


def even_codebooks(task: Task, network: Params) -> QatParams:
    """What a quantized task starts from, with evenly spaced centroids.

    A step is as fast with them, and k-means would be compiled for every shape of a kernel, which takes minutes.
    """
    shapes = task.shapes(network)

    def even(book: Codebook) -> Codebook:
        # Types are given: a weakly typed array comes out of the step strongly typed, and the step is compiled again.
        line = jnp.linspace(-2, 2, book.centroids.shape[1], dtype=jnp.float32)
        # The scale is its softplus, about 0.03.
        raw_scale = jnp.full(book.raw_scale.shape, -3.5, jnp.float32)
        return dataclasses.replace(book, raw_scale=raw_scale, centroids=jnp.broadcast_to(line, book.centroids.shape))

    books = {name: even(book) for name, book in shapes.codebooks.items()}

    def latent(name: str, leaf: jax.Array) -> jax.Array:
        return leaf / jnp.maximum(jnp.std(leaf), 1e-6) if name in books else leaf

    return QatParams(jax.jit(functools.partial(map_named, latent))(network), books)


def noise(batch: int, samples: int, classes: int) -> steps.Batch:
    """A batch as the pipeline makes it: one example in five clean, one reverberant, the rest with interference."""
    kind = jnp.arange(batch) % 5
    disturbed = (kind > 0) & (kind < 4)
    keys = jax.random.split(jax.random.key(0))

    def sound(key: jax.Array) -> jax.Array:
        return jnp.clip(3277 * jax.random.normal(key, (batch, samples)), -32768, 32767).astype(jnp.int16)

    return {
        "wave": sound(keys[0]),
        "interference": sound(keys[1]) * disturbed[:, None],
        "snr_db": jnp.where(disturbed, 10.0, jnp.inf),
        "reverb": kind == 4,
        "speaker": (jnp.arange(batch) % classes).astype(jnp.int32),
    }
