"""Files from the net: whole or not at all, and the ones that were meant where their hash is published."""

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
    """The MD5 of a file, in hexadecimal: what corpora publish. It tells damage, not malice.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     written = Path(directory, "a").write_text("abc")
    ...     md5_of(Path(directory, "a"))
    '900150983cd24fb0d6963f7d28e17f72'
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def check_md5(path: Path, md5: str, name: str = "") -> None:
    """Refuses a file that is another than the published one.

    Args:
        path: of the file.
        md5: what it must have; empty where none is published.
        name: what it is called in messages; its path where left out.

    Raises:
        UserError: it has another.
    """
    if md5 and (found := md5_of(path)) != md5:
        raise UserError(f"{name or path} is damaged or another file: its MD5 is {found}, and should be {md5}")


def download(address: str, path: Path, md5: str = "") -> Path:
    """Downloads a file, unless it is there already; either way its hash is checked.

    Args:
        address: http:// or https://.
        path: what it is called here.
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
            _copy(answer, temporary, int(length) if length else None, path.name)
            check_md5(temporary, md5, address)
    except UserError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:  # urllib's own errors are OSErrors
        raise UserError(f"cannot download {address}: {getattr(error, 'reason', None) or error}") from error
    return path


def _copy(answer: http.client.HTTPResponse, path: Path, length: int | None, name: str) -> None:
    """Writes what comes; a connection that ends early is an error."""
    total = None if length is None else -(-length // _BLOCK)
    bar, got = Bar(total, f"downloading {name}", "MiB"), 0
    try:
        with path.open("wb") as file:
            while block := answer.read(_BLOCK):
                file.write(block)
                got += len(block)
                bar.show(-(-got // _BLOCK))
    finally:
        bar.close()
    if length is not None and got != length:
        raise OSError(f"it broke off after {got:,} of {length:,} bytes")
