"""Commands on inputs that are damaged, hostile or merely odd: nothing may crash, hang, or leave half a file.

    python launch/fuzz.py --inputs=2500 --json=fuzz.json      # minutes
    python launch/fuzz.py --inputs=60                         # seconds; what the tests run
    python launch/fuzz.py --only=audio:17                     # one input again, with all it prints

Each input is a command line over files that are made for it, and runs in a process of its own, forked from this one, in
which the library is imported and nothing has run. It is clean if the command ends in time with status 0, or with status
2 and one line that says what is wrong; if no traceback is printed; if what it read is as it was; and if what it was to
write is not there, or whole. The same seed gives the same inputs.
"""

import argparse
import collections
import contextlib
import functools
import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import safetensors.numpy  # noqa: E402
import soundfile  # noqa: E402

LIMIT = 40  # seconds that a command may take; on a busy machine compiling takes some
NUMBERS = [
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "-0.0",
    "1e400",
    "0.001",
    "1e-320",
    "9" * 30,
    "99999999",
    "",
    " ",
    "1,",
    "x",
]
NUMBERS += ["1e9", "2.5", "true", "None", "0x10", "\u0661", "[1,2]", "1:2"]
PLACES = ["", " ", "/dev/null", "/dev/full", "/dev/zero", "/proc/self/mem", "/", ".", "x" * 300, "no/such/place", "~"]
PLACES += ["{pipe}", "{folder}", "{loop}", "{unreadable}", "synthetic:", "synthetic:dev?speakers=0", "synthetic:no"]
PLACES += ["\udcff\udcfe", "a\nb", "\u202e.npz", "2:", ":", "-"]
VALUES = [None, True, -1, 0, 1, 10**30, 1e308, "", "x", [], {}, [[]], [1, "a"], {"a": {}}, "NaN", float("nan")]
VALUES += [float("inf"), "9" * 400, -(2**63), [0] * 50, "../../etc/passwd", "\x00"]
Line = list[str]


