"""`kmq-jax import_model`: a pretrained model of WeSpeaker or Kiwano as a MODEL of ours."""

import argparse
from pathlib import Path

from kmq_jax.cli import command
from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import named_leaves
from kmq_jax.interop import pretrained
from kmq_jax.models.speaker_model import SpeakerModel, frontend_of, save_model


def flags() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = command.parser(
        "import_model",
        "Imports a pretrained model: WeSpeaker's ResNets (ONNX, PyTorch) and Kiwano's (.ckpt), or their tensors as "
        ".safetensors. Nothing in the file is executed; every tensor must have its place.",
        "kmq-jax import_model --source=voxceleb_resnet34.onnx --out=runs/wespeaker34",
    )
    parser.add_argument("--source", required=True, type=Path, help="the file to import")
    parser.add_argument("--out", required=True, type=Path, help="directory to write; it is a MODEL for every command")
    parser.add_argument("--format", choices=pretrained.FORMATS, help="found from the file where left out")
    parser.add_argument(
        "--activation",
        choices=("silu", "relu"),
        help="of the blocks of a Kiwano network, which its checkpoints do not record (default: silu)",
    )
    return parser


def main() -> None:
    """Runs the command."""
    args = flags().parse_args()
    imported = pretrained.read(args.source, args.format, args.activation)
    features, given = imported.settings["features"], frontend_of(imported.frontend).num_features
    if features != given:
        raise UserError(
            f"{args.source}: the network takes {features} features a frame, "
            f"and the front end of its toolkit ({imported.frontend}) gives {given}"
        )
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out={args.out} is a file; name a directory")
    save_model(args.out / "model.kmq", SpeakerModel(*imported))
    parameters = sum(leaf.size for _, leaf in named_leaves(imported.variables["params"]))
    settings = ", ".join(f"{name} {value}" for name, value in imported.settings.items())
    print(f"{args.out}: {imported.architecture} ({settings}), {parameters / 1e6:.2f} M parameters")
    print(f"front end {imported.frontend}: {frontend_of(imported.frontend)}")
