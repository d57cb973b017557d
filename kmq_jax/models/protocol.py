"""What every other package may ask of a network. Nothing outside `models` and `interop` knows more of it.

A new network derives from `SpeakerNetwork`, lists its `parts`, and is named in `models.registry`. Training,
quantization, fitting, diagnosis and cascades then work on it; for ONNX files it also defines `to_onnx`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import flax.linen as nn
import jax
import numpy as np
from numpy.typing import ArrayLike

from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import Variables, named_leaves
from kmq_jax.nn.conv import Window
from kmq_jax.nn.whole import Moments

Frames = TypeVar("Frames", int, jax.Array)


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a network whose output is looked at: a residual block, a layer with its activation, the pooling.

    Attributes:
        name: the path of its Linen module, such as "stage1/block0"; its parameters lie below it.
        component: the larger part it belongs to, such as "stage1"; several parts may share one.
        stride: frames of the network's input for one frame of its output.
        lost: frames that the output is short of, because convolutions up to here have no padding.
        distilled: whether distillation compares its output.
        whole: whether all of an utterance's output counts: for networks that mask no lengths and do not say along which
            axis time runs.
    """

    name: str
    component: str
    stride: int = 1
    lost: int = 0
    distilled: bool = False
    whole: bool = False

    def frames(self, frames: Frames) -> Frames:
        """How many frames the part gives for so many frames of the network's input.

        >>> Part("stage2/block0", "stage2", stride=2).frames(9)
        5
        >>> Part("frame3", "frame3", lost=8).frames(9)
        1
        """
        return -(-(frames - self.lost) // self.stride)


class SpeakerNetwork(nn.Module):
    """A network from features to one embedding an utterance: the base of all of them.

    Attributes:
        features: features a frame, the last axis of the input.
        embedding_size: dimension of the embedding.
        masks_lengths: whether padded frames can be told apart by `lengths`. Where not (a class attribute, not a
            setting), all utterances of a batch must be of one length.
    """

    features: int
    embedding_size: int
    masks_lengths = True

    def __call__(self, features: jax.Array, lengths: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Embeds a batch of utterances.

        Args:
            features: `[batch, time, features]`, any float dtype.
            lengths: int `[batch]`, real frames of each utterance; what lies beyond is ignored. None: all are real.
            train: normalise by the batch's statistics, and update the running ones (`mutable=["batch_stats"]`).

        Returns:
            Float32 `[batch, embedding_size]`.
        """
        raise NotImplementedError

    @nn.nowrap
    def parts(self) -> tuple[Part, ...]:
        """The network's parts in running order. Every parameter lies below one of them."""
        raise NotImplementedError

    @nn.nowrap
    def without_remat(self) -> "SpeakerNetwork":
        """The same network without rematerialization, under which nothing can be taken out of a block."""
        return self

    @nn.nowrap
    def keeping(self, what: str) -> "SpeakerNetwork":
        """The same network, which keeps `what` of blocks that are recomputed. Most networks recompute none."""
        return self

    @nn.nowrap
    def to_onnx(self, graph: "GraphBuilder", feats: str) -> str:
        """Adds the network in evaluation to a graph.

        Args:
            graph: the graph.
            feats: name of the input, `[batch, time, features]`.

        Returns:
            Name of the output, `[batch, embedding_size]`.

        Raises:
            UserError: this network has no ONNX form.
        """
        raise UserError(f"{type(self).__name__} has no ONNX form: its class does not define to_onnx")

    @nn.nowrap
    def components(self) -> tuple[str, ...]:
        """The components, from input to output."""
        return tuple(dict.fromkeys(part.component for part in self.parts()))

    @nn.nowrap
    def part_of(self, name: str) -> Part:
        """The part that a parameter or statistic belongs to.

        Raises:
            UserError: it is no parameter of the network.
        """
        folders = name.split("/")
        known = _by_name(self)
        # The longest path first: a part may lie below another.
        for end in range(len(folders), 0, -1):
            if part := known.get("/".join(folders[:end])):
                return part
        raise UserError(f"parameter {name!r} belongs to no component ({', '.join(self.components())})")

    @nn.nowrap
    def component_of(self, name: str) -> str:
        """The component, one of `components()`, that a parameter or statistic belongs to.

        Raises:
            UserError: it is no parameter of the network.
        """
        return self.part_of(name).component

    @nn.nowrap
    def least_frames(self) -> int:
        """The frames that an utterance must have at least: more than are lost for want of padding."""
        return 1 + max(part.lost for part in self.parts())

    @nn.nowrap
    def chunk_step(self) -> int:
        """Chunks of a long utterance begin at multiples of so many frames; 0: the network cannot be run in chunks.

        It can be where frames mix only by convolutions and by the statistics that `nn.whole` gives. 0 is always safe.
        """
        return 0

    @nn.nowrap
    def distilled_parts(self) -> tuple[str, ...]:
        """The parts that distillation compares: those that say so, or all where none does."""
        parts = self.parts()
        return tuple(part.name for part in parts if part.distilled) or tuple(part.name for part in parts)

    @nn.nowrap
    def taps(
        self,
        variables: Variables,
        features: jax.Array,
        lengths: jax.Array | None = None,
        train: bool = False,
        names: Sequence[str] | None = None,
        mutable: Sequence[str] = (),
    ) -> tuple[jax.Array, dict[str, jax.Array], Variables]:
        """Embeds a batch, and gives the outputs of parts on the way.

        Args:
            variables: `{"params": tree, "batch_stats": tree}`.
            features: `[batch, time, features]`.
            lengths: as in `__call__`.
            train: as in `__call__`.
            names: of parts; None takes all. Parts that are no module, such as a plain function, are left out.
            mutable: collections that are updated, such as "batch_stats".

        Returns:
            The embeddings; by part in running order `[batch, time', ..., channels]`, or `[batch, values]` after the
            pooling, whose padded frames hold anything; and the updated collections.
        """
        order = [part.name for part in self.parts()] if names is None else list(names)

        def captured(module: nn.Module, method: str) -> bool:
            return method == "__call__" and "/".join(module.path) in order

        embeddings, state = self.apply(
            variables,
            features,
            lengths,
            train=train,
            capture_intermediates=captured,
            mutable=["intermediates", *mutable],
        )
        updates = dict(state)
        found: dict[str, jax.Array] = {}
        for name, leaf in named_leaves(updates.pop("intermediates", {}), is_leaf=lambda x: isinstance(x, tuple)):
            value = leaf[-1]  # the last call; a module may give a mask beside its output
            found[name.removesuffix("/__call__")] = value[0] if isinstance(value, tuple) else value
        return embeddings, {name: found[name] for name in order if name in found}, updates


@functools.lru_cache(maxsize=64)
def _by_name(network: SpeakerNetwork) -> dict[str, Part]:
    return {part.name: part for part in network.parts()}


class GraphBuilder(Protocol):
    """What `SpeakerNetwork.to_onnx` builds a graph with. Values go by name; channels are axis 1.

    `layer` and `norm` are paths of Linen modules, whose parameters the builder has. A batch normalisation `norm` that
    directly follows a layer is folded into it.
    """

    def conv(self, x: str, layer: str, moves: Window | None = None, norm: str | None = None) -> str:
        """Convolves `[batch, channel, time, (freq)]`; `moves` is, if left out, step 1 with "same" padding."""

    def linear(self, x: str, layer: str, norm: str | None = None) -> str:
        """A linear layer on `[batch, in]`."""

    def linear_frames(self, x: str, layer: str) -> str:
        """A linear layer on `[batch, time, in]`."""

    def scale_and_shift(self, x: str, norm: str, ndim: int, epsilon: float = ...) -> str:
        """A batch normalisation, of `ndim` axes, that follows no layer directly."""

    def layer_norm(self, x: str, norm: str, epsilon: float) -> str:
        """A normalisation over the last axis."""

    def parameter(self, name: str) -> str:
        """A parameter in its own layout."""

    def activation(self, x: str, function: Callable[[jax.Array], jax.Array]) -> str:
        """One of `nn.relu`, `nn.silu`, `nn.sigmoid` and `nn.tanh`."""

    def frames_of(self, x: str, size: int | None = None) -> str:
        """Turns `[batch, channel, time]` to `[batch, time, channel]`.

        With a `size` it flattens `[batch, channel, time, freq]` to `[batch, time, size]`, the channel running fastest.
        """

    def channels_of(self, frames: str) -> str:
        """Turns `[batch, time, channel]` to `[batch, channel, time]`."""

    def whole(
        self,
        place: str,
        frames: str,
        outputs: Mapping[str, Sequence[str | int]],
        finish: Callable[[Moments], Sequence[np.ndarray]],
        logits: str | None = None,
        axis: int = 1,
    ) -> None:
        """Notes a place of `nn.whole`: what `finish` makes of all frames' moments are the `outputs`, with shapes."""

    def mean_over_time(self, x: str, place: str) -> str:
        """Mean over time `[batch, channel]` of `[batch, channel, time]`: `nn.whole.mean` in the module `place`."""

    def statistics(self, frames: str, floor: float, pooling: str = "pool") -> str:
        """Mean and unbiased deviation over time of `[batch, time, in]`: `nn.pooling.StatisticsPooling`."""

    def attentive_statistics(self, frames: str, pooling: str, floor: float) -> str:
        """Weighted mean and deviation over time: `nn.pooling.AttentiveStatisticsPooling`, called `pooling`."""

    def weighted_pooling(self, frames: str, logits: str, pooling: str, floor: float, axis: int = 1) -> str:
        """Mean and deviation over `axis`, that of time, weighted by the softmax of logits: `nn.whole.weighted`."""

    def rounded(self, x: str, place: str) -> str:
        """Rounds activations to 8 bits where the network has a step for this place: see `nn.integers.rounded`."""

    def node(self, operator: str, *inputs: str, **attributes: object) -> str:
        """An ONNX operator by its name."""

    def integers(self, *values: int) -> str:
        """A constant of int64 numbers."""

    def number(self, value: float) -> str:
        """A constant float32 scalar."""

    def array(self, name: str, value: ArrayLike) -> str:
        """A constant of a name of its own."""

    def cast(self, x: str, dtype: str) -> str:
        """Casts to a type by its ONNX name, such as "FLOAT"."""

    def has(self, module: str) -> bool:
        """Whether the network has parameters below `module`."""