class Maker:
    """Makes inputs in a folder of their own, from good files.

    Attributes:
        rng: draws everything.
        base: the good files.
        folder: of this input; what the command writes lies in `out` below it.
    """

    def __init__(self, seed: str, base: Path, folder: Path):
        """Makes the folder."""
        self.rng, self.base, self.folder = random.Random(seed), base, folder
        self.out = folder / "out"
        self.out.mkdir(parents=True)

    def damaged(self, data: bytes) -> bytes:
        """Damages bytes, mostly near the beginning, where headers are."""
        rng, made = self.rng, bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 8))):
            if not made:
                break
            at = rng.randrange(min(len(made), rng.choice((16, 64, 300, len(made)))))
            kind = rng.randrange(8)
            if kind < 2:
                made[at] ^= 1 << rng.randrange(8)
            elif kind == 2:
                made[at : at + 4] = rng.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80"))
            elif kind == 3:
                del made[at : at + rng.choice((1, 4, 1000))]
            elif kind == 4:
                made[at:at] = rng.randbytes(rng.choice((1, 4, 1000)))
            elif kind == 5:
                del made[rng.randrange(len(made)) :]
            elif kind == 6:
                made[at : at + 8] = struct.pack(rng.choice("<>") + "Q", rng.choice((0, 1, 2**31, 2**40, 2**63)))
            else:
                made += made[: rng.randrange(len(made) + 1)]
        return bytes(made)

    def text(self, text: str) -> bytes:
        """Damages a list: words, lines, blanks, encodings."""
        rng, lines = self.rng, text.split("\n")
        for _ in range(rng.choice((1, 1, 3))):
            at, kind = rng.randrange(len(lines)), rng.randrange(10)
            words = lines[at].split(" ")
            if kind == 0:
                words[rng.randrange(len(words))] = rng.choice([*NUMBERS, *PLACES, "target", "|", '"'])
                lines[at] = " ".join(words)
            elif kind == 1:
                lines.insert(at, rng.choice(("", "\u00a0", "\ufeff", "#", "a b c d", "\t", "x" * 100_000)))
            elif kind == 2:
                lines[at] += rng.choice(("\r", " ", ",", "\u2028", " x", "\0"))
            elif kind == 3:
                del lines[at]
                lines = lines or [""]
            elif kind == 4:
                lines.append(lines[at])
            elif kind == 5:
                return "\n".join(lines).encode(rng.choice(("utf-16", "latin-1", "utf-8-sig")), errors="replace")
            elif kind == 6:
                return self.damaged("\n".join(lines).encode())
            elif kind == 7:
                lines[at] = lines[at].replace(",", rng.choice((";", ",,", "\t")))
            elif kind == 8:
                lines = lines[: rng.randrange(len(lines) + 1)] or [""]
            else:
                rng.shuffle(words)
                lines[at] = " ".join(words)
        return "\n".join(lines).encode(errors="surrogateescape")

    def json(self, value: object) -> str:
        """Damages a JSON value: a node becomes another, goes, or lies too deep."""
        rng = self.rng
        value = json.loads(json.dumps(value))
        if rng.random() < 0.1:
            return rng.choice(("[" * 50_000, "{", "", "null", "[]", '{"a":1}{', "\ufeff{}", '{"a"' * 1000))
        for _ in range(rng.choice((1, 1, 2))):
            nodes = [(parent, key) for parent, key in _nodes(value)]
            if not nodes:
                break
            parent, key = rng.choice(nodes)
            kind = rng.randrange(5)
            if kind == 0:
                del parent[key]
            elif kind == 1 and isinstance(parent, dict):
                parent[rng.choice(("x", "", "version", "bits"))] = rng.choice(VALUES)
            else:
                parent[key] = rng.choice(VALUES)
        return json.dumps(value)

    def file(self, name: str, data: bytes | str) -> str:
        """Writes a file of this input."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode(errors="surrogateescape") if isinstance(data, str) else data)
        return str(path)

    def place(self) -> str:
        """A place that is no file, or is a special one."""
        place = self.rng.choice(PLACES)
        path = self.folder / "special"
        if place == "{pipe}":
            os.mkfifo(path)
        elif place == "{folder}":
            path.mkdir()
        elif place == "{loop}":
            path.symlink_to(path)
        elif place == "{unreadable}":
            path.write_bytes(b"x")
            path.chmod(0)
        else:
            return place
        return str(path)


def _nodes(value: object) -> Iterator[tuple]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    for key in keys:
        yield value, key
        yield from _nodes(value[key])  # type: ignore[index]


def kmq(make: Maker) -> Line:
    """Model files: their bytes, their manifest, their tensors; with and without a fitting checksum."""
    from kmq_jax.models import artifact

    good = (make.base / make.rng.choice(("model.kmq", "two.kmq"))).read_bytes()
    if make.rng.random() < 0.3:
        return ["summarize", "--model=" + make.file("a.kmq", make.damaged(good))]
    arrays = dict(safetensors.numpy.load(good))
    end = 8 + int.from_bytes(good[:8], "little")
    text = json.loads(good[8:end])["__metadata__"]["kmq"]
    if make.rng.random() < 0.5:
        text = make.json(json.loads(text))
    else:
        name = make.rng.choice(sorted(arrays))
        array = arrays[name]
        kind = make.rng.randrange(7)
        if kind == 0:
            del arrays[name]
        elif kind == 1:
            arrays[name + make.rng.choice(("x", "/below", "#codebook", "#x"))] = array
        elif kind == 2:
            arrays[name] = array[..., None] if make.rng.random() < 0.5 else array.reshape(-1)
        elif kind == 3 and array.dtype.kind == "f":
            arrays[name] = np.where(
                np.arange(array.size).reshape(array.shape) == 0, make.rng.choice((np.nan, np.inf)), array
            )
        elif kind == 4:
            arrays[name] = array.astype(make.rng.choice(("int8", "float16", "bool", "float64")))
        elif kind == 5:
            arrays[name] = array[:0] if array.ndim else array
        else:
            arrays[name] = np.zeros_like(array)
    seal = artifact._checksum(text, arrays)
    return ["summarize", "--model=" + make.file("a.kmq", safetensors.numpy.save(arrays, {"kmq": text, "sha256": seal}))]


def policies(make: Maker) -> Line:
    """Policies of cascades, and the trials and embeddings they run on."""
    good = json.loads((make.base / "policy.json").read_text())
    policy = make.file("policy.json", make.json(good))
    stages = [f"--stage={bits}:{make.base}/e{bits}.npz" for bits in (2, 4)]
    return [
        "cascade",
        f"--policy={policy}",
        *stages,
        f"--trials={make.base}/trials",
        f"--json={make.out}/c.json",
        "--replicates=0",
    ]


def embeddings(make: Maker) -> Line:
    """Embedding files: damaged archives, arrays of other types and shapes, bombs."""
    kind = make.rng.randrange(4)
    if kind == 0:
        data = make.damaged((make.base / "e2.npz").read_bytes())
    else:
        with np.load(make.base / "e2.npz") as held:
            arrays = dict(held)
        name = make.rng.choice(sorted(arrays))
        array = arrays[name]
        change = make.rng.randrange(7)
        if change == 0:
            del arrays[name]
        elif change == 1:
            arrays[name] = array.astype(object)
        elif change == 2:
            arrays[name] = np.zeros((0, 3)) if make.rng.random() < 0.5 else array[..., None]
        elif change == 3 and array.dtype.kind == "f":
            array[0, 0] = make.rng.choice((np.nan, np.inf, 0, 1e38))
        elif change == 4:
            arrays[name] = np.zeros(1)
        elif change == 5:
            arrays[name] = array[:-1] if array.ndim else array
        written = io.BytesIO()
        np.savez(written, **arrays)
        if change == 6:
            written = _bomb(make, name)
        data = written.getvalue()
    where = make.file("e.npz", data)
    return [
        "score",
        f"--embeddings={where}",
        f"--trials={make.base}/trials",
        f"--out={make.out}/s.txt",
        "--replicates=0",
    ]


def _bomb(make: Maker, name: str) -> io.BytesIO:
    """An archive whose array claims, or holds, far more than its size."""
    header = io.BytesIO()
    shape = (10**9, 10**6) if make.rng.random() < 0.5 else (1 << 28,)
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as archive:
        for one in ("ids", "embeddings"):
            archive.writestr(f"{one}.npy", header.getvalue() + bytes(1 << 20))
    return written


def trials(make: Maker) -> Line:
    """Trial lists."""
    where = make.file("trials", make.text((make.base / "trials").read_text()))
    return [
        "score",
        f"--embeddings={make.base}/e2.npz",
        f"--trials={where}",
        f"--out={make.out}/s.txt",
        "--replicates=0",
    ]


def audio(make: Maker) -> Line:
    """Recordings in every container, damaged, cut, empty, mislabelled."""
    source = make.base / "audio" / make.rng.choice(sorted(os.listdir(make.base / "audio")))
    data = source.read_bytes()
    kind = make.rng.randrange(4)
    if kind == 0:
        data = data[: make.rng.randrange(len(data))]
    elif kind < 3:
        data = make.damaged(data)
    suffix = source.suffix if make.rng.random() < 0.9 else make.rng.choice((".wav", ".flac", ".mp3", ".ogg", ".m4a"))
    make.file(f"data/ann/a{suffix}", data)
    return ["extract", f"--model={make.base}/model.kmq", f"--data={make.folder}/data", f"--out={make.out}/e.npz"]


def lists(make: Maker) -> Line:
    """Lists of recordings: Kaldi's and CSV."""
    wav = make.base / "audio" / "a.wav"
    files = {
        "wav.scp": f"u1 {wav}\nu2 {wav}\n",
        "utt2spk": "u1 s1\nu2 s2\n",
        "segments": "u1 u1 0 0.3\nu2 u2 0.1 -1\n",
        "spk2age": "s1 30\n",
    }
    if make.rng.random() < 0.4:
        text = f"id,path,speaker,start,stop,age\nu1,{wav},s1,0,0.3,20\nu2,{wav},s2,,,\n"
        data = make.file("list.csv", make.text(text))
    else:
        wrong = make.rng.choice(sorted(files))
        for name, text in files.items():
            make.file(f"k/{name}", make.text(text) if name == wrong else text)
        data = str(make.folder / "k")
    return ["extract", f"--model={make.base}/model.kmq", f"--data={data}", f"--out={make.out}/e.npz"]


