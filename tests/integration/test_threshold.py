"""`kmq-jax threshold`, and `verify` by what it wrote, on a tiny network."""

import json

import jax
import numpy as np
import pytest
import soundfile
from commands import run

from kmq_jax.core.errors import UserError
from kmq_jax.core.progress import say_once
from kmq_jax.data import source
from kmq_jax.models import registry
from kmq_jax.models.speaker_model import SpeakerModel, fingerprint, load_model, save_model
from kmq_jax.scoring.threshold import Decider
from kmq_jax.speakers.store import SpeakerStore, threshold_of

SETTINGS = {"width": 4, "blocks": [1, 1, 1, 1], "embedding_size": 8}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """`one.kmq`, `two.kmq`, and `people`: recordings of 4 speakers, 3 of each."""
    directory = tmp_path_factory.mktemp("threshold")
    for name, seed in (("one", 0), ("two", 1)):
        variables = registry.initialize(registry.build("wespeaker_resnet34", **SETTINGS), jax.random.key(seed))
        model = SpeakerModel("wespeaker_resnet34", SETTINGS, "wespeaker", jax.device_get(variables))
        save_model(directory / f"{name}.kmq", model)
    spoken = source.open_source("synthetic:dev?speakers=4&utterances=3")
    for row in range(len(spoken)):
        file = directory / "people" / spoken.speakers[row] / f"{row}.wav"
        file.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(file, spoken.load(row), source.SAMPLE_RATE, subtype="FLOAT")
    return directory


@pytest.fixture(scope="module")
def file(place):
    with pytest.MonkeyPatch.context() as patch:
        flags = [f"--model={place}/one.kmq", f"--data={place}/people", f"--out={place}/threshold.json"]
        assert run(patch, "threshold", *flags, "--false_accept=0.2", "--replicates=100") == 0
    return place / "threshold.json"


def recordings(place):
    files = sorted((place / "people").rglob("*.wav"), key=lambda path: int(path.stem))
    return [f"--enrol={files[0]}", f"--test={files[-1]}"]


def test_the_file_holds_what_the_embeddings_tell(place, file):
    held = json.loads(file.read_text())
    model = load_model(place / "one.kmq")
    files = sorted((place / "people").rglob("*.wav"))
    rows = np.stack([model.embed(path) for path in files])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    owner = np.array([path.parent.name for path in files])
    one, two = np.triu_indices(len(files), 1)
    scores, same = (rows[one] * rows[two]).sum(axis=1), owner[one] == owner[two]
    accepted = scores >= held["threshold"] - 1e-5
    assert held["false_accept_rate"] == pytest.approx(accepted[~same].mean()) and held["false_accept_rate"] <= 0.2
    assert held["false_reject_rate"] == pytest.approx(1 - accepted[same].mean())
    assert held["fingerprint"] == fingerprint(model)
    counts = {"recordings": 12, "speakers": 4, "speaker_pairs": 6, "trials": 66}
    counts |= {"false_accept_rate_trials": 54, "false_reject_rate_trials": 12, "wanted_false_accept_rate": 0.2}
    assert {name: held[name] for name in counts} == counts
    for name in ("false_accept_rate", "false_reject_rate"):
        low, high = held[f"{name}_ci95"]
        assert 0 <= low <= held[name] <= high <= 1
    assert held["command"].startswith("kmq-jax threshold --model=")


