"""Reading PyTorch checkpoints without running code from them, and the same tensors from safetensors files."""

import os
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kmq_jax.core.errors import UserError, reason_of
from kmq_jax.core.files import Json, require_regular

_CONTAINERS = ("state_dict", "model", "model_state_dict", "model_state")


class Checkpoint(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        tensors: arrays by name.
        about: the other entries that are text, numbers, or settings (as a dict).
    """

    tensors: dict[str, np.ndarray]
    about: Json


class _Settings:
    """Stands in for the configuration dataclasses in Kiwano's checkpoints: it takes attributes, and has no code."""


_SETTINGS = ("kiwano.model.resnet.KiwanoResNetConfig", "kiwano.model.resnet.XIKiwanoResNetConfig")


def read(path: Path) -> Checkpoint:
    """Reads a checkpoint.

    PyTorch's own format is read by `torch.load(weights_only=True)`, which builds tensors and plain containers only. The
    file is a dict of tensors, or a dict that holds one as "state_dict", "model", "model_state_dict" or "model_state".
    A prefix that all names share, such as the "module." of distributed training, is taken off. bfloat16 becomes
    float32.

    Raises:
        UserError: the file cannot be read, is damaged, holds anything but plain data, or PyTorch is not installed.
    """
    try:
        require_regular(path)
        with path.open("rb") as file:
            # A safetensors file begins with eight bytes of length, then JSON.
            is_safetensors = file.read(9)[8:] == b"{"
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason_of(error)}") from error
    content: object = _read_safetensors(path) if is_safetensors else _read_torch(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    # A dict with its tensors inside another, or the bare dict of tensors.
    state = next((content[name] for name in _CONTAINERS if isinstance(content.get(name), dict)), content)
    about = {} if state is content else {str(k): _plain(v) for k, v in content.items() if k not in _CONTAINERS}
    tensors: dict[str, np.ndarray] = {}
    left = 4 * os.path.getsize(path)
    for name, value in state.items():
        if not isinstance(name, str) or not hasattr(value, "nbytes"):
            raise UserError(f"{path}: entry {name!r} is a {type(value).__name__}, not a tensor")
        # A tensor may be a view that repeats a few bytes; what is larger than the file must not be copied out.
        left -= value.nbytes
        if left < 0:
            raise UserError(f"{path}: tensor {name} claims more data than the file holds")
        tensors[name] = _array(path, name, value)
    return Checkpoint(_without_prefix(tensors), about)


def _without_prefix(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names without the words, up to a dot, that all of them begin with: wrappers of a network put them there."""
    while len(tensors) > 1:
        first = next(iter(tensors)).partition(".")[0] + "."
        if not all(name.startswith(first) and len(name) > len(first) for name in tensors):
            break
        tensors = {name.removeprefix(first): value for name, value in tensors.items()}
    return tensors


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    import ml_dtypes  # comes with JAX; with it numpy knows bfloat16
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if (kind := file.get_slice(name).get_dtype()).startswith(("F8", "F4", "F6", "C")):
                    raise UserError(f"{path}: tensor {name} is of type {kind}, which is not read")
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not a safetensors file that can be read: {error}") from error
    return {name: x.astype(np.float32) if x.dtype == ml_dtypes.bfloat16 else x for name, x in found.items()}


def _read_torch(path: Path) -> object:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} is a PyTorch checkpoint, and PyTorch is not installed: pip install torch, "
            "or store the tensors as .safetensors"
        ) from None
    try:
        with torch.serialization.safe_globals([(_Settings, name) for name in _SETTINGS]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file makes of the reader
        raise UserError(f"{path} is not a checkpoint of plain tensors: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What PyTorch says is wrong, without its advice to load the file by running its code."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    if found := re.search(r"(?:GLOBAL|[Uu]nsupported (?:global|class):?(?: GLOBAL)?) (\S+)", text):
        return f"it holds {found[1]}, which is none"
    return text.split("\n")[0] or type(error).__name__


def _array(path: Path, name: str, value: Any) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    try:
        value = value.detach()
        return (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
    except Exception as error:  # sparse, quantized or on a device that is not there
        raise UserError(f"{path}: tensor {name} is not a plain one: {error}") from error


def _plain(value: object) -> object:
    return dict(vars(value)) if isinstance(value, _Settings) else value