@functools.cache
def good_lines(base: Path, out: Path) -> list[Line]:
    """Command lines that are right, to be changed in one word."""
    stages = [f"--stage={bits}:{base}/e{bits}.npz" for bits in (2, 4)]
    listed = f"--trials={base}/trials"
    model, data = f"--model={base}/model.kmq", f"--data={base}/data"
    return [
        ["quantize", model, "--bits=2", "--unfitted", f"--out={out}/q.kmq", "--skip=^stem/", "--granularity=channel"],
        ["quantize", model, "--bits=4", "--unfitted", "--nested=2", f"--out={out}/q.kmq", f"--rules={base}/rules.json"],
        ["summarize", model, f"--json={out}/s.json"],
        [
            "extract",
            f"--model={base}/two.kmq",
            data,
            f"--out={out}/e.npz",
            "--bits=2",
            "--max_seconds=1",
            "--batch_size=2",
        ],
        [
            "score",
            f"--embeddings={base}/e2.npz",
            listed,
            f"--out={out}/s.txt",
            f"--json={out}/s.json",
            "--replicates=20",
        ],
        [
            "score",
            f"--embeddings={base}/e2.npz",
            listed,
            f"--snorm_cohort={base}/e4.npz",
            "--top_n=4",
            f"--det={out}/d.png",
        ],
        [
            "calibrate",
            *stages,
            f"--reference={base}/e4.npz",
            listed,
            f"--out={out}/p.json",
            "--replicates=20",
            "--alpha=0.1",
        ],
        ["cascade", f"--policy={base}/policy.json", *stages, listed, f"--out={out}/d.csv", f"--json={out}/c.json"],
        ["import_model", f"--source={base}/model.onnx", f"--out={out}/imported"],
        ["export", model, f"--out={out}/m.onnx", "--opset=18"],
        ["tables", f"--file={base}/readme.md"],
        ["prepare_data", f"--source={base}/no-such-data", f"--out={out}/prepared", "--workers=1", "--min_seconds=0.2"],
        ["diagnose", f"--reference={base}/e4.npz", f"--quantized=2:{base}/e2.npz", listed, f"--out={out}/diagnosis"],
        ["enroll", f"--store={out}/people", model, "--speaker=c", "--replace", f"{base}/audio/a.wav"],
        ["identify", f"--store={base}/people", f"{base}/audio/a.wav", "--threshold=0.5", "--false_accept=0.01"],
        ["speakers", f"--store={base}/people"],
        ["threshold", model, f"--data={base}/several", f"--out={out}/t.json", "--false_accept=0.5", "--replicates=100"],
        ["verify", f"--store={base}/people", "--speaker=a", f"{base}/audio/a.wav", f"--json={out}/v.json"],
        [
            "conditions",
            f"--reference={base}/model.kmq",
            f"--quantized=2:{base}/two.kmq",
            f"--data={base}/several",
            "--condition=first=0.4",
            "--replicates=20",
            f"--json={out}/conditions.json",
        ],
        [
            "push",
            model,
            "--repo=me/net",
            "--license=mit",
            "--source=us",
            f"--card={out}/card.md",
            f"--out={out}/told.kmq",
        ],
        ["demo", model, "--threshold=0.5", f"--runtime={base}/ort", f"--out={out}/page"],
        [
            "verify",
            f"--cascade={base}",
            f"--enrol={base}/audio/a.wav",
            f"--test={base}/audio/a.flac",
            f"--json={out}/v.json",
        ],
        [
            "bench",
            "score",
            "--trials=100",
            "--utterances=40",
            "--speakers=10",
            "--replicates=20",
            "--repeats=1",
            "--dim=2",
        ],
        ["train", "--config=quickstart:smoke", f"--workdir={out}/run", "--config.data.train=no-such-data"],
        ["study", "--config=quickstart:smoke", f"--workdir={out}/run", "--config.data.train=no-such-data"],
    ]