def test_a_threshold_of_speech_alone_says_so_and_is_warned_of_elsewhere(place, file, tmp_path, monkeypatch, capsys):
    pytest.importorskip("webrtcvad")
    say_once.cache_clear()
    for path in sorted((place / "people").rglob("*.wav")):
        other = tmp_path / "people" / path.parent.name / path.name
        other.parent.mkdir(parents=True, exist_ok=True)
        wave = np.concatenate([np.tile(soundfile.read(path)[0], 2), np.zeros(source.SAMPLE_RATE)])
        soundfile.write(other, wave, source.SAMPLE_RATE, subtype="FLOAT")
    model, heard = f"--model={place}/one.kmq", tmp_path / "threshold.json"
    flags = [model, f"--data={tmp_path}/people", f"--out={heard}", "--vad", "--replicates=100", "--false_accept=0.2"]
    assert run(monkeypatch, "threshold", *flags) == 0
    assert "12 recordings: used " in capsys.readouterr().err
    assert json.loads(heard.read_text())["vad"] is True and json.loads(file.read_text())["vad"] is False
    for given, vad, warned in ((heard, True, ""), (file, False, ""), (heard, False, "without"), (file, True, "with")):
        flags = [model, *recordings(tmp_path), f"--threshold={given}", *(["--vad"] if vad else [])]
        assert run(monkeypatch, "verify", *flags) == 0
        said = [line for line in capsys.readouterr().err.splitlines() if "`threshold`" in line]
        then = "with" if warned == "without" else "without"
        wanted = f"warning: `threshold` was found {then} vad, now it is {warned}: its error rates are others"
        assert said == ([wanted] if warned else [])
    store = SpeakerStore(tmp_path / "s", place / "one.kmq", vad=True)
    say_once.cache_clear()
    threshold_of(str(file), store)
    assert "was found without vad, now it is with" in capsys.readouterr().err


def test_what_is_printed_says_how_little_few_speakers_tell(place, tmp_path, monkeypatch, capsys):
    flags = [f"--model={place}/one.kmq", f"--data={place}/people", "--replicates=100", f"--json={tmp_path}/t.json"]
    assert run(monkeypatch, "threshold", *flags, "--false_accept=0.15") == 0
    assert json.loads((tmp_path / "t.json").read_text())["false_accept_rate"] <= 0.15
    shown = capsys.readouterr()
    assert "12 recordings of 4 speakers" in shown.out and "12 more speakers would halve" in shown.out
    (told,) = (line for line in shown.err.splitlines() if line.startswith("warning"))
    # Six pairs at most: 1/6, and three over six.
    assert "4 speakers are too few for 15 % false accepts" in told and "rule of three" in told


def test_verify_decides_by_the_file_and_by_a_number(place, file, tmp_path, monkeypatch, capsys):
    flags = [f"--model={place}/one.kmq", *recordings(place), f"--json={tmp_path}/v.json"]
    assert run(monkeypatch, "verify", *flags, f"--threshold={file}") == 0
    line = capsys.readouterr().out.strip()
    held, found = (json.loads(path.read_text()) for path in (file, tmp_path / "v.json"))
    assert found["threshold"] == held["threshold"] and found["decision"] == (found["score"] >= held["threshold"])
    assert "\n" not in line and line.startswith("same speaker" if found["decision"] else "different speakers")
    assert "of different speakers are accepted" in line and "from 4 speakers" in line
    for number, decision in (("-1", True), ("1", False)):
        assert run(monkeypatch, "verify", *flags, f"--threshold={number}") == 0
        assert "accepted" not in capsys.readouterr().out
        assert json.loads((tmp_path / "v.json").read_text())["decision"] is decision


def test_verify_refuses_what_does_not_fit(place, file, tmp_path, monkeypatch, capsys):
    def refused(*flags):
        assert run(monkeypatch, "verify", *recordings(place), *flags) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    one, two = f"--model={place}/one.kmq", f"--model={place}/two.kmq"
    assert "--threshold was found with the model" in refused(two, f"--threshold={file}")
    assert "kmq-jax threshold --model=" in refused(one)
    assert "one of --cascade, --store and --model" in refused()
    assert "--threshold does not go with --cascade" in refused(f"--cascade={place}", "--threshold=0.5")
    assert "one of --cascade, --store and --model" in refused(one, f"--cascade={place}")
    bad = tmp_path / "bad.json"
    held = json.loads(file.read_text())
    for text, what in [
        ("{", "is not valid JSON"),
        ("[]", "does not hold a JSON object"),
        ("{}", "is no file of"),
        (json.dumps(held | {"false_accept_rate": 2}), "is damaged"),
        (json.dumps(held | {"false_reject_rate_ci95": [0]}), "is damaged"),
        (json.dumps(held | {"fingerprint": None}), "is damaged"),
        (json.dumps(held | {"threshold": True}), "is damaged"),
        (json.dumps(held | {"threshold": 10**400}), "is damaged"),
    ]:
        bad.write_text(text)
        line = refused(one, f"--threshold={bad}")
        assert "--threshold" in line and what in line and str(bad) in line
    assert "--threshold" in refused(one, f"--threshold={tmp_path}/absent.json")
    assert "(=nan) must be a finite number" in refused(one, "--threshold=nan")
    assert "(=55) must lie between -1 and 1" in refused(one, "--threshold=55")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ("synthetic:dev?speakers=1&utterances=4", "recordings of one speaker only"),
        ("synthetic:dev?speakers=4&utterances=1", "one recording a speaker only"),
        ("synthetic:dev?speakers=1001&utterances=3", "3003 recordings: all pairs are of at most 3000"),
    ],
)
def test_recordings_that_cannot_tell_are_refused_before_the_model_is_read(tmp_path, monkeypatch, capsys, data, what):
    out = tmp_path / "threshold.json"
    assert run(monkeypatch, "threshold", "--model=/nowhere", f"--data={data}", f"--out={out}") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"--data (={data})" in line and what in line and not out.exists()


