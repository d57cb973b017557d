"""Every network by name; and a network's parameters, arithmetic and first weights, without running it."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from numbers import Real

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import zeros

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json
from kmq_jax.core.tree import Variables, map_named, named_leaves
from kmq_jax.models import walk
from kmq_jax.models.campplus import CamPlusPlus
from kmq_jax.models.ge2e import Ge2e
from kmq_jax.models.graph import GraphNetwork
from kmq_jax.models.protocol import SpeakerNetwork
from kmq_jax.models.redimnet import TABLES, ReDimNet
from kmq_jax.models.resnet import SMOKE, kiwano, wespeaker
from kmq_jax.models.settings import check
from kmq_jax.models.tdnn import SPEECHBRAIN, Ecapa, Xvector
from kmq_jax.nn.layers import KAIMING_NORMAL, TORCH_DEFAULT, BatchNorm

Factory = Callable[..., SpeakerNetwork]


@dataclasses.dataclass(frozen=True)
class _Entry:
    """What a name stands for.

    Attributes:
        factory: makes the network from keyword arguments.
        fixed: arguments that the name decides; they are no settings.
        defaults: values of settings in place of the factory's own.
        smoke: settings of a network so small that a run passes in seconds.
    """

    factory: Factory
    fixed: Mapping[str, object]
    defaults: Mapping[str, object]
    smoke: Mapping[str, object]


_NETWORKS: dict[str, _Entry] = {}


def register(
    name: str,
    factory: Factory,
    *,
    fixed: Mapping[str, object] | None = None,
    defaults: Mapping[str, object] | None = None,
    smoke: Mapping[str, object] | None = None,
) -> None:
    """Names a network, so that configurations, models on disk and commands know it.

    Args:
        name: a new name.
        factory: makes the network from keyword arguments, such as its class. Each has a default that JSON can hold
            and is a setting, among them `features`, `embedding_size` and `dtype` (the compute dtype, by name).
        fixed: arguments of the factory that the name decides.
        defaults: values of settings in place of the factory's own.
        smoke: settings of a network so small that a run passes in seconds, for `:smoke` configurations.

    Raises:
        UserError: the name is taken by another factory.
    """
    entry = _Entry(factory, dict(fixed or {}), dict(defaults or {}), dict(smoke or {}))
    # The same factory again is no mistake: notebooks run a cell twice.
    if _NETWORKS.get(name, entry).factory is not factory:
        raise UserError(f"there is a model {name!r} already: a network needs a name of its own")
    _NETWORKS[name] = entry


_LARGEST = 65536  # of any setting: channels, sizes, blocks
_MOST = 20_000  # of the numbers of one setting together, such as the blocks of all stages


def names() -> tuple[str, ...]:
    """The names that `build` knows."""
    return tuple(_NETWORKS)


def _entry(name: str) -> _Entry:
    if not isinstance(name, str) or name not in _NETWORKS:
        raise UserError(f"unknown model {name!r}: it must be one of {', '.join(_NETWORKS)}")
    return _NETWORKS[name]


def default_settings(name: str) -> Json:
    """The settings of network `name` with their defaults, as values that JSON can hold.

    >>> default_settings("resnet18")["blocks"]
    [2, 2, 2, 2]

    Raises:
        UserError: no network has this name.
    """
    entry = _entry(name)
    parameters = inspect.signature(entry.factory).parameters
    no_settings = {*entry.fixed, "name", "parent"}  # the last two are Linen's own
    # A factory's signature is the list of its settings: there is no second one to keep in step.
    settings = {key: parameter.default for key, parameter in parameters.items() if key not in no_settings}
    settings |= entry.defaults
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}


def smoke_settings(name: str) -> Json:
    """The settings by which network `name` is so small that a run passes in seconds.

    Raises:
        UserError: no network has this name.
    """
    return dict(_entry(name).smoke)


def build(name: str, **settings: object) -> SpeakerNetwork:
    """Makes a network.

    Args:
        name: one of `names()`.
        **settings: those of `default_settings(name)`; the network's class or factory says what they mean.

    Returns:
        A Linen module: `model.init(key, features)`, `model.apply(variables, features, lengths, train=...)`.

    Raises:
        UserError: the name, a setting or a value is unknown; the message names it.

    >>> build("wespeaker_resnet34", width=8).channels
    (8, 16, 32, 64)
    """
    known = default_settings(name)
    for setting in settings:
        if setting not in known:
            raise UserError(f"model {name} has no setting {setting!r}; it has {', '.join(sorted(known))}")
        _check_size(setting, settings[setting])
        _check_kind(setting, settings[setting], known[setting])
    entry = _entry(name)
    return entry.factory(**{**entry.fixed, **entry.defaults, **settings})


def _check_size(name: str, value: object) -> None:
    """Refuses a setting that would take all memory before a layer is made: settings come from files, too.

    Raises:
        UserError: a number in it is negative or too large, or the numbers are too many or add up to too much.
    """
    # A list of lists at most, as a table of stages is.
    many = value if isinstance(value, (list, tuple)) else (value,)
    flat = [one for part in many for one in (part if isinstance(part, (list, tuple)) else (part,))]
    for one in flat:
        if isinstance(one, (int, float)) and not 0 <= one <= _LARGEST:
            raise UserError(f"`{name}` (={value}) must be 0 to {_LARGEST}")
    if isinstance(value, (list, tuple)) and (len(flat) > 100 or sum(x for x in flat if isinstance(x, int)) > _MOST):
        raise UserError(f"`{name}` (={str(value)[:100]}) asks for more than any network has")


def _check_kind(name: str, value: object, default: object) -> None:
    """Refuses a setting of another kind than its default. Which values of a kind it may have, the network says.

    Raises:
        UserError: names the setting.
    """
    words = "true or false" if isinstance(default, bool) else "a text" if isinstance(default, str) else "a number"
    words = f"a list like {default}" if isinstance(default, (list, tuple)) else words
    # A dtype may be a type as well as its name.
    check(name, name == "dtype" or _is_like(value, default), str(value)[:100], words)


def _is_like(value: object, default: object) -> bool:
    """Whether a setting is of its default's kind: true or false, a text, a number, a list of one of these or of lists.

    >>> _is_like([3, 4, 6, 3], (2, 2, 2, 2)), _is_like(5, (2, 2)), _is_like([5], ((1, 2),)), _is_like(True, 1)
    (True, False, False, False)
    """
    if isinstance(default, (list, tuple)):
        return isinstance(value, (list, tuple)) and all(_is_like(one, default[0]) for one in value if default)
    if isinstance(default, (bool, str)):
        return isinstance(value, type(default))
    # True is an int to Python. A default of any other kind tells nothing.
    return not isinstance(default, (int, float)) or (isinstance(value, Real) and not isinstance(value, bool))


shapes = walk.shapes


def initialize(model: SpeakerNetwork, key: jax.Array) -> Variables:
    """Draws the variables `{"params", "batch_stats"}` of a network, from the distributions that `model.init` uses.

    Much faster than `model.init`, which compiles a random generator for every parameter and runs every layer: here
    one long vector of each distribution is drawn and cut into kernels. A network with parameters that start in
    other ways than those of `nn.layers` is left to `model.init`.
    """
    tree, starts = _starts(model)
    leaves = dict(named_leaves(tree))
    if any(start is None for start in starts.values()):
        # Seven frames more than the least: of eight, three strides of 2 leave one.
        return jax.jit(model.init)(key, jnp.zeros((1, 7 + model.least_frames(), model.features)))
    normal = {name: leaves[name].shape for name in leaves if starts[name] == "normal"}
    uniform = {name: leaves[name].shape for name in leaves if starts[name] == "uniform"}
    normal_key, uniform_key = jax.random.split(key)
    drawn = {}
    for name, x in _cut(jax.random.normal(normal_key, _count(normal)), normal):
        drawn[name] = x * math.sqrt(2 / (x.size / x.shape[-2]))  # variance 2 / fan out
    for name, x in _cut(jax.random.uniform(uniform_key, _count(uniform), minval=-1, maxval=1), uniform):
        drawn[name] = x / math.sqrt(x.size / x.shape[-1])  # variance 1 / (3 fan in)

    def start(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if name in drawn:
            return jnp.asarray(drawn[name], leaf.dtype)
        return (jnp.ones if starts[name] == "ones" else jnp.zeros)(leaf.shape, leaf.dtype)

    return map_named(start, tree)


@functools.lru_cache(maxsize=64)
def _starts(model: SpeakerNetwork) -> tuple[Variables, dict[str, str | None]]:
    """The shapes of a network's variables, and how each starts: "normal", "uniform", "ones", "zeros" or None (else)."""
    known: dict[str, str | None] = {}

    def note(layer: walk.Layer, x: jax.Array, run: walk.Run) -> jax.Array:
        module = layer.module
        if isinstance(module, BatchNorm):
            ones = ("params/{}/scale", "batch_stats/{}/var")
            known.update({name.format(layer.name): "ones" for name in ones})
            known.update({name.format(layer.name): "zeros" for name in ("params/{}/bias", "batch_stats/{}/mean")})
        elif layer.kind in (walk.CONVOLUTION, walk.LINEAR, walk.RECURRENCE):
            # Initializers are functions, told apart by identity. An unknown one stays None.
            kinds = {id(KAIMING_NORMAL): "normal", id(TORCH_DEFAULT): "uniform"}
            known[f"params/{layer.name}/kernel"] = kinds.get(id(module.kernel_init))
            known[f"params/{layer.name}/bias"] = "zeros" if getattr(module, "bias_init", zeros) is zeros else None
        return run(x)

    with walk.visiting(note):
        tree = walk.traced(model)
    return tree, {name: known.get(name) for name, _ in named_leaves(tree)}


