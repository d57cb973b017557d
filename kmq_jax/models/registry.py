"""Every network by name, and what can be said of one without running it: parameters, arithmetic, components."""

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import map_named, named_leaves
from kmq_jax.models.resnet import ResNet, kiwano, wespeaker
from kmq_jax.nn.layers import KAIMING_NORMAL

_NETWORKS: dict[str, Callable[..., ResNet]] = {
    "resnet18": functools.partial(kiwano, blocks=(2, 2, 2, 2), preactivation=False),
    "resnet36": functools.partial(kiwano, blocks=(3, 4, 6, 3), preactivation=False),
    "resnet50": functools.partial(kiwano, blocks=(3, 4, 6, 3), preactivation=True),
    "resnet101": functools.partial(kiwano, blocks=(3, 4, 23, 3), preactivation=True),
    "resnet200": functools.partial(kiwano, blocks=(3, 24, 36, 3), preactivation=True),
    "wespeaker_resnet18": functools.partial(wespeaker, blocks=(2, 2, 2, 2), bottleneck=False),
    "wespeaker_resnet34": functools.partial(wespeaker, blocks=(3, 4, 6, 3), bottleneck=False),
    "wespeaker_resnet50": functools.partial(wespeaker, blocks=(3, 4, 6, 3), bottleneck=True),
    "wespeaker_resnet101": functools.partial(wespeaker, blocks=(3, 4, 23, 3), bottleneck=True),
    "wespeaker_resnet152": functools.partial(wespeaker, blocks=(3, 8, 36, 3), bottleneck=True),
    "wespeaker_resnet221": functools.partial(wespeaker, blocks=(6, 16, 48, 3), bottleneck=True),
    "wespeaker_resnet293": functools.partial(wespeaker, blocks=(10, 20, 64, 3), bottleneck=True),
}

_COMPONENT_OF = {
    "stem": "stem",
    **{f"stage{i}": f"stage{i}" for i in range(1, 5)},
    "pool": "pooling",
    "head": "embedding",
}
COMPONENTS = tuple(_COMPONENT_OF.values())
"""The parts of a network that diagnosis tells apart, from input to output."""


def names() -> tuple[str, ...]:
    """The names that `build` knows."""
    return tuple(_NETWORKS)


def default_settings(name: str) -> dict[str, Any]:
    """The settings of network `name` with their defaults, as values that JSON can hold.

    Raises:
        UserError: no network has this name.
    """
    if name not in _NETWORKS:
        raise UserError(f"unknown model {name!r}: it must be one of {', '.join(_NETWORKS)}")
    parameters = inspect.signature(_NETWORKS[name]).parameters
    kind = ("preactivation", "bottleneck")  # what the name stands for, not a setting
    settings = {key: parameter.default for key, parameter in parameters.items() if key not in kind}
    return {**settings, "blocks": list(settings["blocks"])}


def build(name: str, **settings: Any) -> ResNet:
    """Makes a network.

    Args:
        name: one of `names()`.
        **settings: `width`, `blocks` (in each stage), `features`, `embedding_size`, `norm`, `dtype`, `remat`, and for
            Kiwano's pre-activation networks `activation` and `last_taps`; see `models.resnet`.

    Returns:
        A Linen module: `model.init(key, features)`, `model.apply(variables, features, lengths, train=...)`.

    Raises:
        UserError: the name, a setting or a value is unknown; the message names it.
    """
    known = default_settings(name)
    for setting in settings:
        if setting not in known:
            raise UserError(f"model {name} has no setting {setting!r}; it has {', '.join(sorted(known))}")
    return _NETWORKS[name](**settings)


