"""Which model may stand at which level of a cascade; what it decides is tested with whole commands."""

import dataclasses

import numpy as np
import pytest

from kmq_jax import quant
from kmq_jax.cascade import verifier
from kmq_jax.cascade.policy import CascadePolicy
from kmq_jax.cascade.verifier import _read_at, save_cascade
from kmq_jax.core.errors import UserError
from kmq_jax.metrics.calibration import AffineMap
from kmq_jax.models.speaker_model import SpeakerModel, at_bits, fingerprint


def test_a_nested_model_embeds_without_bits_for_its_last_level_alone():
    kernel = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)
    rule = quant.QuantRule("kernel", quant.QuantSpec(4, coarse=(2,), only_smaller=False))
    packed = quant.quantize_params({"layer": {"kernel": kernel}}, [rule])
    whole = SpeakerModel("wespeaker_resnet34", {}, "wespeaker", {"params": packed})
    # Extracted without --bits, the embeddings are those of 4 bits, whichever level they are given for.
    assert _read_at(whole, 4, fingerprint(whole), "n.kmq").bits == 4
    with pytest.raises(UserError, match=r"n.kmq is not the model .* at 2 bits \(extract --bits=2\)"):
        _read_at(whole, 2, fingerprint(whole), "n.kmq")
    for bits in (2, 4):
        assert _read_at(whole, bits, fingerprint(at_bits(whole, bits)), "n.kmq").bits == bits
    # A model that does not nest has one fingerprint, at whichever level it stands.
    single = dataclasses.replace(whole, variables={"params": {"layer": {"kernel": kernel}}})
    assert _read_at(single, 32, fingerprint(single), "f.kmq") is single


def test_a_refused_cascade_leaves_the_one_that_lies_there(tmp_path, monkeypatch):
    models = {}
    for name in ("old2", "old4", "new2", "new4"):
        kernel = np.full((2, 2), len(models), np.float32)
        models[name] = SpeakerModel("wespeaker_resnet34", {}, "wespeaker", {"params": {"layer": {"kernel": kernel}}})
    monkeypatch.setattr(verifier, "load_model", lambda place: models[place.rsplit("/", 1)[-1]])
    monkeypatch.setattr(verifier, "save_model", lambda path, model: path.write_text(fingerprint(model)))
    line, known = AffineMap(1.0, 0.0), {name: fingerprint(model) for name, model in models.items()}

    def policy(*names):
        return CascadePolicy((2, 4), (line, line), ((0.0, 1.0),), 0.5, models=tuple(known[name] for name in names))

    save_cascade(tmp_path, policy("old2", "old4"), {2: "old2", 4: "old4"})
    before = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert (before["2.kmq"], before["4.kmq"]) == (known["old2"], known["old4"])
    with pytest.raises(UserError, match="old4 is not the model that the policy was made for at 4 bits"):
        save_cascade(tmp_path, policy("new2", "new4"), {2: "new2", 4: "old4"})
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == before


def test_a_model_of_the_hub_keeps_its_name(tmp_path, monkeypatch):
    model = SpeakerModel("wespeaker_resnet34", {}, "wespeaker", {"params": {"layer": {"kernel": np.ones((2, 2))}}})
    asked = []
    monkeypatch.setattr(verifier, "load_model", lambda place: asked.append(place) or model)
    monkeypatch.setattr(verifier, "save_model", lambda path, model: path.write_text(""))
    line = AffineMap(1.0, 0.0)
    policy = CascadePolicy((2, 4), (line, line), ((0.0, 1.0),), 0.5)
    save_cascade(tmp_path / "made", policy, {2: "hf://me/tiny", 4: "hf://me/tiny@main/nested.kmq"})
    assert asked == ["hf://me/tiny", "hf://me/tiny@main/nested.kmq"]
