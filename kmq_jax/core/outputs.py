"""Checks that a command's outputs can be written: before the work, not after it."""

import errno
import os
import re
import stat
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from kmq_jax.core.errors import UserError, reason_of

_BUCKET = re.compile(r"((?:gs|gcs|s3|hdfs|abfss?|https?):)/+(.*)", re.DOTALL)  # `Path` leaves one slash of two

_PARTS = {"model.kmq", "averaged.kmq", "config.json", "policy.json", "cascade.json", "dataset_info.json"}
_PARTS |= {"wav.scp", "utt2spk", "segments"}
"""Files that are read when a directory is given as a MODEL, a cascade or DATA."""


def check_outputs(files: Mapping[str, Path], folders: Mapping[str, Path], inputs: Mapping[str, Sequence[str]]) -> None:
    """Refuses outputs that cannot be written, that are one another, or that are also read.

    Args:
        files: outputs that are files, by the flag that names them.
        folders: outputs that are directories.
        inputs: places that are read, by flag. What is no path, such as `synthetic:dev`, does no harm.

    Raises:
        UserError: one is at fault; the message names its flag.

    >>> check_outputs({"--out": Path("a.npz"), "--json": Path("./a.npz")}, {}, {})
    Traceback (most recent call last):
    kmq_jax.core.errors.UserError: --json (=a.npz) is also --out: they must differ
    """
    seen: dict[str, str] = {}
    for flag, path in {**files, **folders}.items():
        try:
            place = os.path.realpath(path)
            # A device takes any number of outputs.
            if not _is_device(path):
                if place in seen:
                    raise UserError(f"{flag} (={path}) is also {seen[place]}: they must differ")
                seen[place] = flag
                for name, values in inputs.items():
                    if any(_is_read(value, place) for value in values):
                        raise UserError(f"{flag} (={path}) is also {name}, which is read: they must differ")
            _check_writable(flag, path, flag in folders)
        except UserError:
            raise
        except (OSError, ValueError) as error:  # ValueError: a null byte in the name
            raise UserError(f"{flag} (={path}) cannot be written: {reason_of(error)}") from None
    for place, flag in seen.items():
        for folder in Path(place).parents:
            if (above := seen.get(str(folder))) in files:
                raise UserError(f"{flag} (={place}) lies below {above} (={folder}), which is a file")


def _is_read(value: str, place: str) -> bool:
    """Whether reading `value`, a file or a directory, means reading the file at `place`."""
    if not value:
        return False
    read = os.path.realpath(value)
    return read == place or os.path.dirname(place) == read and os.path.basename(place) in _PARTS


def _is_device(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def check_no_bucket(flag: str, place: str) -> None:
    """Refuses an address such as gs://: a path of that name would be made on the local disk instead.

    >>> check_no_bucket("--out", "gs://bucket/data")
    Traceback (most recent call last):
    kmq_jax.core.errors.UserError: --out (=gs://bucket/data) is no path: mount the bucket (launch/README.md)
    """
    if found := _BUCKET.match(place):
        raise UserError(f"{flag} (={found[1]}//{found[2]}) is no path: mount the bucket (launch/README.md)")


def _check_writable(flag: str, path: Path, folder: bool) -> None:
    if not str(path).strip():
        raise UserError(f"{flag} must name a {'directory' if folder else 'file'}")
    check_no_bucket(flag, str(path))
    target = Path(os.path.realpath(path))
    if _is_device(path):
        if folder:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        return  # tried when it is written to: opening may have effects
    if target.exists() and target.is_dir() != folder:
        number = errno.ENOTDIR if folder else errno.EISDIR
        raise OSError(number, os.strerror(number))
    parent = target if folder and target.exists() else target.parent
    # Up to the nearest directory that exists: the missing ones will be made in it.
    while not parent.exists():
        _check_name(parent)
        parent = parent.parent
    _check_name(target)
    if not parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    # A file is made, not permissions asked for: to the superuser a read-only file system looks writable. Where the
    # system can, the file has no name, so that a kill here leaves nothing.
    with tempfile.TemporaryFile(prefix=".part-", dir=parent):
        pass


def _check_name(path: Path) -> None:
    # Linux's NAME_MAX, and PATH_MAX without its closing null byte.
    if len(os.fsencode(path.name)) > 255 or len(os.fsencode(path)) > 4095:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
