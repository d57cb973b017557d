"""What a model tells of itself: from the import on, through quantization, into what `summarize` prints."""

import hashlib
import json

import jax
import numpy as np
import pytest
from commands import run

from kmq_jax.core.errors import UserError
from kmq_jax.interop import pretrained
from kmq_jax.interop.assemble import Imported
from kmq_jax.models import artifact, registry
from kmq_jax.models.about import told
from kmq_jax.models.speaker_model import SpeakerModel, fingerprint, load_model, save_model

SETTINGS = {"width": 4, "blocks": [1, 1, 1, 1], "embedding_size": 8, "norm": "bias"}


@pytest.fixture(scope="module")
def model():
    variables = registry.initialize(registry.build("wespeaker_resnet34", **SETTINGS), jax.random.key(0))
    return SpeakerModel("wespeaker_resnet34", SETTINGS, "wespeaker", variables)


def test_an_import_notes_its_file_and_quantization_what_it_was_fitted_on(monkeypatch, capsys, model, tmp_path):
    source = tmp_path / "theirs.onnx"
    source.write_bytes(b"what is read of it is tested elsewhere")
    settings = {**SETTINGS, "features": 80}
    read = Imported("wespeaker_resnet34", settings, "wespeaker", model.variables)
    monkeypatch.setattr(pretrained, "read", lambda *given: read)
    flags = f"--source={source}", "--license=cc-by-4.0", f"--out={tmp_path}/m"
    assert run(monkeypatch, "import_model", *flags) == 0
    made = load_model(tmp_path / "m").about
    assert made["source"] == source.name and made["license"] == "cc-by-4.0" and made["made_by"].startswith("kmq_jax 0")
    assert made["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    flags = f"--model={tmp_path}/m", "--bits=4", "--unfitted", f"--out={tmp_path}/q.kmq"
    assert run(monkeypatch, "quantize", *flags) == 0
    assert load_model(tmp_path / "q.kmq").about == {**made, "fitted_on": "nothing"}
    capsys.readouterr()
    assert run(monkeypatch, "summarize", f"--model={tmp_path}/q.kmq", f"--json={tmp_path}/s.json") == 0
    printed = capsys.readouterr().out
    assert f"made from: {source.name}\n" in printed and "licence: cc-by-4.0\n" in printed
    assert "fitted on: nothing\n" in printed
    assert json.loads((tmp_path / "s.json").read_text())["about"]["license"] == "cc-by-4.0"


def test_a_file_without_it_is_as_it_was_and_it_changes_no_fingerprint(model, tmp_path):
    save_model(tmp_path / "a.kmq", model)
    assert set(artifact.load(tmp_path / "a.kmq")[0]) == {"architecture", "settings", "frontend"}
    assert load_model(tmp_path / "a.kmq").about == {}
    known = SpeakerModel("wespeaker_resnet34", SETTINGS, "wespeaker", model.variables, about={"source": "x"})
    save_model(tmp_path / "b.kmq", known)
    assert load_model(tmp_path / "b.kmq").about == {"source": "x"}
    assert fingerprint(load_model(tmp_path / "b.kmq")) == fingerprint(model)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("/home/alice/model.onnx", "model.onnx"),
        ("/Users/Alice/words/train", "words/train"),
        ("/export/home/alice", "~"),
        ("/home/alice/words, /net/homes/bob/more,synthetic:dev", "words,more,synthetic:dev"),
        ("/data/voxceleb/train", "voxceleb/train"),
        ("data/home/train", "data/home/train"),
    ],
)
def test_nobodys_home_is_told(place, expected):
    assert told(place) == expected


@pytest.mark.parametrize(
    "about",
    [
        *([], "x", {"source": 3}, {"source": {"a": "b"}}, {"source": "x" * 3000}, {"x" * 3000: "y"}),
        {"metrics": {"eer": 10**400}},
        *({"metrics": 2}, {"metrics": {"eer": "2"}}, {"metrics": {"eer": True}}, {str(i): "x" for i in range(300)}),
    ],
)
def test_what_is_no_description_is_refused(model, tmp_path, about):
    manifest = {"architecture": "wespeaker_resnet34", "settings": SETTINGS, "frontend": "wespeaker", "about": about}
    artifact.save(tmp_path / "a.kmq", manifest, jax.tree.map(np.asarray, model.variables))
    with pytest.raises(UserError, match="`about`"):
        load_model(tmp_path / "a.kmq")


def test_a_terminal_is_not_steered(model, tmp_path, monkeypatch, capsys):
    known = SpeakerModel(
        "wespeaker_resnet34", SETTINGS, "wespeaker", model.variables, about={"source": "\x1b]0;x\x07a\nb"}
    )
    save_model(tmp_path / "a.kmq", known)
    assert run(monkeypatch, "summarize", f"--model={tmp_path}/a.kmq") == 0
    assert "made from: ?]0;x?a?b\n" in capsys.readouterr().out
