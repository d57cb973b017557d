"""Exported files as others run them: the example with numpy and ONNX Runtime alone, and sherpa-onnx."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
from commands import parity_of

from kmq_jax.interop.export import export_model
from kmq_jax.models import registry
from kmq_jax.models.speaker_model import SpeakerModel, save_model

SETTINGS = {"width": 4, "blocks": [1, 1, 1, 1], "embedding_size": 8, "norm": "bias"}
RATE = 16000


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model, its file, and two recordings."""
    place = tmp_path_factory.mktemp("deploy")
    network = registry.build("wespeaker_resnet34", **SETTINGS)
    variables = registry.initialize(network, jax.random.key(3))
    model = SpeakerModel("wespeaker_resnet34", SETTINGS, "wespeaker", variables)
    save_model(place / "m.kmq", model)
    rng = np.random.default_rng(0)
    waves = [np.cumsum(rng.normal(size=n)) for n in (RATE, RATE + 345)]
    for name, wave in zip("ab", waves):
        soundfile.write(place / f"{name}.wav", 0.5 * wave / np.abs(wave).max(), RATE, subtype="PCM_16")
    return place, model


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_the_example_needs_nothing_of_ours(saved, kind):
    place, model = saved
    exported = export_model(place / "m.kmq", place / "inside.onnx", features_inside=True)
    assert parity_of(exported.parity)[0] > 0.9999995
    example = Path(__file__).parents[2] / "examples" / "deploy.py"
    for name in "ab" if kind == "flac" else "":
        soundfile.write(place / f"{name}.flac", *soundfile.read(place / f"{name}.wav", dtype="int16"))
    hide = "sys.modules['soundfile'] = None" if kind == "wav" else ""
    start = f"import runpy, sys\n{hide}\nrunpy.run_path(sys.argv.pop(1))"
    words = [
        sys.executable,
        "-I",
        "-c",
        start,
        example,
        place / "inside.onnx",
        place / f"a.{kind}",
        place / f"b.{kind}",
    ]
    printed = subprocess.run(words, capture_output=True, text=True, check=True, cwd=place).stdout
    a, b = (model.embed(place / f"{name}.wav", engine="jax") for name in "ab")
    cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    assert float(printed.split()[1]) == pytest.approx(cosine, abs=1e-4)


def test_a_file_that_takes_a_wave_does_not_say_that_it_takes_features(saved):
    """sherpa-onnx would compute features by these names, and feed them where samples belong."""
    onnx = pytest.importorskip("onnx")
    place, _ = saved
    export_model(place / "m.kmq", place / "wave.onnx", features_inside=True)
    about = {entry.key: entry.value for entry in onnx.load(place / "wave.onnx").metadata_props}
    assert about.keys() == {"comment", "sample_rate", "frontend", "bits", "fingerprint"}
    assert "a wave" in about["comment"] and about["frontend"] == "wespeaker"


def test_sherpa_onnx_takes_the_file_and_gives_what_its_features_give(saved):
    """Its front end is its own: a povey window, filters up to 7,600 Hz, frames beyond the edges."""
    sherpa_onnx = pytest.importorskip("sherpa_onnx", reason="sherpa-onnx opens the file")
    knf = pytest.importorskip("kaldi_native_fbank", reason="computes sherpa-onnx's features")
    place, model = saved
    export_model(place / "m.kmq", place / "outside.onnx")
    wave = soundfile.read(place / "a.wav", dtype="float32")[0]
    settings = sherpa_onnx.SpeakerEmbeddingExtractorConfig(model=str(place / "outside.onnx"), num_threads=1)
    extractor = sherpa_onnx.SpeakerEmbeddingExtractor(settings)
    stream = extractor.create_stream()
    stream.accept_waveform(sample_rate=RATE, waveform=wave)
    stream.input_finished()
    theirs = np.array(extractor.compute(stream))

    options = knf.FbankOptions()
    options.frame_opts.dither = 0
    options.frame_opts.snip_edges = False
    options.mel_opts.num_bins = 80
    options.mel_opts.high_freq = -400
    fbank = knf.OnlineFbank(options)
    fbank.accept_waveform(RATE, (wave * 32768).tolist())
    fbank.input_finished()
    features = np.stack([fbank.get_frame(i) for i in range(fbank.num_frames_ready)])
    features = (features - features.mean(axis=0)).astype(np.float32)
    ours = np.asarray(model.network().apply(model.variables, features[None]))[0]
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4 * np.abs(ours).max())
