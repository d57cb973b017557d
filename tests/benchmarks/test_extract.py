"""The benchmark of extraction: what does not go together is told before any work."""

import pytest

from kmq_jax.benchmarks.options import ExtractBench
from kmq_jax.core.errors import UserError

ONE = {"model": "m.kmq", "data": "d", "onnx": "m.onnx"}
BESIDE = {"model": "m.kmq", "data": "d", "peers": "onnxruntime", "reference": "r"}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (BESIDE | {"onnx": "m.onnx"}, "`onnx` does not go with `peers`"),
        (BESIDE | {"features": "ours"}, "`features` does not go with `peers`"),
        (BESIDE | {"compute": "bfloat16"}, "`compute` does not go with `peers`"),
        (BESIDE | {"threads": 3}, "`threads` does not go with `peers`"),
        (BESIDE | {"peers": ","}, r"`peers` \(=,\) must name one of onnxruntime"),
        (BESIDE | {"model": "a/m.kmq,b/m.kmq"}, r"`model` \(=a/m.kmq,b/m.kmq\) must name files of different names"),
        (ONE | {"reference": "r"}, "`reference` needs `peers`"),
        (ONE | {"calibration": "c"}, "`calibration` needs `peers`"),
    ],
)
def test_what_would_do_nothing_is_refused(given, told):
    with pytest.raises(UserError, match=told):
        ExtractBench(**given)


def test_each_way_has_its_own():
    assert ExtractBench(**ONE, features="ours", compute="bfloat16", threads=3).threads == 3
    more = BESIDE | {"model": "a/m.kmq,b/n.kmq", "calibration": "c"}
    assert ExtractBench(**more).named_models == {"ours, m": "a/m.kmq", "ours, n": "b/n.kmq"}
