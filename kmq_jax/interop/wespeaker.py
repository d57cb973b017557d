"""WeSpeaker's ResNets: what their files have in common, and PyTorch checkpoints. See wespeaker_onnx for ONNX.

Structure read in wespeaker/models/resnet.py, models/pooling_layers.py and utils/checkpoint.py of
https://github.com/wenet-e2e/wespeaker at dfa7419.
"""

import numpy as np

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json
from kmq_jax.interop.assemble import Imported, assemble, count_blocks, network_tensors, shape_of, torch_names
from kmq_jax.interop.torch_checkpoint import Checkpoint
from kmq_jax.models import registry
from kmq_jax.nn.layers import Bottleneck

KERNEL_AXES = (3, 2, 1, 0)  # from [out, in, freq, time]

_MODULES = {
    "stem/conv": "conv1",
    "stem/bn": "bn1",
    "shortcut/conv": "shortcut.0",
    "shortcut/bn": "shortcut.1",
    "head/linear": "seg_1",
}


def recognizes(tensors: dict[str, np.ndarray]) -> bool:
    """Whether names are those of WeSpeaker's ResNets."""
    return "conv1.weight" in tensors and "seg_1.weight" in tensors


def convert(checkpoint: Checkpoint, where: str) -> Imported:
    """Makes our model of a PyTorch checkpoint's tensors; depth, width and sizes are read off them.

    The classifier (`projection.*`), which only training needs, is left behind.

    Raises:
        UserError: a tensor is missing, left over or of the wrong shape, or there are two embedding layers.
    """
    tensors = network_tensors(checkpoint, "projection.")
    if two := [name for name in tensors if name.startswith(("seg_bn_1.", "seg_2."))]:
        raise UserError(f"{where}: tensor {two[0]}: networks with two embedding layers are not supported")
    if pool := [name for name in tensors if name.startswith("pool.")]:
        raise UserError(f"{where}: tensor {pool[0]}: only the pooling TSTP, which has no parameters, is supported")
    # Only bottlenecks have a third convolution.
    bottleneck = "layer1.0.conv3.weight" in tensors
    width = shape_of(tensors, "conv1.weight", 4, where)[0]
    embedding_size, statistics = shape_of(tensors, "seg_1.weight", 2, where)
    architecture, settings = settings_of(
        count_blocks(tensors, where), bottleneck, width, statistics, embedding_size, None, "batch", where
    )
    network = registry.build(architecture, **settings)
    variables = assemble(network, tensors, torch_names(_MODULES), KERNEL_AXES, where)
    return Imported(architecture, settings, "wespeaker", variables)


def settings_of(
    blocks: list[int],
    bottleneck: bool,
    width: int,
    statistics: int,
    embedding_size: int,
    features: int | None,
    norm: str,
    where: str,
) -> tuple[str, Json]:
    """Finds the network's name and settings.

    Args:
        blocks: residual blocks in each stage.
        bottleneck: whether they are bottlenecks.
        width: channels of the first convolution.
        statistics: values that the linear layer reads.
        embedding_size: values that it gives.
        features: mel bands; None takes 8 for each frequency that is pooled.
        norm: "batch", or "bias" where batch normalisation is folded.
        where: the file, for messages.

    Returns:
        A name of the registry, and the settings. A depth that has no name goes by the first name of its kind.

    Raises:
        UserError: pooling TSTP does not give as many statistics.
    """
    # The fourth stage has eight times the channels of the first.
    channels = 8 * width * (Bottleneck.expansion if bottleneck else 1)
    # A mean and a deviation for every channel at every frequency that is pooled.
    freqs, left = divmod(statistics, 2 * channels) if channels else (0, 0)
    if left or not freqs or features and -(-features // 8) != freqs:
        raise UserError(
            f"{where}: the linear layer reads {statistics} values, "
            f"not mean and deviation of {channels} channels at some frequencies (pooling TSTP)"
        )
    settings = {
        "blocks": list(blocks),
        "width": width,
        "features": features or 8 * freqs,
        "embedding_size": embedding_size,
        "norm": norm,
    }
    kind = [
        name
        for name in registry.names()
        if name.startswith("wespeaker") and (registry.build(name).block is Bottleneck) == bottleneck
    ]
    return next((n for n in kind if registry.default_settings(n)["blocks"] == list(blocks)), kind[0]), settings
