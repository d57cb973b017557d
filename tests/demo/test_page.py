"""The page in a real browser beside Python, with files and with a microphone; and its directory and server."""

import http.client
import io
import json
import os
import signal
import threading
import time
import urllib.request
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
from browser import browser
from commands import run

from kmq_jax import quant
from kmq_jax.cascade.policy import CascadePolicy
from kmq_jax.cascade.verifier import load_cascade, save_cascade
from kmq_jax.core.errors import UserError
from kmq_jax.data import synthetic
from kmq_jax.demo import page as pages
from kmq_jax.demo.runtime import FILES, runtime_files
from kmq_jax.demo.serve import own_hosts, serve, server
from kmq_jax.interop.export import export_model
from kmq_jax.metrics.calibration import AffineMap, IsotonicMap
from kmq_jax.models import registry
from kmq_jax.models.speaker_model import SpeakerModel, fingerprint, load_model, save_model
from kmq_jax.scoring.threshold import decide, read_threshold

SETTINGS = {"width": 4, "blocks": [1, 1, 1, 1], "embedding_size": 8, "norm": "bias"}
RATE = 16000


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny network in full precision and at 2 bits, a cascade of both, and recordings that it tells apart."""
    place = tmp_path_factory.mktemp("demo")
    variables = registry.initialize(registry.build("wespeaker_resnet34", **SETTINGS), jax.random.key(3))
    save_model(place / "32.kmq", SpeakerModel("wespeaker_resnet34", SETTINGS, "wespeaker", variables))
    packed = {**variables, "params": quant.quantize_params(variables["params"], bits=2)}
    save_model(place / "2.kmq", SpeakerModel("wespeaker_resnet34", SETTINGS, "wespeaker", packed))
    rng = np.random.default_rng(0)
    time_axis = np.arange(2 * RATE) / RATE
    sounds = {
        "a": np.sin(2 * np.pi * 200 * time_axis) * (np.sin(9 * time_axis) > 0) + 0.01 * rng.normal(size=2 * RATE),
        "b": np.sin(2 * np.pi * 900 * time_axis * time_axis) + 0.01 * rng.normal(size=2 * RATE),
        "c": np.cumsum(rng.normal(size=3 * RATE)),
        "d": rng.normal(size=2 * RATE),
    }
    for name, wave in sounds.items():
        soundfile.write(place / f"{name}.wav", 0.5 * wave / np.abs(wave).max(), RATE, subtype="PCM_16")
    voice = synthetic.open_synthetic("synthetic:dev").load(0)
    soundfile.write(place / "voice.wav", voice, RATE, subtype="PCM_16")
    both = np.stack([voice, np.roll(voice, 50)], axis=1)
    soundfile.write(place / "stereo.wav", both, RATE, subtype="FLOAT")
    smooth = np.convolve(rng.normal(size=3 * 44100), np.hanning(40), "same")
    soundfile.write(place / "rate.wav", 0.5 * smooth / np.abs(smooth).max(), 44100)
    soundfile.write(place / "silent.wav", np.zeros(RATE), RATE)
    soundfile.write(place / "short.wav", voice[:800], RATE)
    soundfile.write(place / "loud.wav", 30000 * voice, RATE, subtype="FLOAT")
    clipped = np.clip(2 * np.sin(2 * np.pi * 900 * time_axis * time_axis), -1, 1)
    soundfile.write(place / "clipped.ogg", clipped, RATE)  # a third of what it decodes to lies beyond full scale
    soundfile.write(place / "beyond.wav", 1.2 * clipped, RATE, subtype="FLOAT")
    return place


@pytest.fixture(scope="module")
def runtime():
    try:
        return runtime_files()
    except UserError as error:
        pytest.skip(f"no onnxruntime-web: {error}")


def served(out):
    running = server(out)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    return running, f"http://127.0.0.1:{running.server_port}/"


def score_of(tab, row):
    return float(tab.wait(f"document.querySelectorAll('#test .verdict')[{row}]?.dataset.score"))


def test_the_page_decides_as_python_does(place, runtime, tmp_path):
    threshold = read_threshold("0.9")
    pages.write_demo(tmp_path / "site", pages.demo_of_model(place / "2.kmq", threshold), runtime)
    running, address = served(tmp_path / "site")
    enrolled, tested = [place / "a.wav", place / "stereo.wav"], [place / f"{name}.wav" for name in "bcd"]
    expected = [decide(place / "2.kmq", enrolled, test, threshold) for test in tested]
    assert np.ptp([one.score for one in expected]) > 0.02  # else any page would do
    fake = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
    with browser(tmp_path / "home", *fake, f"--use-file-for-fake-audio-capture={place}/voice.wav") as tab, running:
        tab.open(address)
        tab.give("#enrol input", *enrolled)
        tab.give("#test input", *tested)
        for row, one in enumerate(expected):
            assert score_of(tab, row) == pytest.approx(one.score, abs=1e-3)
            said = tab.do(f"document.querySelectorAll('#test .verdict')[{row}].innerText")
            assert said.startswith("Same speaker\n" if one.decision else "Different speakers\n")
            assert "threshold 0.9000; decided at 2 bits in" in said
        other = decide(place / "2.kmq", enrolled, place / "rate.wav", threshold).score
        tab.give("#test input", place / "rate.wav")
        assert score_of(tab, 3) == pytest.approx(other, abs=0.02)
        assert "3.0 s; resampled from 44100 Hz to 16 kHz; embedded in" in tab.text()
        tab.do("[...document.querySelectorAll('#test .remove')].at(-1).click()")
        assert "mean of 2 channels" in tab.text() and "resampled" not in tab.text()

        other = decide(place / "2.kmq", enrolled, place / "clipped.ogg", threshold).score
        tab.give("#test input", place / "clipped.ogg")
        assert score_of(tab, 3) == pytest.approx(other, abs=0.02)
        assert "2.0 s; decoded by the browser to 16 kHz; clipped to full scale" in tab.text()
        tab.do("[...document.querySelectorAll('#test .remove')].at(-1).click()")

        whole = "where full scale is 1"
        for name, why in (("silent", "silent"), ("short", "too short (0.05 s)"), ("loud", whole), ("beyond", whole)):
            tab.give("#test input", place / f"{name}.wav")
            told = json.dumps(f"{name}.wav: "), json.dumps(why)
            tab.wait(" && ".join(f"document.getElementById('error').textContent.includes({part})" for part in told))

        recorded = microphone(tab, tmp_path)
        sound, rate = soundfile.read(io.BytesIO(recorded.read_bytes()))
        assert rate == RATE and len(sound) > RATE / 2 and sound.std() > 1e-3
        alike = decide(place / "2.kmq", enrolled, recorded, threshold).score
        assert score_of(tab, 3) == pytest.approx(alike, abs=1e-3)

        for width in (390, 1280):
            tab.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
            assert tab.do("document.documentElement.scrollWidth") <= width
        asked = {
            event["params"]["request"]["url"] for event in tab.events if event["method"] == "Network.requestWillBeSent"
        }
        assert {url for url in asked if not url.startswith((address, "data:", f"blob:{address}"))} == set()
        assert not [event for event in tab.events if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
        # The policy of the page, not the absence of a network, keeps it from telling anyone.
        refused = (
            "new Promise(done => addEventListener('securitypolicyviolation', event => done(event.effectiveDirective)))"
        )
        assert (
            tab.do(
                f"(() => {{ const told = {refused}; fetch('http://127.0.0.1:1/').catch(() => {{}}); return told; }})()"
            )
            == "connect-src"
        )
        running.shutdown()


def microphone(tab, folder):
    """Records a second with the microphone, and saves what was recorded as a user would."""
    tab.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    tab.do("document.querySelector('#test .record').click()")
    tab.wait("document.querySelector('#test .live output').textContent.includes('1.')")
    tab.do("document.querySelector('#test .record').click()")
    score_of(tab, 3)
    tab.do("[...document.querySelectorAll('#test .save')].at(-1).click()")
    saved = folder / "recording 1.wav"
    end = time.monotonic() + 20
    while not saved.is_file():
        assert time.monotonic() < end, "the recording was not saved"
        time.sleep(0.05)
    return saved


def test_the_page_climbs_a_cascade_as_python_does_and_tells_of_a_denied_microphone(place, runtime, tmp_path):
    # The enrolled side is the last level's; the gate of the first holds the score in the middle, and no other.
    enrolled = load_model(place / "32.kmq").embed(place / "a.wav")
    tested = load_model(place / "2.kmq").embed([place / f"{name}.wav" for name in "bcd"])
    own = tested @ enrolled / np.linalg.norm(tested, axis=1) / np.linalg.norm(enrolled)
    low, middle, high = sorted(own.tolist())
    straight = AffineMap(0.5, 0.1)  # the gate holds the one in the middle
    knots = np.array([-0.5, 0.5, 0.9])
    gate = tuple(0.5 * (middle + side) / 2 + 0.1 for side in (low, high))
    marks = fingerprint(load_model(place / "2.kmq")), fingerprint(load_model(place / "32.kmq"))
    policy = CascadePolicy(
        (2, 32), (straight, IsotonicMap(knots, knots**3)), (gate,), 0.5 * middle + 0.1, enrolment="top", models=marks
    )
    save_cascade(tmp_path / "cascade", policy, {2: str(place / "2.kmq"), 32: str(place / "32.kmq")})
    cascade = load_cascade(tmp_path / "cascade")
    expected = [cascade.verify([place / "a.wav"], place / f"{name}.wav") for name in "bcd"]
    assert {one.bits for one in expected} == {2, 32}
    pages.write_demo(tmp_path / "site", pages.demo_of_cascade(tmp_path / "cascade"), runtime)
    running, address = served(tmp_path / "site")
    first = tmp_path / "site" / "model-2.onnx"
    kept = first.rename(tmp_path / "kept")
    with browser(tmp_path / "home", "--deny-permission-prompts") as tab, running:
        tab.open(address)
        tab.give("#test input", place / "b.wav")
        tab.give("#enrol input", place / "a.wav")
        tab.wait("document.getElementById('error').textContent.includes('the model cannot be opened')")
        kept.rename(first)  # a recording that found no model is embedded once there is one
        tab.give("#test input", *(place / f"{name}.wav" for name in "cd"))
        for row, one in enumerate(expected):
            assert score_of(tab, row) == pytest.approx(one.score, abs=1e-3)
            assert f"at {one.bits} bits" in tab.do(f"document.querySelectorAll('#test .verdict')[{row}].innerText")
        tab.do("document.querySelector('#enrol .record').click()")
        tab.wait("/microphone/.test(document.getElementById('error').textContent)")
        running.shutdown()


@pytest.fixture
def stand_in(tmp_path):
    """A directory with files of onnxruntime-web's names."""
    for name in FILES:
        (tmp_path / "ort" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "ort" / name).write_text("//")
    return f"--runtime={tmp_path}/ort"


