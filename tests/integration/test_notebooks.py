"""The notebooks: valid, with outputs of these very cells, and sound from top to bottom in their small form."""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")

NOTEBOOKS = sorted((Path(__file__).parents[2] / "colab").glob("*.ipynb"))
TRIED = [pytest.param(path, marks=[] if path.stem == "quantize_pretrained" else pytest.mark.slow) for path in NOTEBOOKS]
"""The others train and diagnose, as the commands' own tests do."""
PICTURES = {"quantize_pretrained": 3, "train_tpu": 2, "diagnose_cascade": 8}  # at least


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_all_are_here():
    assert {path.stem for path in NOTEBOOKS} == PICTURES.keys()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_shows_what_its_cells_gave(path):
    """As `.ci/notebooks.py` stores it, which is to run again where a cell changes."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = code_of(notebook)
    sources = "\0".join(cell.source for cell in code)
    assert notebook.metadata["kmq_jax"]["code"] == hashlib.sha256(sources.encode()).hexdigest()[:16]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= PICTURES[path.stem]
    printed = "".join(output.get("text", "") for output in outputs)
    assert "cpu, JAX" in printed and not re.search(r"/(tmp|root|home|work)/| left", printed)
    assert path.stat().st_size < 1 << 20


class Machine:
    """Runs a notebook's first cell in a directory without the package, and notes what it would install."""

    def __init__(self, path, directory, monkeypatch, smi=""):
        (self.cell,) = [cell.source for cell in code_of(nbformat.read(path, as_version=4))[:1]]
        self.installed, self.directory, find = [], directory, importlib.util.find_spec
        monkeypatch.chdir(directory)
        monkeypatch.setattr(os, "environ", {"PATH": "/bin"})
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "kmq_jax" else find(name))

        def run(command, **settings):
            if command == "nvidia-smi":
                if not smi:
                    raise FileNotFoundError(command)
                return SimpleNamespace(stdout=smi)
            self.installed.append(command[-1])
            assert command[:-1] == [sys.executable, "-m", "pip", "install", "-q"] and settings["check"]
            return None

        monkeypatch.setattr(subprocess, "run", run)

    def start(self, **form):
        """Runs the cell as a form with these values would."""
        cell = self.cell
        for name, value in form.items():
            before = [line for line in cell.splitlines() if line.startswith(f"{name} = ")]
            cell = cell.replace(before[0], f"{name} = {value!r}")
        names = {}
        exec(cell, names)
        return names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_finds_the_package(path, tmp_path, monkeypatch):
    machine = Machine(path, tmp_path, monkeypatch, "NVIDIA-SMI 550  Driver Version: 550  CUDA Version: 12.4 |")
    with pytest.raises(SystemExit, match="upload its wheel beside this notebook, or set REPOSITORY"):
        machine.start()
    machine.start(REPOSITORY="https://example.org/kmq_jax")
    machine.start(REPOSITORY="https://example.org/kmq_jax.zip")
    (tmp_path / "kmq_jax-0.1.0-py3-none-any.whl").write_text("")
    names = machine.start()
    assert machine.installed == [
        "kmq_jax[cuda12] @ git+https://example.org/kmq_jax",
        "kmq_jax[cuda12] @ https://example.org/kmq_jax.zip",
        f"{tmp_path}/kmq_jax-0.1.0-py3-none-any.whl[cuda12]",
    ]
    assert names["RUNS"] == Path("runs") / path.stem and (tmp_path / names["RUNS"]).is_dir()
    clone = tmp_path / "clone"
    (clone / "colab").mkdir(parents=True)
    (clone / "kmq_jax").mkdir()
    monkeypatch.chdir(clone / "colab")
    machine.start()
    assert len(machine.installed) == 3 and Path.cwd() == clone


@pytest.mark.parametrize(
    ("smi", "extra"), [("", ""), ("CUDA Version: 13.0", "[cuda13]"), ("CUDA Version: 11.8", "[cuda12]")]
)
def test_what_is_installed_fits_the_driver(smi, extra, tmp_path, monkeypatch):
    machine = Machine(NOTEBOOKS[0], tmp_path, monkeypatch, smi)
    machine.start(REPOSITORY="https://example.org/kmq_jax")
    assert machine.installed == [f"kmq_jax{extra} @ git+https://example.org/kmq_jax"]


