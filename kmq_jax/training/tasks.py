"""The two things training does to a network: it trains it as it is, or with quantized weights.

`FullPrecision` and `Quantized` are the same to the training step and the loop: a `Task`. A task is fixed during a run;
what changes is in the `TrainState`.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Protocol

import jax
import jax.numpy as jnp

from kmq_jax.core import distributed
from kmq_jax.core.errors import UserError
from kmq_jax.core.options import shown
from kmq_jax.core.progress import say_once
from kmq_jax.core.tree import Params, Variables
from kmq_jax.models.checkpoint import Checkpoints
from kmq_jax.models.runner import AVERAGED, PACKED
from kmq_jax.models.speaker_model import SpeakerModel
from kmq_jax.ptq import activations, moments
from kmq_jax.training import qat
from kmq_jax.training.options import QatOptions
from kmq_jax.training.state import Network, QatParams, TrainState, load_network

Phase = tuple[str, ...]
"""Names of the tensors that are quantized in a part of the run."""


@dataclasses.dataclass(frozen=True)
class Speech:
    """Training speech without augmentation, for what is measured before and after training.

    Attributes:
        crops: gives features `[batch, time, mel]` of random crops, each less its own mean (`prepare.random_crops`).
        passes: given a number of passes over the data, gives their features, batch by batch.
    """

    crops: Callable[[], jax.Array]
    passes: Callable[[int], Iterable[jax.Array]]


@dataclasses.dataclass(frozen=True)
class Final:
    """The model that training ends with, where that is not what the last checkpoint holds.

    Attributes:
        model: the model.
        file: its name in the workdir.
        how: how it was made, in words.
    """

    model: SpeakerModel
    file: str
    how: str


class Task(Protocol):
    """What training does to a network."""

    @property
    def smaller_bits(self) -> tuple[int, ...]:
        """The fewer bits at which nested codebooks are validated as well."""

    @property
    def saved_as(self) -> str | None:
        """The file of the workdir that holds the network of each checkpoint as it is shipped."""

    def shapes(self, network: Params) -> Network:
        """The shapes of what `init` makes of full-precision parameters."""

    def init(self, reference: SpeakerModel, speech: Speech) -> tuple[Network, Params]:
        """Parameters and running statistics before the first step, from a full-precision model."""

    def init_indices(self, network: Network) -> qat.Indices:
        """`TrainState.indices` before the first step."""

    def phases(self, network: Network) -> list[Phase]:
        """The parts of the run, equally long."""

    def enter_phase(
        self, network: Network, indices: qat.Indices, phase: Phase, before: Phase
    ) -> tuple[Network, qat.Indices]:
        """The parameters and indices that a phase after the first begins with."""

    def measure(
        self, model: SpeakerModel, network: Network, indices: qat.Indices, phase: Phase, speech: Speech
    ) -> Params | None:
        """The running statistics that a phase begins with, or None where those there are stay."""

    def weights(self, network: Network, indices: qat.Indices, step: jax.Array, phase: Phase | None) -> Params:
        """The weights a step computes with, differentiable in `network`; steps count from 0 in each phase."""

    def beside(self, network: Network, phase: Phase | None) -> Variables:
        """The variables that a step computes with beside weights and statistics."""

    def after_update(
        self, before: Network, after: Network, indices: qat.Indices, step: jax.Array
    ) -> tuple[Network, qat.Indices]:
        """What follows the optimizer's update of `before` to `after`; `step` counts the phase's updates, with it."""

    def variables(self, state: TrainState) -> Variables:
        """The variables that are shipped."""

    def finish(self, trained: SpeakerModel, checkpoints: Checkpoints, speech: Speech) -> Final | None:
        """What follows the last step."""


@dataclasses.dataclass(frozen=True)
class FullPrecision:
    """Training without quantization.

    Attributes:
        average_last: checkpoints that are averaged into the final model; fewer than two: none.
        smaller_bits, saved_as: see `Task`.
    """

    average_last: int = 0
    smaller_bits: tuple[int, ...] = ()
    saved_as: str | None = None

    def shapes(self, network: Params) -> Network:
        """See `Task`."""
        return network

    def init(self, reference: SpeakerModel, speech: Speech) -> tuple[Network, Params]:
        """See `Task`."""
        return reference.variables["params"], reference.variables["batch_stats"]

    def init_indices(self, network: Network) -> qat.Indices:
        """See `Task`."""
        return {}

    def phases(self, network: Network) -> list[Phase]:
        """See `Task`."""
        return [()]

    def enter_phase(
        self, network: Network, indices: qat.Indices, phase: Phase, before: Phase
    ) -> tuple[Network, qat.Indices]:
        """See `Task`."""
        return network, indices

    def measure(
        self, model: SpeakerModel, network: Network, indices: qat.Indices, phase: Phase, speech: Speech
    ) -> Params | None:
        """See `Task`."""
        return None

    def weights(self, network: Network, indices: qat.Indices, step: jax.Array, phase: Phase | None) -> Params:
        """See `Task`."""
        return network

    def beside(self, network: Network, phase: Phase | None) -> Variables:
        """See `Task`."""
        return {}

    def after_update(
        self, before: Network, after: Network, indices: qat.Indices, step: jax.Array
    ) -> tuple[Network, qat.Indices]:
        """See `Task`."""
        return after, indices

    def variables(self, state: TrainState) -> Variables:
        """See `Task`."""
        return {"params": state.params.network, "batch_stats": state.batch_stats}

    def finish(self, trained: SpeakerModel, checkpoints: Checkpoints, speech: Speech) -> Final | None:
        """Averages the last checkpoints, running statistics included."""
        if self.average_last < 2:
            return None
        # Not one that a stop has left: the average would depend on where the run was stopped.
        newest = checkpoints.due_steps()[-self.average_last :]
        if len(newest) < self.average_last:
            say_once(f"warning: `average_last` (={self.average_last}): the run kept {len(newest)} checkpoints")
        mean = average([load_network(checkpoints, step) for step in newest])
        model = dataclasses.replace(trained, variables=mean)
        return Final(model, AVERAGED, f"average of the last {len(newest)} checkpoints")


@dataclasses.dataclass(frozen=True)
class Quantized:
    """Quantization-aware training, see `qat`.

    Attributes:
        options: the `quant` section.
        thaw: step of a phase from which scales are trained.
        last_move: centroids rest after this step of a phase.
        allocation: bits by name, in mixed precision.
        parent: parameters of the packed network that nested codebooks grow from.
        ranges: of activations that are rounded to 8 bits; None rounds none.
        measured: whether running statistics are measured afresh after training: where steps went by those of batches.
        saved_as: see `Task`.
    """

    options: QatOptions
    thaw: float = 0.0
    last_move: float = 0.0
    allocation: qat.Allocation | None = None
    parent: Params | None = None
    ranges: activations.Ranges | None = None
    measured: bool = True
    saved_as: str | None = PACKED

    @property
    def smaller_bits(self) -> tuple[int, ...]:
        """See `Task`."""
        return self.options.coarse

    def shapes(self, network: Params) -> QatParams:
        """See `Task`.

        Raises:
            UserError: nothing is quantized.
        """
        made = jax.eval_shape(lambda n: qat.init_params(self.options, n, self.allocation, self.parent), network)
        if not made.codebooks:
            raise UserError(f"`quant.rules` (={shown(self.options.rules)}) give no tensor a codebook: set quant.bits")
        return made

    def init(self, reference: SpeakerModel, speech: Speech) -> tuple[QatParams, Params]:
        """See `Task`."""
        features = speech.crops() if self.options.fit_crops else None
        return qat.init_fitted(self.options, reference, features, self.allocation, self.parent, self.ranges)

    def init_indices(self, network: Network) -> qat.Indices:
        """See `Task`."""
        assert isinstance(network, QatParams)
        if self.parent is not None:
            return qat.parent_indices(network, self.parent)
        return qat.first_indices(self.options, network)

    def phases(self, network: Network) -> list[Phase]:
        """See `Task`."""
        assert isinstance(network, QatParams)
        return qat.phases_of(self.options, network.codebooks)

    def enter_phase(
        self, network: Network, indices: qat.Indices, phase: Phase, before: Phase
    ) -> tuple[QatParams, qat.Indices]:
        """See `Task`."""
        assert isinstance(network, QatParams)
        return qat.enter_phase(self.options, network, indices, phase, before)

    def measure(
        self, model: SpeakerModel, network: Network, indices: qat.Indices, phase: Phase, speech: Speech
    ) -> Params | None:
        """See `Task`."""
        assert isinstance(network, QatParams)
        if not self.options.bn_passes or not model.variables.get("batch_stats"):
            return None
        # Any step does: without nested codebooks it decides gradients alone, and these have no `bn_passes`.
        weights = qat.effective_weights(self.options, network, indices, jnp.zeros((), jnp.int32), names=phase)
        beside = self.beside(network, phase)
        used = dataclasses.replace(model, variables={**model.variables, "params": weights, **beside})
        return distributed.mean_of_all(moments.averaged_statistics(used, speech.passes(self.options.bn_passes)))

    def weights(self, network: Network, indices: qat.Indices, step: jax.Array, phase: Phase | None) -> Params:
        """See `Task`."""
        assert isinstance(network, QatParams)
        return qat.effective_weights(self.options, network, indices, step, self.thaw, phase)

    def beside(self, network: Network, phase: Phase | None) -> Variables:
        """See `Task`."""
        assert isinstance(network, QatParams)
        return qat.integer_steps(self.ranges, network, phase)

    def after_update(
        self, before: Network, after: Network, indices: qat.Indices, step: jax.Array
    ) -> tuple[QatParams, qat.Indices]:
        """See `Task`."""
        assert isinstance(before, QatParams) and isinstance(after, QatParams)
        if self.thaw or self.options.centroids != "gradient":
            after = qat.hold_still(self.options, before, after, step - 1 < self.thaw)
        after = qat.move_centroids(self.options, after, indices, step, self.last_move)
        indices = qat.reassign(self.options, after, indices, step)
        # Last: it undoes whatever came before for the parent's part.
        return (qat.keep_parent(before, after) if self.options.grow_from else after), indices

    def variables(self, state: TrainState) -> Variables:
        """See `Task`."""
        assert isinstance(state.params.network, QatParams)
        halves = self.options.biases == "float16", qat.half_rules(self.options)
        packed = qat.packed_variables(state.params.network, state.indices, *halves)
        steps = jax.device_get(self.beside(state.params.network, None))
        return {**packed, "batch_stats": state.batch_stats, **steps}

    def finish(self, trained: SpeakerModel, checkpoints: Checkpoints, speech: Speech) -> Final | None:
        """Measures batch normalisation afresh, unless steps already went by the statistics that are shipped."""
        measurable = self.measured and trained.variables["batch_stats"]
        if not measurable or not (self.options.fit_crops or self.options.bn_passes):
            return None
        if self.options.bn_passes:
            passes = speech.passes(self.options.bn_passes)
            statistics = distributed.mean_of_all(moments.averaged_statistics(trained, passes))
            model = dataclasses.replace(trained, variables={**trained.variables, "batch_stats": statistics})
        else:
            model = moments.own_statistics(trained, speech.crops())
        return Final(model, PACKED, "with batch normalisation measured afresh")


def average(trees: list[Params]) -> Params:
    """The mean of trees of floating-point arrays, leaf by leaf.

    >>> average([{"w": 1.0}, {"w": 2.0}])
    {'w': 1.5}
    """
    return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]) / len(leaves), *trees)