def flags(make: Maker) -> Line:
    """Every command with one flag that is wrong, twice, misspelt, missing, or of a strange value."""
    line = list(make.rng.choice(good_lines(make.base, make.out)))
    at = make.rng.randrange(1, len(line))
    name, _, value = line[at].partition("=")
    kind = make.rng.randrange(8)
    if kind == 0:
        line[at] = name
    elif kind == 1:
        del line[at]
    elif kind == 2:
        line.append(line[at])
    elif kind == 3:
        line[at] = name[:-1] + "=" + value
    elif kind < 6:
        line[at] = f"{name}={make.rng.choice(NUMBERS)}"
    else:
        line[at] = f"{name}={make.place()}"
    return line


def outputs(make: Maker) -> Line:
    """Outputs that cannot be written, that are one another, that are read."""
    written = ("--out", "--json", "--det", "--workdir", "--cascade")
    lines = [line for line in good_lines(make.base, make.out) if any(w.partition("=")[0] in written for w in line)]
    line = list(make.rng.choice(lines))
    at = make.rng.choice([i for i, word in enumerate(line) if word.partition("=")[0] in written])
    name = line[at].partition("=")[0]
    others = [word.partition("=")[2] for i, word in enumerate(line) if i != at and "/" in word]
    full = f"{make.file('a-file', 'x')}/below"
    places = [make.place(), full, f"{make.base}/model.kmq/x", str(make.out), "/proc/x", *others]
    line[at] = f"{name}={make.rng.choice(places)}"
    return line


@functools.cache
def _settings() -> list[tuple[str, object]]:
    from kmq_jax.training.config import default_config

    def walk(tree: dict, prefix: str) -> Iterator[tuple[str, object]]:
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return list(walk(default_config("resnet18").to_dict(), ""))


def settings(make: Maker) -> Line:
    """Settings of configurations, and configurations that are none."""
    command = make.rng.choice(("train", "train", "study"))
    end = [f"--workdir={make.out}/run", "--config.data.train=no-such-data"]
    kind = make.rng.randrange(10)
    if kind == 0:
        texts = [
            "\0\1\2",
            "import",
            "get_config = 1",
            "def get_config(): raise KeyError('x')",
            "def get_config(): return 3",
        ]
        texts += ["x" * 5, "def get_config():\n  return get_config()", "import no_such_module", "\x80\x04K\x01.", "1/0"]
        return [command, "--config=" + make.file("own.py", make.rng.choice(texts)), *end]
    if kind == 1:
        return [
            command,
            f"--config={make.rng.choice(['quickstart:', 'quickstart:x', 'no', ':', '/', 'a:b:c', '/dev/null'])}",
            *end,
        ]
    name, value = make.rng.choice(_settings())
    if kind == 2:
        name = name[:-1]
    wrong = make.rng.choice([*NUMBERS, "(1,2)", "'a'", "{}", "(10000000,)", "()", "((1,2),)", "-" + str(value)])
    line = [command, "--config=quickstart:smoke", f"--config.{name}={wrong}", *end]
    return line[:-1] if name == "data.train" else line


