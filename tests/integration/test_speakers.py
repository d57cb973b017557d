"""The commands of a store of speakers: enroll, verify, identify, speakers."""

import json
import re
import shlex
from pathlib import Path

import jax
import pytest
from commands import arrays_of, run
from recordings import tone, write

from kmq_jax.models import registry
from kmq_jax.models.speaker_model import SpeakerModel, save_model

SETTINGS = {"width": 4, "blocks": [1, 1, 1, 1], "embedding_size": 8}
README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory, with what the README's block names."""
    for key, name in enumerate(("r34-4bit", "r34-2bit")):
        variables = registry.initialize(registry.build("wespeaker_resnet34", **SETTINGS), jax.random.key(key))
        model = SpeakerModel("wespeaker_resnet34", SETTINGS, "wespeaker", jax.device_get(variables))
        save_model(tmp_path / "runs" / f"{name}.kmq", model)
    for i, name in enumerate(("alice1", "alice2", "unknown", "bob")):
        write(tmp_path / f"{name}.wav", tone(hertz=150 + 100 * i, seed=i))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readmes_block_runs_as_printed(place, monkeypatch, capsys):
    section = README.read_text().split("\n## Enrolled speakers\n")[1].split("\n## ")[0]
    assert len(section.splitlines()) <= 20
    (block,) = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    for line in block.splitlines():
        program, *words = shlex.split(line, comments=True)
        assert program == "kmq-jax" and run(monkeypatch, *words) == 0, line
    out = capsys.readouterr().out
    assert "alice: recordings: 2, 2.0 s" in out and "recordings embedded with runs/r34-2bit.kmq: 2" in out
    assert re.search(r"^alice +2 +2\.0 +\d{4}-\d\d-\d\d \d\d:\d\d$", out, re.MULTILINE)
    assert re.search(r"^alice: (accepted|rejected), score -?\d\.\d{4}", out, re.MULTILINE)


