"""`kmq-jax import_model`: a pretrained model of WeSpeaker or Kiwano as a MODEL of ours."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kmq_jax.cli.command import Command
from kmq_jax.cli.flags import options_of
from kmq_jax.core.options import Options, option


@dataclass(frozen=True, kw_only=True)
class Files(Options):
    """What the command reads and writes."""

    source: Path = option("the file to import")
    out: Path = option("directory to write; it is a MODEL for every command", metavar="DIR", writes="directory")
    format: Literal["wespeaker-onnx", "onnx", "wespeaker-torch", "kiwano", "3dspeaker"] | None = option(
        "of the file; left out: found from the file", None
    )
    activation: Literal["silu", "relu", "none"] | None = option(
        "what checkpoints do not record: of a Kiwano network's blocks (left out: silu), or of CAM++'s embedding "
        "(left out: relu with 3D-Speaker's, whose own code has none)",
        None,
    )
    frontend: Literal["kiwano", "wespeaker", "3dspeaker", "wespeaker60", "wespeaker72"] | None = option(
        "that an ONNX graph was trained with; left out: what the file names, or WeSpeaker's of so many features", None
    )
    layout: Literal["frames-first", "features-first"] | None = option(
        "of an ONNX graph's input, where its shape does not tell", None
    )
    output: str | None = option("of an ONNX graph that has several: the embedding's name", None)


COMMAND = Command(
    "import_model",
    "Imports a pretrained network of WeSpeaker (ONNX, PyTorch), 3D-Speaker or Kiwano, or its tensors as .safetensors.\n"
    "Nothing in the file is executed; every tensor must have its place. Any other ONNX network from features to an\n"
    "embedding is imported as a graph, where ONNX Runtime gives the same embeddings.",
    "kmq-jax import_model --source=voxceleb_resnet34.onnx --out=runs/wespeaker34",
    (Files,),
)


def main() -> None:
    """Runs the command."""
    files = options_of(Files, COMMAND.parse())
    from kmq_jax.interop.import_model import describe, import_model
    from kmq_jax.interop.onnx_network import Asked

    asked = Asked(files.frontend, files.layout, files.output)
    model = import_model(files.source, files.out, files.format, files.activation, asked)
    print(f"{files.out}: {describe(model)}")