def _count(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int]:
    return (sum(map(math.prod, shapes.values())),)


def _cut(flat: jax.Array, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, np.ndarray]]:
    """Cuts a vector into arrays of these shapes, in order."""
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    for (name, shape), part in zip(shapes.items(), np.split(np.asarray(flat), ends[:-1])):
        yield name, part.reshape(shape)


def parameter_count(model: SpeakerNetwork) -> int:
    """How many trained numbers a network has: weights, biases, and scale and bias of batch normalisations.

    >>> parameter_count(build("wespeaker_resnet34"))
    6634336
    """
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(model)["params"]))


def layer_macs(model: SpeakerNetwork, frames: int = 300) -> dict[str, int]:
    """Multiply-accumulates of each convolution and linear layer for one utterance.

    Zero padding counts as input, as is usual; biases, normalisations and activations do not count.

    Args:
        model: the network.
        frames: length of the utterance.

    Returns:
        `{name of the kernel: count}` in the order in which layers run.
    """
    counts: dict[str, int] = {}
    for layer in walk.layers(model, frames):
        if layer.kernel is not None:
            name = f"{layer.name}/kernel"
            # A layer that is called twice in a forward pass counts twice.
            counts[name] = counts.get(name, 0) + layer.macs
    return counts


def macs(model: SpeakerNetwork, frames: int = 300) -> int:
    """Multiply-accumulates to embed one utterance of this many frames.

    >>> small = build("wespeaker_resnet18", **smoke_settings("wespeaker_resnet18"))
    >>> macs(small, frames=200) == sum(layer_macs(small, frames=200).values())
    True
    """
    return sum(layer_macs(model, frames).values())


