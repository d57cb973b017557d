"""Kaldi data directories: `wav.scp`, `utt2spk`, and where present `segments`, `spk2gender`, `spk2age`."""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from kmq_jax.core.errors import UserError, reason_of
from kmq_jax.core.files import require_regular
from kmq_jax.data.table import Utterances, age_of, gender_of, require_unique

T = TypeVar("T")


def read_table(path: Path) -> tuple[dict[str, str], dict[str, int]]:
    r"""Reads a two-column Kaldi file, `key rest-of-line`; blank lines and CRLF are fine.

    Returns:
        `{key: rest}` and `{key: line number}`, in file order.

    Raises:
        UserError: naming the file and line: the file cannot be read, is not UTF-8, a line has one column, or a key
            comes twice.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     written = Path(directory, "utt2spk").write_text("a-1 anna\na-2 anna\n")
    ...     read_table(Path(directory, "utt2spk"))
    ({'a-1': 'anna', 'a-2': 'anna'}, {'a-1': 1, 'a-2': 2})
    """
    values: dict[str, str] = {}
    lines: dict[str, int] = {}
    for number, line in numbered_lines(path):
        fields = line.split(None, 1)
        if not fields:
            continue
        if len(fields) < 2:
            raise UserError(f"{path}:{number}: expected two columns, found only {fields[0]!r}")
        key = fields[0]
        if key in values:
            raise UserError(f"{path}:{number}: {key} was already given on line {lines[key]}")
        values[key], lines[key] = fields[1].rstrip(), number
    return values, lines


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """Reads a text file as `(line number, line)`.

    Raises:
        UserError: the file cannot be read or is not UTF-8.
    """
    require_regular(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason_of(error)}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        raise UserError(f"{path}:{line}: not UTF-8 text") from None
    # Not `splitlines`, which also breaks at form feeds and other characters, where editors count no line.
    return list(enumerate(text.split("\n"), 1))


def open_kaldi(root: Path) -> Utterances:
    """Opens a Kaldi data directory.

    Paths in `wav.scp` may be absolute or relative to the directory. Commands (`sox ... |`) are refused: no code from
    a data file is ever run.

    Raises:
        UserError: naming file and line of what is wrong.
    """
    recordings, scp_lines = read_table(root / "wav.scp")
    for key, place in recordings.items():
        if place.endswith("|") or place.startswith("|"):
            raise UserError(
                f"{root / 'wav.scp'}:{scp_lines[key]}: {key} is a command ({place!r}), which is not run; "
                "write its output to a file and give that path"
            )
    speaker_of, speaker_lines = read_table(root / "utt2spk")
    for key, speaker in speaker_of.items():
        if len(speaker.split()) != 1:
            raise UserError(f"{root / 'utt2spk'}:{speaker_lines[key]}: expected one speaker, found {speaker!r}")
    listing = root / "wav.scp"
    spans: np.ndarray | None = None
    ids, paths, lines = list(recordings), list(recordings.values()), list(scp_lines.values())
    if (root / "segments").is_file():
        listing = root / "segments"
        ids, paths, spans, lines = _read_segments(listing, recordings)
    if not ids:
        raise UserError(f"{listing}: lists no utterance")
    for key, line in zip(ids, lines):
        if key not in speaker_of:
            raise UserError(f"{listing}:{line}: utterance {key} has no line in {root / 'utt2spk'}")
    return Utterances(
        ids=tuple(ids),
        paths=tuple(paths),
        speakers=tuple(speaker_of[key] for key in ids),
        root=root,
        spans=spans,
        genders=_read_optional(root / "spk2gender", gender_of),
        ages=_read_optional(root / "spk2age", age_of),
        listing=listing,
        lines=tuple(lines),
    )


def _read_segments(path: Path, recordings: dict[str, str]) -> tuple[list[str], list[str], np.ndarray, list[int]]:
    """Reads `utterance recording first last` (seconds; a last of -1 is the recording's end)."""
    ids: list[str] = []
    paths: list[str] = []
    spans: list[tuple[float, float]] = []
    lines: list[int] = []
    for number, line in numbered_lines(path):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 4:
            raise UserError(f"{path}:{number}: expected `utterance recording first last`, found {len(fields)} columns")
        key, recording, first, last = fields
        if recording not in recordings:
            raise UserError(f"{path}:{number}: recording {recording} is not in wav.scp")
        try:
            span = float(first), float(last)
        except ValueError:
            raise UserError(f"{path}:{number}: {first} and {last} must be seconds") from None
        if span[1] == -1:  # Kaldi's "to the end"
            span = span[0], math.inf
        elif span[1] == math.inf:
            raise UserError(f"{path}:{number}: {last} must be seconds, or -1 for the end of the recording")
        if not 0 <= span[0] < span[1]:
            raise UserError(f"{path}:{number}: a segment from {first} to {last} seconds")
        ids.append(key)
        paths.append(recordings[recording])
        spans.append(span)
        lines.append(number)
    require_unique(ids, path, lines)
    return ids, paths, np.array(spans, np.float64).reshape(-1, 2), lines


def _read_optional(path: Path, read: Callable[[str], T | None]) -> dict[str, T]:
    """Reads a value of each speaker, where the table exists; a value that cannot be read is left out."""
    found = {}
    for key, text in (read_table(path)[0] if path.is_file() else {}).items():
        with contextlib.suppress(ValueError):
            if (value := read(text)) is not None:
                found[key] = value
    return found
