"""Kiwano's checkpoints (`model<epoch>.ckpt`) of its pre-activation ResNets.

Three layouts of names are known: `KiwanoResNet` (three 3x3 convolutions a block, SiLU), its forerunner `ResNet`
or `ResNetV2` (the third 1x1), and the same without the prefixes `preresnet.`, `temporal_pooling.` and `embedding.`,
as written before 2024. The classifier `output.W` is left behind. Structure read in kiwano/model/resnet.py of
https://github.com/mrouvier/kiwano at 3e276cd and earlier.
"""

import numpy as np

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json
from kmq_jax.interop.assemble import Imported, assemble, count_blocks, network_tensors, shape_of, torch_names
from kmq_jax.interop.torch_checkpoint import Checkpoint
from kmq_jax.models import registry
from kmq_jax.nn.layers import PreActivationBlock

KERNEL_AXES = (2, 3, 1, 0)  # from [out, in, time, freq]
FEATURES = 81
CLASSES = ("KiwanoResNet", "ResNet", "ResNetV2")

_MODULES = {
    "stem/conv": "pre_conv1",
    "stem/bn": "pre_bn1",
    "shortcut/conv": "downsample.0",
    "shortcut/bn": "downsample.1",
    "se/fc1": "se.fc.0",
    "se/fc2": "se.fc.2",
    "pool/attention1": "attention.0",
    "pool/attention2": "attention.2",
    "head/bn_in": "norm_stats",
    "head/linear": "fc_embed",
    "head/bn": "norm_embed",
}
_PREFIXES = {"pool": "temporal_pooling.", "head": "embedding."}  # and "preresnet." for the stem and the stages


def recognizes(tensors: dict[str, np.ndarray]) -> bool:
    """Whether names are those of Kiwano's networks."""
    return any(name.endswith("pre_conv1.weight") for name in tensors)


def convert(checkpoint: Checkpoint, where: str, activation: str | None = None) -> Imported:
    """Makes our model of a checkpoint's tensors; depth, width and embedding size are read off them.

    Args:
        checkpoint: names and arrays.
        where: the file, for messages.
        activation: "silu" or "relu", within the blocks. None takes SiLU, which a checkpoint does not record: for some
            weeks of 2025 and 2026 Kiwano's class `ResNet` had ReLU.

    Raises:
        UserError: a tensor is missing, left over or of the wrong shape, or the network is not one of Kiwano's ResNets.
    """
    about = checkpoint.about
    if about.get("name") not in (None, *CLASSES):
        raise UserError(f"{where} holds a {about['name']}; of Kiwano's networks {', '.join(CLASSES)} can be imported")
    tensors = network_tensors(checkpoint, "output.")
    prefixed = "pre_conv1.weight" not in tensors
    translate = torch_names(_MODULES)

    def name_of(ours: str) -> str:
        return (_PREFIXES.get(ours.split("/")[0], "preresnet.") if prefixed else "") + translate(ours)

    def kernel_shape(module: str, axes: int) -> tuple[int, ...]:
        return shape_of(tensors, name_of(f"{module}/kernel"), axes, where)

    blocks = count_blocks([name.removeprefix("preresnet.") for name in tensors], where)
    settings: Json = {
        "blocks": blocks,
        "width": kernel_shape("stem/conv", 4)[0],
        "features": _features(about, where),
        "embedding_size": kernel_shape("head/linear", 2)[0],
        "activation": activation or "silu",
        "last_taps": kernel_shape("stage1/block0/conv3", 4)[2],
    }
    architecture = _architecture(blocks)
    network = registry.build(architecture, **settings)
    return Imported(architecture, settings, "kiwano", assemble(network, tensors, name_of, KERNEL_AXES, where))


def _architecture(blocks: list[int]) -> str:
    names = [name for name in registry.names() if getattr(registry.build(name), "block", None) is PreActivationBlock]
    # A depth that no name has goes by the first name; `blocks` in its settings tells the depth.
    return next((n for n in names if registry.default_settings(n)["blocks"] == blocks), names[0])


def _features(about: Json, where: str) -> int:
    """The features a frame, from the stored settings; the usual number where there are none.

    Raises:
        UserError: the settings are not those of a network that is known.
    """
    config = about.get("config")
    config = config if isinstance(config, dict) else {}
    strides = config.get("stage_strides", (1, 2, 2, 2))
    strides = tuple(strides) if isinstance(strides, list) else strides
    if strides != (1, 2, 2, 2):
        raise UserError(f"{where}: stage_strides {strides!r} are not supported, only (1, 2, 2, 2)")
    features = config.get("in_channels", FEATURES)
    if not isinstance(features, int) or not 81 <= features <= 88:  # the original pools exactly 11 frequencies
        raise UserError(f"{where}: in_channels (={features}) must be 81 to 88")
    return features
