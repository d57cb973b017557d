"""Long recordings: chunks give what one run gives; what cannot be cut is embedded in parts, and that is said."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from kmq_jax import quant
from kmq_jax.core.errors import UserError
from kmq_jax.data import source
from kmq_jax.models import long, registry, speaker_model
from kmq_jax.models.protocol import Part, SpeakerNetwork
from kmq_jax.models.speaker_model import SpeakerModel, embed_all, embed_waves

RATE = source.SAMPLE_RATE


def model_of(name, frontend="wespeaker", **more):
    settings = registry.smoke_settings(name) | more
    variables = registry.initialize(registry.build(name, **settings), jax.random.key(0))
    return SpeakerModel(name, settings, frontend, variables)


@pytest.fixture(scope="module")
def speech():
    table = source.open_source("synthetic:dev?speakers=4&utterances=1")
    return np.concatenate([table.load(row) for row in range(4)])


def cosine(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


@pytest.mark.parametrize(
    "name, frontend",
    [
        ("wespeaker_resnet34", "wespeaker"),  # plain statistics
        ("xvector", "wespeaker"),  # frames are lost for want of padding
        ("resnet18", "kiwano"),  # squeeze-and-excitation, attention
        ("ecapa_speechbrain_c512", "wespeaker"),  # sees the whole, mirrored ends
        ("campplus", "3dspeaker"),  # masks by context
    ],
)
@pytest.mark.parametrize("engine", ["jax", "onnxruntime"])
def test_chunks_give_what_one_run_gives(monkeypatch, speech, name, frontend, engine):
    model, waves = model_of(name, frontend), [speech[: 7 * RATE + 77], speech[:RATE]]
    whole = embed_waves(model, waves, engine=engine)
    chunks = []
    real = long.merge
    monkeypatch.setattr(long, "merge", lambda a, b: chunks.append(1) or real(a, b))
    monkeypatch.setattr(long, "LONG", 2.0)
    monkeypatch.setattr(long, "CHUNK", 208)
    parts = embed_waves(model, waves, engine=engine)
    assert len(chunks) >= 3
    np.testing.assert_allclose(parts[1], whole[1], rtol=0, atol=1e-5 * np.abs(whole[1]).max())  # short: as ever
    assert cosine(parts[0], whole[0]) > 1 - 1e-8
    np.testing.assert_allclose(parts[0], whole[0], rtol=0, atol=1e-4 * np.abs(whole[0]).max())
    assert cosine(whole[0], embed_waves(model, [speech[: 3 * RATE]], engine=engine)[0]) < 1 - 1e-6  # it can tell


def test_packed_weights_are_prepared_once_for_all_long_recordings(monkeypatch, speech):
    full = model_of("xvector")
    params = quant.quantize_params(full.variables["params"], {"^frame1/conv/kernel$": 4})
    model = dataclasses.replace(full, variables={**full.variables, "params": params})
    monkeypatch.setattr(long, "LONG", 1.0)
    calls, real = [], quant.dequantize_params
    monkeypatch.setattr(quant, "dequantize_params", lambda *given: calls.append(1) or real(*given))
    for _ in range(2):
        embed_waves(model, [speech[: 2 * RATE]] * 2)
    assert len(calls) == 1


def test_the_first_frames_less_the_mean_of_all(monkeypatch, speech, tmp_path):
    import soundfile

    (tmp_path / "a").mkdir()
    soundfile.write(tmp_path / "a" / "1.wav", speech[: 6 * RATE], RATE, subtype="FLOAT")
    model, table = model_of("wespeaker_resnet34"), source.open_source(tmp_path)
    whole = embed_all(model, table, max_frames=333)
    monkeypatch.setattr(long, "LONG", 2.0)
    monkeypatch.setattr(long, "CHUNK", 104)
    np.testing.assert_allclose(embed_all(model, table, max_frames=333), whole, rtol=0, atol=1e-4 * np.abs(whole).max())
    assert not np.allclose(embed_all(model, table), whole, atol=1e-3 * np.abs(whole).max())


@pytest.mark.parametrize("engine", ["jax", "onnxruntime"])
def test_what_cannot_be_cut_is_embedded_in_parts_and_says_so(monkeypatch, speech, engine, capsys):
    model, wave = model_of("redimnet_b0", features=80), speech[: 5 * RATE]
    monkeypatch.setattr(long, "LONG", 2.0)
    speaker_model._tell_of_parts.cache_clear()
    (found,) = embed_waves(model, [wave], engine=engine)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "redimnet_b0" in told and "2 s" in told
    each = np.stack([embed_waves(model, [part], engine=engine)[0] for part in np.array_split(wave, 3)])
    expected = (each / np.linalg.norm(each, axis=1, keepdims=True)).sum(axis=0)
    assert cosine(found, expected) > 1 - 1e-6
    assert not capsys.readouterr().err


def test_moments_add_up_in_any_parts():
    rng = np.random.default_rng(0)
    frames, logits = rng.normal(3, 1, (50, 4)), rng.normal(0, 40, (50, 4))
    weights = np.exp(logits - logits.max(0))
    mean = (weights * frames).sum(0) / weights.sum(0)
    variance = (weights * (frames - mean) ** 2).sum(0) / weights.sum(0)
    for cuts in ([], [10], [1, 2, 30], [0, 50]):  # some parts are empty
        parts = zip(np.split(frames, cuts), np.split(logits, cuts))
        total, *rest = (long.moments_of(*part) for part in parts)
        for one in rest:
            total = long.merge(total, one)
        np.testing.assert_allclose(total.mean, mean)
        np.testing.assert_allclose(total.squares / total.weight, variance)
        plain, *others = (long.moments_of(part) for part in np.split(frames, cuts))
        for one in others:
            plain = long.merge(plain, one)
        np.testing.assert_allclose(plain.mean, frames.mean(0))
        np.testing.assert_allclose(plain.squares / (plain.weight - 1), frames.var(0, ddof=1))


class Unnamed(SpeakerNetwork):
    """Says that it can be cut, but takes its mean without `nn.whole`."""

    features: int = 80
    embedding_size: int = 3
    dtype: str = "float32"

    @nn.compact
    def __call__(self, features, lengths=None, train=False):
        return nn.Dense(self.embedding_size, name="head")(features.mean(1))

    @nn.nowrap
    def parts(self):
        return (Part("head", "head"),)

    @nn.nowrap
    def chunk_step(self):
        return 1

    @nn.nowrap
    def to_onnx(self, graph, feats):
        return graph.linear(graph.node("ReduceMean", feats, graph.integers(1), keepdims=0), "head")


@pytest.mark.parametrize("engine", ["jax", "onnxruntime"])
def test_a_network_that_says_wrongly_that_it_can_be_cut_is_refused(monkeypatch, engine):
    registry.register("unnamed", Unnamed)
    variables = Unnamed().init(jax.random.key(0), np.zeros((1, 20, 80)))
    model, wave = SpeakerModel("unnamed", {}, "wespeaker", variables), np.random.default_rng(0).normal(size=RATE)
    monkeypatch.setattr(long, "LONG", 0.5)
    with pytest.raises(UserError, match=r"Unnamed has a chunk_step \(1\), but asks nn.whole for no statistics"):
        embed_waves(model, [wave.astype(np.float32)], engine=engine)
