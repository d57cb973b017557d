"""One entry to every format that can be imported, found from the file where it is not named."""

from pathlib import Path

from kmq_jax.core.errors import UserError, reason_of
from kmq_jax.interop import (
    campplus,
    ge2e,
    kiwano,
    onnx_network,
    redimnet,
    tdnn,
    torch_checkpoint,
    wespeaker,
    wespeaker_onnx,
)
from kmq_jax.interop.assemble import Imported
from kmq_jax.interop.onnx_network import NOTHING_ASKED, Asked

FORMATS = ("wespeaker-onnx", "onnx", "wespeaker-torch", "kiwano", "3dspeaker")
_ASKED = "--frontend, --layout and --output"
_NO_ACTIVATION = "--activation is for Kiwano's checkpoints and CAM++ only"


def read(path: Path, form: str | None = None, activation: str | None = None, asked: Asked = NOTHING_ASKED) -> Imported:
    """Reads a model of another toolkit.

    Args:
        path: an ONNX file, a PyTorch checkpoint, or its tensors as safetensors.
        form: one of `FORMATS`; None finds it from the file. An ONNX file that is no ResNet of WeSpeaker is read as a
            graph.
        activation: see `kiwano.convert` and `campplus.convert`.
        asked: what a graph may leave open.

    Raises:
        UserError: the file cannot be read, is of no known format, or holds another network; see the readers.
    """
    is_onnx = form in ("wespeaker-onnx", "onnx") or form is None and _looks_like_onnx(path)
    if activation and (is_onnx or form == "wespeaker-torch"):
        raise UserError(_NO_ACTIVATION)
    if is_onnx:
        return _read_onnx(path, form, asked)
    if asked != NOTHING_ASKED:
        raise UserError(f"{_ASKED} are for ONNX files only")
    checkpoint = torch_checkpoint.read(path)
    if form == "kiwano" or form is None and kiwano.recognizes(checkpoint.tensors):
        return kiwano.convert(checkpoint, str(path), activation)
    if campplus.recognizes(checkpoint.tensors):
        return campplus.convert(checkpoint, str(path), form, activation)
    if form == "3dspeaker":
        raise UserError(f"{path}: its tensors are not those of CAM++, which --format=3dspeaker reads")
    if activation:
        raise UserError(f"{path}: {_NO_ACTIVATION}")
    for family in (tdnn, redimnet, ge2e):
        if family.recognizes(checkpoint.tensors):
            return family.convert(checkpoint, str(path))
    if form == "wespeaker-torch" or wespeaker.recognizes(checkpoint.tensors):
        return wespeaker.convert(checkpoint, str(path))
    raise UserError(f"{path}: its tensors ({', '.join(list(checkpoint.tensors)[:3])}, ...) are of no known network")


def _read_onnx(path: Path, form: str | None, asked: Asked) -> Imported:
    if form == "wespeaker-onnx":
        if asked != NOTHING_ASKED:
            raise UserError(f"{_ASKED} are for graphs: they do not go with --format=wespeaker-onnx, but with onnx")
        return wespeaker_onnx.read(path)
    if form is None and asked == NOTHING_ASKED:
        try:
            return wespeaker_onnx.read(path)
        except UserError:
            pass  # another network, which is no error: it is read as a graph below
    return onnx_network.read(path, asked)


def _looks_like_onnx(path: Path) -> bool:
    """Whether a file is no zip archive, pickle or safetensors: it is then tried as ONNX, which has no signature."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason_of(error)}") from error
    return not (start.startswith((b"PK\x03\x04", b"\x80")) or start[8:] == b"{")
