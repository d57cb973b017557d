"""Mean normalisation of features over the real frames of each utterance, and cutting crops of utterances."""

import jax
import jax.numpy as jnp

from kmq_jax.core.errors import UserError


def mean_normalize(features: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
    """Subtracts each utterance's mean over time from its features.

    In the log-spectral domain a microphone or a telephone line is a constant added to every frame, so taking the
    mean away takes most of the channel away; the speaker stays in what varies.

    Args:
        features: [batch, time, mel].
        lengths: real frames of each utterance [batch], integer; None when every frame is real.

    Returns:
        The same shape. The mean is over real frames only, and padded frames are exactly 0, so that an utterance
        gives the same numbers alone and padded in a longer batch. An utterance of length 0 is all zeros.

    Raises:
        UserError: the features are not [batch, time, mel].

    >>> mean_normalize(jnp.array([[[1.0], [3.0], [9.0]]]), jnp.array([2])).tolist()  # the third frame is padding
    [[[-1.0], [1.0], [0.0]]]
    """
    if features.ndim != 3:
        raise UserError(f"features (of shape {features.shape}) must be [batch, time, mel]")
    if lengths is None:
        return features - features.mean(1, keepdims=True)
    real = (jnp.arange(features.shape[1])[None] < lengths[:, None])[:, :, None]
    # Not a product with the mask: padding that holds NaN or infinity must not leak into the mean.
    total = jnp.where(real, features, 0).sum(1, keepdims=True)
    mean = total / jnp.maximum(real.sum(1, keepdims=True).astype(features.dtype), 1)
    return jnp.where(real, features - mean, 0)


def crop_frames(features: jax.Array, lengths: jax.Array, place: jax.Array, frames: int) -> jax.Array:
    """Cuts a crop of `frames` frames out of each utterance; one that is shorter is repeated.

    Args:
        features: `[batch, time, mel]`.
        lengths: real frames of each utterance `[batch]`, integer, at least one.
        place: where each crop begins, from 0 to below 1, as a share of the places it can begin at `[batch]`.
        frames: of a crop.

    Returns:
        `[batch, frames, mel]`.

    >>> features = jnp.arange(5.0).reshape(1, 5, 1)
    >>> crop_frames(features, jnp.array([4]), jnp.array([0.99]), 2).ravel().tolist()
    [2.0, 3.0]
    >>> crop_frames(features, jnp.array([2]), jnp.array([0.99]), 3).ravel().tolist()
    [0.0, 1.0, 0.0]
    """
    lengths = jnp.maximum(lengths, 1)  # the remainder below divides by them
    start = jnp.floor(place * jnp.maximum(lengths - frames + 1, 1)).astype(jnp.int32)
    index = (start[:, None] + jnp.arange(frames)[None]) % lengths[:, None]
    return jnp.take_along_axis(features, index[:, :, None], axis=1)
