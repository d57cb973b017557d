#!/usr/bin/env python3
"""Processor time, user and system together, and most memory of commands in fresh processes, printed as JSON.

    .ci/fresh.py [--repeats=5] [BIN] >.github/results/fresh.json

BIN is the directory of an installed kmq-jax (that of this Python where left out). The model is a WeSpeaker ResNet34 of
full size, made here with random weights and quantized at 4 bits, once with activations in floating point and once in 8
bits (`w4a8.kmq`): what verifies is as large as a real one. Recordings of 3 s, and a DATA of 20, come from the embedded
voices. Each command runs once before, so that files are in memory and caches are filled. Then three lists that strain
memory run once each, by the 8-bit model: 16 recordings of which one is 5 minutes long, one of an hour beside one of
5 s, and 500 of as many lengths, 1 to 6 s.
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
    ("verify", "--model=w4a8.kmq", "--enrol=a.wav", "--test=b.wav", "--threshold=0.5"),
    ("extract", "--model=model.kmq", "--data=DATA", "--out=embeddings.npz"),
    ("extract", "--model=w4a8.kmq", "--data=DATA", "--out=embeddings.npz"),
)
LONG = tuple(
    ("extract", "--model=w4a8.kmq", f"--data={data}", "--out=embeddings.npz") for data in ("SIXTEEN", "HOUR", "LENGTHS")
)
SETUP = """
from pathlib import Path
import jax, numpy as np, soundfile
from kmq_jax.data.source import open_source
from kmq_jax.models import registry
from kmq_jax.models.speaker_model import SpeakerModel, save_model
name, settings = "wespeaker_resnet34", {"norm": "bias"}
variables = registry.initialize(registry.build(name, **settings), jax.random.key(0))
save_model("full.kmq", SpeakerModel(name, settings, "wespeaker", jax.device_get(variables)))
voices = open_source("synthetic:test?speakers=2&utterances=1")
for name, row in {"a": 0, "b": 1}.items():
    soundfile.write(f"{name}.wav", voices.load(row)[:48000], 16000)
voices = open_source("synthetic:test?speakers=10&utterances=2")
for row, name in enumerate(voices.ids):
    place = Path("DATA", f"speaker{row // 2}")
    place.mkdir(parents=True, exist_ok=True)
    soundfile.write(place / f"{row % 2}.wav", voices.load(row), 16000)
speech = np.concatenate([voices.load(row) for row in range(len(voices))])
SECONDS = {"SIXTEEN": [3.0] * 15 + [300.0], "HOUR": [5.0, 3600.0], "LENGTHS": [1 + i / 100 for i in range(500)]}
for name, lengths in SECONDS.items():
    place = Path(name, "speaker")
    place.mkdir(parents=True)
    for i, seconds in enumerate(lengths):
        soundfile.write(place / f"{i}.wav", np.resize(speech, round(16000 * seconds)), 16000)
"""


def cost_of(line: list[str], place: str) -> tuple[float, int]:
    """Seconds of user and system, and the most memory in bytes, of one run; its output is kept to itself."""
    with subprocess.Popen(line, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"fresh.py: {' '.join(line)} ended with {process.returncode}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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
            ("quantize", "--model=full.kmq", "--bits=4", "--activations=8", "--data=DATA", "--out=w4a8.kmq"),
            ("enroll", "--store=people", "--model=model.kmq", "--speaker=alice", "a.wav"),
        ):
            subprocess.run([program, *words], cwd=folder, check=True, stdout=sys.stderr)
        rows = []
        for words in (*COMMANDS, *LONG):
            repeats = 1 if words in LONG else given.repeats
            if words not in LONG:
                cost_of([program, *words], folder)
            found, memory = zip(*(cost_of([program, *words], folder) for _ in range(repeats)))
            about = {"least": round(min(found), 3), "median": round(statistics.median(found), 3)}
            about |= {"most_memory": max(memory), "runs": repeats}
            rows.append({"command": f"kmq-jax {' '.join(words)}", **about})
    about = {"kind": "fresh", "python": platform.python_version(), "processor": processor(), "cores": os.cpu_count()}
    print(json.dumps({**about, "repeats": given.repeats, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
