#!/usr/bin/env python3
"""Processor time of commands in fresh processes, user and system together, printed as JSON.

    .ci/fresh.py [--repeats=5] [BIN] >.github/results/fresh.json

BIN is the directory of an installed kmq-jax (that of this Python where left out). The model is a WeSpeaker ResNet34 of
full size, made here with random weights and quantized at 4 bits: what verifies is as large as a real one. Recordings of
3 s come from the embedded voices. Each command runs once before, so that files are in memory and caches are filled.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

COMMANDS = (
    ("--help",),
    ("verify", "--help"),
    ("verify", "--model=model.kmq", "--enrol=a.wav", "--test=b.wav", "--threshold=0.5"),
    ("verify", "--store=people", "--speaker=alice", "b.wav", "--threshold=0.5"),
    ("identify", "--store=people", "b.wav", "--top=1"),
)
SETUP = """
import jax, soundfile
from kmq_jax.data.source import open_source
from kmq_jax.models import registry
from kmq_jax.models.speaker_model import SpeakerModel, save_model
name, settings = "wespeaker_resnet34", {"norm": "bias"}
variables = registry.initialize(registry.build(name, **settings), jax.random.key(0))
save_model("full.kmq", SpeakerModel(name, settings, "wespeaker", jax.device_get(variables)))
voices = open_source("synthetic:test?speakers=2&utterances=1")
for name, row in {"a": 0, "b": 1}.items():
    soundfile.write(f"{name}.wav", voices.load(row)[:48000], 16000)
"""


def seconds_of(line: list[str], place: str) -> float:
    """User and system seconds of one run; its output is kept to itself."""
    before = os.times()
    subprocess.run(line, cwd=place, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Prints the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("bin", nargs="?", type=Path, default=Path(sys.executable).parent)
    given = parser.parse_args()
    program, place = str(given.bin.absolute() / "kmq-jax"), tempfile.TemporaryDirectory()
    with place as folder:
        subprocess.run([str(given.bin.absolute() / "python"), "-c", SETUP], cwd=folder, check=True)
        for words in (
            ("quantize", "--model=full.kmq", "--bits=4", "--unfitted", "--out=model.kmq"),
            ("enroll", "--store=people", "--model=model.kmq", "--speaker=alice", "a.wav"),
        ):
            subprocess.run([program, *words], cwd=folder, check=True, stdout=sys.stderr)
        rows = []
        for words in COMMANDS:
            seconds_of([program, *words], folder)
            found = [seconds_of([program, *words], folder) for _ in range(given.repeats)]
            about = {"least": round(min(found), 3), "median": round(statistics.median(found), 3)}
            rows.append({"command": f"kmq-jax {' '.join(words)}", **about})
    about = {"kind": "fresh", "python": platform.python_version(), "processor": processor(), "cores": os.cpu_count()}
    print(json.dumps({**about, "repeats": given.repeats, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
