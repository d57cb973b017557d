"""`kmq-jax export`: a MODEL as an ONNX file."""

import argparse
from pathlib import Path

from kmq_jax.cli import command
from kmq_jax.interop import onnx_export
from kmq_jax.models.speaker_model import SpeakerModel, frontend_of, load_model


def flags() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = command.parser(
        "export",
        "Writes a model as ONNX: `feats` [batch, frames, features], mean-normalised over the utterance, to `embs` "
        "[batch, size]. Quantized weights stay packed in the file.",
        "kmq-jax export --model=runs/r36-2bit.kmq --out=r36-2bit.onnx",
    )
    parser.add_argument(
        "--model", required=True, help="MODEL: a training workdir, a .kmq file or an imported directory"
    )
    parser.add_argument("--out", required=True, type=Path, help="the .onnx file to write")
    parser.add_argument("--bits", type=int, help="width at which nested codebooks are read (default: the widest)")
    parser.add_argument(
        "--opset",
        type=int,
        help=f"operator set, from {onnx_export.OLDEST_OPSET} (default: the oldest with a type for every width)",
    )
    return parser


def properties(speaker_model: SpeakerModel, embedding_size: int) -> dict[str, str]:
    """What a user of the file must know to compute its input, as text; the first five are WeSpeaker's names."""
    fbank = frontend_of(speaker_model.frontend)
    return {
        "framework": speaker_model.frontend,
        "sample_rate": str(fbank.sample_rate),
        "output_dim": str(embedding_size),
        "normalize_samples": str(int(fbank.waveform_scale == 1)),
        "comment": f"{speaker_model.architecture}, exported by kmq_jax; input features mean-normalised",
        "features": str(fbank.num_features),
        "window": fbank.window,
        "frame_length_ms": str(fbank.frame_length_ms),
        "frame_shift_ms": str(fbank.frame_shift_ms),
        "low_freq": str(fbank.low_freq),
        "high_freq": str(fbank.high_freq),
        "use_energy": str(int(fbank.use_energy)),
    }


def main() -> None:
    """Runs the command."""
    args = flags().parse_args()
    speaker_model = load_model(args.model, args.bits)
    network = speaker_model.network()
    about = properties(speaker_model, network.embedding_size)
    opset = onnx_export.export(args.out, network, speaker_model.variables, about, args.bits, args.opset)
    size = args.out.stat().st_size
    print(f"{args.out}: {speaker_model.architecture}, {size / 1e6:.2f} MB, operator set {opset}")