def initialize(model: ResNet, key: jax.Array) -> dict[str, Any]:
    """Draws the variables `{"params", "batch_stats"}` of a network, from the distributions that `model.init` uses.

    Much faster than `model.init`, which compiles a random generator for every parameter and runs every layer: here
    one long vector of each distribution is drawn and cut into kernels.
    """
    tree = shapes(model)
    kernels = {name: leaf.shape for name, leaf in named_leaves(tree) if name.endswith("kernel")}
    normal = {n: shape for n, shape in kernels.items() if len(shape) == 4 and model.kernel_init is KAIMING_NORMAL}
    uniform = {name: shape for name, shape in kernels.items() if name not in normal}

    def cut(flat: jax.Array, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, np.ndarray]]:
        ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
        for (name, shape), part in zip(shapes.items(), np.split(np.asarray(flat), ends[:-1])):
            yield name, part.reshape(shape)

    def count(shapes: dict[str, tuple[int, ...]]) -> tuple[int]:
        return (sum(map(math.prod, shapes.values())),)

    normal_key, uniform_key = jax.random.split(key)
    drawn = {}
    for name, x in cut(jax.random.normal(normal_key, count(normal)), normal):
        drawn[name] = x * math.sqrt(2 / (x.size / x.shape[-2]))  # variance 2 / fan out
    for name, x in cut(jax.random.uniform(uniform_key, count(uniform), minval=-1, maxval=1), uniform):
        drawn[name] = x / math.sqrt(x.size / x.shape[-1])  # variance 1 / (3 fan in)

    def start(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if name in drawn:
            return jnp.asarray(drawn[name], leaf.dtype)
        return (jnp.ones if name.endswith(("/scale", "/var")) else jnp.zeros)(leaf.shape, leaf.dtype)

    return map_named(start, tree)


def shapes(model: ResNet) -> dict[str, Any]:
    """The variables of a network as `jax.ShapeDtypeStruct`, without drawing any."""
    features = jax.ShapeDtypeStruct((1, 8, model.features), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), features)


def parameter_count(model: ResNet) -> int:
    """How many trained numbers a network has: weights, biases, and scale and bias of batch normalisations."""
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(model)["params"]))


def layer_macs(model: ResNet, frames: int = 300) -> dict[str, int]:
    """Multiply-accumulates of each convolution and linear layer for one utterance.

    The layers are found by intercepting calls while shapes are propagated, so no arithmetic runs. Zero padding counts
    as input, as is usual; biases, normalisations and activations do not count.

    Args:
        model: the network.
        frames: length of the utterance.

    Returns:
        `{name of the kernel: count}` in the order in which layers run.
    """
    counts: dict[str, int] = {}

    def record(run: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        y = run(*args, **kwargs)
        layer = context.module
        if context.method_name == "__call__" and layer.has_variable("params", "kernel"):
            positions = y.size // y.shape[-1]
            name = "/".join((*layer.path, "kernel"))
            counts[name] = layer.get_variable("params", "kernel").size * positions
        return y

    variables = shapes(model)
    features = jax.ShapeDtypeStruct((1, frames, model.features), jnp.float32)
    with nn.intercept_methods(record):
        jax.eval_shape(model.apply, variables, features)
    return counts


def macs(model: ResNet, frames: int = 300) -> int:
    """Multiply-accumulates to embed one utterance of this many frames."""
    return sum(layer_macs(model, frames).values())


def component(name: str) -> str:
    """The component, one of `COMPONENTS`, that the parameter called `name` belongs to.

    Raises:
        UserError: the name does not begin as those of the networks here do.
    """
    try:
        return _COMPONENT_OF[name.split("/", 1)[0]]
    except KeyError:
        raise UserError(f"parameter {name!r} belongs to no component ({', '.join(COMPONENTS)})") from None


def components(names_or_model: Iterable[str] | ResNet) -> dict[str, str]:
    """The component of every parameter.

    Args:
        names_or_model: parameter names, or the network that has them.

    Returns:
        `{name: component}`.
    """
    if isinstance(names_or_model, ResNet):
        return components(name for name, _ in named_leaves(shapes(names_or_model)["params"]))
    return {name: component(name) for name in cast(Iterable[str], names_or_model)}
