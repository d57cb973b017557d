"""onnxruntime-web from a stand-in for npm's registry, good and hostile; nothing here uses the network."""

import base64
import hashlib
import http.server
import io
import os
import tarfile
import threading

import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.demo import runtime

GOOD = {name: name.encode() * 100 for name in runtime.FILES}


def package(files=GOOD, folder="package/dist", links=()):
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for name, target in links:
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    return made.getvalue()


def hash_of(data):
    return base64.b64encode(hashlib.sha512(data).digest()).decode()


@pytest.fixture
def registry(monkeypatch, tmp_path):
    """Serves whatever `held["data"]` is, and notes what was asked for."""
    held = {"data": package(), "asked": []}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            held["asked"].append(self.path)
            self.send_response(200 if held["data"] else 404)
            self.send_header("Content-Length", str(len(held["data"])))
            self.end_headers()
            self.wfile.write(held["data"])

        def log_message(self, *words):
            pass

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{running.server_port}")
        yield held
        running.shutdown()


def test_files_are_downloaded_once_and_kept(registry, monkeypatch, tmp_path):
    monkeypatch.setattr(runtime.download, "__defaults__", (hash_of(registry["data"]), 1 << 20))
    assert runtime.runtime_files() == GOOD
    assert runtime.runtime_files() == GOOD
    assert registry["asked"] == [f"/onnxruntime-web/-/onnxruntime-web-{runtime.VERSION}.tgz"]
    kept = tmp_path / "cache" / "kmq_jax" / f"onnxruntime-web-{runtime.VERSION}"
    assert sorted(file.name for file in kept.iterdir()) == sorted(runtime.FILES)


def test_a_registry_may_end_in_a_slash(registry, monkeypatch):
    monkeypatch.setenv("npm_config_registry", f"{os.getenv(runtime._REGISTRY_SET)}/npm/")
    runtime.download(hash_of(registry["data"]))
    assert registry["asked"] == [f"/npm/onnxruntime-web/-/onnxruntime-web-{runtime.VERSION}.tgz"]


def test_another_package_is_refused_and_nothing_is_kept(registry, tmp_path):
    with pytest.raises(UserError, match="not the package that is expected: its SHA-512 is another"):
        runtime.runtime_files()
    assert not (tmp_path / "cache").exists()


def test_a_package_that_never_ends_is_refused(registry):
    with pytest.raises(UserError, match="larger than 100 bytes"):
        runtime.download(hash_of(registry["data"]), largest=100)


def test_a_registry_that_has_none_or_is_out_of_reach_is_told_with_what_to_do(registry, monkeypatch):
    registry["data"] = b""
    with pytest.raises(UserError, match=r"cannot download http://.*: Not Found; without network: `runtime`"):
        runtime.download()
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:1")
    with pytest.raises(UserError, match=r"cannot download .*: .*refused; without network: `runtime`, .*npm pack"):
        runtime.download()
    monkeypatch.setenv("npm_config_registry", "file:///etc")
    with pytest.raises(UserError, match="must begin with https"):
        runtime.download()


def test_a_package_or_its_directory_may_be_given(tmp_path):
    (tmp_path / "a.tgz").write_bytes(package())
    assert runtime.runtime_files(tmp_path / "a.tgz") == GOOD
    for place in (tmp_path / "one", tmp_path / "two" / "dist", tmp_path / "three" / "package" / "dist"):
        place.mkdir(parents=True)
        for name, data in GOOD.items():
            (place / name).write_bytes(data)
        assert runtime.runtime_files(tmp_path / place.relative_to(tmp_path).parts[0]) == GOOD
    with pytest.raises(UserError, match="holds no onnxruntime-web"):
        runtime.runtime_files(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"not gzip", "is no package of npm"),
        (package()[:200], "is no package of npm"),
        (package({"ort.wasm.min.mjs": b"x"}), "lacks package/dist/ort-wasm-simd-threaded.mjs"),
        (package(folder="package/other"), "lacks package/dist/ort.wasm.min.mjs"),
        (package(folder="../../package/dist"), "lacks package/dist/ort.wasm.min.mjs"),
        (package(folder="/package/dist"), "lacks package/dist/ort.wasm.min.mjs"),
        (package({}, links=[("ort.wasm.min.mjs", "/etc/passwd")]), "ort.wasm.min.mjs is no file"),
    ],
)
def test_other_archives_are_refused(tmp_path, data, message):
    (tmp_path / "a.tgz").write_bytes(data)
    with pytest.raises(UserError, match=message):
        runtime.runtime_files(tmp_path / "a.tgz")


def test_what_unpacks_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "_UNPACKED", 1 << 16)
    (tmp_path / "a.tgz").write_bytes(package({**GOOD, "bomb": bytes(1 << 20)}))
    with pytest.raises(UserError, match="unpacks to more than 65,536 bytes"):
        runtime.runtime_files(tmp_path / "a.tgz")


def test_names_that_lead_out_write_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tgz").write_bytes(package({**GOOD, "../../../escaped": b"x"}))
    assert runtime.runtime_files(tmp_path / "in" / "a.tgz") == GOOD
    assert [place.name for place in tmp_path.rglob("*")] == ["in", "a.tgz"]
