"""What runs where packages for training alone, or locks of the system, are not there."""

import importlib.metadata
import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest
from recordings import tone, write

from kmq_jax.cli import main
from kmq_jax.models import registry
from kmq_jax.models.speaker_model import SpeakerModel, save_model

ROOT = Path(__file__).parents[2]
TRAINING_ALONE = ("grain", "tensorflow_datasets", "array_record")


def normal(requirement):
    """The name of a requirement, as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def left_out():
    """The modules of every installed package that the light install is without."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    kept = {normal(requirement) for requirement in groups["light"]} | {"kmq-jax"}
    owners = importlib.metadata.packages_distributions()
    return [name for name, own in owners.items() if name != "kmq_jax" and not kept & {normal(one) for one in own}]


def run_without(blocked, code, cwd):
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment |= {name: os.environ[name] for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
    # What stands as None in there is not found, and not looked for either.
    script = f"import sys\nsys.modules.update(dict.fromkeys({tuple(blocked)!r}))\n{code}"
    return subprocess.run([sys.executable, "-c", script], cwd=cwd, capture_output=True, text=True, env=environment)


def command(name, *flags):
    """Code that runs one command and goes on."""
    return f"""
from kmq_jax.cli import main
sys.argv = ["kmq-jax", {name!r}, *{list(flags)!r}]
try:
    main.main()
except SystemExit as done:
    assert not done.code, done.code
"""


def test_every_command_is_there_without_what_training_alone_needs(tmp_path):
    names = [*main.COMMANDS]
    code = f"import importlib\nfor name in {names!r}:\n    importlib.import_module('kmq_jax.cli.' + name)"
    done = run_without([*left_out(), "fcntl", "resource"], code, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model in full precision, and two recordings at 48 kHz."""
    directory = tmp_path_factory.mktemp("light")
    settings = {"width": 4, "blocks": [1, 1, 1, 1], "embedding_size": 8}
    variables = jax.device_get(registry.initialize(registry.build("wespeaker_resnet34", **settings), jax.random.key(0)))
    save_model(directory / "full.kmq", SpeakerModel("wespeaker_resnet34", settings, "wespeaker", variables))
    for name in ("a", "b"):
        write(directory / f"{name}.wav", tone(rate=48000), rate=48000)
    return directory


def test_a_model_is_quantized_and_verifies_without_them(place):
    code = "".join(
        [
            command("quantize", "--model=full.kmq", "--bits=4", "--out=light.kmq", "--data=synthetic:dev?speakers=3"),
            command("verify", "--model=light.kmq", "--enrol=a.wav", "--test=b.wav", "--threshold=0.5"),
            command("enroll", "--store=people", "--model=light.kmq", "--speaker=alice", "a.wav"),
            command("identify", "--store=people", "b.wav"),
        ]
    )
    # Without locks, too, as on Windows.
    done = run_without([*left_out(), "fcntl", "resource"], code, place)
    assert done.returncode == 0, done.stderr
    assert "times smaller" in done.stdout and "alice" in done.stdout
    assert not [path.name for path in place.iterdir() if ".part-" in path.name]


def test_the_light_install_is_what_was_weighed():
    weigh = runpy.run_path(str(ROOT / ".ci" / "weigh.py"))
    (arguments,) = weigh["FORMS"]["light"]
    assert f".venv/bin/pip install -q {' '.join(arguments)}\n" in (ROOT / "README.md").read_text()
    found = json.loads((ROOT / ".github" / "results" / "install.json").read_text())
    assert found["light"]["megabytes"] < 700 and found["example"]["megabytes"] < 150  # what they are meant to weigh


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("train", "--config=quickstart:smoke", "--workdir=run"),
            "training needs the package grain: pip install grain",
        ),
        (
            ("prepare_data", "--source=synthetic:dev?speakers=2", "--out=shards"),
            "a dataset in shards needs the package array_record: pip install array_record",
        ),
    ],
)
def test_what_needs_them_says_so_in_one_line(flags, message, tmp_path):
    name = flags[0]
    code = f"from kmq_jax.cli import main\nsys.argv = ['kmq-jax', *{list(flags)!r}]\nmain.main()"
    done = run_without(TRAINING_ALONE, code, tmp_path)
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == f"kmq-jax {name}: {message}", done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
