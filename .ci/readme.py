#!/usr/bin/env python3
"""Runs every code block of the README as printed, in order, in a copy of the repository.

    .ci/readme.py [--python=PYTHON] [--first=N] [--list]

What a reader would bring (a model, recordings, lists, a corpus' archive) is stood in for by small files of the same
names, made beforehand. What would take hours or minutes is shortened, and nothing else is changed: `SHORTER` says
what, and a line of it that fits no block is an error. Shell blocks of one page share a directory, blocks of Python
share their names. PYTHON is one that has the package with the extra `test`: then environments are not made and
nothing is installed. Without it, everything is installed as printed. `--first=4` leaves out the blocks before the
fourth, which are installations, the first study and the tests: `.ci/run` runs those itself.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHORTER = {
    "--config=configs/quickstart.py": "--config=configs/quickstart.py:smoke",
    "-m pytest": "-m pytest -n 0 tests/quant/test_readme_example.py",  # the whole of it is what .ci/run runs besides
    # What is quantized without training, measured; the rest of a study is what block 1 does. The model that stands in
    # is imported as a graph, whose first layer has another name than the real one's.
    "configs/wespeaker_so762.py:so762": 'configs/wespeaker_so762.py:smoke --config.study.rules="()" '
    "--config.study.epochs.2=0 "
    '--config.study.nested=False --config.study.diagnose="()" --config.study.cascades="()"',
    "--config=quickstart --workdir": "--config=quickstart:smoke --workdir",
    "--config=configs/wespeaker34_distilled.py:2": "--config=configs/wespeaker34_distilled.py:smoke",
    # Its smoke form makes a network to begin with, of a size that the model that stands in has not.
    "--config.init_from=runs/wespeaker34 --config.data.root=DIR": "--config.data.root=DIR",
    # Intervals and Hessians of a diagnosis are most of its time.
    "kmq-jax diagnose ": "kmq-jax diagnose --replicates=20 --hessian_draws=1 --hessian_utterances=1 "
    "--retention_utterances=4 --layer_utterances=4 ",
}
INSTALLED = (
    (r"python3 -m venv \.venv && \.venv/bin/pip install [^&\n]*&& \\\n", ""),
    (r"^\.venv/bin/pip install .*$", "true"),
)
"""What is left out where the package is installed: environments and installations."""


def blocks_of(text: str) -> list[tuple[str, str]]:
    """Language and code of each block of shell or Python."""
    return [(match[1], match[2]) for match in BLOCK.finditer(text)]


def shortened(blocks: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The blocks with what takes long made short."""
    for long in SHORTER:
        if not any(long in code for _, code in blocks):
            raise SystemExit(f"readme.py: no block holds {long!r}, which SHORTER would shorten")

    def short(code: str) -> str:
        for long, less in SHORTER.items():
            code = code.replace(long, less)
        return code

    return [(language, short(code)) for language, code in blocks]


