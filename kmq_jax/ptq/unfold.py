"""Batch normalisation put back into a network whose file has it folded into the convolutions.

Published ONNX files have it folded. The network computes the same without it, but it cannot be trained by recipes that
normalise by a batch, or that measure statistics anew once weights are quantized.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import Leaf, map_named, named_leaves
from kmq_jax.data import source
from kmq_jax.models import registry
from kmq_jax.models.about import told
from kmq_jax.models.speaker_model import SpeakerModel, frontend_of
from kmq_jax.models.walk import NORMALISATION, layers, shapes
from kmq_jax.nn.layers import BatchNorm
from kmq_jax.ptq.moments import output_moments, random_features
from kmq_jax.ptq.quantize import CROPS, SECONDS


def unfold(model: SpeakerModel, features: jax.Array) -> SpeakerModel:
    """Gives each convolution's outputs a batch normalisation of their own mean and variance.

    Scale and bias undo what the statistics do, so that the network computes what it did before. The original scales are
    lost: these are chosen so that normalised channels have a variance of 1, as those have.

    Args:
        model: in full precision, with `norm="bias"` among its settings.
        features: `[batch, time, mel]`, on which outputs are measured.

    Returns:
        The model with `norm="batch"`; convolutions have no bias.

    Raises:
        UserError: no batch normalisation is folded into convolutions alone.
    """
    if model.settings.get("norm") != "bias":
        raise UserError(f"{model.architecture}: no batch normalisation is folded into its convolutions")
    settings = {**model.settings, "norm": "batch"}
    unfolded = registry.build(model.architecture, **settings)
    follows = {layer.name: layer.follows for layer in layers(unfolded) if layer.kind == NORMALISATION}
    found = jax.device_get(output_moments(model, features))
    for norm, layer in follows.items():
        if layer not in found:
            raise UserError(f"{model.architecture}: {norm} follows no convolution, and cannot be unfolded")
    folded = dict(named_leaves(model.variables["params"]))

    def filled(name: str, leaf: Leaf) -> np.ndarray:
        layer, _, kind = name.rpartition("/")
        if layer not in follows:
            return np.asarray(folded[name])
        convolution = follows[layer]
        mean, deviation = found[convolution]
        made = {
            "scale": np.sqrt(deviation**2 + BatchNorm.epsilon),
            "bias": mean,
            "mean": mean - folded[f"{convolution}/bias"],
            "var": deviation**2,
        }
        return np.asarray(made[kind], np.float32)

    variables = {collection: map_named(filled, tree) for collection, tree in shapes(unfolded).items()}
    return dataclasses.replace(model, settings=settings, variables=variables)


def unfolded_on(data: str) -> Callable[[SpeakerModel], SpeakerModel]:
    """`unfold`, measured on random crops of a DATA.

    Raises:
        UserError: the DATA cannot be read.
    """
    utterances = source.open_sources(data)

    def made(model: SpeakerModel) -> SpeakerModel:
        found = unfold(model, random_features(frontend_of(model.frontend), utterances, CROPS, SECONDS))
        return dataclasses.replace(found, about={**found.about, "unfolded_on": f"{CROPS} crops of {told(data)}"})

    return made
