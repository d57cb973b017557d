"""Packing indices of 1 to 8 bits into bytes with none wasted, and back."""

from functools import partial

import jax
import jax.numpy as jnp


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` indices of `bits` bits each take.

    >>> packed_bytes(9, 3)
    4
    """
    return (count * bits + 7) // 8


@partial(jax.jit, static_argnames="bits")
def pack_bits(indices: jax.Array, bits: int) -> jax.Array:
    """Packs indices `[..., n]` below 2^bits into uint8 `[..., ceil(n * bits / 8)]`, a little-endian stream of bits.

    May be called inside jit.

    >>> pack_bits(jnp.array([3, 0, 1, 2, 1]), 2).tolist()  # 3 + 0 * 4 + 1 * 16 + 2 * 64, then 1
    [147, 1]
    """
    n = indices.shape[-1]
    lead = [(0, 0)] * (indices.ndim - 1)
    # Eight indices fill exactly `bits` bytes, however many bits one has.
    eights = jnp.pad(indices.astype(jnp.uint8), [*lead, (0, -n % 8)]).reshape(*indices.shape[:-1], -1, 8)
    bytes_ = []
    for byte in range(bits):
        value = jnp.zeros(eights.shape[:-1], jnp.uint8)
        for i in range(8):
            shift = i * bits - 8 * byte  # where index i begins, counted from this byte's first bit
            if -bits < shift < 8:
                value |= eights[..., i] << shift if shift >= 0 else eights[..., i] >> -shift
        bytes_.append(value)
    stream = jnp.stack(bytes_, axis=-1).reshape(*indices.shape[:-1], -1)
    return stream[..., : packed_bytes(n, bits)]


@partial(jax.jit, static_argnames=("bits", "n"))
def unpack_bits(packed: jax.Array, bits: int, n: int) -> jax.Array:
    """Undoes `pack_bits`: uint8 `[..., ceil(n * bits / 8)]` to indices uint8 `[..., n]`. May be called inside jit.

    >>> unpack_bits(jnp.array([147, 1], jnp.uint8), 2, 5).tolist()
    [3, 0, 1, 2, 1]
    """
    lead = [(0, 0)] * (packed.ndim - 1)
    short = -packed.shape[-1] % bits
    groups = jnp.pad(packed, [*lead, (0, short)]).reshape(*packed.shape[:-1], -1, bits)
    mask = (1 << bits) - 1
    indices = []
    for i in range(8):
        first, shift = divmod(i * bits, 8)
        value = groups[..., first] >> shift
        if shift + bits > 8:  # it goes on in the next byte
            value |= groups[..., first + 1] << (8 - shift)
        indices.append(value & mask)
    return jnp.stack(indices, axis=-1).reshape(*packed.shape[:-1], -1)[..., :n]
