"""One entry to every format that can be imported, found from the file where it is not named."""

from pathlib import Path

from kmq_jax.core.errors import UserError
from kmq_jax.interop import campplus, ge2e, kiwano, redimnet, tdnn, torch_checkpoint, wespeaker, wespeaker_onnx
from kmq_jax.interop.assemble import Imported

FORMATS = ("wespeaker-onnx", "wespeaker-torch", "kiwano", "3dspeaker")


def read(path: Path, form: str | None = None, activation: str | None = None) -> Imported:
    """Reads a model of another toolkit.

    Args:
        path: an ONNX file, a PyTorch checkpoint, or its tensors as safetensors.
        form: one of `FORMATS`; None finds it from the file.
        activation: see `kiwano.convert` and `campplus.convert`.

    Raises:
        UserError: the file cannot be read, is of no known format, or holds another network; see the readers.
    """
    if activation and form not in (None, "kiwano", "3dspeaker"):
        raise UserError("--activation is for Kiwano's checkpoints and CAM++ only")
    if form == "wespeaker-onnx" or form is None and _looks_like_onnx(path):
        return wespeaker_onnx.read(path)
    checkpoint = torch_checkpoint.read(path)
    if form == "kiwano" or form is None and kiwano.recognizes(checkpoint.tensors):
        return kiwano.convert(checkpoint, str(path), activation)
    if campplus.recognizes(checkpoint.tensors):
        return campplus.convert(checkpoint, str(path), form, activation)
    if tdnn.recognizes(checkpoint.tensors):
        return tdnn.convert(checkpoint, str(path))
    if redimnet.recognizes(checkpoint.tensors):
        return redimnet.convert(checkpoint, str(path))
    if ge2e.recognizes(checkpoint.tensors):
        return ge2e.convert(checkpoint, str(path))
    if form == "wespeaker-torch" or wespeaker.recognizes(checkpoint.tensors):
        return wespeaker.convert(checkpoint, str(path))
    raise UserError(f"{path}: its tensors ({', '.join(list(checkpoint.tensors)[:3])}, ...) are of no known network")


def _looks_like_onnx(path: Path) -> bool:
    """Neither a zip archive, nor a pickle, nor safetensors: then a file is tried as ONNX, which has no signature."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return not (start.startswith((b"PK\x03\x04", b"\x80")) or start[8:] == b"{")
