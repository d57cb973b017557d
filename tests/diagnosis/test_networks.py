"""Experiments on networks: what is left out where there is nothing to say."""

import dataclasses

import jax
import numpy as np
import pytest

from kmq_jax import quant
from kmq_jax.data.source import open_source
from kmq_jax.diagnosis import networks, variants
from kmq_jax.diagnosis.options import DiagnosisOptions
from kmq_jax.diagnosis.run import diagnose
from kmq_jax.models import registry
from kmq_jax.models.speaker_model import SpeakerModel, embed_all, save_model
from kmq_jax.nn import integers
from kmq_jax.ptq import activations

ENROL, TEST, LABELS = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 0]), np.array([True, False, True, False])


@pytest.mark.parametrize("replicates", [20, 1000])
def test_where_few_draws_have_both_kinds_of_trials_there_is_no_interval(replicates):
    """Of two speakers, half of the draws hold one alone, and so no pair of two."""
    values = np.array([0.9, 0.1, 0.8, 0.2])
    options = DiagnosisOptions(replicates=replicates, seed=3)
    rates = networks._Rates.of(values, LABELS, ENROL, TEST, options)
    assert rates.draws is None and rates.row(rates)["eer_ci95"] is None


def test_a_step_needs_a_difference_on_both_sides():
    assert networks.steps_db([np.inf, np.inf, 30.0, 25.5]) == [None, None, None, -4.5]


SETTINGS = {"width": 4, "blocks": [1, 1, 1, 1], "embedding_size": 8}
DATA = "synthetic:dev?speakers=4&utterances=3"
QUICK = DiagnosisOptions(retention_utterances=0, layer_utterances=6, hessian_draws=1, hessian_utterances=2,
                         hessian_seconds=1.0, replicates=20, max_seconds=1.0)  # fmt: skip


@pytest.fixture(scope="module")
def full():
    """A network in full precision."""
    variables = registry.initialize(registry.build("wespeaker_resnet34", **SETTINGS), jax.random.key(3))
    return SpeakerModel("wespeaker_resnet34", SETTINGS, "wespeaker", jax.device_get(variables))


@pytest.fixture(scope="module")
def rounded(full):
    """The same at 4 bits with 8-bit activations."""
    params = quant.quantize_params(full.variables["params"], {"/kernel$": quant.QuantSpec(4, only_smaller=False)})
    packed = dataclasses.replace(full, variables={**full.variables, "params": params})
    features = np.random.default_rng(2).normal(size=(3, 90, 80)).astype(np.float32)
    return activations.with_ranges(packed, activations.measure(full, features))


@pytest.fixture(scope="module")
def both(full, rounded):
    return networks.Networks(full, {4: rounded}, open_source(DATA), QUICK)


def cosine(a, b):
    return np.sum(a * b, 1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def loss(a, b):
    return float(1 - cosine(a, b).mean())


def test_all_or_nothing_put_back_is_one_network_or_the_other(full, rounded, both):
    mixes = [variants.mix(both.low[4], both.base, lambda name, back=back: back) for back in (True, False)]
    own, low = both._embed(None, mixes, "mixes")
    table = open_source(DATA)
    np.testing.assert_allclose(own, embed_all(full, table, max_seconds=1.0), rtol=1e-4, atol=1e-4)
    theirs = embed_all(rounded, table, max_seconds=1.0)
    without = {key: tree for key, tree in rounded.variables.items() if key != integers.COLLECTION}
    floating = embed_all(dataclasses.replace(rounded, variables=without), table, max_seconds=1.0)
    # Where a value lies between two levels, the last bit before it decides: far less than what rounding does at all.
    assert loss(low, theirs) < 0.1 * loss(floating, theirs)


def test_a_component_takes_its_rounding_along(full, rounded, both):
    """Beside the emulation in `nn.integers`, given the steps of one component alone."""
    inside = "stage2"
    (mirror,) = [
        tree for kind, name, tree in variants.component_mixes(both.network, both.base, both.low[4])
        if (kind, name) == ("mirror", inside)
    ]  # fmt: skip
    (found,) = both._embed(None, [mirror], "mirror")
    low = quant.dequantize_params(rounded.variables)
    params = {**full.variables["params"], inside: low["params"][inside]}
    steps = {integers.COLLECTION: {inside: low[integers.COLLECTION][inside]}}
    table = open_source(DATA)
    with_steps, without = (
        embed_all(
            dataclasses.replace(full, variables={**full.variables, "params": params, **more}), table, max_seconds=1.0
        )
        for more in (steps, {})
    )
    assert loss(found, with_steps) < 0.1 * loss(without, with_steps)


def test_a_layer_takes_the_rounding_of_its_input_along(both):
    (mixed,) = variants.layer_mixes(both.base, both.low[4], ["stage2/block0/conv1/kernel"])
    grids = mixed[integers.COLLECTION]
    assert [place for place, grid in grids.items() if grid[0] > 0] == ["stage2/block0/conv1/input"]


def test_a_network_with_8_bit_activations_is_diagnosed(full, rounded, tmp_path):
    places = tmp_path / "full.kmq", tmp_path / "w4a8.kmq"
    for place, model in zip(places, (full, rounded)):
        save_model(place, model)
    found = diagnose(places[0], {4: places[1]}, DATA, DATA, QUICK)
    rows = {(row["experiment"], row["component"]): row for row in found.tables["retention"]}
    whole = rows["low", ""]["mean_abs_drift"]
    assert rows["reference", ""]["mean_abs_drift"] == 0 < whole
    assert all(row["mean_abs_drift"] > 0 for (kind, _), row in rows.items() if kind == "mirror")
    assert all(row["damage"] > 0 for row in found.tables["layers"])
    assert all(np.isfinite(row["sqnr_db"]) for row in found.tables["blocks"])
