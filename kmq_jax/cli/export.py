"""`kmq-jax export`: a MODEL as an ONNX file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kmq_jax.cli.command import Command
from kmq_jax.cli.flags import options_of
from kmq_jax.core.options import Options, option


@dataclass(frozen=True, kw_only=True)
class Files(Options):
    """What the command reads and writes."""

    model: str = option("MODEL: a training workdir, a .kmq file or an imported directory", metavar="MODEL")
    out: Path = option("the .onnx file to write", writes="file")
    bits: int | None = option("bits at which a nested model is read; left out: the most it has", None, at_least=1)
    features: Literal["outside", "inside"] = option(
        "inside: `wave` [batch, samples] in, the filterbank is part of the file", "outside"
    )
    indices: Literal["smallest", "uint4"] = option(
        "smallest: as few bits as the operator set has a type for; uint4: for runtimes without 2-bit types", "smallest"
    )
    opset: int | None = option("operator set; left out: the oldest with a type for all of the model's bits", None)


COMMAND = Command(
    "export",
    "Writes a model as ONNX: `feats` [batch, frames, features], mean-normalised over the utterance, to `embs`\n"
    "[batch, size]. Quantized weights stay packed in the file.",
    "kmq-jax export --model=runs/r36-2bit.kmq --out=r36-2bit.onnx",
    (Files,),
)


def main() -> None:
    """Runs the command."""
    files = options_of(Files, COMMAND.parse())
    from kmq_jax.interop.export import export_model

    inside = files.features == "inside"
    found = export_model(files.model, files.out, files.bits, files.opset, files.indices, inside)
    size = files.out.stat().st_size / 1e6
    print(f"{files.out}: {found.model.architecture}, {size:.2f} MB, operator set {found.opset}")
    print(found.parity or "not compared: ONNX Runtime is not installed")
