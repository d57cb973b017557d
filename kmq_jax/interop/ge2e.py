"""Checkpoints of GE2E, the LSTM of Resemblyzer and of the voice cloning toolkit it comes from.

Structure read in resemblyzer/voice_encoder.py (Resemblyzer 0.1.4, whose package holds `pretrained.pt`).
"""

import re

import numpy as np

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json
from kmq_jax.interop.assemble import Imported, fill, network_tensors, shape_of
from kmq_jax.interop.torch_checkpoint import Checkpoint
from kmq_jax.models import registry


def recognizes(tensors: dict[str, np.ndarray]) -> bool:
    """Whether names are those of GE2E's LSTM."""
    return "lstm.weight_ih_l0" in tensors and "linear.weight" in tensors


def convert(checkpoint: Checkpoint, where: str) -> Imported:
    """Makes our model of a checkpoint's tensors; the number of LSTMs and all sizes are read off them.

    What the loss learns beside the network (`similarity_weight`, `similarity_bias`) is left behind.

    Raises:
        UserError: a tensor is missing, left over or of the wrong shape.
    """
    tensors = network_tensors(checkpoint, "similarity_")
    layers = 1 + max(int(match[1]) for name in tensors if (match := re.fullmatch(r"lstm\.weight_ih_l(\d)", name)))
    gates, features = shape_of(tensors, "lstm.weight_ih_l0", 2, where)
    settings: Json = {
        "features": features,
        "embedding_size": shape_of(tensors, "linear.weight", 2, where)[0],
        "width": gates // 4,  # an LSTM has four gates
        "layers": layers,
    }
    for n in range(layers):
        own, other = (f"lstm.bias_{kind}_l{n}" for kind in ("ih", "hh"))
        if shape_of(tensors, own, 1, where) != shape_of(tensors, other, 1, where):
            raise UserError(f"{where}: tensors {own} and {other} have different shapes")
        tensors[own] = tensors[own] + tensors.pop(other)  # nothing lies between the two
        taps = f"lstm.weight_ih_l{n}"
        shape = shape_of(tensors, taps, 2, where)
        tensors[taps] = tensors[taps].reshape(*shape, 1)  # a convolution of one tap
    network = registry.build("ge2e", **settings)
    return Imported("ge2e", settings, "resemblyzer", fill(network, tensors, _name_of, where))


def _name_of(ours: str) -> str:
    """Their name of a parameter.

    >>> _name_of("lstm1/input/bias"), _name_of("lstm3/recurrence/kernel"), _name_of("head/linear/kernel")
    ('lstm.bias_ih_l0', 'lstm.weight_hh_l2', 'linear.weight')
    """
    module, leaf = ours.rsplit("/", 1)
    leaf = {"kernel": "weight"}.get(leaf, leaf)
    if match := re.fullmatch(r"lstm(\d+)/(input|recurrence)", module):
        return f"lstm.{leaf}_{'ih' if match[2] == 'input' else 'hh'}_l{int(match[1]) - 1}"
    return f"linear.{leaf}"
