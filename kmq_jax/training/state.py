"""All that changes during training, and the parts of a checkpoint that it is saved as."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import numpy as np
import optax

from kmq_jax import quant
from kmq_jax.core.files import Json
from kmq_jax.core.tree import Params, Variables
from kmq_jax.models.checkpoint import Checkpoints

Parts = Json
"""The parts of a checkpoint by name; each is a tree of arrays."""


# Leaves come in this order, and a norm over all leaves adds them in it: another order would change its last digit.
@functools.partial(jax.tree_util.register_dataclass, data_fields=["codebooks", "per_bits", "latents"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class QatParams:
    """A network's parameters in quantization-aware training.

    Attributes:
        latents: the tree of the network's parameters. A quantized tensor is a full-precision latent there, and a step
            computes with the centroids nearest to it. Other tensors are as they are. Where codebooks nest, biases are
            those at the most bits.
        codebooks: by name of a quantized tensor.
        per_bits: where codebooks nest, the biases that each smaller number of bits has of its own, `{"2": tree}`.
    """

    latents: Params
    codebooks: Mapping[str, quant.Codebook]
    per_bits: Mapping[str, Params] = dataclasses.field(default_factory=dict)


Network = Params | QatParams


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trainable:
    """What the optimizer moves; float32.

    Attributes:
        classifier: centres of the speakers `[classes, sub-centres, dim]`.
        network: its parameters, or in quantization-aware training a `QatParams`.
    """

    classifier: jax.Array
    network: Network


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes during training. Margin, learning rate and random keys derive from `step`.

    Attributes:
        step: steps done, int32 scalar.
        params: what the optimizer moves.
        batch_stats: running statistics of the network's normalisation.
        opt_state: the optimizer's.
        indices: cached assignments of latents to centroids, by name; empty where each step assigns afresh. Where
            codebooks nest, those at the fewest bits.
    """

    step: jax.Array
    params: Trainable
    batch_stats: Params
    opt_state: optax.OptState
    indices: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)


def checkpoint_parts(state: TrainState) -> Parts:
    """A state as the parts of a checkpoint: a network can then be read without its classifier and optimizer."""
    network, codebooks, per_bits = state.params.network, {}, {}
    if isinstance(network, QatParams):
        network, codebooks, per_bits = network.latents, network.codebooks, network.per_bits
    training = {
        "step": state.step,
        "opt_state": state.opt_state,
        "codebooks": codebooks,
        "per_bits": per_bits,
        "indices": state.indices,
    }
    return {
        "network": {"params": network, "batch_stats": state.batch_stats},
        "classifier": {"centres": state.params.classifier},
        "training": training,
    }


def from_checkpoint(parts: Parts) -> TrainState:
    """The inverse of `checkpoint_parts`."""
    network, training = parts["network"]["params"], parts["training"]
    if training["codebooks"]:
        network = QatParams(network, training["codebooks"], training["per_bits"])
    return TrainState(
        step=training["step"],
        params=Trainable(parts["classifier"]["centres"], network),
        batch_stats=parts["network"]["batch_stats"],
        opt_state=training["opt_state"],
        indices=training["indices"],
    )


def load_classifier(checkpoints: Checkpoints) -> np.ndarray | None:
    """The centres of the newest checkpoint's classifier `[classes, sub-centres, dim]`; None where there is none yet."""
    newest = checkpoints.steps()[-1:]
    centres: np.ndarray | None = checkpoints.load(newest[0], "classifier")["centres"] if newest else None
    return centres


def load_network(checkpoints: Checkpoints, step: int) -> Variables:
    """The variables of a checkpoint's network."""
    variables: Variables = checkpoints.load(step, "network")
    return variables
