"""`kmq-jax export`: a MODEL as an ONNX file."""

from dataclasses import dataclass
from pathlib import Path

from kmq_jax.cli.command import Command
from kmq_jax.cli.flags import options_of
from kmq_jax.core.options import Options, option


@dataclass(frozen=True, kw_only=True)
class Files(Options):
    """What the command reads and writes."""

    model: str = option("MODEL: a training workdir, a .kmq file or an imported directory", metavar="MODEL")
    out: Path = option("the .onnx file to write", writes="file")
    bits: int | None = option("bits at which a nested model is read; left out: the most it has", None, at_least=1)
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

    model, opset = export_model(files.model, files.out, files.bits, files.opset)
    print(f"{files.out}: {model.architecture}, {files.out.stat().st_size / 1e6:.2f} MB, operator set {opset}")
