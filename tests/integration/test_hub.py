"""Models to and from a stand-in for the Hugging Face Hub on this machine, by the real library where it downloads."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from commands import run

from kmq_jax.core import hub
from kmq_jax.core.errors import UserError
from kmq_jax.models import registry
from kmq_jax.models.speaker_model import SpeakerModel, fingerprint, load_model, save_model

COMMIT = "c" * 40


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A packed model, as the Hub holds it."""
    variables = registry.initialize(registry.build("wespeaker_resnet34", width=4), jax.random.key(0))
    path = tmp_path_factory.mktemp("model") / "model.kmq"
    save_model(path, SpeakerModel("wespeaker_resnet34", {"width": 4}, "wespeaker", variables))
    return path


@pytest.fixture
def server(file):
    """Serves `me/tiny` as the Hub does: a file's address tells its commit and hash."""
    held = file.read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        asked: list[str] = []

        def do_HEAD(self):
            self.answer(False)

        def do_GET(self):
            self.answer(True)

        def answer(self, whole):
            self.asked.append(self.path)
            there = self.path in ("/me/tiny/resolve/main/model.kmq", f"/me/tiny/resolve/{COMMIT}/model.kmq")
            self.send_response(200 if there else 404)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(held).hexdigest()}"')
            if not there:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", str(len(held) if there else 0))
            self.end_headers()
            if whole and there:
                self.wfile.write(held)

        def log_message(self, *words):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running, Handler.asked
        running.shutdown()


def test_a_model_is_fetched_once_and_is_the_same(server, file, tmp_path):
    running, asked = server
    code = """if True:
        import sys
        from kmq_jax.core.errors import UserError
        from kmq_jax.core.hub import fetch
        from kmq_jax.models.speaker_model import fingerprint, load_model
        print(fingerprint(load_model("hf://me/tiny")))
        print(fetch(f"hf://me/tiny@main/model.kmq").read_bytes() == open(sys.argv[1], "rb").read())
        try:
            fetch("hf://me/tiny/absent.kmq")
        except UserError as error:
            print(error)
    """
    more = {
        "HF_ENDPOINT": f"http://127.0.0.1:{running.server_port}",
        "HF_HOME": str(tmp_path),
        "HF_HUB_DISABLE_XET": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], env={**os.environ, **more}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    own, same, absent = done.stdout.strip().splitlines()
    assert own == fingerprint(load_model(file)) and same == "True"
    assert absent.startswith("hf://me/tiny: ") and "absent.kmq" in absent
    assert all(path.endswith(".kmq") for path in asked if path.startswith("/me/"))


@pytest.mark.parametrize(
    "text", ["hf://name", "hf://org/name/config.json", "hf://a/b/c.kmq/../../x", "hf:///etc/passwd"]
)
def test_other_places_are_refused(text):
    with pytest.raises(UserError, match="must be hf://ORG/NAME"):
        hub.fetch(text)


def test_a_path_with_one_slash_is_the_same_place(monkeypatch, file):
    """Options that are paths make one slash of two."""
    seen = []
    stand_in = SimpleNamespace(hf_hub_download=lambda *words, **more: seen.append((*words, more)) or str(file))
    monkeypatch.setattr(hub, "library", lambda: stand_in)
    for place in ("hf://me/tiny", Path("hf://me/tiny"), "hf://me/tiny@v1/sub/two.kmq"):
        assert load_model(place).architecture == "wespeaker_resnet34"
    assert seen[0] == seen[1] == ("me/tiny", "model.kmq", {"revision": None})
    assert seen[2] == ("me/tiny", "sub/two.kmq", {"revision": "v1"})


def test_without_the_library_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r'pip install "kmq_jax\[hub\]"'):
        hub.fetch("hf://me/tiny")


def test_a_model_and_its_card_are_pushed_as_one_commit(monkeypatch, file, tmp_path, capsys):
    import huggingface_hub

    calls = []

    class Api:
        def create_repo(self, repo, private, exist_ok):
            calls.append(("repo", repo, private, exist_ok))

        def create_commit(self, repo, operations, commit_message):
            if repo == "me/closed":
                raise OSError("401 Client Error:\n  Invalid user token")
            held = {one.path_in_repo: one.path_or_fileobj for one in operations}
            calls.append(held | {"loaded": load_model(held["model.kmq"])})
            return SimpleNamespace(commit_url=f"https://hub/{repo}/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    (tmp_path / "m.json").write_text(json.dumps({"eer": 2.5, "min_dcf": 0.25, "eer_ci95": [1.0, 2.0]}))
    flags = [f"--model={file}", "--license=cc-by-4.0", "--source=made by a test", f"--metrics={tmp_path}/m.json"]
    assert run(monkeypatch, "push", *flags, "--repo=me/tiny", "--private") == 0
    assert capsys.readouterr().out == "https://hub/me/tiny/commit/1\n"
    assert calls[0] == ("repo", "me/tiny", True, True)
    told = {"license": "cc-by-4.0", "source": "made by a test", "metrics": {"eer": 2.5, "min_dcf": 0.25}}
    assert calls[1]["loaded"].about == told and fingerprint(calls[1]["loaded"]) == fingerprint(load_model(file))
    text = calls[1]["README.md"].decode()
    assert text.startswith("---\nlicense: cc-by-4.0\nlibrary_name: kmq_jax\n") and "made by a test" in text
    assert "| eer | 2.5 |" in text and 'kmq_jax.load("hf://me/tiny")' in text
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(load_model(file).variables["params"]))
    assert f"| parameters | {size:,} |" in text
    assert run(monkeypatch, "push", *flags, "--repo=me/closed") == 2
    assert capsys.readouterr().err == "kmq-jax push: hf://me/closed: 401 Client Error: Invalid user token\n"
    del calls[:]
    assert run(monkeypatch, "push", *flags, "--repo=me/tiny", f"--card={tmp_path}/card.md") == 0
    assert (tmp_path / "card.md").read_text() == text and not calls
    # A file that tells all this of itself needs no flags.
    assert run(monkeypatch, "push", *flags, "--repo=me/tiny", f"--out={tmp_path}/told.kmq") == 0
    assert run(monkeypatch, "push", f"--model={tmp_path}/told.kmq", "--repo=me/tiny") == 0
    assert calls[1]["README.md"].decode() == text and calls[1]["loaded"].about == told


def test_a_card_needs_a_licence_and_a_source_and_says_nothing_else_by_them(monkeypatch, file, tmp_path, capsys):
    card = f"--card={tmp_path}/card.md", "--repo=me/tiny", f"--model={file}"
    assert run(monkeypatch, "push", *card, "--source=x") == 2
    assert capsys.readouterr().err == "kmq-jax push: --license must be given: the model does not tell it\n"
    assert run(monkeypatch, "push", *card, "--license=mit") == 2
    assert "--source must be given" in capsys.readouterr().err
    assert run(monkeypatch, "push", *card, "--license=mit\ntags: x", "--source=x") == 2
    assert "must be a short name such as cc-by-4.0" in capsys.readouterr().err
    assert run(monkeypatch, "push", *card, "--license=mit", "--source=<script>\n---\n| x") == 0
    assert "- Source: &lt;script&gt;?---?\\| x\n" in (tmp_path / "card.md").read_text()
