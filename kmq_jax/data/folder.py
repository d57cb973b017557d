"""Plain trees of audio files, and CSV lists of them."""

import csv
import os
from collections.abc import Iterator
from pathlib import Path

from kmq_jax.core.errors import UserError
from kmq_jax.data.audio import SUFFIXES
from kmq_jax.data.table import Utterances, require_unique


def audio_files(root: Path) -> Iterator[str]:
    """Yields the audio files below `root`, as sorted "/"-separated paths relative to it; hidden names are left out."""
    for directory, directories, names in os.walk(root, followlinks=True):
        # In place, as `os.walk` asks: it then enters these, in this order, on any file system.
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        below = os.path.relpath(directory, root).replace(os.sep, "/")
        prefix = "" if below == "." else below + "/"
        for name in sorted(names):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                yield prefix + name


def open_folder(root: Path) -> Utterances:
    """Opens any `speaker/**/audio` tree: the first directory is the speaker, the relative path is the id.

    Files directly in `root` belong to one speaker, named like the directory: so a folder of noise can be opened, too.

    Raises:
        UserError: there is no audio file.
    """
    paths = tuple(audio_files(root))
    if not paths:
        raise UserError(f"{root} holds no audio file ({', '.join(sorted(SUFFIXES))})")
    speakers = tuple(path.split("/", 1)[0] if "/" in path else root.resolve().name for path in paths)
    return Utterances(ids=paths, paths=paths, speakers=speakers, root=root)


def open_csv(path: Path) -> Utterances:
    """Opens a CSV with the columns `path` (relative to the CSV, or absolute) and `speaker`.

    Further columns are allowed; of them `id` (default: the path), `gender` and `age` are used.

    Raises:
        UserError: naming file and line: no such columns, an empty field, a wrong number of fields, an id twice.
    """
    ids: list[str] = []
    paths: list[str] = []
    speakers: list[str] = []
    lines: list[int] = []
    genders: dict[str, str] = {}
    ages: dict[str, float] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, skipinitialspace=True)
            header = [name.strip() for name in rows.fieldnames or []]
            rows.fieldnames = header
            if not {"path", "speaker"} <= set(header):
                raise UserError(
                    f"{path}:1: the header must name the columns path and speaker, found {','.join(header)!r}"
                )
            for row in rows:
                line = rows.line_num
                if None in row or None in row.values():
                    raise UserError(f"{path}:{line}: expected {len(header)} fields")
                if not row["path"] or not row["speaker"]:
                    raise UserError(f"{path}:{line}: path or speaker is empty")
                speaker = row["speaker"]
                ids.append(row.get("id") or row["path"])
                paths.append(row["path"])
                speakers.append(speaker)
                lines.append(line)
                if row.get("gender"):
                    genders[speaker] = row["gender"][:1].lower()
                if row.get("age"):
                    try:
                        ages[speaker] = float(row["age"])
                    except ValueError:
                        raise UserError(f"{path}:{line}: age {row['age']!r} is not a number") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV in UTF-8: {error}") from None
    if not ids:
        raise UserError(f"{path}: lists no utterance")
    require_unique(ids, path, lines)
    return Utterances(
        ids=tuple(ids),
        paths=tuple(paths),
        speakers=tuple(speakers),
        root=path.parent,
        genders=genders,
        ages=ages,
        listing=path,
        lines=tuple(lines),
    )
