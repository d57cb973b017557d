"""Which model may stand at which level of a cascade; what it decides is tested with whole commands."""

import dataclasses

import numpy as np
import pytest

from kmq_jax import quant
from kmq_jax.cascade.verifier import _read_at
from kmq_jax.core.errors import UserError
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