def imports(make: Maker) -> Line:
    """Checkpoints of other toolkits: safetensors, PyTorch, ONNX; damaged, or with other tensors."""
    names = [name for name in ("model.safetensors", "model.pt", "model.onnx") if (make.base / name).exists()]
    name = make.rng.choice(names)
    data = make.damaged((make.base / name).read_bytes())
    if name == "model.safetensors" and make.rng.random() < 0.6:
        tensors = dict(safetensors.numpy.load((make.base / name).read_bytes()))
        one = make.rng.choice(sorted(tensors))
        kind = make.rng.randrange(5)
        if kind == 0:
            del tensors[one]
        elif kind == 1:
            tensors[one + ".x"] = tensors[one]
        elif kind == 2:
            tensors[one] = tensors[one][..., None]
        elif kind == 3:
            tensors[one] = np.full_like(tensors[one], np.nan) if tensors[one].dtype.kind == "f" else tensors[one]
        else:
            tensors[one] = tensors[one].astype(make.rng.choice(("int8", "float64", "bool")))
        data = safetensors.numpy.save(tensors)
    return ["import_model", "--source=" + make.file(name, data), f"--out={make.out}/imported"]


def workdirs(make: Maker) -> Line:
    """Directories that claim to be models or cascades."""
    files = [
        "config.json",
        "policy.json",
        "cascade.json",
        "model.kmq",
        "checkpoints/3/x",
        "checkpoints/x",
        "averaged.kmq",
    ]
    for name in make.rng.sample(files, make.rng.randrange(1, 4)):
        good = make.base / name
        kind = make.rng.randrange(3)
        if kind == 0 and not (make.folder / "dir" / name).exists() and "/" not in name:
            (make.folder / "dir").mkdir(exist_ok=True)
            os.mkfifo(make.folder / "dir" / name)
        elif good.is_file() and name.endswith(".json"):
            make.file(f"dir/{name}", make.json(json.loads(good.read_text())))
        else:
            make.file(
                f"dir/{name}", make.rng.choice((b"", b"{}", b"\0" * 100, b'{"model": 3}', b'{"model": {"name": []}}'))
            )
    place = str(make.folder / "dir")
    if make.rng.random() < 0.5:
        return ["summarize", f"--model={place}"]
    return ["verify", f"--cascade={place}", f"--enrol={make.base}/audio/a.wav", f"--test={make.base}/audio/a.wav"]


def rules(make: Maker) -> Line:
    """Rules of quantization: expressions that explode or match nothing, and files of rules."""
    patterns = [
        "(a+)+$",
        "(.*.*.*)*x",
        "(",
        "[",
        "(?P<x>",
        "\\",
        "x{99999999999}",
        "^",
        "",
        "(?i)KERNEL",
        "(.|.)*$",
        "((((" * 50,
    ]
    line = ["quantize", f"--model={make.base}/model.kmq", "--bits=2", "--unfitted", f"--out={make.out}/q.kmq"]
    if make.rng.random() < 0.5:
        return [*line, f"--skip={make.rng.choice(patterns)}"]
    good = [{"pattern": "kernel$", "bits": 4}, {"pattern": make.rng.choice(patterns), "bits": None}]
    return [*line, "--rules=" + make.file("rules.json", make.json(good))]


def stores(make: Maker) -> Line:
    """Stores of speakers: files that are damaged, and rows that no store of ours has."""
    place = Path(make.file("people/speakers.sqlite", (make.base / "people" / "speakers.sqlite").read_bytes()))
    if make.rng.random() < 0.6:
        place.write_bytes(make.damaged(place.read_bytes()))
    else:
        column = make.rng.choice(("speaker", "path", "hash", "seconds", "enrolled", "embedding"))
        table, column = make.rng.choice((("recording", column), ("model", make.rng.choice(("place", "bits", "dim")))))
        value = make.rng.choice(("NULL", "''", "x'00ff'", "-1", "1e300", "'\x1b[2J'", "zeroblob(100000)", "1 << 40"))
        with contextlib.closing(sqlite3.connect(place)) as raw, contextlib.suppress(sqlite3.Error), raw:
            raw.execute(f"UPDATE {table} SET {column} = {value}")
    sound = f"{make.base}/audio/a.wav"
    store = f"--store={place.parent}"
    lines = [["speakers", store], ["identify", store, sound], ["enroll", store, "--speaker=c", sound]]
    lines += [["verify", store, "--speaker=a", sound], ["enroll", store, f"--model={make.base}/two.kmq", "--again"]]
    return make.rng.choice(lines)