@pytest.mark.parametrize("rate", ["0", "1", "-1", "nan", "a"])
def test_rates_that_are_none_are_refused(tmp_path, monkeypatch, capsys, rate):
    flags = ["--model=m", "--data=d", f"--out={tmp_path}/t.json", f"--false_accept={rate}"]
    assert run(monkeypatch, "threshold", *flags) == 2
    assert f"--false_accept (={rate}) must be" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_store_takes_a_threshold_of_its_own_model_alone(place, file, tmp_path):
    store = SpeakerStore(tmp_path, f"{place}/one.kmq")
    assert threshold_of(str(file), store).value == json.loads(file.read_text())["threshold"]
    assert (threshold_of("0.25", store), threshold_of(None, store)) == (Decider(0.25), None)
    with pytest.raises(UserError, match="`threshold` was found with the model .*, but the store's is"):
        threshold_of(str(file), SpeakerStore(tmp_path, f"{place}/two.kmq"))


def test_a_store_says_the_error_rates_of_the_file_and_among_all_who_are_enrolled(
    place, file, tmp_path, monkeypatch, capsys
):
    flags = [f"--store={tmp_path}/s", f"--threshold={file}"]
    first, own, _, second, _, other, *_ = sorted(map(str, place.glob("people/*/*.wav")))
    for name, recording in (("a", first), ("b", second)):
        enroll = [f"--store={tmp_path}/s", f"--model={place}/one.kmq", f"--speaker={name}", recording]
        assert run(monkeypatch, "enroll", *enroll) == 0
    capsys.readouterr()
    assert run(monkeypatch, "verify", *flags, "--speaker=a", own) == 0
    assert "of different speakers are accepted" in capsys.readouterr().out
    assert run(monkeypatch, "verify", flags[0], "--speaker=a", "--threshold=0.5", own) == 0
    assert "of different speakers" not in capsys.readouterr().out
    held = json.loads(file.read_text())
    one, (low, high) = held["false_accept_rate"], held["false_accept_rate_ci95"]
    assert run(monkeypatch, "identify", *flags, other, f"--json={tmp_path}/i.json") == 0
    out, found = capsys.readouterr().out, json.loads((tmp_path / "i.json").read_text())
    # Of two enrolled, neither accepts: independent errors multiply.
    assert found["false_accept_rate"] == pytest.approx(1 - (1 - one) ** 2)
    assert found["false_accept_rate_ci95"] == pytest.approx([1 - (1 - low) ** 2, 1 - (1 - high) ** 2])
    assert found["false_accept_rate_at_most"] == pytest.approx(min(1, 2 * high))
    assert f"accepted as one of 2 at a rate of about {found['false_accept_rate']:.4g} [" in out
    assert run(monkeypatch, "identify", *flags, other, "--false_accept=0.5", f"--json={tmp_path}/i.json") == 0
    found = json.loads((tmp_path / "i.json").read_text())
    assert found["false_accept_rate"] == 0.75 and found["false_accept_rate_ci95"] is None
