"""ECAPA-TDNN checkpoints of WeSpeaker and of SpeechBrain, and WeSpeaker's x-vector.

Structure read in wespeaker/models/ecapa_tdnn.py and tdnn.py (https://github.com/wenet-e2e/wespeaker at dfa7419) and in
speechbrain/lobes/models/ECAPA_TDNN.py (https://github.com/speechbrain/speechbrain at 9c826ef).
"""

import re
from collections.abc import Callable

import numpy as np

from kmq_jax.core.files import Json
from kmq_jax.interop.assemble import LEAVES, Imported, fill, network_tensors, shape_of
from kmq_jax.interop.torch_checkpoint import Checkpoint
from kmq_jax.models import registry
from kmq_jax.models.tdnn import SPEECHBRAIN, WESPEAKER

_WESPEAKER = {
    "layer1/conv": "layer1.conv",
    "layer1/bn": "layer1.bn",
    "mfa/conv": "conv",
    "pool/attention1": "pool.linear1",
    "pool/attention2": "pool.linear2",
    "head/bn_in": "bn",
    "head/linear": "linear",
}
_WESPEAKER_BLOCK = {"in": "0.{}", "out": "2.{}", "se/fc1": "3.linear1", "se/fc2": "3.linear2"}
_SPEECHBRAIN = {
    "layer1/conv": "blocks.0.conv.conv",
    "layer1/bn": "blocks.0.norm.norm",
    "mfa/conv": "mfa.conv.conv",
    "mfa/bn": "mfa.norm.norm",
    "pool/attention1": "asp.tdnn.conv.conv",
    "pool/bn": "asp.tdnn.norm.norm",
    "pool/attention2": "asp.conv.conv",
    "head/bn_in": "asp_bn.norm",
    "head/linear": "fc.conv",
}
_SPEECHBRAIN_BLOCK = {
    "in": "tdnn1.{}",
    "out": "tdnn2.{}",
    "se/fc1": "se_block.conv1.conv",
    "se/fc2": "se_block.conv2.conv",
}
_SPEECHBRAIN_LEAF = {"conv": "conv.conv", "bn": "norm.norm"}


def recognizes(tensors: dict[str, np.ndarray]) -> bool:
    """Whether names are those of one of these networks."""
    return any(name in tensors for name in ("layer2.se_res2block.0.conv.weight", "frame_1.conv_1d.weight")) or (
        "blocks.1.res2net_block.blocks.0.conv.conv.weight" in tensors
    )


def convert(checkpoint: Checkpoint, where: str) -> Imported:
    """Makes our model of a checkpoint's tensors; widths and sizes are read off them.

    WeSpeaker's classifier (`projection.*`) is left behind.

    Raises:
        UserError: a tensor is missing, left over or of the wrong shape.
    """
    tensors = network_tensors(checkpoint, "projection.")
    if "frame_1.conv_1d.weight" in tensors:
        return _xvector(tensors, where)
    layout = SPEECHBRAIN if "blocks.0.conv.conv.weight" in tensors else WESPEAKER
    name_of = speechbrain_name if layout == SPEECHBRAIN else wespeaker_name

    def shape(module: str, axes: int = 3) -> tuple[int, ...]:
        return shape_of(tensors, name_of(f"{module}/kernel"), axes, where)

    width, features, _ = shape("layer1/conv")
    aggregated = shape("mfa/conv")[0]
    settings: Json = {
        "features": features,
        "embedding_size": shape("head/linear", 3 if layout == SPEECHBRAIN else 2)[0],
        "width": width,
        "aggregated": aggregated,
        "layout": layout,
        # With context, attention reads each frame beside the mean and deviation over all of them.
        "context": shape("pool/attention1")[1] == 3 * aggregated,
    }
    return _filled("ecapa_c512", settings, layout, tensors, name_of, where)


