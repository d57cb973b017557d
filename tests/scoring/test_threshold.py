"""What a decision refuses; thresholds themselves are tested with whole commands."""

import json

import numpy as np
import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.scoring.threshold import Decider, decide, read_threshold

WAVE = np.zeros(16000, np.float32), 16000


def test_a_claim_without_recordings_is_not_accepted():
    with pytest.raises(UserError, match="there is no recording of the claimed speaker"):
        decide("m.kmq", [], WAVE, Decider(0.5))


@pytest.mark.parametrize(("value", "why"), [(float("nan"), "a finite number"), (5.0, "between -1 and 1")])
def test_a_threshold_that_no_cosine_can_be_is_refused_wherever_it_comes_from(tmp_path, value, why):
    with pytest.raises(UserError, match=why):
        decide("m.kmq", [WAVE], WAVE, Decider(value))
    with pytest.raises(UserError, match=why):
        read_threshold(str(value))


def test_a_file_beyond_one_is_refused_as_the_number_is(tmp_path):
    held = {"kind": "threshold", "version": 2, "threshold": 0.5, "speakers": 3, "fingerprint": "m"}
    for name in ("false_accept_rate", "false_reject_rate"):
        held |= {name: 0.1, f"{name}_ci95": [0, 0.2], f"{name}_trials": 9, f"{name}_units": 9}
    file = tmp_path / "t.json"
    file.write_text(json.dumps(held))
    assert read_threshold(str(file)).value == 0.5
    with pytest.raises(UserError, match="is damaged"):
        file.write_text(json.dumps(held | {"vad": "no"}))
        read_threshold(str(file))
    file.write_text(json.dumps(held | {"threshold": 5.0}))
    with pytest.raises(UserError, match=r"\(=5.0 in .*t.json\) must lie between -1 and 1"):
        read_threshold(str(file))
