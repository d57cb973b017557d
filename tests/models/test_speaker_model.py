import dataclasses
import os
import shlex
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from kmq_jax import quant
from kmq_jax.core.errors import UserError
from kmq_jax.models import registry, speaker_model
from kmq_jax.models.speaker_model import PER_BITS, SpeakerModel, at_bits, fingerprint, load_model, mono, save_model

WAVE = (0.1 * np.random.default_rng(0).standard_normal(16000)).astype(np.float32)
SETTINGS = {"width": 4, "features": 81, "embedding_size": 8, "blocks": [1, 1, 1, 1]}


@pytest.fixture(scope="module")
def model():
    network = registry.build("resnet18", **SETTINGS)
    variables = jax.jit(lambda key: network.init(key, jnp.ones((1, 50, 81)), jnp.array([50]), train=False))(
        jax.random.key(0)
    )
    return SpeakerModel("resnet18", SETTINGS, "kiwano", variables)


def test_it_is_a_tree(model):
    leaves, structure = jax.tree.flatten(model)
    assert len(leaves) == len(jax.tree.leaves(model.variables)) and hash(structure) is not None
    doubled = jax.jit(lambda m: jax.tree.map(lambda x: 2 * x, m))(model)
    assert isinstance(doubled, SpeakerModel) and doubled.settings == model.settings
    np.testing.assert_array_equal(jax.tree.leaves(doubled)[0], 2 * leaves[0])
    assert jax.tree_util.tree_leaves_with_path(model)[0][0][0].name == "variables"


def test_its_name_is_short(model):
    assert repr(model).startswith("SpeakerModel(resnet18, kiwano features, 32 bits, ")
    packed = quant.quantize_params(model.variables, {"kernel$": quant.QuantSpec(4, coarse=(2,), only_smaller=False)})
    shown = repr(SpeakerModel("resnet18", SETTINGS, "kiwano", packed, 2))
    assert "2/4 bits, read at 2, " in shown and len(shown) < 100


def test_paths_arrays_and_lists(model, tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, WAVE, 16000, subtype="FLOAT")
    one = model.embed(WAVE, 16000)
    assert one.shape == (8,)
    for other in (model.embed(path), model.embed(str(path)), model.embed(jnp.asarray(WAVE), 16000)):
        np.testing.assert_allclose(other, one, atol=1e-5)
    many = model.embed([WAVE, path, WAVE[:8000]], 16000)
    assert many.shape == (3, 8)
    np.testing.assert_allclose(many[:2], [one, one], atol=1e-5)
    for bad, message in (((WAVE,), "sample_rate"), (([],), "empty list"), ((WAVE[:100], 16000), "shorter")):
        with pytest.raises(UserError, match=message):
            model.embed(*bad)


def test_channels_are_told_from_samples():
    stereo = np.stack([WAVE, 3 * WAVE])
    for wave in (stereo, stereo.T):
        np.testing.assert_allclose(mono(wave), 2 * WAVE, rtol=1e-6)
    np.testing.assert_array_equal(mono(WAVE[None]), WAVE)
    for bad in (np.zeros((100, 100)), np.zeros((64, 16000)), np.zeros((1, 2, 16000)), np.float32(0)):
        with pytest.raises(UserError, match=r"\[samples\], \[samples, channels\] or \[channels, samples\]"):
            mono(bad)
    with pytest.raises(UserError, match="complex64"):
        mono(WAVE.astype(np.complex64))


@pytest.mark.parametrize("packed", [False, True])
def test_a_bfloat16_model_is_saved_and_loaded(model, tmp_path, packed):
    variables = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.variables)
    if packed:
        variables = quant.quantize_params(variables, {"kernel$": 4})
    low = SpeakerModel("resnet18", SETTINGS, "kiwano", variables)
    save_model(tmp_path / "low.kmq", low)
    loaded = load_model(tmp_path / "low.kmq")
    found, wanted = quant.dequantize_params(loaded.variables), quant.dequantize_params(variables)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}
    jax.tree.map(np.testing.assert_array_equal, found, dict(wanted))
    assert np.isfinite(loaded.embed(WAVE, 16000)).all()


