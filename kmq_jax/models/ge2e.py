"""GE2E: an LSTM over windows of 1.6 s, whose embeddings are averaged, as Resemblyzer has it.

    windows -> lstm1 -> lstm2 -> lstm3 -> head

Windows of 160 frames begin every 77 frames. A window counts if at least 120 steps of it are within the utterance, the
first always; what lies beyond the end is zero. The head takes a window's last frame through a linear layer and ReLU to
an embedding of length 1; the utterance's is their mean, again of length 1.

    lstm{n}/input                                   `[1, in, 4 * width]`, a convolution of one tap with a bias
    lstm{n}/recurrence                              `[width, 4 * width]`
    head/linear

Gates stand in PyTorch's order: input, forget, cell, output. PyTorch's two biases are one here, their sum.

References: Wan et al., Generalized End-to-End Loss for Speaker Verification, 2018; structure read in
resemblyzer/voice_encoder.py (Resemblyzer 0.1.4).
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kmq_jax.models.protocol import Frames, Part, SpeakerNetwork
from kmq_jax.models.settings import check_counts, check_dtype, check_features
from kmq_jax.nn.frames import frame_mask, mask_frames
from kmq_jax.nn.layers import TORCH_DEFAULT, Conv, dense
from kmq_jax.nn.recurrent import Recurrence

WINDOW, STEP, LEAST = 160, 77, 120  # frames of a window, from one to the next, and that a later one must exceed


def windows_of(frames: int) -> int:
    """How many windows an utterance of so many frames has.

    >>> [windows_of(frames) for frames in (1, 197, 198, 300)]
    [1, 1, 2, 3]
    """
    return 1 + max(0, (frames - LEAST - 1) // STEP)


@dataclasses.dataclass(frozen=True)
class _Windows(Part):
    """A part whose output holds the windows of an utterance one behind the other."""

    def frames(self, frames: Frames) -> Frames:
        """As many as its windows have, which overlap; none of no frames.

        >>> [_Windows("lstm1", "lstm1").frames(frames) for frames in (0, 1, 198)]
        [0, 160, 320]
        """
        later = (frames - LEAST - 1) // STEP
        return WINDOW * (1 + later * (later > 0)) * (frames > 0)


class Lstm(nn.Module):
    """One LSTM over windows side by side."""

    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, windows * 160, in]` to `[batch, windows * 160, width]`."""
        gates = Conv(4 * self.width, 1, use_bias=True, dtype=self.dtype, kernel_init=TORCH_DEFAULT, name="input")(x)
        return Recurrence(WINDOW, self.dtype, name="recurrence")(gates)


def _unit(x: jax.Array) -> jax.Array:
    """Scales vectors to length 1. One of zeros, which the ReLU may give, stays as it is."""
    # At zero the gradient of the norm is NaN; that of the ReLU before it drops this.
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class _Head(nn.Module):
    """From the windows' last frames to one embedding, in float32."""

    embedding_size: int

    @nn.compact
    def __call__(self, x: jax.Array, counts: jax.Array) -> jax.Array:
        """Maps `[batch, windows, width]` to `[batch, embedding_size]`, by the windows where `counts` is true."""
        each = _unit(nn.relu(dense(self.embedding_size, "linear")(x.astype(jnp.float32))))
        return _unit(jnp.where(counts[..., None], each, 0).sum(1) / counts.sum(1)[:, None])


class Ge2e(SpeakerNetwork):
    """The LSTM of GE2E; build one by `kmq_jax.models.registry.build("ge2e")`.

    Attributes:
        features: mel bands.
        embedding_size: dimension of the embedding.
        width: of each LSTM.
        layers: LSTMs one after the other.
        dtype: compute dtype of products. Parameters, cells and the head are float32.
    """

    features: int = 40
    embedding_size: int = 256
    width: int = 256
    layers: int = 3
    dtype: DTypeLike = "float32"

    def __post_init__(self) -> None:
        """Checks the settings.

        Raises:
            UserError: one is not allowed; the message names it.
        """
        check_counts(features=self.features, embedding_size=self.embedding_size, width=self.width, layers=self.layers)
        check_dtype(self.dtype)
        super().__post_init__()

    @nn.compact
    def __call__(self, features: jax.Array, lengths: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Embeds a batch of utterances; see `SpeakerNetwork`.

        Raises:
            UserError: the input has not the network's number of features.
        """
        check_features(features.shape, self.features)
        batch, time, _ = features.shape
        x = mask_frames(features.astype(self.dtype), frame_mask(lengths, time))
        starts = range(0, STEP * windows_of(time), STEP)
        x = jnp.pad(x, ((0, 0), (0, max(0, starts[-1] + WINDOW - time)), (0, 0)))
        # Windows one behind the other, so that layers see one axis of time.
        x = jnp.concatenate([x[:, start : start + WINDOW] for start in starts], axis=1)
        for n in range(self.layers):
            x = Lstm(self.width, self.dtype, name=f"lstm{n + 1}")(x)
        frames = jnp.full((batch,), time) if lengths is None else lengths
        begins = jnp.asarray(starts)[None]
        # The first counts however short the utterance is.
        counts = (begins == 0) | (frames[:, None] > begins + LEAST)
        return _Head(self.embedding_size, name="head")(x[:, WINDOW - 1 :: WINDOW], counts)

    @nn.nowrap
    def parts(self) -> tuple[Part, ...]:
        """The LSTMs, whose outputs hold all windows one behind the other, and the head."""
        lstms = [_Windows(f"lstm{n + 1}", f"lstm{n + 1}", distilled=True) for n in range(self.layers)]
        return (*lstms, Part("head", "embedding"))
