"""onnxruntime-web, which runs an ONNX model in a browser: three files of its package on npm's registry.

One version is taken, and its hash stands here: whatever server answers, the files are those that were tried. This
version has every operator and type that our files use, indices of 2 bits included.
"""

import base64
import gzip
import hashlib
import http.client
import io
import os
import sys
import tarfile
import urllib.error
import urllib.request
import zlib
from pathlib import Path

from kmq_jax.core.errors import UserError, reason_of
from kmq_jax.core.files import atomic_write, cache_directory, require_regular

VERSION = "1.30.0"
INTEGRITY = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""SHA-512 of the package, as npm writes it."""
FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
REGISTRY = "https://registry.npmjs.org"
_REGISTRY_SET = "npm_config_registry"  # npm's own name, in small letters
_LARGEST, _UNPACKED = 64 << 20, 256 << 20  # bytes of a package, and of what it unpacks to
_BROKEN = (gzip.BadGzipFile, EOFError, zlib.error, tarfile.TarError)


def runtime_files(given: Path | None = None) -> dict[str, bytes]:
    """The files of onnxruntime-web, by name. They are downloaded once, and kept in the user's cache directory.

    Args:
        given: a package's `.tgz` file, or a directory that it was unpacked to: then nothing is downloaded.

    Raises:
        UserError: the registry cannot be reached, the download is another package, or a file is missing.
    """
    if given is not None:
        return _of_directory(given) if given.is_dir() else _unpacked(_read(given, _LARGEST), str(given))
    kept = cache_directory() / f"onnxruntime-web-{VERSION}"
    if all((kept / name).is_file() for name in FILES):
        return _of_directory(kept)
    files = _unpacked(download(), "the package")
    for name, data in files.items():
        with atomic_write(kept / name) as temporary:
            temporary.write_bytes(data)
    return files


def download(integrity: str = INTEGRITY, largest: int = _LARGEST) -> bytes:
    """The package from the registry (the environment's `npm_config_registry` names another one).

    Args:
        integrity: SHA-512 that it must have, in base64.
        largest: bytes; more are refused.

    Raises:
        UserError: it cannot be downloaded, is too large, or has another hash.
    """
    registry = (os.environ.get(_REGISTRY_SET) or REGISTRY).rstrip("/")
    address = f"{registry}/onnxruntime-web/-/onnxruntime-web-{VERSION}.tgz"
    if not address.startswith(("https://", "http://")):
        raise UserError(f"{_REGISTRY_SET}: {address} must begin with https:// or http://")
    print(f"downloading {address}, once", file=sys.stderr)
    without = f"; without network: `runtime`, a file had by `npm pack onnxruntime-web@{VERSION}`"
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            data: bytes = answer.read(largest + 1)  # a byte more shows that it is too large
    except (OSError, ValueError, http.client.HTTPException) as error:  # urllib's own errors are OSErrors
        reason = getattr(error, "reason", None) or error
        raise UserError(f"cannot download {address}: {reason}{without}") from error
    if len(data) > largest:
        raise UserError(f"{address} is larger than {largest:,} bytes, which it must not be")
    if base64.b64encode(hashlib.sha512(data).digest()).decode() != integrity:
        raise UserError(f"{address} is not the package that is expected: its SHA-512 is another")
    return data


def _read(file: Path, most: int) -> bytes:
    require_regular(file)
    try:
        with file.open("rb") as opened:
            data = opened.read(most + 1)
    except OSError as error:
        raise UserError(f"cannot read {file}: {reason_of(error)}") from error
    if len(data) > most:
        raise UserError(f"{file} is larger than {most:,} bytes, which no file of onnxruntime-web is")
    return data


def _of_directory(place: Path) -> dict[str, bytes]:
    """The files of an unpacked package, or of its `dist`."""
    for folder in (place, place / "dist", place / "package" / "dist"):
        if (folder / FILES[0]).is_file():
            return {name: _read(folder / name, _LARGEST) for name in FILES}
    raise UserError(f"{place} holds no onnxruntime-web: it lacks {FILES[0]}")


def _unpacked(package: bytes, what: str) -> dict[str, bytes]:
    """The files of a package. Nothing is written by the names in it, and no link of it is followed."""
    found: dict[str, bytes] = {}
    try:
        with gzip.open(io.BytesIO(package)) as stream:
            whole = stream.read(_UNPACKED + 1)
        if len(whole) > _UNPACKED:
            raise UserError(f"{what} unpacks to more than {_UNPACKED:,} bytes")
        with tarfile.open(fileobj=io.BytesIO(whole), mode="r:") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                if folder != "package/dist" or name not in FILES or name in found:
                    continue
                opened = archive.extractfile(member) if member.isreg() else None
                if opened is None:
                    raise UserError(f"{what}: {member.name} is no file")
                found[name] = opened.read()
    except _BROKEN as error:
        raise UserError(f"{what} is no package of npm: {error}") from error
    if missing := [name for name in FILES if name not in found]:
        raise UserError(f"{what} holds no onnxruntime-web: it lacks package/dist/{missing[0]}")
    return found
