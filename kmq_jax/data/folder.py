"""Plain trees of audio files, and CSV lists of them."""

import collections
import csv
import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from kmq_jax.core.errors import UserError, reason_of
from kmq_jax.core.files import require_regular
from kmq_jax.core.progress import say_once
from kmq_jax.data.audio import SUFFIXES
from kmq_jax.data.table import Utterances, age_of, gender_of, require_unique

# Corpora whose first directory is no speaker. Each pattern finds the speaker in the path of a recording.
_LIBRISPEECH = re.compile(r"(?:.*/)?(?P<chapter>\d+)/(?P<speaker>\d+)-(?P=chapter)-\d+\.\w+$")
_TIMIT = re.compile(r"(?:.*/)?(?P<speaker>[FM][A-Z]{3}\d)/S[AIX]\d+(\.\w+)+$", re.IGNORECASE)
_VCTK = re.compile(r"(?:.*/)?(?P<speaker>p\d{3}|s5)/(?P=speaker)_\d{3}\w*\.\w+$")
_CORPORA = (_LIBRISPEECH, _TIMIT, _VCTK)
_NO_SPEAKER = re.compile(
    r"(train|dev|test|eval|valid|validation|dr[1-8]|wavs?|wav\d+\w*|flac|mp3|aac|audio|audios|clips|data|"
    r"(train|dev|test)[-_].*|cn-?celeb.*|\d+k(hz)?|part[-_ ]?\d+|male|female|men|women|clean|noisy|speech|voices?|"
    r"recordings?)$",
    re.IGNORECASE,
)


