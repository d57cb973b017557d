"""What options of embedding refuse."""

import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.data import audio
from kmq_jax.diagnosis.options import DiagnosisOptions
from kmq_jax.scoring.options import LEAST_SECONDS, ExtractionOptions


@pytest.mark.parametrize("options", [ExtractionOptions, DiagnosisOptions])
def test_recordings_are_not_cut_to_next_to_nothing(options):
    # One frame, less its mean, is zero: the same embedding of everybody.
    with pytest.raises(UserError, match=r"`max_seconds` \(=0\.03\) must be 0, which takes all, or at least 0\.1"):
        options(max_seconds=0.03)
    assert [options(max_seconds=seconds).max_seconds for seconds in (0.0, 0.1)] == [0.0, 0.1]


def test_the_shortest_cut_is_the_shortest_recording():
    assert LEAST_SECONDS == audio.MIN_SECONDS
