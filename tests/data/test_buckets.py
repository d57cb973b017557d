from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kmq_jax.core.errors import UserError
from kmq_jax.data.buckets import length_buckets, padded_lengths, tight_batches


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 100_000), min_size=1, max_size=80), st.integers(1, 9), st.integers(1, 5), st.booleans())
def test_every_utterance_is_in_one_batch_that_fits(lengths, batch_size, max_shapes, cut):
    most = 50_000 if cut else None
    batches = length_buckets(lengths, batch_size, max_shapes=max_shapes, max_samples=most, step=1000)
    found = np.concatenate([batch.indices[batch.indices >= 0] for batch in batches])
    assert sorted(found) == list(range(len(lengths)))
    assert len({batch.size for batch in batches}) <= max_shapes
    for batch in batches:
        assert batch.indices.shape == (batch_size,) and batch.indices.dtype == np.int32
        rows = np.array(lengths)[batch.indices[batch.indices >= 0]]
        assert (np.minimum(rows, most or 10**9) <= batch.size).all()
    sizes = [batch.size for batch in batches]
    assert sizes == sorted(sizes, reverse=True)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 3))
def test_no_choice_of_lengths_processes_less(lengths, batch_size, max_shapes):
    lengths = np.array(lengths)
    sizes = np.unique(lengths)

    def cost(edges):
        bucket = np.searchsorted(edges, lengths)
        return sum(-(-np.sum(bucket == i) // batch_size) * batch_size * edge for i, edge in enumerate(edges))

    best = min(
        cost([*inner, sizes[-1]])
        for k in range(min(max_shapes, len(sizes)))
        for inner in map(list, combinations(sizes[:-1], k))
    )
    assert cost(padded_lengths(lengths, batch_size, max_shapes=max_shapes, step=1)) == best


def test_many_lengths_are_bucketed_with_little_padding():
    lengths = (np.random.default_rng(0).lognormal(11.5, 0.5, 30000)).astype(int)
    batches = length_buckets(lengths, 32)
    assert len({batch.size for batch in batches}) <= 8
    geometric = np.geomspace(lengths.min(), lengths.max(), 9)[1:]
    simple = geometric[np.searchsorted(geometric, lengths * 0.999999)].sum()  # not even counting empty rows
    assert sum(batch.size * 32 for batch in batches) < min(0.9 * simple, 1.2 * lengths.sum())


def test_edges():
    assert length_buckets([], 4) == []
    (batch,) = length_buckets([0], 2)
    np.testing.assert_array_equal(batch.indices, [0, -1])
    for name in ("batch_size", "max_shapes", "max_samples", "step"):
        with pytest.raises(UserError, match=f"`{name}`"):
            length_buckets([5], **{"batch_size": 1, name: 0})
    for name in ("batch_size", "max_shapes", "step"):
        with pytest.raises(UserError, match=f"`{name}`"):
            tight_batches([5], **{"batch_size": 1, name: 0})


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 100_000), max_size=60), st.integers(1, 9), st.integers(1, 5))
def test_tight_batches_hold_every_utterance_once_within_their_limits(lengths, batch_size, max_shapes):
    batches = tight_batches(lengths, batch_size, max_shapes=max_shapes, most_samples=150_000, step=1000)
    found = np.concatenate([np.array([], int), *(batch.indices for batch in batches)])
    assert sorted(found) == list(range(len(lengths)))
    assert len({batch.size for batch in batches}) <= max_shapes
    for batch in batches:
        assert 1 <= len(batch.indices) <= batch_size
        assert (np.array(lengths)[batch.indices] <= batch.size).all()
    sizes = [batch.size for batch in batches]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("count", [50, 1250])
def test_little_of_a_list_s_batches_is_padding(count):
    seconds = np.random.default_rng(1).lognormal(1.3, 0.3, count).clip(2, 12)  # read sentences
    lengths = (16_000 * seconds).astype(int)
    batches = tight_batches(lengths, 16)
    assert sum(batch.size * len(batch.indices) for batch in batches) <= 1.05 * lengths.sum()
    assert len({(batch.size, len(batch.indices)) for batch in batches}) <= 21


def test_a_batch_of_long_recordings_is_small():
    batches = tight_batches([16_000 * 300] + [16_000 * 4] * 15, 16, most_samples=16_000 * 40)
    assert [len(batch.indices) for batch in batches] == [1, 10, 5]