def test_identify_tells_what_is_known_and_no_more(place, monkeypatch, capsys):
    for name in ("alice1", "alice2", "bob"):
        assert (
            run(monkeypatch, "enroll", "--store=s", "--model=runs/r34-4bit.kmq", f"--speaker={name}", f"{name}.wav")
            == 0
        )
    capsys.readouterr()
    assert run(monkeypatch, "identify", "--store=s", "bob.wav", "--top=2", "--json=i.json") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["1.0000", "bob"] and len(out) == 3 and "nothing is decided among 3 speakers" in out[2]
    found = json.loads((place / "i.json").read_text())
    assert found["speakers"] == 3 and found["false_accept_rate"] is None and len(found["ranking"]) == 2
    assert found["speaker"] == found["ranking"][0]["speaker"] == "bob" and found["accepted"] is None
    flags = ["--store=s", "bob.wav", "--threshold=1", "--false_accept=0.5", "--json=i.json"]
    assert run(monkeypatch, "identify", *flags) == 0
    out = capsys.readouterr().out
    assert "about 0.875 if comparisons err independently, of at most 1 in any case" in out
    found = json.loads((place / "i.json").read_text())
    assert found["false_accept_rate"] == pytest.approx(7 / 8) and found["score"] == pytest.approx(1)
    assert run(monkeypatch, "identify", "--store=s", "bob.wav", "--threshold=0.9", "--json=i.json") == 0
    assert json.loads((place / "i.json").read_text())["accepted"] is True
    assert run(monkeypatch, "speakers", "--store=s", "--remove=bob") == 0
    assert "bob is removed; recordings: 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, line",
    [
        ("enroll --store=s --speaker=alice alice1.wav", "--model must be given: s does not know where its model lies"),
        ("enroll --store=s --model=runs/r34-4bit.kmq alice1.wav", "--speaker and at least one RECORDING must be given"),
        (
            "enroll --store=s --model=runs/r34-4bit.kmq --speaker=a",
            "--speaker and at least one RECORDING must be given",
        ),
        ("enroll --store=s --model=runs/r34-4bit.kmq --speaker=a no.wav", "no.wav: missing"),
        ("enroll --store=s --again", "--again needs --model"),
        ("enroll --store=s --again --model=m --speaker=a", "--again embeds all recordings of the store: it takes"),
        ("enroll --store=s --bits=2 --speaker=a alice1.wav", "--bits needs --model"),
        ("enroll --store=bob.wav --speaker=a alice1.wav", "--store (=bob.wav) cannot be written: Not a directory"),
        ("speakers --store=s", "s holds no speakers yet: enroll them first"),
        ("identify --store=s bob.wav", "s holds no speakers yet: enroll them first"),
        (
            "identify --store=s bob.wav --false_accept=0.1",
            "--false_accept is a rate at a threshold: give --threshold, too",
        ),
        ("identify --store=s", "the following arguments are required: RECORDING (see --help)"),
        ("verify --store=s --speaker=a --test=bob.wav", "s holds no speakers yet: enroll them first"),
        ("verify --store=s --speaker=a bob.wav --test=bob.wav", "--test does not go with --store"),
        ("verify --store=s --speaker=a bob.wav", "s holds no speakers yet: enroll them first"),
        ("verify --store=s bob.wav", "--speaker must be given with --store"),
        ("verify --store=s --speaker=a", "RECORDING must be given with --store"),
        ("verify --store=s --speaker=a bob.wav --enrol=bob.wav", "--enrol does not go with --store"),
        ("verify --store=s --speaker=a bob.wav --compute=bfloat16", "--compute does not go with --store"),
        ("verify --cascade=s --enrol=bob.wav --test=bob.wav --threshold=0.1", "--threshold does not go with --cascade"),
        ("verify --cascade=s --test=bob.wav", "--enrol must be given with --cascade"),
        ("verify --cascade=s --enrol=bob.wav --test=bob.wav --bits=2", "--bits does not go with --cascade"),
        ("verify --store=s --speaker=a bob.wav --bits=2", "--bits needs --model"),
        ("identify --store=s bob.wav --bits=2", "--bits needs --model"),
        ("verify --store=s --cascade=s", "one of --cascade, --store and --model must be given"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(place, monkeypatch, capsys, words, line):
    before = sorted(place.rglob("*"))
    command, *flags = words.split()
    assert run(monkeypatch, command, *flags) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"kmq-jax {command}: {line}") and said.count("\n") == 1
    assert sorted(place.rglob("*")) == before


def test_speech_alone_of_long_recordings(place, monkeypatch, capsys):
    pytest.importorskip("webrtcvad")
    import numpy as np

    from kmq_jax.data import source

    table = source.open_source("synthetic:dev?speakers=2&utterances=2")
    (place / "DATA" / "x").mkdir(parents=True)
    for row, name in enumerate(("a1", "a2", "b1", "b2")):
        speech = np.concatenate([table.load(row)] * 8)
        write(place / "DATA" / "x" / f"{name}.wav", np.concatenate([speech, np.zeros(60 * 16000, np.float32)]))
    model, a1, a2 = "--model=runs/r34-4bit.kmq", "DATA/x/a1.wav", "DATA/x/a2.wav"
    said = {}
    for command in (
        ("enroll", "--store=s", model, "--speaker=a", "--vad", a1),
        ("verify", "--store=s", "--speaker=a", "--vad", "--threshold=0.5", a2),
        ("identify", "--store=s", "--vad", a2),
        ("verify", model, f"--enrol={a1}", f"--test={a2}", "--vad", "--threshold=0.5"),
        ("extract", model, "--data=DATA", "--out=x.npz", "--vad"),
    ):
        assert run(monkeypatch, *command) == 0
        out, err = capsys.readouterr()
        said[command[0], command[1]] = out
        assert re.search(r"used \d+\.\d s of speech of \d+\.\d s", err), command
        assert "warning: mostly no speech" in err
    assert (
        float(re.search(r", (\d+\.\d) s", said["enroll", "--store=s"])[1]) < 45
    )  # of speech: the minute is not counted
    score = [re.search(r"-?\d\.\d{4}", said[key])[0] for key in said if key[0] in ("verify", "identify")]
    embeddings = arrays_of(place / "x.npz")["embeddings"]
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    assert len(set(score)) == 1 and float(score[0]) == pytest.approx(float(unit[0] @ unit[1]), abs=2e-4)
