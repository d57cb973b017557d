"""The packed model file `.kmq`: safetensors, with a JSON manifest in its metadata.

Every array of the tree is a tensor of the file: `NAME` for an ordinary leaf; `NAME#packed`, `NAME#codebook` and one
`NAME#coarse<i>` for each nested codebook of a quantized one. The manifest tells what cannot be read off the arrays,
and a checksum covers it and them. Nothing in the file is ever executed.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from kmq_jax.core.errors import UserError, reason_of
from kmq_jax.core.files import Json, Row, atomic_write, parse_json, require_regular
from kmq_jax.core.tree import Leaf, Variables, named_leaves
from kmq_jax.quant.types import CodebookTensor, is_codebook_tensor

VERSION = 1
# Types that both JAX and numpy hold: those read, by safetensors' names, and (below) those written, by numpy's.
_DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}
_TYPES = {"bool", "bfloat16", "float16", "float32", "float64"}
_TYPES |= {f"{kind}{size}" for kind in ("int", "uint") for size in (8, 16, 32, 64)}
# Characters. The manifest comes from the file, so its size is not to be trusted.
_LONGEST_MANIFEST = 16 << 20


def save(path: str | os.PathLike[str], manifest: Row, tree: Variables) -> None:
    """Writes a model, atomically.

    Args:
        path: the file to write; its name usually ends in `.kmq`.
        manifest: what a reader needs beside the arrays, as JSON values: architecture, its settings, front end,
            training config. The keys "version" and "tensors" are the file's own.
        tree: nested dicts of arrays and `CodebookTensor`s, such as `{"params": ..., "batch_stats": ...}`. Other
            containers are saved by their leaves' names, and come back as dicts.

    Raises:
        UserError: the file cannot be written, two leaves would have the same name in it, or an array's type has no
            place in it (complex, float8).
        TypeError, ValueError: the manifest is not JSON.
    """
    if clash := {"version", "tensors"} & set(manifest):
        raise ValueError(f"the manifest's key {sorted(clash)[0]!r} is the file's own")
    arrays: dict[str, np.ndarray] = {}
    quantized: dict[str, Json] = {}
    for name, leaf in named_leaves(tree, is_leaf=is_codebook_tensor):
        parts = {name: leaf}
        if is_codebook_tensor(leaf):
            leaf.validate()
            quantized[name] = {"shape": leaf.shape, "bits": leaf.bits, "axis": leaf.axis, "coarse": len(leaf.coarse)}
            if leaf.dtype_name != "float32":
                quantized[name]["dtype"] = leaf.dtype_name
            parts = {f"{name}#packed": leaf.packed, f"{name}#codebook": leaf.codebook}
            parts |= {f"{name}#coarse{i}": codebook for i, codebook in enumerate(leaf.coarse)}
        elif "#" in name:
            raise UserError(f"the leaf's name {name!r} must not hold a #")
        if twice := set(parts) & set(arrays):
            raise UserError(f"two leaves are named {sorted(twice)[0]!r}")
        # The library writes the buffer as it lies: that of a transposed view is in another order. Not by
        # `ascontiguousarray`, which makes a number an array of one.
        arrays |= {key: np.asarray(value, order="C") for key, value in parts.items()}
        # Of a quantized leaf this sees the indices alone; `validate` has seen its codebooks.
        if arrays[next(iter(parts))].dtype.name not in _TYPES:
            raise UserError(f"{name} is {arrays[name].dtype}, which .kmq files do not hold")
    text = json.dumps({**manifest, "version": VERSION, "tensors": quantized}, allow_nan=False, sort_keys=True)
    with atomic_write(path) as temporary:
        temporary.write_bytes(
            _reproducible(safetensors.numpy.save(arrays, {"kmq": text, "sha256": _checksum(text, arrays)}))
        )


def _reproducible(file: bytes) -> bytes:
    """The same file with its header's keys in order: the library writes its metadata in a random one."""
    # A safetensors file: the header's length in 8 bytes, the header as JSON, the arrays.
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.dumps(json.loads(file[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors stay aligned
    return len(header).to_bytes(8, "little") + header + file[end:]


def _checksum(text: str, arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over the manifest's text and every array's name, type, shape and bytes, in the order of names."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"\n{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def load(path: str | os.PathLike[str]) -> tuple[Json, Variables]:
    """Reads a model that `save` wrote.

    The file may come from anyone: its header is checked against its length before anything is allocated, its contents
    against the checksum, and every quantized tensor against its invariants.

    Returns:
        `(manifest, tree)`: the manifest that was saved, and nested dicts of numpy arrays and `CodebookTensor`s.

    Raises:
        UserError: the file is missing, is not a .kmq file, was cut short or altered, is of a newer version, or holds a
            weight that is not finite; the message names it, and the tensor.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save(f"{directory}/a.kmq", {"architecture": "own"}, {"params": {"bias": np.float32([1, 2])}})
    ...     load(f"{directory}/a.kmq")
    ({'architecture': 'own'}, {'params': {'bias': array([1., 2.], dtype=float32)}})
    """
    path = Path(path)
    require_regular(path)
    try:
        # By Python first: its errors say why a file cannot be read.
        with path.open("rb") as opened:
            opened.read(1)
        # The library refuses a header that does not cover the file's bytes exactly.
        with safetensors.safe_open(path, framework="numpy") as file:
            text, checksum = _header(path, file.metadata() or {})
            manifest = parse_json(text)
            _check_version(path, manifest)
            names = list(file.keys())
            for name in names:
                if file.get_slice(name).get_dtype() not in _DTYPES:
                    raise UserError(f"{path}: tensor {name} has a type that .kmq files do not hold")
            arrays = {name: file.get_tensor(name) for name in names}
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason_of(error)}") from error
    except UserError:
        raise
    except (safetensors.SafetensorError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise UserError(f"{path} is not a .kmq file, or it was cut short: {error}") from error
    if _checksum(text, arrays) != checksum:
        raise UserError(f"{path} was altered after it was written: its checksum does not match")
    check_finite(arrays, str(path))
    try:
        tree = _assemble(arrays, manifest.pop("tensors"))
    except KeyError as error:
        raise UserError(f"{path} is not a consistent .kmq file: it lacks {error}") from error
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} is not a consistent .kmq file: {error}") from error
    del manifest["version"]
    return manifest, tree


def check_finite(arrays: Mapping[str, np.ndarray], where: str) -> None:
    """Refuses weights that are NaN or infinite: every embedding would be so, too.

    Args:
        arrays: by name.
        where: the file they come from, for messages.

    Raises:
        UserError: names the tensor.
    """
    for name, array in arrays.items():
        # numpy does not know that bfloat16 is floating point.
        values = array.astype(np.float32) if array.dtype.name == "bfloat16" else array
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise UserError(f"{where}: tensor {name} holds values that are not finite (NaN or infinity)")


def _header(path: Path, metadata: Mapping[str, str]) -> tuple[str, str]:
    if "kmq" not in metadata or "sha256" not in metadata:
        raise UserError(f"{path} is a safetensors file, but not a .kmq file: it has no manifest")
    if len(metadata["kmq"]) > _LONGEST_MANIFEST:
        raise UserError(f"{path} has a manifest of {len(metadata['kmq'])} characters")
    return metadata["kmq"], metadata["sha256"]


def _check_version(path: Path, manifest: object) -> None:
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if not isinstance(version, int) or version < 1:
        raise UserError(f"{path} is not a .kmq file: its manifest has no version")
    if version > VERSION:
        raise UserError(f"{path} is of .kmq version {version}; this kmq_jax reads up to {VERSION}: upgrade it")


def _assemble(arrays: Mapping[str, np.ndarray], quantized: Mapping[str, Row]) -> Variables:
    left: dict[str, Leaf] = dict(arrays)  # what no quantized tensor claims is an ordinary leaf
    leaves: dict[str, Leaf] = {}
    if not isinstance(quantized, dict):
        raise ValueError("`tensors` is not an object")
    for name, about in quantized.items():
        # The count comes from the file: a huge one would keep the loop below busy for ever.
        if not (isinstance(about, dict) and isinstance(about["coarse"], int) and 0 <= about["coarse"] <= 8):
            raise ValueError(f"{name} is not described as a quantized tensor")
        tensor = CodebookTensor(
            codebook=left.pop(f"{name}#codebook"),
            packed=left.pop(f"{name}#packed"),
            coarse=tuple(left.pop(f"{name}#coarse{i}") for i in range(about["coarse"])),
            shape=tuple(about["shape"]),
            bits=about["bits"],
            axis=about["axis"],
            dtype_name=about.get("dtype", "float32"),
        )
        try:
            tensor.validate()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        leaves[name] = tensor
    tree: Variables = {}
    for name, leaf in (leaves | left).items():
        *folders, last = name.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
            if not isinstance(place, dict):
                raise ValueError(f"{name} lies below another tensor")
        if last in place:
            raise ValueError(f"two tensors are named {name}")
        place[last] = leaf
    return tree
