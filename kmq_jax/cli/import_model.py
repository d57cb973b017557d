"""`kmq-jax import_model`: a pretrained model of another toolkit as a MODEL of ours."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from kmq_jax.cli.command import Command
from kmq_jax.cli.flags import options_of
from kmq_jax.core.options import Options, option

FrontEnd: TypeAlias = Literal[
    "kiwano", "wespeaker", "3dspeaker", "wespeaker60", "wespeaker72",
    "speechbrain", "redimnet60", "redimnet72", "redimnet60-15ms", "redimnet72-15ms", "resemblyzer",
]  # fmt: skip


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
    license: str | None = option("short name of the file's licence, such as cc-by-4.0; it stays with the model", None)
    frontend: FrontEnd | None = option(
        "that an ONNX graph was trained with; left out: what the file names, or WeSpeaker's of so many features", None
    )
    layout: Literal["frames-first", "features-first"] | None = option(
        "of an ONNX graph's input, where its shape does not tell", None
    )
    output: str | None = option("of an ONNX graph that has several: the embedding's name", None)
    unfold: str | None = option(
        "put batch normalisation back where the file has it folded into convolutions, measured on 100 crops of this "
        "data; the embeddings stay, and training can normalise by batches again",
        None,
        metavar="DATA",
    )


COMMAND = Command(
    "import_model",
    "Imports a pretrained network, or its tensors as .safetensors, together with the front end it was trained on: of\n"
    "WeSpeaker (ResNet as ONNX or PyTorch; CAM++, ECAPA-TDNN, x-vector, ReDimNet), 3D-Speaker (CAM++), SpeechBrain\n"
    "(ECAPA-TDNN), IDRnD (ReDimNet), Resemblyzer (GE2E) or Kiwano (ResNet). Nothing in the file is executed; every\n"
    "tensor must have its place. Any other ONNX network from features to an embedding is imported as a graph, where\n"
    "ONNX Runtime gives the same embeddings. It cannot mask lengths: its batches hold recordings of equal length, and\n"
    "JAX compiles once for each length, which --engine=onnxruntime avoids.",
    "kmq-jax import_model --source=voxceleb_resnet34.onnx --out=runs/wespeaker34",
    (Files,),
)


def main() -> None:
    """Runs the command."""
    files = options_of(Files, COMMAND.parse())
    from kmq_jax.interop.import_model import describe, import_model
    from kmq_jax.interop.onnx_network import Asked
    from kmq_jax.ptq.unfold import unfolded_on

    asked = Asked(files.frontend, files.layout, files.output)
    change = None if files.unfold is None else unfolded_on(files.unfold)
    made = import_model(files.source, files.out, files.format, files.activation, files.license, asked, change)
    print(f"{files.out}: {describe(made)}")