def test_the_settings_may_name_a_dtype(model):
    named = SpeakerModel("resnet18", {**SETTINGS, "dtype": "bfloat16"}, "kiwano", model.variables)
    assert named.network().dtype == "float32" and named.network("bfloat16").dtype == "bfloat16"
    assert named.network() == model.network()


def test_strict_types(model):
    with jax.numpy_dtype_promotion("strict"):
        assert model.embed(WAVE, 16000).dtype == np.float32


def test_what_is_read_at_some_bits_is_neither_read_at_others_nor_saved(model, tmp_path):
    # Each number of bits may have biases and statistics of its own, which are gone once others are taken.
    params = quant.quantize_params(model.variables["params"], {"kernel$": quant.QuantSpec(4, coarse=(2,))})
    own = {"2": {"params/head/linear/bias": np.full(8, 9, np.float32)}}
    whole = SpeakerModel("resnet18", SETTINGS, "kiwano", {**model.variables, "params": params, PER_BITS: own})
    low = at_bits(whole, 2)
    assert at_bits(low, 2).variables["params"]["head"]["linear"]["bias"][0] == 9
    for other in (None, 4):
        with pytest.raises(UserError, match="read at 2 bits already"):
            at_bits(low, other)
    with pytest.raises(UserError, match="read at 2 bits: save the whole one"):
        save_model(tmp_path / "low.kmq", low)
    assert not (tmp_path / "low.kmq").exists()


@pytest.mark.parametrize(
    ("specs", "bits", "said"),
    [
        # A number that a few tensors happen to have is no choice: the model would be read as it is.
        ((quant.QuantSpec(2), quant.QuantSpec(4)), 2, "2 bits: its tensors have 2 to 4, each its own"),
        ((quant.QuantSpec(4), quant.QuantSpec(4)), 3, "3 bits: only at 4"),
        ((quant.QuantSpec(3), quant.QuantSpec(4, coarse=(2,))), 3, "3 bits: only at 2, 4"),
        ((None, None), 2, "2 bits: it is not quantized"),
        ((quant.QuantSpec(4), quant.QuantSpec(4)), 4, None),
        ((quant.QuantSpec(3), quant.QuantSpec(4, coarse=(2,))), 2, None),
    ],
)
def test_bits_are_those_that_the_whole_model_can_be_read_at(model, specs, bits, said, tmp_path):
    first, others = (spec and dataclasses.replace(spec, only_smaller=False) for spec in specs)
    params = quant.quantize_params(model.variables["params"], {"^stem/.*kernel$": first, "kernel$": others})
    save_model(tmp_path / "m.kmq", dataclasses.replace(model, variables={**model.variables, "params": params}))
    if said is None:
        read = load_model(tmp_path / "m.kmq", bits)
        # A nested model at fewer bits is another one; any other is the same, whatever is asked for.
        assert read.bits == bits and (fingerprint(read) == fingerprint(load_model(tmp_path / "m.kmq"))) == (bits == 4)
        return
    with pytest.raises(UserError, match=said):
        load_model(tmp_path / "m.kmq", bits)


def test_types_without_a_place_in_the_file(model, tmp_path):
    odd = SpeakerModel("resnet18", SETTINGS, "kiwano", {"params": {"w": np.zeros(3, np.complex64)}})
    with pytest.raises(UserError, match="w is complex64"):
        save_model(tmp_path / "odd.kmq", odd)


def _head(bias):
    return {"2": {"params": {"head": {"linear": {"bias": bias}}}}}


