"""Bits by layer within a budget: predictions beside what happens, exactness, files and mistakes."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from kmq_jax import quant
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import read_json, write_json
from kmq_jax.models import registry
from kmq_jax.models.speaker_model import SpeakerModel, fingerprint, save_model
from kmq_jax.ptq import activations, budget, quantize
from kmq_jax.ptq.options import QuantizeOptions

SETTINGS = {"width": 4, "blocks": [1, 1, 1, 1], "embedding_size": 8, "norm": "bias"}
DATA = "synthetic:train?speakers=4&utterances=2"


@pytest.fixture(scope="module")
def measured():
    network = registry.build("wespeaker_resnet34", **SETTINGS)
    model = SpeakerModel("wespeaker_resnet34", SETTINGS, "wespeaker", registry.initialize(network, jax.random.key(0)))
    features = np.random.default_rng(0).normal(size=(4, 60, 80)).astype(np.float32)
    rules = quantize.rules_of(QuantizeOptions(budget=3.0))
    return model, budget.measure(model, budget.mark_of(fingerprint(model), rules, DATA), rules, features, draws=4)


def test_the_budget_is_kept_and_nothing_better_fits(measured):
    _, found = measured
    for average in (2.0, 2.5, 3.7, 6.0):
        chosen = budget.allocate(found, average=average)
        assert found.average(chosen) <= average + 1e-9
    few = ["stem/conv/kernel", "stage4/block0/conv2/kernel", "head/linear/kernel"]

    def cut(table):
        return {name: table[name] for name in few}

    small = budget.Sensitivities("", *map(cut, (found.traces, found.errors, found.sizes, found.weights)), 100)
    chosen = budget.allocate(small, average=3.0)
    every = [dict(zip(few, bits)) for bits in itertools.product(budget.BITS, repeat=3)]
    best = min(small.damage(bits_of) for bits_of in every if small.average(bits_of) <= 3)
    assert small.damage(chosen) == pytest.approx(best)


def test_the_curve_falls_and_so_does_what_happens(measured):
    model, found = measured
    rows = budget.curve(found, points=5)
    assert all(a["bytes"] <= b["bytes"] and a["damage"] >= b["damage"] for a, b in itertools.pairwise(rows))
    features = np.random.default_rng(0).normal(size=(4, 60, 80)).astype(np.float32)
    exact = np.asarray(model.network().apply(model.variables, features))
    damage = []
    for average in (2.5, 4.0, 6.0):
        rules = quant.rules_of(budget.allocate(found, average=average), quant.QuantSpec(8))
        params = quant.dequantize_params(quant.quantize_params(model.variables["params"], rules))
        given = np.asarray(model.network().apply({"params": params}, features))
        cosine = np.sum(exact * given, 1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(given, axis=1)
        damage.append(np.mean(1 - cosine))
    assert damage[0] > damage[1] > damage[2]


def test_a_size_is_kept_by_the_file(measured, tmp_path):
    model, found = measured
    size = found.rest + 40_000
    chosen = budget.allocate(found, size=size)
    rules = quant.rules_of(chosen, quant.QuantSpec(8))
    save_model(tmp_path / "a.kmq", quantize.quantize_model(model, rules))
    assert 0.7 * size < (tmp_path / "a.kmq").stat().st_size <= size


def test_a_size_counts_biases_and_activations_as_they_are_stored(measured, measured_again, tmp_path):
    model, _ = measured
    params = quant.quantize_params(model.variables["params"], {"/kernel$": 2, "": None})
    plain = dataclasses.replace(model, variables={**model.variables, "params": params})
    halved = dataclasses.replace(plain, variables=quantize.with_half_biases(plain.variables))
    whole = activations.with_ranges(plain, dict.fromkeys(activations.places_of(model), (0.1, 5.0)))
    rest, sizes = [], []
    for made, settings in ((plain, {}), (halved, {"biases": "float16"}), (whole, {"activations": 8})):
        rest.append(quantize.rules_within(model, QuantizeOptions(size="1MB", **settings), DATA, tmp_path)[1].rest)
        save_model(tmp_path / "a.kmq", made)
        sizes.append((tmp_path / "a.kmq").stat().st_size)
    assert sizes[1] - sizes[0] == pytest.approx(rest[1] - rest[0], abs=64)
    assert 0 < sizes[2] - sizes[0] <= rest[2] - rest[0] < 4 * (sizes[2] - sizes[0])
    assert len(measured_again) == 1


def test_biases_that_float16_cannot_hold_stay_as_they_are():
    biases = {"large": [1e5, 0.5], "small": [1e-9, 2e-9], "usual": [3.25, -0.5], "zero": [0, 0]}
    layers = {name: {"kernel": np.ones((2, 2), np.float32), "bias": np.float32(x)} for name, x in biases.items()}
    halved = quantize.with_half_biases(layers)
    for name, layer in halved.items():
        np.testing.assert_array_equal(layer["bias"], layers[name]["bias"])
        assert layer["bias"].dtype == (np.float32 if name in ("large", "small") else np.float16)


def test_changed_recordings_are_measured_again(measured, measured_again, tmp_path):
    recording = tmp_path / "data" / "speaker" / "a.wav"
    recording.parent.mkdir(parents=True)
    for content in (b"1", b"1", b"22"):
        if not recording.exists() or recording.read_bytes() != content:
            recording.write_bytes(content)
        quantize.rules_within(measured[0], QuantizeOptions(budget=3.0), str(tmp_path / "data"), tmp_path)
    assert len(set(measured_again)) == len(measured_again) == 2


def test_fewer_crops_than_are_measured_on_are_other_sensitivities(measured, measured_again, tmp_path):
    for crops in (100, 8, 4, 4, 200):
        quantize.rules_within(measured[0], QuantizeOptions(budget=3.0), DATA, tmp_path, crops)
    assert len(measured_again) == len(set(measured_again)) == 2  # of 8 crops and of 4


def test_the_file_of_damaged_sensitivities_is_named(measured, measured_again, tmp_path):
    settings = measured[0], QuantizeOptions(budget=3.0), DATA, tmp_path
    quantize.rules_within(*settings)
    (kept,) = tmp_path.glob("sensitivities-*.json")
    other = measured[1].to_json() | {"sizes": {name: {2: 1.0} for name in measured[1].sizes}}
    for damaged in ([], other):
        write_json(kept, damaged)
        with pytest.raises(UserError, match=r"ies-\w+\.json: these are no sensitivities: .*; remove the file"):
            quantize.rules_within(*settings)


def test_the_loss_is_measured_on_crops_that_were_not_fitted_on(measured, monkeypatch):
    short = np.arange(3.0)[np.arange(4 + 16) % 3]  # three short recordings, again and again
    monkeypatch.setattr(budget, "loss_of", lambda model, quantized, features: features.tolist())
    for drawn, expected in ((short, None), (np.append(short[:-1], 9.0), [9.0]), (np.arange(20.0), [*range(4, 20)])):
        monkeypatch.setattr(quantize, "random_features", lambda *given, drawn=drawn: drawn)
        assert quantize.measured_loss(measured[0], measured[0], DATA, crops=4) == expected


@pytest.fixture
def measured_again(measured, monkeypatch):
    """The marks of what would have been measured; what is found is always the same."""
    marks = []

    def measure(model, mark, rules, features):
        marks.append(mark)
        return dataclasses.replace(measured[1], model=mark)

    monkeypatch.setattr(budget, "measure", measure)
    monkeypatch.setattr(quantize, "random_features", lambda *given: None)
    return marks


def test_another_budget_measures_nothing_again(measured, measured_again, tmp_path):
    model, found = measured
    for average in (3.0, 4.0):
        rules, again, bits_of = quantize.rules_within(model, QuantizeOptions(budget=average), DATA, tmp_path)
        assert again.errors == found.errors
        assert bits_of == budget.allocate(found, average=average)
        assert {rule.spec.bits for rule in rules} == set(bits_of.values())
    assert len(measured_again) == 1
    # Other tensors, other codebooks, other recordings: what was measured does not hold for them.
    quantize.rules_within(model, QuantizeOptions(budget=4.0, skip=("^stem/",)), DATA, tmp_path)
    quantize.rules_within(model, QuantizeOptions(budget=4.0, granularity="tensor"), DATA, tmp_path)
    quantize.rules_within(model, QuantizeOptions(budget=4.0), "synthetic:dev", tmp_path)
    assert len(set(measured_again)) == 4 == len(list(tmp_path.iterdir()))


def test_rules_keep_tensors_within_a_budget_but_give_no_bits(tmp_path):
    (tmp_path / "r.json").write_text('[{"pattern": "^stem/", "bits": null}]')
    options = QuantizeOptions(budget=3.0, rules=tmp_path / "r.json")
    assert [rule.pattern for rule in quantize.rules_of(options)] == ["^stem/", "/kernel$"]
    (tmp_path / "r.json").write_text('[{"pattern": "^stem/", "bits": 8}]')
    with pytest.raises(UserError, match=r"r\.json gives bits, which `budget`"):
        quantize.rules_of(options)


def test_the_rules_beside_a_file_name_each_tensor_alone(tmp_path):
    bits_of = {"a_b/kernel": 3, "a.b/kernel": 2}  # names of imported graphs have dots
    table = {name: {bits: 4.0**-bits for bits in budget.BITS} for name in bits_of}
    found = budget.Sensitivities("m", dict.fromkeys(bits_of, 1.0), table, table, dict.fromkeys(bits_of, 8), 0)
    for chosen in (bits_of, dict(reversed(bits_of.items()))):
        budget.report(found, chosen, tmp_path / "a.kmq")
        written = read_json(tmp_path / "a.rules.json")
        rules = [quant.QuantRule(rule["pattern"], quant.QuantSpec(rule["bits"])) for rule in written]
        params = {name: np.zeros((64, 64), np.float32) for name in bits_of}
        assert {name: spec.bits for name, spec in quant.decide(params, rules).items()} == bits_of


def test_mistakes(measured):
    _, found = measured
    fewest = found.bytes_of(dict.fromkeys(found.sizes, 2))
    with pytest.raises(UserError, match=f"`size` .={found.rest + 10} bytes. is too small: .* takes {fewest}$"):
        budget.allocate(found, size=found.rest + 10)
    with pytest.raises(UserError, match="`budget` .=1.5. must be at least 2"):
        budget.allocate(found, average=1.5)
    with pytest.raises(UserError, match="size"):
        budget.bytes_from("two")
    with pytest.raises(UserError, match="no sensitivities"):
        budget.Sensitivities.from_json({"model": "x", "traces": {}})
    for given in ({}, {"bits": 2, "budget": 2.5}, {"budget": 2.5, "nested": (2,)}):
        with pytest.raises(UserError):
            QuantizeOptions(**given)