def thresholds(make: Maker) -> Line:
    """Files of `threshold`, where a decision is made by them; and the recordings that one is found from."""
    rng, base = make.rng, make.base
    sound = f"{base}/audio/a.wav"
    if rng.random() < 0.3:
        for speaker in range(rng.randrange(5)):
            for one in range(rng.randrange(4)):
                data = (base / "audio" / rng.choice(("a.wav", "a.flac", "float.wav"))).read_bytes()
                name = rng.choice((f"s{speaker}", "\udcff", "train", "a b"))
                make.file(f"data/{name}/{one}.wav", make.damaged(data) if rng.random() < 0.2 else data)
        (make.folder / "data").mkdir(exist_ok=True)
        wanted = f"--false_accept={rng.choice(('0.01', '0.5', *NUMBERS))}"
        line = ["threshold", f"--model={base}/model.kmq", f"--data={make.folder}/data", f"--out={make.out}/t.json"]
        return [*line, wanted, f"--replicates={rng.choice(('100', '100', *NUMBERS))}"]
    value = rng.choice(NUMBERS)
    if rng.random() < 0.8:
        value = make.file("t.json", make.json(json.loads((base / "threshold.json").read_text())))
    store, model = f"--store={base}/people", f"--model={base}/model.kmq"
    lines = [["identify", store, sound], ["verify", store, "--speaker=a", sound]]
    lines += [["verify", model, f"--enrol={sound}", f"--test={base}/audio/a.flac", f"--json={make.out}/v.json"]]
    return [*rng.choice(lines), f"--threshold={value}"]


def prepared(make: Maker) -> Line:
    """Datasets in shards: their lists, what tfds is told of them, their bytes."""
    for path in sorted((make.base / "set").iterdir()):
        make.file(f"set/{path.name}", path.read_bytes())
    path = make.folder / "set" / make.rng.choice(sorted(os.listdir(make.base / "set")))
    kind = make.rng.randrange(8)
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.unlink()
        os.mkfifo(path)
    elif kind < 5 and path.suffix == ".json":
        path.write_text(make.json(json.loads(path.read_text())))
    elif kind < 5 and path.suffix == ".csv":
        path.write_bytes(make.text(path.read_text()))
    else:
        path.write_bytes(make.damaged(path.read_bytes()))
    return ["extract", f"--model={make.base}/model.kmq", f"--data={make.folder}/set", f"--out={make.out}/e.npz"]


CLASSES: dict[str, Callable[[Maker], Line]] = {
    "kmq": kmq,
    "policies": policies,
    "embeddings": embeddings,
    "trials": trials,
    "audio": audio,
    "lists": lists,
    "flags": flags,
    "outputs": outputs,
    "settings": settings,
    "imports": imports,
    "workdirs": workdirs,
    "rules": rules,
    "stores": stores,
    "thresholds": thresholds,
    "prepared": prepared,
}
"""What inputs there are, by class."""


def base_files(base: Path) -> None:
    """Makes the good files that inputs start from. It uses JAX: to be called in a process of its own."""
    _networks(base)
    _scores(base)
    _recordings(base)


def _networks(base: Path) -> None:
    """A network in all forms, and what lies beside one."""
    import jax

    from kmq_jax import quant
    from kmq_jax.demo import runtime
    from kmq_jax.models import registry
    from kmq_jax.models.speaker_model import SpeakerModel, save_model

    name = "wespeaker_resnet18"
    own = registry.smoke_settings(name)
    own = {**registry.default_settings(name), **own}
    own.pop("dtype", None)
    network = registry.build(name, **own)
    variables = jax.device_get(registry.initialize(network, jax.random.key(0)))
    model = SpeakerModel(name, own, "wespeaker", variables)
    save_model(base / "model.kmq", model)
    two = quant.quantize_params(variables["params"], [quant.QuantRule("/kernel$", quant.QuantSpec(4, coarse=(2,)))])
    save_model(base / "two.kmq", SpeakerModel(name, own, "wespeaker", {**variables, "params": two}))
    (base / "config.json").write_text(json.dumps({"model": {"name": name, **own}, "frontend": "wespeaker"}))
    (base / "rules.json").write_text('[{"pattern": "stem", "bits": null}]')
    (base / "readme.md").write_text("text\n")
    (base / "ort").mkdir()
    for name in runtime.FILES:  # nothing here runs them
        (base / "ort" / name).write_text(name)
    safetensors.numpy.save_file(
        {"conv1.weight": np.ones((4, 1, 3, 3), np.float32), "bn1.weight": np.ones(4, np.float32)},
        base / "model.safetensors",
    )
    with contextlib.suppress(ImportError):
        import torch

        torch.save({"conv1.weight": torch.ones(4, 1, 3, 3)}, base / "model.pt")
    with contextlib.suppress(ImportError):
        from kmq_jax.interop.export import export_model

        export_model(str(base / "model.kmq"), base / "model.onnx", None, None)


