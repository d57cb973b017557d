#!/usr/bin/env python3
"""Runs the notebooks as they stand, each in a kernel of its own in a copy of the repository, and stores their outputs.

    .ci/notebooks.py [NAME ...]

These are what a viewer sees before anything runs: what the cells print, but for lines of progress, and pictures in few
colours; sound is left out. A hash of the code is stored, too. A test tells by it that the outputs are of these cells.
Takes the Python that has the package with the extra `test`. It runs what is committed, in minutes on two cores.
"""

import base64
import hashlib
import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
HOME = "/content/kmq_jax"  # where a clone lies on Colab
PROGRESS = re.compile(r"^.*\(\d+ %\), \d.* left.*\n?", re.MULTILINE)
COLOURS = 64


def code_hash(notebook: nbformat.NotebookNode) -> str:
    """A hash of the code cells, in order."""
    code = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def in_few_colours(png: str) -> str:
    """A picture, base64, at about a third of its size."""
    small = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(png))) as picture:
        picture.convert("RGB").quantize(COLOURS).save(small, "png", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def kept(outputs: list[nbformat.NotebookNode], place: str) -> list[nbformat.NotebookNode]:
    """Outputs as they are stored: streams joined and without progress, small pictures, no sound, no path of `place`."""
    found: list[nbformat.NotebookNode] = []
    for output in outputs:
        if output.output_type != "stream":
            output.data.pop("text/html", None)
            if png := output.data.get("image/png"):
                output.data["image/png"] = in_few_colours(png)
            found.append(output)
        elif found and found[-1].get("name") == output.name:
            found[-1].text += output.text  # a line may come in pieces
        elif output.text.strip():
            found.append(output)
    for output in found:
        if output.output_type == "stream":
            lines = PROGRESS.sub("", output.text).replace(place, HOME).splitlines()
            output.text = "".join(f"{line}\n" for line in lines if line)
    return [output for output in found if output.get("text", "-")]


def run(path: Path, clone: Path) -> None:
    """Runs one notebook in the clone, and writes it with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(clone / "colab")}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = kept(cell.outputs, str(clone))
    notebook.metadata["kmq_jax"] = {"code": code_hash(notebook)}
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.write(notebook, path)


def main() -> None:
    """Runs those that are named, or all."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for name in ("RUNS", "KMQ_NOTEBOOK_SMALL"):
        os.environ.pop(name, None)
    for name in sys.argv[1:] or sorted(path.stem for path in (ROOT / "colab").glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as place:
            clone = Path(place, "kmq_jax")
            subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
            os.environ["PYTHONPATH"] = str(clone)
            run(ROOT / "colab" / f"{name}.ipynb", clone)
            print(name, f"{(ROOT / 'colab' / f'{name}.ipynb').stat().st_size / 1024:.0f} KiB", flush=True)


if __name__ == "__main__":
    main()
