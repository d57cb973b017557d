import json
import struct

import jax
import numpy as np
import pytest
import safetensors.numpy

from kmq_jax import quant
from kmq_jax.core.errors import UserError
from kmq_jax.models import artifact
from kmq_jax.quant import QuantRule, QuantSpec

RNG = np.random.default_rng(0)
MANIFEST = {"architecture": "resnet36", "settings": {"channels": [1, 2]}, "front_end": {"num_mel_bins": 80}}


@pytest.fixture(scope="module")
def tree():
    params = {
        "conv": {"kernel": RNG.standard_normal((3, 3, 8, 32)).astype(np.float32), "bias": np.ones(32, np.float32)},
        "linear": {"kernel": RNG.standard_normal((72, 32)).astype(np.float32)},
    }
    rules = [
        QuantRule("conv/kernel", QuantSpec(4, coarse=(2, 3))),
        QuantRule("bias", QuantSpec(16)),
        QuantRule("kernel", QuantSpec(3, granularity="tensor")),
    ]
    return {"params": quant.quantize_params(params, rules), "batch_stats": {"bn": {"mean": np.zeros(32, np.float32)}}}


@pytest.fixture
def saved(tree, tmp_path):
    path = tmp_path / "model.kmq"
    artifact.save(path, MANIFEST, tree)
    return path


def test_round_trip(saved, tree):
    manifest, loaded = artifact.load(saved)
    assert manifest == MANIFEST
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    for mine, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(tree)):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)


def test_a_number_stays_one(tmp_path):
    artifact.save(tmp_path / "a.kmq", {}, {"params": {"scale": np.float32(2), "one": np.ones(1, np.float32)}})
    params = artifact.load(tmp_path / "a.kmq")[1]["params"]
    assert (params["scale"].shape, params["one"].shape) == ((), (1,)) and params["scale"] == 2


def test_deterministic_and_readable_by_safetensors(saved, tree, tmp_path):
    artifact.save(tmp_path / "again.kmq", MANIFEST, tree)
    assert (tmp_path / "again.kmq").read_bytes() == saved.read_bytes()
    assert "params/conv/kernel#packed" in safetensors.numpy.load_file(saved)


def test_size_is_the_arrays_and_little_else(tmp_path):
    weights = {"w": RNG.standard_normal((1000, 64)).astype(np.float32)}
    result = quant.quantize_params(weights, QuantSpec(4))
    artifact.save(tmp_path / "w.kmq", {}, result)
    assert (tmp_path / "w.kmq").stat().st_size <= 1.02 * quant.size_bytes(result).total


def test_every_flipped_byte_is_refused(saved, tmp_path):
    content = saved.read_bytes()
    for place in {*range(0, len(content), len(content) // 40), 0, 7, 8, 9, 200, len(content) - 1}:
        altered = bytearray(content)
        altered[place] ^= 0x41
        copy = tmp_path / "altered.kmq"
        copy.write_bytes(altered)
        with pytest.raises(UserError, match="altered.kmq"):
            artifact.load(copy)


@pytest.mark.parametrize("share", [0, 0.0005, 0.01, 0.5, 0.999])
def test_truncated_is_refused(saved, tmp_path, share):
    copy = tmp_path / "cut.kmq"
    copy.write_bytes(saved.read_bytes()[: int(share * saved.stat().st_size)])
    with pytest.raises(UserError, match="cut.kmq"):
        artifact.load(copy)


def rewritten(saved, tmp_path, change):
    """The file with another manifest and a checksum that fits it."""
    arrays = safetensors.numpy.load_file(saved)
    with safetensors.safe_open(saved, framework="numpy") as file:
        manifest = json.loads(file.metadata()["kmq"])
    change(manifest)
    text = json.dumps(manifest)
    path = tmp_path / "rewritten.kmq"
    path.write_bytes(safetensors.numpy.save(arrays, {"kmq": text, "sha256": artifact._checksum(text, arrays)}))
    return path


def test_newer_version_is_refused(saved, tmp_path):
    with pytest.raises(UserError, match=r"rewritten.kmq is of .kmq version 99.*upgrade"):
        artifact.load(rewritten(saved, tmp_path, lambda m: m.update(version=99)))


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about.update(shape=[1 << 40, 32]),
        lambda about: about.update(shape=[-72, 32]),
        lambda about: about.update(bits=200),
        lambda about: about.update(axis=9),
        lambda about: about.update(coarse=3),
        lambda about: about.pop("bits"),
    ],
)
def test_a_manifest_that_lies_is_refused(saved, tmp_path, change):
    path = rewritten(saved, tmp_path, lambda m: change(m["tensors"]["params/linear/kernel"]))
    with pytest.raises(UserError, match="rewritten.kmq"):
        artifact.load(path)


def test_other_files_are_refused(tmp_path):
    plain = tmp_path / "plain.safetensors"
    plain.write_bytes(safetensors.numpy.save({"a": np.ones(3)}))
    with pytest.raises(UserError, match="no manifest"):
        artifact.load(plain)
    bomb = tmp_path / "bomb.kmq"
    bomb.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(UserError, match="bomb.kmq"):
        artifact.load(bomb)
    with pytest.raises(UserError, match="absent.kmq"):
        artifact.load(tmp_path / "absent.kmq")
    with pytest.raises(UserError, match="cannot read"):
        artifact.load(tmp_path)


def test_a_failed_save_leaves_the_old_file(saved, tree):
    before = saved.read_bytes()
    with pytest.raises((TypeError, ValueError)):
        artifact.save(saved, {"bad": float("nan")}, tree)
    assert saved.read_bytes() == before and len(list(saved.parent.iterdir())) == 1


def test_names_that_clash():
    with pytest.raises(ValueError, match="version"):
        artifact.save("unused.kmq", {"version": 3}, {})
    with pytest.raises(UserError, match="#"):
        artifact.save("unused.kmq", {}, {"a#b": np.ones(2)})