def _scores(base: Path) -> None:
    """Embeddings of made-up voices, their trials, and a cascade over them."""
    from kmq_jax.cascade.calibrate import calibrate
    from kmq_jax.cascade.options import CalibrationOptions
    from kmq_jax.scoring.table import write_embeddings

    rng = np.random.default_rng(0)
    ids = [f"s{s}/u{u}.wav" for s in range(6) for u in range(3)]
    voices = rng.normal(size=(6, 8)).repeat(3, axis=0)
    for bits, noise in ((2, 0.9), (4, 0.5)):
        rows = (voices + noise * rng.normal(size=voices.shape)).astype(np.float32)
        write_embeddings(base / f"e{bits}.npz", ids, ids, [one[:2] for one in ids], rows, "")
    pairs = [f"{int(a[:2] == b[:2])} {a} {b}" for i, a in enumerate(ids) for b in ids[i + 1 :]]
    (base / "trials").write_text("\n".join(pairs) + "\n")
    levels = [(bits, str(base / f"e{bits}.npz")) for bits in (2, 4)]
    calibrate(levels, levels[1][1], str(base / "trials"), CalibrationOptions(replicates=0)).save(base / "policy.json")
    (base / "cascade.json").write_text(json.dumps({"kind": "cascade", "models": {"2": "two.kmq", "4": "two.kmq"}}))


def _recordings(base: Path) -> None:
    """Recordings in every container, a store of speakers, a threshold, a dataset in shards."""
    from kmq_jax.data import writer
    from kmq_jax.data.source import open_source
    from kmq_jax.scoring.options import ThresholdOptions
    from kmq_jax.scoring.threshold import find_threshold, save_threshold
    from kmq_jax.speakers.store import SpeakerStore

    rng, time_of = np.random.default_rng(1), np.arange(8000) / 16000
    wave = (0.3 * np.sin(2 * np.pi * 200 * time_of) + 0.01 * rng.normal(size=8000)).astype(np.float32)
    (base / "audio").mkdir()
    for suffix, form in {
        "wav": "WAV", "rf64": "RF64", "w64": "W64", "aiff": "AIFF", "au": "AU", "sph": "NIST", "caf": "CAF",
        "flac": "FLAC", "ogg": "OGG", "mp3": "MP3",
    }.items():  # fmt: skip
        soundfile.write(base / "audio" / f"a.{suffix}", wave, 16000, format=form)
    soundfile.write(base / "audio" / "float.wav", wave, 16000, subtype="FLOAT")
    store = SpeakerStore(base / "people", base / "model.kmq")
    store.enrol("a", [base / "audio" / "a.flac"])
    store.enrol("b", [base / "audio" / "float.wav"])
    for place in (f"s{s}/{u}.wav" for s in range(4) for u in range(2)):
        (base / "several" / place).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(base / "several" / place, wave + 0.05 * rng.normal(size=8000), 16000)
    found = find_threshold(
        str(base / "model.kmq"), str(base / "several"), ThresholdOptions(false_accept=0.5, replicates=100)
    )
    save_threshold(base / "threshold.json", found, "model.kmq", "several", "kmq-jax threshold")
    (base / "data" / "ann").mkdir(parents=True)
    shutil.copy(base / "audio" / "a.wav", base / "data" / "ann" / "a.wav")
    writer._written = multiprocessing.Value("q", 0)
    writer._run = lambda tasks, workers, total: [writer._write_shard(task) for task in tasks]  # here, which is quicker
    writer.prepare(open_source(base / "several"), base / "set", min_seconds=0.2)


def started(work: Callable[[], None], stdout: int, stderr: int, folder: Path) -> int:
    """Runs `work` in a forked process; its number.

    Args:
        work: what to run.
        stdout: open file for what it prints.
        stderr: open file for what it tells.
        folder: where to run it.
    """
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        os.setsid()
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        # Anew: those that this process had know what they lead to.
        sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
        os.chdir(folder)
        # What runs in the background ignores the one; Python itself ignores the other.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        work()
        status = 0
    except SystemExit as asked:
        status = asked.code if isinstance(asked.code, int) else 1 if asked.code else 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def ended(child: int, limit: float, interrupt: float | None = None) -> int | None:
    """Waits for a forked process; its exit status, or None where it had to be stopped.

    Args:
        child: its number.
        limit: seconds.
        interrupt: seconds after which Ctrl-C is pressed.
    """
    began = time.monotonic()
    while time.monotonic() < began + limit:
        if interrupt is not None and time.monotonic() > began + interrupt:
            interrupt = None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGINT)
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            with contextlib.suppress(ProcessLookupError):  # what it may have started
                os.killpg(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)  # it may not lead a group yet
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def forked(
    work: Callable[[], None], log: Path, limit: float, folder: Path, interrupt: float | None = None
) -> int | None:
    """Runs `work` in a forked process that prints into a file; see `started` and `ended`."""
    with log.open("wb") as file:
        return ended(started(work, file.fileno(), file.fileno(), folder), limit, interrupt)


def command(line: Line) -> None:
    """Runs a command line in this process, as `kmq-jax` does."""
    from kmq_jax.cli import main

    sys.argv = ["kmq-jax", *line]
    main.main()


