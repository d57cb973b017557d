"""The page's directory: the page with its scripts and style, the models, and onnxruntime-web."""

import dataclasses
import importlib.resources
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from kmq_jax.cascade.policy import CascadePolicy
from kmq_jax.cascade.verifier import load_cascade
from kmq_jax.core.errors import UserError, reason_of
from kmq_jax.core.files import Json, atomic_write, require_regular
from kmq_jax.demo.runtime import VERSION
from kmq_jax.html import write
from kmq_jax.interop.export import export_model
from kmq_jax.models.onnx_export import require_onnx
from kmq_jax.scoring.threshold import Decider

Place = str | os.PathLike[str]
SCRIPTS = "demo.css", "demo.js", "recorder.js"
RATE = "16000"  # Hz, what the page gives a model
_LARGEST = 1 << 29  # bytes of a model: a browser holds it several times


@dataclasses.dataclass(frozen=True)
class Level:
    """A model of the page; there are several where a cascade decides.

    Attributes:
        file: its name beside the page.
        data: the .onnx file.
        bits: of its weights, such as "2"; empty where unknown.
        name: its network, empty where unknown.
        fingerprint: of the MODEL it was exported from, None where unknown.
        map: a cascade's map of its scores, as `metrics.calibration` writes it; None leaves them as they are.
        gate: scores between which the next level is asked; None of the last.
    """

    file: str
    data: bytes
    bits: str
    name: str
    fingerprint: str | None
    map: Json | None = None
    gate: tuple[float | None, float | None] | None = None

    def settings(self) -> Json:
        """What the page knows of it."""
        return {"file": self.file, "bits": self.bits, "map": self.map, "gate": self.gate}


@dataclasses.dataclass(frozen=True)
class Demo:
    """What a page decides by.

    Attributes:
        levels: the models, in the order in which they are asked.
        threshold: accept from this score on; None where the visitor chooses.
        known: what is known of the threshold's error rates, in one sentence; empty where nothing is.
        enrolment: "each": both sides at a level's bits; "top": enrolled recordings always at the last level's.
        fixed: whether the threshold cannot be changed on the page: a cascade's gates are made for it.
    """

    levels: tuple[Level, ...]
    threshold: float | None = None
    known: str = ""
    enrolment: str = "each"
    fixed: bool = False

    def settings(self) -> Json:
        """What the page's script reads."""
        levels = [level.settings() for level in self.levels]
        return {"levels": levels} | {name: getattr(self, name) for name in ("threshold", "known", "enrolment", "fixed")}


def demo_of_model(model: Place, threshold: Decider | None = None, bits: int | None = None) -> Demo:
    """A page's models and threshold, of one model.

    Args:
        model: a MODEL, which is exported; or an .onnx file of `export --features=inside`.
        threshold: to decide by.
        bits: at which a nested MODEL is read.

    Raises:
        UserError: the model cannot be read, has another input than a wave, or is not that of the threshold.
    """
    if str(model).lower().endswith(".onnx"):
        if bits is not None:
            raise UserError(f"`bits` does not go with {model}: they were chosen when it was exported")
        level = _read_level(Path(model), "model.onnx")
    else:
        level = _exported(model, bits, "model.onnx")
    if threshold is None:
        return Demo((level,))
    if threshold.model is not None and level.fingerprint is None:
        raise UserError(f"{model} does not tell its fingerprint, which `threshold` is for: export it again")
    threshold.require(level.fingerprint or "", str(model))
    threshold.warn_of_vad(False)  # the page embeds recordings whole
    return Demo((level,), threshold.value, threshold.known)


def demo_of_cascade(directory: Place) -> Demo:
    """A page's models and threshold, of a cascade's directory.

    Raises:
        UserError: it is no cascade, or one of its models cannot be read or exported.
    """
    cascade = load_cascade(directory)
    policy = cascade.policy
    levels = []
    for i, bits in enumerate(policy.bits):
        read_at = cascade.model_at(i).bits
        level = _exported(cascade.files[bits], read_at, f"model-{bits}.onnx")
        levels.append(dataclasses.replace(level, bits=str(bits), map=policy.maps[i].to_dict(), gate=_gate(policy, i)))
    return Demo(tuple(levels), policy.threshold, "", policy.enrolment, True)


def _gate(policy: CascadePolicy, level: int) -> tuple[float | None, float | None] | None:
    if level == len(policy.gates):
        return None
    low, high = (side if math.isfinite(side) else None for side in policy.gates[level])  # JSON lacks infinity
    return low, high


def _exported(model: Place, bits: int | None, name: str) -> Level:
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, name)
        export_model(os.fspath(model), file, bits, features_inside=True, compare=False)
        return _read_level(file, name)


def _read_level(file: Path, name: str) -> Level:
    """A model from an .onnx file that may come from anyone: it is looked at, and never run here."""
    onnx = require_onnx()
    require_regular(file)
    try:
        if file.stat().st_size > _LARGEST:
            raise UserError(f"{file} is larger than {_LARGEST:,} bytes: too large for a page")
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {reason_of(error)}") from error
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # of protobuf
        raise UserError(f"{file} is no ONNX file") from error
    if any(tensor.external_data for tensor in model.graph.initializer):
        raise UserError(f"{file} keeps tensors in other files: export it as one file")
    inputs = [given.name for given in model.graph.input]
    if inputs != ["wave"] or "embs" not in [made.name for made in model.graph.output]:
        taken = ", ".join(inputs)[:80] or "nothing"
        raise UserError(f"{file} takes {taken}, not a wave: use a file of kmq-jax export --features=inside")
    about: Mapping[str, str] = {entry.key: entry.value for entry in model.metadata_props}
    if about.get("sample_rate", RATE) != RATE:
        raise UserError(f"{file} is for {about['sample_rate']} Hz; the page gives {RATE} Hz")
    network = about.get("comment", "").partition(",")[0]
    return Level(name, data, about.get("bits", ""), network, about.get("fingerprint"))


def write_demo(out: Path, demo: Demo, runtime: Mapping[str, bytes]) -> None:
    """Writes a page and all that it needs; any static host can serve the directory.

    Args:
        out: the directory, made where it is missing.
        demo: models and threshold.
        runtime: the files of onnxruntime-web, by name.

    Raises:
        UserError: something cannot be written.
    """
    files = {level.file: level.data for level in demo.levels} | {f"ort/{name}": data for name, data in runtime.items()}
    own = importlib.resources.files("kmq_jax.html")
    files |= {name: (own / name).read_bytes() for name in SCRIPTS}
    for name, data in files.items():
        with atomic_write(out / name) as temporary:
            temporary.write_bytes(data)
    # The page last: where it is, all that it names is.
    sizes = [f"{len(level.data) / 1e6:.1f} MB" for level in demo.levels]
    write(out / "index.html", "demo", {}, demo=demo, settings=demo.settings(), sizes=sizes, runtime=VERSION)
