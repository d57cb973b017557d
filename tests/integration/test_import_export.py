"""From another toolkit's file to a MODEL, to embeddings, and out to ONNX again, by the commands."""

import sys

import commands
import numpy as np
import originals
import pytest
import recordings
import safetensors.numpy

from kmq_jax.benchmarks import extract as bench_extract
from kmq_jax.cli import bench, export, extract, import_model
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import read_json
from kmq_jax.data.source import open_source
from kmq_jax.models import artifact
from kmq_jax.models.speaker_model import frontend_of
from kmq_jax.quant.transform import quantize_params
from kmq_jax.quant.types import QuantSpec

pytest.importorskip("onnx", reason="export needs onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="exported files are run by ONNX Runtime")


def command(monkeypatch, module, *flags):
    monkeypatch.setattr(sys, "argv", [module.__name__, *flags])
    module.main()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A WeSpeaker ResNet of two channels, with WeSpeaker's 80 mel bands."""
    path = tmp_path_factory.mktemp("wespeaker") / "avg_model.safetensors"
    safetensors.numpy.save_file(originals.fill(originals.wespeaker_shapes([1, 1, 1, 1], 2, False, 80, 6)), path)
    return path


def test_import_extract_export(checkpoint, tmp_path, monkeypatch, capsys):
    directory, data = tmp_path / "imported", recordings.kaldi(tmp_path / "data", 2, 2)
    command(monkeypatch, import_model, f"--source={checkpoint}", f"--out={directory}")
    said = capsys.readouterr().out
    assert "wespeaker_resnet18" in said and "hamming" in said
    command(monkeypatch, extract, f"--model={directory}", f"--data={data}", f"--out={tmp_path / 'e.npz'}")
    command(monkeypatch, export, f"--model={directory}", f"--out={tmp_path / 'm.onnx'}")
    assert "operator set 18" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    properties = session.get_modelmeta().custom_metadata_map
    assert properties["sample_rate"] == "16000" and properties["window"] == "hamming"
    assert properties["framework"] == "wespeaker" and properties["output_dim"] == "6"

    # Kaldi's own features into the exported file give the embeddings that ours gave from audio.
    pytest.importorskip("kaldi_native_fbank")
    utterances = open_source(str(data))
    onnx = bench_extract.session(tmp_path / "m.onnx", 1)
    fbank = frontend_of("wespeaker")
    theirs = np.concatenate([onnx(bench_extract.own_features(utterances, fbank, i)) for i in range(len(utterances))])
    ours = commands.arrays_of(tmp_path / "e.npz")["embeddings"]
    assert bench_extract.cosines(ours, theirs).min() > 0.99999
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-3 * np.abs(theirs).max())

    common = [f"--model={directory}", f"--onnx={tmp_path / 'm.onnx'}", f"--data={data}", "--repeats=1"]
    for features in ("own", "ours"):
        command(
            monkeypatch, _Bench, *common, f"--features={features}", f"--json={tmp_path / 'f.json'}", "--utterances=3"
        )
        figures = read_json(tmp_path / "f.json")
        assert figures["utterances"] == 3 and figures["features"] == features
        assert figures["speedup"] == pytest.approx(figures["onnx_seconds"] / figures["ours_seconds"])
        assert figures["min_cosine"] > 0.99999


class _Bench:
    """The benchmark as `kmq-jax bench extract` calls it."""

    @staticmethod
    def main():
        bench.run("extract", sys.argv[1:])


def test_a_quantized_model_is_exported_packed(checkpoint, tmp_path, monkeypatch):
    command(monkeypatch, import_model, f"--source={checkpoint}", f"--out={tmp_path / 'm'}", "--format=wespeaker-torch")
    manifest, variables = artifact.load(tmp_path / "m" / "model.kmq")
    variables["params"]["head"] = quantize_params(variables["params"]["head"], QuantSpec(4))
    artifact.save(tmp_path / "q.kmq", manifest, variables)
    for name, source in (("float", tmp_path / "m"), ("packed", tmp_path / "q.kmq")):
        command(monkeypatch, export, f"--model={source}", f"--out={tmp_path / name}.onnx")
    head = variables["params"]["head"]["linear"]["kernel"]
    saved = (tmp_path / "float.onnx").stat().st_size - (tmp_path / "packed.onnx").stat().st_size
    assert saved > 0.8 * (4 * head.size - head.packed.size)


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        (import_model, ["--source=none.onnx", "--out=x"], "cannot read none.onnx"),
        (export, ["--model=none", "--out=x.onnx"], "none is no model"),
        (_Bench, ["--model=none", "--onnx=none.onnx", "--data=x"], r"--onnx \(=none.onnx\) cannot be opened"),
        (_Bench, ["--model=none", "--onnx=x", "--data=x", "--threads=0"], "must be at least 1"),
    ],
)
def test_mistakes(module, flags, message, monkeypatch):
    with pytest.raises(UserError, match=message):
        command(monkeypatch, module, *flags)


def test_a_network_of_other_features_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    safetensors.numpy.save_file(originals.fill(originals.wespeaker_shapes([1, 1, 1, 1], 2, False, 24, 6)), path)
    with pytest.raises(UserError, match=r"takes 24 features a frame, and the front end .* gives 80"):
        command(monkeypatch, import_model, f"--source={path}", f"--out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["import_model", "export"])
def test_one_line_errors(name, monkeypatch, capsys):
    given = ["--source=nowhere", "--out=x"] if name == "import_model" else ["--model=nowhere", "--out=x"]
    assert commands.run(monkeypatch, name, *given) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "nowhere" in told
