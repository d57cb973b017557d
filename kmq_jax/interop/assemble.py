"""From another toolkit's tensors to the variables of one of our networks: names, layouts, and a check of every one."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json
from kmq_jax.core.tree import Leaf, Variables, map_named
from kmq_jax.interop.torch_checkpoint import Checkpoint
from kmq_jax.models import registry
from kmq_jax.models.protocol import SpeakerNetwork
from kmq_jax.models.resnet import ResNet
from kmq_jax.nn.pooling import flatten_order

# PyTorch calls both the kernel of a layer and the scale of a normalisation "weight".
LEAVES = {"kernel": "weight", "bias": "bias", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_BLOCK = re.compile(r"stage(\d)/block(\d+)/(.+)")
# Axes along which pooled features lie, flattened with the channel fastest here and slowest in PyTorch.
_POOLED = {"pool/attention1/kernel": 0, "pool/attention2/kernel": 1, "pool/attention2/bias": 0, "head/linear/kernel": 0}
_POOLED |= {f"head/bn_in/{leaf}": 0 for leaf in ("scale", "bias", "mean", "var")}


class Imported(NamedTuple):
    """A model of another toolkit as ours.

    Attributes:
        architecture: a name of `models.registry`.
        settings: the network's settings, as JSON values.
        frontend: name of the filterbank setting that the model was trained with.
        variables: `{"params": tree, "batch_stats": tree}` of float32 arrays.
    """

    architecture: str
    settings: Json
    frontend: str
    variables: Variables


def network_tensors(checkpoint: Checkpoint, classifier: str) -> dict[str, np.ndarray]:
    """A PyTorch checkpoint's tensors without the classifier, whose names begin with `classifier`, and step counters.

    >>> tensors = {"conv.weight": np.ones(1), "bn.num_batches_tracked": np.ones(()), "projection.weight": np.ones(1)}
    >>> list(network_tensors(Checkpoint(tensors, {}), "projection."))
    ['conv.weight']
    """
    return {
        name: value
        for name, value in checkpoint.tensors.items()
        if not name.startswith(classifier) and not name.endswith(".num_batches_tracked")
    }


def torch_names(modules: Mapping[str, str]) -> Callable[[str], str]:
    """Makes the function from our parameter names to those of a PyTorch residual network.

    Args:
        modules: their name of each module of ours; within a block, relative to it. Modules of a block that keep their
            name need no entry: `stage1/block0/conv1` is `layer1.0.conv1` in both families.

    >>> name_of = torch_names({"stem/conv": "conv1", "shortcut/conv": "shortcut.0"})
    >>> name_of("stem/conv/kernel"), name_of("stage2/block0/shortcut/conv/kernel")
    ('conv1.weight', 'layer2.0.shortcut.0.weight')
    """

    def translate(name: str) -> str:
        module, leaf = name.rsplit("/", 1)
        if match := _BLOCK.fullmatch(module):
            stage, block, rest = match.groups()
            module = f"layer{stage}.{block}.{modules.get(rest, rest)}"
        else:
            module = modules[module]
        return f"{module}.{LEAVES[leaf]}"

    return translate


def count_blocks(names: Iterable[str], where: str) -> list[int]:
    """Counts the residual blocks of PyTorch's `layer1` to `layer4`.

    Raises:
        UserError: there are none, or their numbers have a gap.

    >>> count_blocks([f"layer{stage}.{n}.conv1.weight" for stage in (1, 2, 3, 4) for n in range(stage)], "model.pt")
    [1, 2, 3, 4]
    """
    blocks: list[set[int]] = [set(), set(), set(), set()]
    for name in names:
        if match := re.match(r"layer([1-4])\.(\d{1,4})\.", name):
            blocks[int(match[1]) - 1].add(int(match[2]))
    for stage, numbers in enumerate(blocks, 1):
        missing = set(range(max(numbers, default=0) + 1)) - numbers
        if missing:
            raise UserError(f"{where}: layer{stage}.{min(missing)} is missing")
    return [len(numbers) for numbers in blocks]


def shape_of(tensors: Mapping[str, np.ndarray], name: str, axes: int, where: str) -> tuple[int, ...]:
    """The shape of a tensor that a network's settings are read off.

    Raises:
        UserError: it is missing, has another number of axes, or is empty.

    >>> shape_of({"conv.weight": np.ones((2, 3))}, "conv.weight", 2, "model.pt")
    (2, 3)
    """
    if name not in tensors:
        raise UserError(f"{where}: tensor {name} is missing")
    if tensors[name].ndim != axes:
        raise UserError(f"{where}: tensor {name} has shape {tensors[name].shape}, not {axes} axes")
    if not tensors[name].size:
        raise UserError(f"{where}: tensor {name} of shape {tensors[name].shape} is empty")
    return tensors[name].shape


def assemble(
    network: SpeakerNetwork,
    tensors: Mapping[str, np.ndarray],
    name_of: Callable[[str], str],
    kernel_axes: tuple[int, int, int, int],
    where: str,
) -> Variables:
    """Fills the variables of `network`.

    Args:
        network: what the tensors are of, one of the residual networks.
        tensors: theirs by name; each must be used once.
        name_of: their name of a parameter or statistic of ours.
        kernel_axes: the transposition from their convolution kernels to `[time, freq, in, out]`.
        where: the file, for messages.

    Returns:
        `{"params": tree, "batch_stats": tree}`, float32.

    Raises:
        UserError: a tensor is missing, has the wrong shape or type, is not finite, or is left over; it is named.
    """
    assert isinstance(network, ResNet)
    # Three strides of 2, each rounding up, come to an eighth, rounded up.
    freqs = math.ceil(network.features / 8)
    channels = network.channels[-1] * network.block.expansion

    def permute(ours: str, value: np.ndarray) -> np.ndarray:
        if ours not in _POOLED:
            return value
        order = flatten_order(freqs, channels)
        axis = _POOLED[ours]
        if value.shape[axis] == 2 * order.size:  # means, then deviations
            order = np.concatenate([order, order + order.size])
        return value.take(order, axis)

    return fill(network, tensors, name_of, where, kernel_axes, permute)


def fill(
    network: SpeakerNetwork,
    tensors: Mapping[str, np.ndarray],
    name_of: Callable[[str], str],
    where: str,
    kernel_axes: tuple[int, int, int, int] = (3, 2, 1, 0),
    permute: Callable[[str, np.ndarray], np.ndarray] = lambda ours, value: value,
) -> Variables:
    """Fills the variables of any network.

    Args:
        network: what the tensors are of.
        tensors: theirs by name, kernels `[out, in, ...]`; each must be used once.
        name_of: their name of a parameter or statistic of ours.
        where: the file, for messages.
        kernel_axes: the transposition from their 2-D kernels to `[time, freq, in, out]`; by default from `[out, in,
            freq, time]`.
        permute: brings a parameter of ours, in its layout, into our order; the shape stays.

    Returns:
        `{"params": tree, "batch_stats": tree}`, float32.

    Raises:
        UserError: a tensor is missing, has the wrong shape or type, is not finite, or is left over; it is named.
    """
    used = set()

    def take(name: str, leaf: Leaf) -> np.ndarray:
        _, ours = name.split("/", 1)  # without "params" or "batch_stats"
        theirs = name_of(ours)
        if theirs not in tensors:
            raise UserError(f"{where}: tensor {theirs} is missing")
        # Each tensor once: what is never taken is reported below, not dropped in silence.
        used.add(theirs)
        given = tensors[theirs]
        value = given
        if ours.endswith("/kernel"):
            if value.ndim == 4:
                value = value.transpose(kernel_axes)
            elif value.ndim == 3 and len(leaf.shape) == 3:
                value = value.transpose(2, 1, 0)  # [out, in, time] to [time, in, out]
            elif value.ndim == 2 or value.shape[2:] == (1,):  # a Conv1d of one tap is a linear layer
                value = value.reshape(value.shape[:2]).T
        if value.shape != leaf.shape:
            raise UserError(f"{where}: tensor {theirs} has shape {given.shape}, which does not fit {ours} {leaf.shape}")
        if not np.issubdtype(value.dtype, np.floating):
            raise UserError(f"{where}: tensor {theirs} is of type {value.dtype}, not floating point")
        value = value.astype(np.float32)
        if not np.isfinite(value).all():
            raise UserError(f"{where}: tensor {theirs} holds values that are not finite")
        return np.ascontiguousarray(permute(ours, value))

    variables = map_named(take, registry.shapes(network))
    if extra := sorted(set(tensors) - used):
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise UserError(f"{where}: tensor {extra[0]}{more} is not part of the network")
    return variables
