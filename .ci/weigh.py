#!/usr/bin/env python3
"""Installs the package in each of its forms into a fresh virtual environment and prints what that weighs, as JSON.

    .ci/weigh.py >.github/results/install.json

Megabytes (of 10^6 bytes) are those that the packages take on the disk, compiled modules included, pip left out.
"""

import json
import platform
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FORMS = {  # the arguments of each `pip install`
    "whole": (["."],),
    "light": (["--no-deps", "--group", "light", "."],),
    "example": (["--no-compile", "numpy", "onnxruntime"],),
}
LISTED = 5.0  # MB from which a package is named


def megabytes(place: Path) -> float:
    """What a directory or file takes on the disk."""
    if place.is_file():
        return place.stat().st_size / 1e6
    return sum(file.stat().st_size for file in place.rglob("*") if file.is_file()) / 1e6


def weigh(form: str, directory: Path) -> dict:
    """Installs one form into `directory`."""
    venv.create(directory, with_pip=True)
    python = directory / "bin" / "python"
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "-U", "pip>=25.1"], check=True)
    (packages,) = directory.glob("lib/python*/site-packages")
    before = {entry.name for entry in packages.iterdir()}
    for arguments in FORMS[form]:
        subprocess.run([*pip, *arguments], cwd=ROOT, check=True)
    sizes = {entry.name: megabytes(entry) for entry in packages.iterdir() if entry.name not in before}
    heavy = {name: round(size) for name, size in sorted(sizes.items(), key=lambda pair: -pair[1]) if size >= LISTED}
    return {"megabytes": round(sum(sizes.values())), "heaviest": heavy}


def main() -> None:
    """Prints the weights of the forms that are named, or of all."""
    found = {"kind": "install", "python": platform.python_version(), "platform": f"{sys.platform} {platform.machine()}"}
    for form in sys.argv[1:] or FORMS:
        with tempfile.TemporaryDirectory() as directory:
            found[form] = weigh(form, Path(directory))
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