def test_the_command_writes_a_page_of_a_model_or_of_an_exported_file(monkeypatch, capsys, place, tmp_path, stand_in):
    export_model(place / "2.kmq", tmp_path / "2.onnx", features_inside=True)
    for model in (place / "2.kmq", tmp_path / "2.onnx"):
        out = tmp_path / model.name
        assert run(monkeypatch, "demo", f"--model={model}", "--threshold=0.5", stand_in, f"--out={out}.site") == 0
        site = Path(f"{out}.site")
        assert {file.name for file in site.iterdir()} == {
            "index.html", "demo.js", "demo.css", "recorder.js", "model.onnx", "ort"
        }  # fmt: skip
        text = (site / "index.html").read_text()
        settings = json.loads(text.split('type="application/json">')[1].split("</script>")[0])
        assert settings["levels"] == [{"file": "model.onnx", "bits": "2", "map": None, "gate": None}]
        assert settings["threshold"] == 0.5
        assert "onnx" not in capsys.readouterr().err


def test_mistakes_are_one_line(monkeypatch, capsys, place, tmp_path, stand_in):
    export_model(place / "2.kmq", tmp_path / "outside.onnx")
    export_model(place / "2.kmq", tmp_path / "inside.onnx", features_inside=True)
    (tmp_path / "bad.onnx").write_bytes(b"\xff\xff")
    other = {"kind": "threshold", "version": 2, "threshold": 0.5, "speakers": 3, "fingerprint": "another"}
    for name in ("false_accept_rate", "false_reject_rate"):
        other |= {name: 0.1, f"{name}_ci95": [0, 1], f"{name}_trials": 9, f"{name}_units": 9}
    (tmp_path / "t.json").write_text(json.dumps(other))
    inside = f"--model={tmp_path}/inside.onnx"
    for flags, message in (
        (
            [f"--model={tmp_path}/outside.onnx"],
            "takes feats, not a wave: use a file of kmq-jax export --features=inside",
        ),
        ([f"--model={tmp_path}/bad.onnx"], "is no ONNX file"),
        ([f"--model={tmp_path}/none.onnx"], "cannot read"),
        ([inside, "--bits=2"], "--bits does not go with"),
        ([inside, f"--threshold={tmp_path}/t.json"], "--threshold was found with the model another, but"),
        ([inside, "--cascade=x"], "one of --cascade and --model must be given"),
        ([], "one of --cascade and --model must be given"),
    ):
        assert run(monkeypatch, "demo", *flags, stand_in, f"--out={tmp_path}/site") == 2
        told = capsys.readouterr().err
        assert message in told and told.count("\n") == 1, told
        assert not (tmp_path / "site").exists()