def test_work_is_kept_on_drive_where_wanted(tmp_path, monkeypatch):
    mounted, colab = [], ModuleType("google.colab")
    colab.drive = SimpleNamespace(mount=mounted.append)
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setattr(Path, "mkdir", lambda path, **settings: None)
    machine = Machine(NOTEBOOKS[0], tmp_path, monkeypatch)
    names = machine.start(REPOSITORY="https://example.org/kmq_jax", KEEP_ON_DRIVE=True)
    assert mounted == ["/content/drive"]
    assert names["RUNS"] == Path("/content/drive/MyDrive/kmq_jax") / NOTEBOOKS[0].stem


# What stands in for `python` in a notebook's commands: it sends its words to the test, and prints what comes back.
CLIENT = """#!{python} -IS
import json, socket, sys
with socket.create_connection(("127.0.0.1", {port})) as asked:
    asked.sendall(json.dumps(sys.argv[1:]).encode())
    asked.shutdown(socket.SHUT_WR)
    status, _, said = asked.makefile().read().partition("\\n")
sys.stdout.write(said)
sys.exit(int(status))
"""


def run_python(words):
    """What `python WORDS` would do, in this process, where JAX is already there: its status and what it printed."""
    said, before, status = io.StringIO(), sys.argv, 0
    sys.argv = ["python", *words[2:]]
    try:
        with contextlib.redirect_stdout(said):
            exec(words[1], {}) if words[0] == "-c" else runpy.run_module(words[1], run_name="__main__")
    except SystemExit as done:
        status = done.code or 0
    finally:
        sys.argv = before
    return f"{status}\n{said.getvalue()}"


def run_script(script, directory):
    """Runs a cell of commands in bash, every `python` of it in this process."""
    with socket.create_server(("127.0.0.1", 0)) as server, (directory / "said").open("w+") as said:
        server.settimeout(0.05)
        client = directory / "python"
        client.write_text(CLIENT.format(python=sys.executable, port=server.getsockname()[1]))
        client.chmod(0o755)
        environment = {**os.environ, "PATH": f"{directory}:{os.environ['PATH']}"}
        with subprocess.Popen(["bash", "-e", "-c", script], env=environment, stdout=said) as process:
            while process.poll() is None:
                with contextlib.suppress(TimeoutError), server.accept()[0] as asked:
                    asked.settimeout(None)
                    asked.sendall(run_python(json.loads(asked.makefile().read())).encode())
        said.seek(0)
        print(said.read())
    assert process.returncode == 0, script


@pytest.fixture
def pictures(monkeypatch):
    """What a notebook shows of pictures; figures that are left open are shown at the end of a cell, and closed."""
    IPython = pytest.importorskip("IPython", reason="IPython is not installed")
    plt = pytest.importorskip("matplotlib.pyplot")
    shown = []
    seen = (IPython.display.Image, plt.Figure)
    monkeypatch.setattr(
        IPython.display, "display", lambda *given: shown.extend(one for one in given if isinstance(one, seen))
    )
    yield shown
    plt.close("all")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of ml_collections' way to load a file
@pytest.mark.parametrize("path", TRIED, ids=lambda path: path.stem)
def test_the_cells_of_a_notebook_run_from_top_to_bottom(path, tmp_path, monkeypatch, capsys, pictures):
    """In this process, so that one JAX runs all of its commands."""
    import jax
    import matplotlib.pyplot as plt

    (tmp_path / "bin").mkdir()
    before = dict(os.environ)
    monkeypatch.chdir(path.parent)
    os.environ.update(KMQ_NOTEBOOK_SMALL="1", RUNS=str(tmp_path / "runs"))
    names = {"__name__": "__main__"}
    try:
        for cell in code_of(nbformat.read(path, as_version=4)):
            if cell.source.startswith("%%script bash -e\n"):
                run_script(cell.source.partition("\n")[2], tmp_path / "bin")
            else:
                exec(cell.source.replace("%matplotlib inline", ""), names)
                pictures += map(plt.figure, plt.get_fignums())
                plt.close("all")
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert f"{jax.device_count()} x cpu on cpu, JAX" in capsys.readouterr().out
    assert len(pictures) >= PICTURES[path.stem]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # of the kernel's client
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_a_kernel_of_its_own(path, tmp_path, monkeypatch, compiled):
    monkeypatch.setenv("KMQ_NOTEBOOK_SMALL", "1")
    monkeypatch.setenv("RUNS", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    (tmp_path / "compiled").symlink_to(compiled)  # their own place for it
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = [output for cell in code_of(notebook) for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert "1 x cpu on cpu, JAX" in printed
    assert len(pictures) >= PICTURES[path.stem]