STAND_INS = """
import shutil, tarfile
from pathlib import Path
import jax, numpy as np, soundfile
from kmq_jax.data.draw import draw_trials, write_trials
from kmq_jax.data.layouts import SO762_DEV
from kmq_jax.data.source import open_source
from kmq_jax.interop.export import export_model
from kmq_jax.models import registry
from kmq_jax.models.speaker_model import SpeakerModel, save_model

def voices(speakers, utterances, split="test"):
    return open_source(f"synthetic:{split}?speakers={speakers}&utterances={utterances}")

def wav(path, wave):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, 16000)

name, settings = "wespeaker_resnet34", {"width": 4, "embedding_size": 32, "norm": "bias"}
variables = registry.initialize(registry.build(name, **settings), jax.random.key(0))
save_model(Path("made/model.kmq"), SpeakerModel(name, settings, "wespeaker", jax.device_get(variables)))
export_model("made/model.kmq", Path("voxceleb_resnet34.onnx"))

table = voices(8, 4)
for row, path in enumerate(table.ids):
    speaker, number = ("alice", "bob", "carol", "dave", "eve", "frank", "grace", "heidi")[row // 4], row % 4 + 1
    for place in ("DATA", "recordings"):
        wav(f"{place}/{speaker}/{number}.wav", table.load(row))
write_trials("dev_trials.txt", draw_trials(open_source("DATA"), seed=1))
for copy, original in {"alice": "alice/1", "alice1": "alice/1", "alice2": "alice/2", "unknown": "bob/1"}.items():
    shutil.copy(f"DATA/{original}.wav", f"{copy}.wav")
for place in ("DIR/so762/train", "DIR/words/train", "DIR/so762/dev"):
    shutil.copytree("DATA", place)
write_trials("DIR/so762/dev/trials.txt", draw_trials(open_source("DATA")))

# speechocean762's archive: six speakers of 20 recordings of 2.5 s.
root, voice = Path("made/speechocean762"), voices(3, 1).load(0)[:40000]
noise = np.random.default_rng(0)
for part, names in {"train": ("0001", "0003", SO762_DEV[0]), "test": ("0005", *SO762_DEV[1:3])}.items():
    lines = {"wav.scp": "", "utt2spk": "", "spk2gender": "", "spk2age": ""}
    for number, speaker in enumerate(names):
        own = voices(6, 1, "dev").load(number + 3 * (part == "test"))
        lines["spk2gender"] += f"{speaker}\\tf\\n"
        lines["spk2age"] += f"{speaker}\\t{6 + 30 * (number == 2)}\\n"
        for utterance in range(20):
            key = f"0{speaker}{utterance:04d}"
            start = noise.integers(1, 1000)
            wav(root / f"WAVE/SPEAKER{speaker}/{key}.WAV", np.resize(own, 42000)[start : start + 40000])
            lines["wav.scp"] += f"{key}\\tWAVE/SPEAKER{speaker}/{key}.WAV\\n"
            lines["utt2spk"] += f"{key}\\t{speaker}\\n"
    for file, text in lines.items():
        (root / part).mkdir(parents=True, exist_ok=True)
        (root / part / file).write_text(text)
Path("data/so762/archives").mkdir(parents=True)
with tarfile.open("data/so762/archives/speechocean762.tar.gz", "w:gz", compresslevel=1) as archive:
    archive.add(root, "speechocean762")
"""


def run(python: Path | None, first: int) -> None:
    """Runs all blocks from the first that is wanted; one that fails ends it."""
    blocks = shortened(blocks_of((ROOT / "README.md").read_text()))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for name in filter(None, listed.split("\0")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        if python:
            (folder / ".venv").symlink_to(python.absolute().parent.parent)
        prepared, seen = python is not None, ""
        if prepared:
            execute(folder, "the stand-ins", [".venv/bin/python", "-c", STAND_INS])
        for number, (language, code) in list(enumerate(blocks, 1))[first - 1 :]:
            if python:
                for pattern, less in INSTALLED:
                    code = re.sub(pattern, less, code, flags=re.MULTILINE)
            if not prepared and "voxceleb_resnet34.onnx" in code:
                execute(folder, "the stand-ins", [".venv/bin/python", "-c", STAND_INS])
                prepared = True
            title = f"block {number} of {len(blocks)}, {language}"
            print(f"== {title}\n{code}", flush=True)
            if language == "bash":
                execute(folder, title, ["bash", "-euo", "pipefail", "-c", f'PATH="$PWD/.venv/bin:$PATH"\n{code}'])
            else:
                seen += code  # later blocks use what earlier ones name
                last = not any(other == "python" for other, _ in blocks[number:])
                if last:
                    execute(folder, title, [".venv/bin/python", "-c", seen])


def execute(folder: Path, title: str, line: list[str]) -> None:
    """Runs one command line and prints what it took.

    Raises:
        SystemExit: it failed.
    """
    # As in the tests: networks are so tiny that compiling them well would take longer than running them; and commands
    # share what is compiled.
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    quick |= {"JAX_COMPILATION_CACHE_DIR": str(folder / ".compiled")}
    begun = time.monotonic()
    done = subprocess.run(line, cwd=folder, check=False, env=os.environ | quick)
    print(f"-- {title}: {time.monotonic() - begun:.1f} s, status {done.returncode}", flush=True)
    if done.returncode:
        raise SystemExit(1)


def main() -> None:
    """Runs or lists the blocks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, help="one that has the package and its extra `test`")
    parser.add_argument("--first", type=int, default=1, metavar="N", help="the first block that is run")
    parser.add_argument("--list", action="store_true", help="print the blocks as they would be run")
    given = parser.parse_args()
    if given.list:
        for language, code in shortened(blocks_of((ROOT / "README.md").read_text())):
            print(f"== {language}\n{code}")
        return
    sys.stdout.reconfigure(line_buffering=True)
    run(given.python, given.first)


if __name__ == "__main__":
    main()
