"""A MODEL as an ONNX file that says how its input is computed."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from kmq_jax import frontend, quant
from kmq_jax.models import onnx_export
from kmq_jax.models.speaker_model import SpeakerModel, embed_waves, fingerprint, frontend_of, load_model

_SECONDS = 2.0, 1.6
"""Of the speech that a file is compared on. What is wrong along time can be right at one length."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """What became of a model.

    Attributes:
        model: the model.
        opset: the operator set that was taken.
        parity: how near the file's embeddings come to ours, in one line; None without ONNX Runtime.
    """

    model: SpeakerModel
    opset: int
    parity: str | None


def export_model(
    model: str | Path,
    out: Path,
    bits: int | None = None,
    opset: int | None = None,
    indices: onnx_export.Indices = "smallest",
    features_inside: bool = False,
    compare: bool = True,
) -> Exported:
    """Writes a MODEL as ONNX. Quantized weights stay packed.

    Args:
        model: the MODEL.
        out: the .onnx file.
        bits: at which a nested model is read; the most it has where left out.
        opset: operator set; where left out, the oldest with a type for all of the model's bits.
        indices: how indices are stored.
        features_inside: put the filterbank into the file, whose input is then the wave.
        compare: run the file and compare its embeddings with ours.

    Returns:
        The model, the operator set, and how near the embeddings come.

    Raises:
        UserError: the model cannot be read or exported.
    """
    speaker_model = load_model(model, bits)
    network, fbank = speaker_model.network(), frontend_of(speaker_model.frontend)
    about = properties(speaker_model, network.embedding_size, features_inside)
    inside = fbank if features_inside else None
    taken = onnx_export.export(out, network, speaker_model.variables, about, bits, opset, indices, inside)
    return Exported(speaker_model, taken, _parity(speaker_model, out, features_inside) if compare else None)


def _parity(speaker_model: SpeakerModel, file: Path, features_inside: bool) -> str | None:
    """Compares the file's embeddings with ours, on made-up speech of each of `_SECONDS`; the worse values count."""
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class of their own
        return f"not compared: this ONNX Runtime cannot open the file ({str(error).splitlines()[0]})"
    fbank = frontend_of(speaker_model.frontend)
    cosines, furthest = [], []
    for wave in map(_made_up_speech, _SECONDS):
        given = {"wave": wave[None]} if features_inside else {"feats": _features(wave, fbank)}
        (theirs,) = session.run(None, given)[0]
        (ours,) = embed_waves(speaker_model, [wave], engine="jax")
        cosines.append(float(ours @ theirs / (np.linalg.norm(ours) * np.linalg.norm(theirs))))
        furthest.append(float(np.abs(ours - theirs).max() / np.abs(ours).max()))
    return (
        f"against our own network: cosine {np.min(cosines):.7f}, largest difference {np.max(furthest):.1e} of the "
        "largest value"
    )


def _features(wave: np.ndarray, fbank: frontend.FrontEnd) -> np.ndarray:
    return np.asarray(frontend.features_of(jnp.asarray(wave)[None], fbank))


def _made_up_speech(seconds: float) -> np.ndarray:
    """Buzzes of a moving pitch in noise, float32 `[samples]`: like speech in level and spectrum."""
    rng = np.random.default_rng(0)
    time = np.arange(round(seconds * 16000)) / 16000
    pitch = 140 + 30 * np.sin(2 * np.pi * 0.7 * time)
    phase = 2 * np.pi * np.cumsum(pitch) / 16000
    buzz = sum(np.sin(k * phase) / k for k in range(1, 20))
    loud = 0.5 + 0.5 * np.sin(2 * np.pi * 3 * time)
    return np.asarray(0.05 * buzz * loud + 0.002 * rng.standard_normal(len(time)), np.float32)


def properties(speaker_model: SpeakerModel, embedding_size: int, features_inside: bool = False) -> dict[str, str]:
    """What a user of the file must know to compute its input, as text by name.

    Of Kaldi's features the first seven are the names that sherpa-onnx reads: without one of them its process exits, or
    its embeddings are others. It has those features only, and computes them itself, so files of other features and
    files that take a wave do without these names. By `frontend` our own import finds the features again.
    """
    fbank = frontend_of(speaker_model.frontend)
    origin = {"bits": bits_of(speaker_model), "fingerprint": fingerprint(speaker_model)}
    origin["frontend"] = speaker_model.frontend
    if features_inside:
        comment = f"{speaker_model.architecture}, exported by kmq_jax; a wave of full scale 1 goes in"
        return {"comment": comment, "sample_rate": str(fbank.sample_rate), **origin}
    if not isinstance(fbank, frontend.FbankConfig):
        settings = {name: str(value) for name, value in dataclasses.asdict(fbank).items()}
        comment = f"{speaker_model.architecture}, exported by kmq_jax; features {speaker_model.frontend}, not Kaldi's"
        return {"comment": comment, "sample_rate": str(fbank.sample_rate), **settings, **origin}
    return {
        "framework": speaker_model.frontend,
        "language": "multilingual",
        "feature_normalize_type": "global-mean",
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
        **origin,
    }


def bits_of(speaker_model: SpeakerModel) -> str:
    """The bits of a model's quantized weights as they are read, such as "4" or "2 to 4"; "32" where there are none."""
    # A nested tensor is read at the model's bits, any other at its own.
    tensors = quant.codebook_tensors(speaker_model.variables)
    read = sorted({(one.coarse and speaker_model.bits) or one.bits for one in tensors}) or [32]
    return str(read[0]) if len(read) == 1 else f"{read[0]} to {read[-1]}"