def test_serving_ends_when_it_is_told_to_and_leaves_nothing(tmp_path):
    seen = {}

    def write(out):
        seen["place"] = out
        (out / "index.html").write_text("a page")

    def visit(address):
        with urllib.request.urlopen(address) as answer:
            seen["page"] = answer.read()
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    tell = lambda line: threading.Thread(target=visit, args=(line.split()[0],), daemon=True).start()  # noqa: E731
    serve(write, 0, tell)
    assert seen["page"] == b"a page" and not seen["place"].exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_usual_port_goes_without_saying():
    assert own_hosts(80) == {"127.0.0.1", "localhost", "127.0.0.1:80", "localhost:80"}
    assert own_hosts(8000) == {"127.0.0.1:8000", "localhost:8000"}


def test_the_server_answers_its_own_origin_alone(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "a.mjs").write_text("//")
    (tmp_path / "secret").write_text("x")
    running, _ = served(tmp_path / "site")
    port = running.server_port

    def ask(path, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        connection.close()
        return answer

    with running:
        assert running.server_address[0] == "127.0.0.1"
        found = ask("/a.mjs")
        assert found.status == 200 and found.getheader("Content-Type") == "text/javascript"
        assert found.getheader("Cross-Origin-Opener-Policy") == "same-origin"
        assert "frame-ancestors 'none'" in found.getheader("Content-Security-Policy")
        assert ask("/a.mjs", Host=f"localhost:{port}").status == 200
        assert ask("/a.mjs", Host=f"evil.example:{port}").status == 403
        assert ask("/").status == 404  # no list of files
        assert ask("/../secret").status == 404
        with pytest.raises(UserError, match=f"`port` \\(={port}\\): .*in use"):
            server(tmp_path, port)
        running.shutdown()
