"""A MODEL as an ONNX file that says how its input is computed."""

from pathlib import Path

from kmq_jax.interop import onnx_export
from kmq_jax.models.speaker_model import SpeakerModel, frontend_of, load_model


def export_model(
    model: str | Path, out: Path, bits: int | None = None, opset: int | None = None
) -> tuple[SpeakerModel, int]:
    """Writes a MODEL as ONNX. Quantized weights stay packed.

    Args:
        model: the MODEL.
        out: the .onnx file.
        bits: at which a nested model is read; the most it has where left out.
        opset: operator set; where left out, the oldest with a type for all of the model's bits.

    Returns:
        The model, and the operator set that was taken.

    Raises:
        UserError: the model cannot be read or exported.
    """
    speaker_model = load_model(model, bits)
    network = speaker_model.network()
    about = properties(speaker_model, network.embedding_size)
    return speaker_model, onnx_export.export(out, network, speaker_model.variables, about, bits, opset)


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
