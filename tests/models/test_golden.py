"""Packed files are, bit for bit, what the package wrote before its modules were moved.

The hashes were taken at revision 18961c9 on an AMD EPYC, where jax 0.10 and 0.12, with and without XLA's
optimizations, gave the same. `launch/golden.sh` compares whole smoke studies of two checkouts.
"""

import hashlib

import numpy as np
import pytest

from kmq_jax.models import artifact
from kmq_jax.quant import QuantSpec, quantize_params

GOLDEN = {
    "4 bits": (QuantSpec(4), "102149bc6cb43d7880f484ebf7ed1ba746028957f20853ac71773500a65a9901"),
    "3 bits": (QuantSpec(3), "190ce3440ffa4d4070fa73d315983b689d182878437a5b3e2197548c3cc49155"),
    "2 bits": (QuantSpec(2), "c4aad7bb58d64372aec8ca269aa9dfb1885f1c4c42e1b923bd8b3f47e4da5117"),
    "nested": (QuantSpec(4, coarse=(2, 3)), "4018054fb41379f518b754a4958e0a7d9cc5bfbb0081d4ec1f78ef920eb7a2d3"),
    "one codebook a tensor": (
        QuantSpec(3, granularity="tensor"),
        "11cacb44993a4de5bf2dab12aecceb311c3a71d52b6665a3570f9f1679231ad3",
    ),
    "symmetric": (
        QuantSpec(2, symmetric=True),
        "185218563dc98c55236b0602e87f254508bcab82982006c67570b17b72659efb",
    ),
}


@pytest.fixture(scope="module")
def params():
    random = np.random.default_rng(0)
    conv = {"kernel": random.standard_normal((3, 3, 16, 24)).astype(np.float32)}
    conv["bias"] = random.standard_normal(24).astype(np.float32)
    return {"conv": conv, "linear": {"kernel": (0.1 * random.standard_t(4, (96, 40))).astype(np.float32)}}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_file_is_the_same(name, params, tmp_path):
    spec, expected = GOLDEN[name]
    manifest = {"architecture": "none", "settings": {}, "frontend": "kiwano"}
    artifact.save(tmp_path / "x.kmq", manifest, {"params": quantize_params(params, spec)})
    assert hashlib.sha256((tmp_path / "x.kmq").read_bytes()).hexdigest() == expected