def _without(tree, name):
    return {key: value for key, value in tree.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: {**v, "params": _without(v["params"], "head")}, r"tensor params/head/\S+ is missing"),
        (lambda v: {**v, "params": {**v["params"], "own": np.ones(3)}}, "tensor params/own is none of the network's"),
        (lambda v: jax.tree.map(lambda x: x[..., None], v), r"tensor \S+ has shape .*, but the network's is"),
        (lambda v: {**v, PER_BITS: _head(np.ones(3))}, "tensor narrow/2/params/head/linear/bias has shape"),
        (lambda v: {**v, PER_BITS: {"2": {"params": {"own": np.ones(3)}}}}, "narrow/2/params/own is none of the"),
        (lambda v: {**v, PER_BITS: np.ones(3)}, "tensor narrow is none of the network's"),
        (lambda v: {**v, "integers": {"stem": {"input": np.ones(3)}}}, "tensor integers/stem/input has shape"),
        (lambda v: {**v, "integers": {"stem": {"conv": {"kernel": np.ones(3)}}}}, r"is \(4,\)"),
        (lambda v: jax.tree.map(lambda x: np.full_like(x, np.nan), v), r"tensor \S+ holds values that are not finite"),
        (lambda v: jax.tree.map(lambda x: np.full_like(x, np.inf), v), r"tensor \S+ holds values that are not finite"),
    ],
    ids=["missing", "extra", "misshapen", "bits", "bits-extra", "bits-alone", "steps", "kernel-steps", "nan", "inf"],
)
def test_weights_that_are_not_the_network_s_are_refused(model, tmp_path, change, message):
    variables = change(jax.device_get(model.variables))
    save_model(tmp_path / "a.kmq", SpeakerModel("resnet18", SETTINGS, "kiwano", variables))
    with pytest.raises(UserError, match=message) as caught:
        load_model(tmp_path / "a.kmq")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"width": "x"},
        {"width": -4},
        {"width": 10**9},
        {"blocks": [10**7, 1, 1, 1]},
        {"blocks": 3},
        {"blocks": [[1], {}]},
    ],
)
def test_settings_that_make_no_network_are_refused_before_anything_is_allocated(model, tmp_path, settings):
    save_model(tmp_path / "a.kmq", SpeakerModel("resnet18", {**SETTINGS, **settings}, "kiwano", model.variables))
    with pytest.raises(UserError, match="a.kmq: "):
        load_model(tmp_path / "a.kmq")


def test_workdirs_that_are_none(tmp_path):
    for text in ("[]", "{}", '{"model": []}', '{"model": {}}', '{"model": {"name": []}, "frontend": 3}', "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError):
            load_model(tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_the_fingerprint_holds_shapes_and_axes():
    weights = np.arange(16, dtype=np.float32).reshape(2, 8)
    square = {"kernel": np.eye(8, dtype=np.float32)}
    trees = [{"kernel": kernel} for kernel in (weights, weights.reshape(8, 2), weights.view(np.int32))]
    trees += [quant.quantize_params(square, quant.QuantSpec(2, axis=axis)) for axis in (0, 1)]
    found = {fingerprint(SpeakerModel("resnet18", SETTINGS, "kiwano", {"params": tree})) for tree in trees}
    assert len(found) == 5


def test_compiled_programs_are_dropped_once_they_are_many(model, monkeypatch):
    monkeypatch.setattr(speaker_model, "_MOST_PROGRAMS", 2)
    speaker_model._programs.clear()
    speaker_model.embed_batch.clear_cache()
    first = speaker_model.embed_waves(model, [WAVE])
    for seconds in (2, 3, 4):
        speaker_model.embed_waves(model, [np.tile(WAVE, seconds)])
        assert speaker_model.embed_batch._cache_size() <= 2
    np.testing.assert_array_equal(speaker_model.embed_waves(model, [WAVE]), first)


def test_threads_share_a_model_and_forked_processes_are_told(model):
    expected = speaker_model.embed_waves(model, [WAVE])
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: speaker_model.embed_waves(model, [WAVE]), range(8)):
            np.testing.assert_array_equal(found, expected)
    child = os.fork()
    if child == 0:
        try:
            speaker_model.embed_waves(model, [WAVE])
        except UserError as error:
            os._exit(42 if "forked" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42


@pytest.mark.parametrize("name", ["resnet.onnx", "a net.pt", "last.ckpt"])
def test_another_toolkits_file_is_told_with_the_command_that_imports_it(name, tmp_path):
    file = tmp_path / name
    file.write_bytes(b"weights")
    with pytest.raises(UserError) as told:
        load_model(file)
    command = str(told.value).split("run kmq-jax ")[1].split(", then")[0]
    words = shlex.split(command)
    assert words == ["import_model", f"--source={file}", f"--out={file.stem}"] and "\n" not in str(told.value)
