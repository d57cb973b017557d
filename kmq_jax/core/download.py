"""Downloads: a file arrives whole or not at all, and is checked by its hash where one is published."""

import hashlib
import http.client
import urllib.error
import urllib.request
from pathlib import Path

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import atomic_write
from kmq_jax.core.progress import Bar

_BLOCK = 1 << 20  # bytes read at a time
_TIMEOUT = 60  # seconds without a byte


def md5_of(path: Path) -> str:
    """The MD5 of a file, in hexadecimal: what corpora publish. It shows damage, and is no guard against malice.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     written = Path(directory, "a").write_text("abc")
    ...     md5_of(Path(directory, "a"))
    '900150983cd24fb0d6963f7d28e17f72'
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def check_md5(path: Path, md5: str, name: str = "") -> None:
    """Refuses a file that differs from the published one.

    Args:
        path: of the file.
        md5: what it must have, in hexadecimal; empty where none is published.
        name: what it is called in messages; its path where left out.

    Raises:
        UserError: its MD5 is another.
    """
    if md5 and (found := md5_of(path)) != md5.lower():
        raise UserError(f"{name or path} is damaged or another file: its MD5 is {found}, and should be {md5}")


def download(address: str, path: Path, md5: str = "") -> Path:
    """Downloads a file, unless it is there already; either way its hash is checked.

    Args:
        address: http:// or https://.
        path: where it goes.
        md5: its MD5 in hexadecimal; empty where none is published.

    Returns:
        `path`.

    Raises:
        UserError: the address has another form, cannot be reached or breaks off, or the file is another one.
    """
    if path.is_file():
        check_md5(path, md5)
        return path
    if not address.startswith(("https://", "http://")):
        raise UserError(f"{address} must begin with https:// or http://")
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT) as answer, atomic_write(path) as temporary:
            length = answer.headers.get("Content-Length")
            _copy(answer, temporary, int(length) if length else None, path.name, address)
            check_md5(temporary, md5, address)
    except UserError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:  # urllib's own errors are OSErrors
        raise _failed(address, error) from error
    return path


def _failed(address: str, error: Exception) -> UserError:
    return UserError(f"cannot download {address}: {getattr(error, 'reason', None) or error}")


def _copy(answer: http.client.HTTPResponse, path: Path, length: int | None, name: str, address: str) -> None:
    """Writes what comes; a connection that ends early is an error."""
    total = None if length is None else -(-length // _BLOCK)  # in blocks, rounded up
    bar, got = Bar(total, f"downloading {name}", "MiB"), 0
    try:
        with path.open("wb") as file:
            while block := _read(answer, address):
                file.write(block)
                got += len(block)
                bar.show(-(-got // _BLOCK))
    finally:
        bar.close()
    if length is not None and got != length:
        raise UserError(f"cannot download {address}: it broke off after {got:,} of {length:,} bytes")


def _read(answer: http.client.HTTPResponse, address: str) -> bytes:
    try:
        return answer.read(_BLOCK)
    except OSError as error:  # the connection's, which must not pass for one of the disk
        raise _failed(address, error) from error