def _register_resnets() -> None:
    kiwanos = {
        "resnet18": ((2, 2, 2, 2), False),
        "resnet36": ((3, 4, 6, 3), False),
        "resnet50": ((3, 4, 6, 3), True),
        "resnet101": ((3, 4, 23, 3), True),
        "resnet200": ((3, 24, 36, 3), True),
    }
    for name, (blocks, preactivation) in kiwanos.items():
        fixed, defaults = {"preactivation": preactivation}, {"blocks": blocks}
        register(name, kiwano, fixed=fixed, defaults=defaults, smoke=SMOKE)
    wespeakers = {
        "wespeaker_resnet18": ((2, 2, 2, 2), False),
        "wespeaker_resnet34": ((3, 4, 6, 3), False),
        "wespeaker_resnet50": ((3, 4, 6, 3), True),
        "wespeaker_resnet101": ((3, 4, 23, 3), True),
        "wespeaker_resnet152": ((3, 8, 36, 3), True),
        "wespeaker_resnet221": ((6, 16, 48, 3), True),
        "wespeaker_resnet293": ((10, 20, 64, 3), True),
    }
    for name, (blocks, bottleneck) in wespeakers.items():
        fixed, defaults = {"bottleneck": bottleneck}, {"blocks": blocks}
        register(name, wespeaker, fixed=fixed, defaults=defaults, smoke=SMOKE)


def _register_tdnns() -> None:
    tiny = {"width": 16, "aggregated": 16, "embedding_size": 32}
    for width in (512, 1024):
        register(f"ecapa_c{width}", Ecapa, defaults={"width": width}, smoke=tiny)
        defaults = {"width": width, "aggregated": 3 * width, "layout": SPEECHBRAIN}
        register(f"ecapa_speechbrain_c{width}", Ecapa, defaults=defaults, smoke=tiny)
    for name, table in TABLES.items():
        tiny_stages = {"features": 16, "width": 4, "stages": ((1, 1, 2, 0), (2, 1, 1, 8)), "group_divisor": 2}
        register(name, ReDimNet, defaults=table, smoke={**tiny_stages, "embedding_size": 32})
    register("xvector", Xvector, smoke={"width": 16, "pooled": 32, "embedding_size": 32})


_register_resnets()
_register_tdnns()
register(
    "campplus",
    CamPlusPlus,
    smoke={"layers": (1, 1, 1), "growth": 8, "width": 16, "stem_channels": 4, "embedding_size": 32},
)
register("ge2e", Ge2e, smoke={"width": 16, "layers": 2, "embedding_size": 32})
register("graph", GraphNetwork)