def _xvector(tensors: dict[str, np.ndarray], where: str) -> Imported:
    width, features, _ = shape_of(tensors, "frame_1.conv_1d.weight", 3, where)
    settings: Json = {
        "features": features,
        "embedding_size": shape_of(tensors, "seg_1.weight", 2, where)[0],
        "width": width,
        "pooled": shape_of(tensors, "frame_5.conv_1d.weight", 3, where)[0],
    }
    return _filled("xvector", settings, WESPEAKER, tensors, xvector_name, where)


def _filled(
    name: str, settings: Json, toolkit: str, tensors: dict[str, np.ndarray], name_of: Callable[[str], str], where: str
) -> Imported:
    if name.startswith("ecapa"):  # the registered name that has these settings, if any
        for known in (name for name in registry.names() if name.startswith("ecapa_")):
            defaults = registry.default_settings(known)
            if all(defaults[key] == settings[key] for key in ("width", "aggregated", "layout")):
                name = known
    network = registry.build(name, **settings)
    return Imported(name, settings, toolkit, fill(network, tensors, name_of, where))


def wespeaker_name(ours: str) -> str:
    """WeSpeaker's name of a parameter or statistic of ECAPA-TDNN.

    >>> wespeaker_name("layer3/res2/unit6/bn/mean"), wespeaker_name("layer2/out/conv/kernel")
    ('layer3.se_res2block.1.bns.6.running_mean', 'layer2.se_res2block.2.conv.weight')
    """
    module, leaf = ours.rsplit("/", 1)
    if match := re.fullmatch(r"(layer[234])/res2/unit(\d)/(conv|bn)", module):
        module = f"{match[1]}.se_res2block.1.{match[3]}s.{match[2]}"
    elif match := re.fullmatch(r"(layer[234])/(se/fc\d|in|out)(?:/(conv|bn))?", module):
        module = f"{match[1]}.se_res2block.{_WESPEAKER_BLOCK[match[2]].format(match[3])}"
    else:
        module = _WESPEAKER[module]
    return f"{module}.{LEAVES[leaf]}"


def speechbrain_name(ours: str) -> str:
    """SpeechBrain's name of a parameter or statistic of ECAPA-TDNN.

    >>> speechbrain_name("layer3/res2/unit6/bn/mean"), speechbrain_name("layer2/out/conv/kernel")
    ('blocks.2.res2net_block.blocks.6.norm.norm.running_mean', 'blocks.1.tdnn2.conv.conv.weight')
    """
    module, leaf = ours.rsplit("/", 1)
    if match := re.fullmatch(r"layer([234])/res2/unit(\d)/(conv|bn)", module):
        module = f"blocks.{int(match[1]) - 1}.res2net_block.blocks.{match[2]}.{_SPEECHBRAIN_LEAF[match[3]]}"
    elif match := re.fullmatch(r"layer([234])/(se/fc\d|in|out)(?:/(conv|bn))?", module):
        part = _SPEECHBRAIN_BLOCK[match[2]].format(_SPEECHBRAIN_LEAF.get(match[3] or "", ""))
        module = f"blocks.{int(match[1]) - 1}.{part}"
    else:
        module = _SPEECHBRAIN[module]
    return f"{module}.{LEAVES[leaf]}"


def xvector_name(ours: str) -> str:
    """WeSpeaker's name of a parameter or statistic of the x-vector network.

    >>> xvector_name("frame2/conv/bias"), xvector_name("head/linear2/kernel")
    ('frame_2.conv_1d.bias', 'seg_2.weight')
    """
    module, leaf = ours.rsplit("/", 1)
    if match := re.fullmatch(r"frame(\d)/(conv|bn)", module):
        module = f"frame_{match[1]}.{'conv_1d' if match[2] == 'conv' else 'bn'}"
    else:
        module = {"head/linear1": "seg_1", "head/bn": "seg_bn_1", "head/linear2": "seg_2"}[module]
    return f"{module}.{LEAVES[leaf]}"
