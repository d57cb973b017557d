"""Reading .npz files that may come from anyone: no pickles, and nothing is inflated beyond reason."""

import math
import os
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path

import numpy as np

from kmq_jax.core.errors import UserError, first_line, reason_of
from kmq_jax.core.files import require_regular

_ALWAYS, _TIMES = 1 << 26, 32
"""Bytes that any file may inflate to, and how many times its own size on top: fixed-width text compresses well."""


def read_npz(
    path: str | os.PathLike[str], needed: Collection[str], more: Collection[str] = (), what: str = "arrays"
) -> dict[str, np.ndarray]:
    """Reads arrays of a file by name.

    The sizes that the file claims for its arrays are compared with one another and with its own before any memory is
    taken.

    Args:
        path: the file.
        needed: arrays that it must hold.
        more: arrays that are read where it holds them; others are left alone.
        what: what the file holds, for messages.

    Returns:
        The arrays by name; of `more`, those that the file holds.

    Raises:
        UserError: it cannot be read, is no such file, lacks an array, or an array claims more than there is.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     np.savez(f"{place}/a.npz", a=np.arange(3))
    ...     read_npz(f"{place}/a.npz", ["a"])
    {'a': array([0, 1, 2])}
    """
    path = Path(path)
    require_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if missing := sorted(set(needed) - set(members)):
                raise ValueError(f"it lacks the array `{missing[0]}`")
            wanted = [name for name in (*needed, *more) if name in members]
            total = sum(members[name].file_size for name in wanted)
            if total > _ALWAYS + _TIMES * path.stat().st_size:
                raise ValueError(f"its arrays would inflate to {total:,} bytes")
            return {name: _read(archive, members[name], name) for name in wanted}
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason_of(error)}") from error
    # What zipfile, zlib and numpy raise on damaged or forged files.
    except (
        ValueError, EOFError, MemoryError, RuntimeError, SyntaxError, TypeError, KeyError, OverflowError,
        RecursionError, NotImplementedError, zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        raise UserError(f"{path} is not an .npz file of {what}: {first_line(error)}") from error


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str) -> np.ndarray:
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError(f"{name} is of the unknown version {version}")
        # In versions 2 and 3 the header is the same but for the width of its length, and for its encoding.
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        if dtype.hasobject:
            raise ValueError(f"{name} holds Python objects, which are not read")
        # zipfile reads at most `file_size` bytes of a member, so an array that fits them is safe to allocate.
        if any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize > member.file_size:
            raise ValueError(f"{name} of shape {shape} claims more than the file holds")
    with archive.open(member) as file:  # again from its start: read_array reads the header itself
        return np.lib.format.read_array(file, allow_pickle=False)