def walk(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As `os.walk`, in sorted order, through links too, but for those that lead back to where they lie.

    Raises:
        UserError: a directory cannot be read: what lies in it would be left out without a word.
    """

    def refuse(error: OSError) -> NoReturn:
        raise UserError(f"cannot read {error.filename}: {reason_of(error)}") from error

    for directory, directories, names in os.walk(root, followlinks=True, onerror=refuse):
        # In place, as `os.walk` asks: it then enters these, in this order, on any file system.
        directories[:] = sorted(name for name in directories if not _loops(root, directory, name))
        yield directory, directories, sorted(names)


def audio_files(root: Path, others: "collections.Counter[str] | None" = None) -> Iterator[str]:
    """Yields the audio files below `root`, as sorted "/"-separated paths relative to it; hidden names are left out.

    Links are followed (see `walk`). A warning tells of those to directories of the same tree, which are read twice.

    Args:
        root: where to look.
        others: counts the files that are left out, by suffix.

    Raises:
        UserError: a directory cannot be read.
    """
    for directory, directories, names in walk(root):
        directories[:] = [name for name in directories if not name.startswith(".")]  # in place: `walk` then skips them
        for name in directories:
            _warn_of_twin(root, os.path.join(directory, name))
        below = os.path.relpath(directory, root).replace(os.sep, "/")
        prefix = "" if below == "." else below + "/"
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if suffix in SUFFIXES:
                yield prefix + name
            elif others is not None:
                others[suffix or "without suffix"] += 1


def _loops(root: Path, directory: str, name: str) -> bool:
    """Whether a directory is a link to one on the way from the root to it, or to one that holds such a directory."""
    place, way = os.path.join(directory, name), Path(directory)
    if not os.path.islink(place):
        return False
    leads_to = os.path.realpath(place) + os.sep  # with the separator: /a/b does not hold /a/bc
    passed = [way, *itertools.takewhile(lambda above: above != root.parent, way.parents)]
    return any((os.path.realpath(above) + os.sep).startswith(leads_to) for above in passed)


def _warn_of_twin(root: Path, place: str) -> None:
    """Warns of a directory that is a link to one of the same tree: its recordings may be of two speakers then."""
    if os.path.islink(place):
        inside = os.path.relpath(os.path.realpath(place), os.path.realpath(root)).split(os.sep)
        if not any(part.startswith(".") for part in inside):  # hidden, or outside, which begins with ".."
            say_once(f"warning: {place} is a link to {'/'.join(inside)}: what lies there is read twice")


def open_folder(root: Path, speakers: bool = True) -> Utterances:
    """Opens any `speaker/**/audio` tree: the first directory is the speaker, the relative path is the id.

    Files directly in `root` belong to one speaker, named like the directory: so a folder of noise can be opened, too.
    LibriSpeech, TIMIT and VCTK, whose first directories are no speakers, are known by the names of their files. What
    is left out is counted on standard error.

    Args:
        root: the tree.
        speakers: whether it matters who speaks. Then a tree whose first directories are called `train`, `wav` and the
            like is refused.

    Raises:
        UserError: there is no audio file, its first directories are no speakers, or a directory cannot be read.
    """
    others: collections.Counter[str] = collections.Counter()
    paths = tuple(audio_files(root, others))
    if not paths:
        raise UserError(f"{root} holds no audio file ({', '.join(sorted(SUFFIXES))})")
    known = next((corpus for corpus in _CORPORA if all(map(corpus.match, paths))), None)
    if known is not None:
        found = tuple(known.match(path)["speaker"] for path in paths)  # type: ignore[index]
    else:
        found = tuple(path.split("/", 1)[0] if "/" in path else root.resolve().name for path in paths)
        for path, name in zip(paths, found):
            if speakers and "/" in path and _NO_SPEAKER.match(name):
                raise UserError(
                    f"{root}: the first directories should be speakers, but {name} is none: give the directory that "
                    "holds one directory a speaker, or a CSV with the columns path and speaker"
                )
    names = sorted(set(found))
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    say_once(f"{root}: {len(paths)} recordings of {len(names)} speaker{'s' * (len(names) > 1)} ({shown})")
    if others:
        listed = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(8))
        say_once(f"{root}: {sum(others.values())} other files are left out ({listed})")
    return Utterances(ids=paths, paths=paths, speakers=found, root=root)


def open_csv(path: Path) -> Utterances:
    """Opens a CSV with the columns `path` (relative to the CSV, or absolute) and `speaker`.

    Further columns are allowed; of them `id` (default: the path), `gender`, `age` and, for parts of recordings,
    `start` and `stop` (or `end`; seconds, empty or -1: to the end) are used. Blanks around a field do not count. A part
    without an id is called `path:start-stop`.

    Raises:
        UserError: naming file and line: no such columns, one of them twice, an empty field, a wrong number of fields,
            an id twice.
    """
    ids: list[str] = []
    paths: list[str] = []
    speakers: list[str] = []
    lines: list[int] = []
    genders: dict[str, str] = {}
    ages: dict[str, float] = {}
    spans: list[tuple[float, float]] = []
    require_regular(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, skipinitialspace=True)
            header = _header(path, rows.fieldnames or [])
            rows.fieldnames = header
            for fields in rows:
                line = rows.line_num
                # DictReader puts surplus fields under None, and None into those that are missing.
                if None in fields or None in fields.values():
                    raise UserError(f"{path}:{line}: expected {len(header)} fields")
                row = {name: value.strip() for name, value in fields.items()}
                if not row["path"] or not row["speaker"]:
                    raise UserError(f"{path}:{line}: path or speaker is empty")
                speaker = row["speaker"]
                first, last = row.get("start", ""), row.get("stop", row.get("end", ""))
                spans.append(_span(path, line, first, last))
                part = f"{row['path']}:{first or 0}-{last}" if first or last else row["path"]
                ids.append(row.get("id") or part)
                paths.append(row["path"])
                speakers.append(speaker)
                lines.append(line)
                if gender := gender_of(row.get("gender", "")):
                    genders[speaker] = gender
                try:
                    if row.get("age") and (age := age_of(row["age"])) is not None:
                        ages[speaker] = age
                except ValueError:
                    raise UserError(f"{path}:{line}: age {row['age']!r} is not a number") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason_of(error)}") from None
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
        spans=np.array(spans) if any(span != (0, math.inf) for span in spans) else None,
        genders=genders,
        ages=ages,
        listing=path,
        lines=tuple(lines),
    )


def _header(path: Path, names: Sequence[str]) -> list[str]:
    """The names of a CSV's columns, checked."""
    header = [name.strip() for name in names]
    if not {"path", "speaker"} <= set(header):
        raise UserError(f"{path}:1: the header must name the columns path and speaker, found {','.join(header)!r}")
    if twice := [name for name, count in collections.Counter(header).items() if name and count > 1]:
        raise UserError(f"{path}:1: the header names the column {twice[0]} twice")
    if "stop" in header and "end" in header:
        raise UserError(f"{path}:1: the header names both stop and end")
    return header


def _span(path: Path, line: int, first: str, last: str) -> tuple[float, float]:
    """The part of a recording that a line of a CSV names, in seconds; to the end where it does not say."""
    try:
        span = float(first or 0), float(last or -1)
    except ValueError:
        raise UserError(f"{path}:{line}: {first} and {last} must be seconds") from None
    if span[1] == -1:
        span = span[0], math.inf
    if not 0 <= span[0] < span[1]:
        raise UserError(f"{path}:{line}: a part from {first or 0} to {last} seconds")
    return span