def problems(status: int | None, said: str, make: Maker) -> list[str]:
    """What is wrong with how a command ended."""
    found = []
    if status is None:
        found.append("hangs")
    elif status not in (0, 2):
        found.append(f"status {status}")
    if "Traceback (most recent call last)" in said:
        found.append("traceback")
    lines = [line for line in said.splitlines() if line.startswith("kmq-jax")]
    if status == 2 and len(lines) != 1:
        found.append(f"{len(lines)} lines of error")
    for path in make.out.rglob("*"):
        if ".part-" in path.name:
            found.append(f"left {path.name}")
        elif path.suffix == ".json" and path.is_file() and not path.is_symlink():
            try:
                json.loads(path.read_text())
            except ValueError:
                found.append(f"half-written {path.name}")
    return found


def digests(folder: Path) -> dict[str, str]:
    """Of all good files. What a command adds, such as a converted model beside its file, is no change of one."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and "cache" not in path.parts]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run_one(
    name: str, number: int, seed: int, base: Path, folder: Path, limit: float = LIMIT
) -> tuple[list[str], Line, str]:
    """Makes and runs one input."""
    shutil.rmtree(folder, ignore_errors=True)
    make = Maker(f"{seed} {name} {number}", base, folder)
    line = [word.replace("\0", "?") for word in CLASSES[name](make)]
    log = base.parent / "log"
    before = digests(base)
    status = forked(lambda: command(line), log, limit, folder)
    said, after = log.read_text(errors="replace"), digests(base)
    changed = [f"changed {path}" for path, digest in before.items() if after.get(path) != digest]
    return problems(status, said, make) + changed, line, said


def main() -> None:
    """Runs the inputs and prints the table; the status is 1 where one is not clean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2500)
    parser.add_argument("--seconds", type=float, default=1800, help="no new input after so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds that a command may take")
    parser.add_argument("--classes", default=",".join(CLASSES))
    parser.add_argument("--only", help="CLASS:NUMBER: one input again")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        base, folder = Path(place) / "base", Path(place) / "input"
        base.mkdir()
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(place) / "cache")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        _import_all()
        if forked(lambda: base_files(base), Path(place) / "log", 600, base) != 0:
            sys.exit((Path(place) / "log").read_text())
        if args.only:
            name, _, number = args.only.partition(":")
            found, line, said = run_one(name, int(number), args.seed, base, folder, args.limit)
            print(" ".join(map(repr, line)), said, found, sep="\n")
            return
        counts = _run_all(args, base, folder, began)
    seconds = time.monotonic() - began
    rows = [
        {"class": name, "tried": tried, "clean": clean, "violations": bad}
        for name, (tried, clean, bad) in counts.items()
    ]
    total = {key: sum(row[key] for row in rows) for key in ("tried", "clean", "violations")}
    print(f"\n{'class':12}{'tried':>8}{'clean':>8}{'violations':>12}")
    for row in [*rows, {"class": "all", **total}]:
        print(f"{row['class']:12}{row['tried']:8}{row['clean']:8}{row['violations']:12}")
    print(f"{seconds:.0f} s, seed {args.seed}")
    if args.json:
        command_line = f"python launch/fuzz.py --inputs={args.inputs} --seed={args.seed}"
        summary = {"kind": "fuzz", "command": command_line, "seconds": round(seconds, 1), "classes": rows, **total}
        args.json.write_text(json.dumps(summary, indent=2) + "\n")
    sys.exit(1 if total["violations"] else 0)


def _import_all() -> None:
    """What children need, without anything that starts threads: a fork would lack them."""
    import importlib

    from kmq_jax.cli.main import COMMANDS

    for name in COMMANDS:
        importlib.import_module(f"kmq_jax.cli.{name}")
    for name in (
        "models.speaker_model",
        "scoring.run",
        "scoring.threshold",
        "cascade.evaluate",
        "cascade.calibrate",
        "interop.import_model",
    ):
        importlib.import_module(f"kmq_jax.{name}")
    for name in (
        "study.pipeline",
        "training.loop",
        "ptq.quantize",
        "diagnosis.run",
        "diagnosis.report",
        "cascade.verifier",
        "speakers.store",
    ):
        importlib.import_module(f"kmq_jax.{name}")
    for name in ("torch", "onnx", "onnx.reference", "ml_collections.config_flags", "matplotlib.figure"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def _run_all(args: argparse.Namespace, base: Path, folder: Path, began: float) -> dict[str, list[int]]:
    chosen = args.classes.split(",")
    counts: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    for i in range(args.inputs):
        if time.monotonic() - began > args.seconds:
            print(f"stopped after {args.seconds:g} s")
            break
        name, number = chosen[i % len(chosen)], i // len(chosen)
        found, line, said = run_one(name, number, args.seed, base, folder, args.limit)
        counts[name][0] += 1
        counts[name][2 if found else 1] += 1
        if found:
            print(f"{name}:{number}: {', '.join(found)}: {' '.join(map(repr, line))[:400]}", flush=True)
            print("    " + "\n    ".join(said.strip().splitlines()[-3:])[:1000], flush=True)
    return dict(counts)


if __name__ == "__main__":
    main()
