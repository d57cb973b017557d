"""Trial lists: pairs of an enrolment and a test utterance, and whether the speaker is the same."""

import bisect
import dataclasses
import difflib
import itertools
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path

import numpy as np

from kmq_jax.core.errors import UserError, reason_of
from kmq_jax.core.files import require_regular
from kmq_jax.data.audio import SUFFIXES
from kmq_jax.data.draw import draw_trials
from kmq_jax.data.kaldi import read_table
from kmq_jax.data.table import Trials, Utterances

__all__ = [
    "Trials",
    "check_models",
    "doubts",
    "draw_trials",
    "model_rows",
    "open_trials",
    "read_in_parts",
    "read_models",
    "read_trials",
    "utterance_index",
]

_COMPARED = 100  # names on either side that an unknown one is compared with
_CHUNK = 1 << 24  # bytes of a list held at a time
_LABELS = {"1": 1, "0": 0, "target": 1, "nontarget": 0}
_Form = tuple[int, int, int]  # the columns of enrolment, test and label
_LABEL_FIRST, _LABEL_LAST = (1, 2, 0), (0, 1, 2)


class _Numbers(dict[str, int]):
    """Numbers names in the order they are asked for, without a Python step for those already seen."""

    def __missing__(self, name: str) -> int:
        self[name] = number = len(self)  # the length before the name is in: the next free number
        return number


def utterance_index(ids: Sequence[str], paths: Sequence[str] = ()) -> dict[str, int]:
    """Maps every name of an utterance to its row: ids, and paths that no two utterances share.

    Where an id and a path are the same, the id counts.

    >>> utterance_index(["a", "b"], ["1.wav", "2.wav"])
    {'1.wav': 0, '2.wav': 1, 'a': 0, 'b': 1}
    """
    index = dict(zip(paths, range(len(paths))))
    if len(index) < len(paths):
        # `index` holds the last row of each path: any other row of it shows that it is shared.
        shared = {path for i, path in enumerate(paths) if index[path] != i}
        index = {path: i for path, i in index.items() if path not in shared}
    index.update(zip(ids, range(len(ids))))
    return index


def read_trials(
    path: str | os.PathLike[str],
    ids: Sequence[str],
    paths: Sequence[str] = (),
    models: Mapping[str, Sequence[str]] | None = None,
) -> Trials:
    """Reads a trial list in any form the field uses; the first line tells which.

    The forms are VoxCeleb's `label enrol test` (1 the same speaker, 0 not), Kaldi's `enrol test target|nontarget`, and
    CN-Celeb's `enrol test label`; words are parted by blanks, commas or semicolons. Utterances go by id or by path; a
    path may end as the list was published, such as in `.wav`, where the recordings came as `.flac` or `.mp3`. CRLF and
    blank lines are fine.

    Args:
        path: the list.
        ids: the utterances' ids.
        paths: their paths; may be left out where the list uses ids.
        models: utterances by enrolment model, where the list enrols models (`read_models`).

    Raises:
        UserError: naming file and line: a line of another form, an unknown utterance; or the file is empty.
    """
    parts = list(read_in_parts(path, ids, paths, models))
    enrol, test, label, enrol_name, test_name = (
        np.concatenate([getattr(part, column) for part in parts])
        for column in ("enrol", "test", "label", "enrol_name", "test_name")
    )
    return Trials(enrol, test, label, parts[-1].names, enrol_name, test_name, parts[-1].models)


def read_in_parts(
    path: str | os.PathLike[str],
    ids: Sequence[str],
    paths: Sequence[str] = (),
    models: Mapping[str, Sequence[str]] | None = None,
    share: tuple[int, int] = (0, 1),
) -> Iterator[Trials]:
    """Reads a trial list a part at a time, so that a list of any length takes bounded memory.

    Args and errors as `read_trials`; errors come when their part is read.

    Args:
        path: the list.
        ids: the utterances' ids.
        paths: their paths.
        models: utterances by enrolment model.
        share: `(i, n)`: the i-th of n shares of the file's lines, of about equal bytes. A share may be empty.

    Yields:
        Trials of some megabytes of lines. `names` grows from part to part and keeps its order.
    """
    path = Path(path)
    table = _Suffixed(utterance_index(ids, paths), paths)
    enrolled: Mapping[str, int] = table
    members: tuple[np.ndarray, ...] | None = None
    if models is not None:
        enrolled = {name: i for i, name in enumerate(models)}
        members = model_rows(models, ids, paths)

    # Names become numbers as they come: a list of millions of trials has few names, looked up once each.
    numbers = _Numbers()
    names: list[str] = []
    enrol_rows, test_rows = np.empty((2, 0), np.int32)  # the row of each of `names`, as either side
    form: _Form | None = None
    separator, found = "", False
    require_regular(path)
    try:
        for lines, first in _lines(path, share):
            try:
                text = b"".join(lines).decode("utf-8-sig" if first else "utf-8")
                opening = _opening(path) if form is None else ""
            except UnicodeDecodeError:
                raise _first_error(path, form or _LABEL_FIRST, enrolled, table) from None
            if form is None:
                separator = _separator(opening)
            tokens = (text.replace(separator, " ") if separator else text).split()
            if not tokens:
                continue
            if form is None:
                form = _guess_form((opening.replace(separator, " ") if separator else opening).split(), table)
            # Words are only counted. Where a short line and a long one cancel out, names below are mostly unknown.
            filled = sum(1 for line in lines if not line.isspace())
            if len(tokens) != 3 * filled:  # other blanks than ASCII's, such as no-break spaces, need a closer look
                filled = sum(1 for line in text.split("\n") if line.strip())
            if len(tokens) != 3 * filled:
                raise _first_error(path, form, enrolled, table)
            enrol_name, test_name = (
                np.fromiter(map(numbers.__getitem__, tokens[column::3]), np.int32) for column in form[:2]
            )
            label = _rows(_LABELS, tokens[form[2] :: 3])
            fresh = list(itertools.islice(numbers, len(names), None))
            names += fresh
            enrol_rows = np.append(enrol_rows, _rows(enrolled, fresh))
            test_rows = np.append(test_rows, _rows(table, fresh))
            enrol, test = enrol_rows[enrol_name], test_rows[test_name]
            if min(np.min(enrol), np.min(test), np.min(label)) < 0:
                raise _first_error(path, form, enrolled, table)
            found = True
            yield Trials(enrol, test, label.astype(bool), tuple(names), enrol_name, test_name, members)
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason_of(error)}") from None
    if not found and share[1] == 1:
        raise UserError(f"{path}: lists no trial")


def _lines(path: Path, share: tuple[int, int]) -> Iterator[tuple[list[bytes], bool]]:
    """The lines that begin within a share of a file, some megabytes at a time; and whether they are its first."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start, end = (size * part // share[1] for part in (share[0], share[0] + 1))
        if start:
            # From a byte before, so that a line that begins at `start` is not skipped.
            file.seek(start - 1)
            file.readline()  # it began in the share before
        place = file.tell()
        while place < end:
            # `readlines` stops once there is more than it was asked for, so that it is asked for a byte less.
            most = min(_CHUNK, end - place - 1)
            yield file.readlines(most) if most else [file.readline()], place == 0
            place = file.tell()


def _opening(path: Path) -> str:
    """The first line of a file that is not blank; it tells the list's form."""
    with path.open("rb") as file:
        lines = (line.decode("utf-8-sig") for line in file)  # a byte-order mark or a no-break space is blank as well
        return next((line for line in lines if line.strip()), "")


def _separator(text: str) -> str:
    """The comma or semicolon that parts the words of a list, or nothing where blanks do, by its first line."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    for mark in ",;":
        words = [word.strip() for word in first.split(mark)]
        if len(words) == 3 and all(len(word.split()) == 1 for word in words):
            return mark
    return ""


class _Suffixed(dict[str, int]):
    """Rows by name; a path that is not found as it stands is looked up without its suffix."""

    def __init__(self, table: Mapping[str, int], paths: Sequence[str]):
        super().__init__(table)
        self._paths = paths
        self._stems: dict[str, int] | None = None

    def row(self, name: str) -> int:
        """The row of a name, or -1."""
        found = self.get(name)
        if found is not None:
            return found
        if self._stems is None:  # made only for lists that need it
            self._stems = utterance_index((), [os.path.splitext(path)[0] for path in self._paths])
        stem, suffix = os.path.splitext(name)
        return self._stems.get(stem, -1) if suffix.lower() in SUFFIXES else -1


def open_trials(text: str, utterances: Utterances, models: str | None = None) -> Trials:
    """Opens a TRIALS argument as indices into `utterances`.

    Args:
        text: a file (`read_trials`), `synthetic:SPLIT` for the trials of the embedded corpus, or nothing, which draws
            trials at random (`draw_trials`).
        utterances: the table.
        models: list of enrolment models (`read_models`), where the trials enrol models.

    Raises:
        UserError: the list cannot be read, or names an unknown utterance; or models are given for trials that are made.
    """
    check_models(text, models)
    if not text:
        return draw_trials(utterances)
    if not text.startswith("synthetic:"):
        return read_trials(text, utterances.ids, utterances.paths, read_models(models) if models else None)
    from kmq_jax.data.synthetic import synthetic_trials

    trials = synthetic_trials(text)
    rows = _rows(utterance_index(utterances.ids), trials.names)
    enrol, test = rows[trials.enrol_name], rows[trials.test_name]
    unknown = np.flatnonzero(np.minimum(enrol, test) < 0)
    if unknown.size:
        first = (trials.enrol_name if enrol[unknown[0]] < 0 else trials.test_name)[unknown[0]]
        raise UserError(
            f"trials {text}: unknown utterance {trials.names[first]}{_nearest(trials.names[first], utterances.ids)}"
        )
    return dataclasses.replace(trials, enrol=enrol, test=test)


def check_models(text: str, models: str | None) -> None:
    """Refuses a list of enrolment models beside trials that are made: these enrol utterances.

    Args:
        text: a TRIALS argument; nothing where trials are drawn.
        models: list of enrolment models, if any.

    Raises:
        UserError: both are given.

    >>> check_models("synthetic:dev", None)
    """
    if models and (not text or text.startswith("synthetic:")):
        what = f"`trials` (={text})" if text else "trials drawn at random"
        raise UserError(f"`enrol_models` does not go with {what}, which enrol utterances")


def read_models(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Reads enrolment models, `model utterance [utterance ...]` a line (Kaldi's spk2utt, CN-Celeb's enroll.map).

    Returns:
        Names of utterances by model, in the order of the file.

    Raises:
        UserError: as `read_table`.
    """
    return {model: rest.split() for model, rest in read_table(Path(path))[0].items()}


def model_rows(
    models: Mapping[str, Sequence[str]], ids: Sequence[str], paths: Sequence[str] = ()
) -> tuple[np.ndarray, ...]:
    """The rows of each enrolment model's utterances, in the order of `models`.

    Args:
        models: utterances by model (`read_models`).
        ids: the utterances' ids.
        paths: their paths, by which models may name them, too.

    Raises:
        UserError: a model names an unknown utterance, or none.

    >>> [rows.tolist() for rows in model_rows({"m": ["b", "c"], "n": ["a"]}, ["a", "b", "c"])]
    [[1, 2], [0]]
    """
    table = _Suffixed(utterance_index(ids, paths), paths)
    return tuple(_members(name, utterances, table) for name, utterances in models.items())


def _rows(table: Mapping[str, int], names: Sequence[str] | Mapping[str, int]) -> np.ndarray:
    """Rows of `names` in `table`, -1 for the unknown."""
    if isinstance(table, _Suffixed):
        return np.fromiter(map(table.row, names), np.int32, len(names))
    return np.fromiter(map(table.get, names, repeat(-1)), np.int32, len(names))


def _members(model: str, utterances: Sequence[str], table: Mapping[str, int]) -> np.ndarray:
    rows = _rows(table, utterances)
    if not len(rows) or rows.min() < 0:
        # The least row, -1, is that of the first unknown name.
        unknown = utterances[int(np.argmin(rows))] if len(rows) else "nothing"
        raise UserError(f"enrolment model {model} names the unknown utterance {unknown}{_nearest(unknown, table)}")
    return rows


def _nearest(name: str, known: Iterable[str]) -> str:
    """The known names that are nearest to an unknown one, as the end of a message; or one, to show their form.

    >>> _nearest("id1/a-2.wav", ["id1/a-1.wav", "id1/a-3.wav", "b"])
    '; the nearest known are id1/a-3.wav, id1/a-1.wav'
    >>> _nearest("zzzz", ["a", "b"])
    '; known is, for example, a'
    """
    ordered = sorted(known)
    composed = unicodedata.normalize("NFC", name)
    if not name.isascii() and any(unicodedata.normalize("NFC", one) == composed for one in ordered):
        return "; the same name is known with its accents written otherwise (Unicode's NFC and NFD)"
    # A table may hold millions: only names that begin or end alike are compared letter by letter.
    place, last = bisect.bisect(ordered, name), name.rsplit("/", 1)[-1]
    alike = [one for one in ordered if one.rsplit("/", 1)[-1] == last][:_COMPARED]
    near = dict.fromkeys([*ordered[max(0, place - _COMPARED) : place + _COMPARED], *alike])
    if found := difflib.get_close_matches(name, near, n=2):
        return f"; the nearest known {'are' if found[1:] else 'is'} {', '.join(found)}"
    return f"; known is, for example, {ordered[0]}" if ordered else ""


def _guess_form(tokens: Sequence[str], table: Mapping[str, int]) -> _Form:
    """Tells the form by the first line: an utterance may itself be called 0 or 1."""
    if len(tokens) >= 3 and tokens[2] in _LABELS and not (tokens[0] in _LABELS and tokens[2] in table):
        return _LABEL_LAST
    return _LABEL_FIRST


def _first_error(path: Path, form: _Form, enrolled: Mapping[str, int], table: Mapping[str, int]) -> UserError:
    """Finds the first line at fault, line by line: the fast way only tells that there is one."""
    separator: str | None = None
    columns = "`label enrol test`" if form == _LABEL_FIRST else "`enrol test label`"
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                return UserError(f"{path}:{number}: not UTF-8 text")
            if separator is None and text.strip():  # the first line tells it, as it did before
                separator = _separator(text)
            tokens = (text.replace(separator, " ") if separator else text).split()
            if not tokens:
                continue
            if len(tokens) != 3:
                return UserError(f"{path}:{number}: expected {columns}, found {len(tokens)} columns")
            enrol, test, label = (tokens[column] for column in form)
            if label not in _LABELS:
                return UserError(
                    f"{path}:{number}: label {label!r} is none of 1, 0, target, nontarget (expected {columns})"
                )
            if _rows(enrolled, [enrol])[0] < 0:
                what = "utterance" if enrolled is table else "enrolment model"
                return UserError(f"{path}:{number}: unknown {what} {enrol}{_nearest(enrol, enrolled)}")
            if _rows(table, [test])[0] < 0:
                return UserError(f"{path}:{number}: unknown utterance {test}{_nearest(test, table)}")
    return UserError(f"{path}: is no trial list")


def doubts(path: str, trials: Trials, enrol_speaker: np.ndarray, test_speaker: np.ndarray) -> list[str]:
    """Finds what makes a list doubtful: contradictory labels, a recording against itself, a repeated pair.

    Args:
        path: of the list; lines of it are named.
        trials: the list.
        enrol_speaker: `[trials]`, integers; empty where only the labels tell of speakers.
        test_speaker: the same.

    Returns:
        One line for each kind of doubt found; it counts the trials and names the line of the first.
    """
    found = []
    if len(enrol_speaker):
        found.append(("labels contradict the speakers' names", (enrol_speaker == test_speaker) != trials.label))
    if trials.models is None:
        own = trials.enrol == trials.test
        # One number for a pair in either order, so that pairs are compared as integers.
        low, high = np.minimum(trials.enrol, trials.test), np.maximum(trials.enrol, trials.test)
        pair = low.astype(np.int64) * (int(high.max(initial=0)) + 1) + high
    else:
        members = [set(rows.tolist()) for rows in trials.models]
        own = np.fromiter((test in members[model] for model, test in zip(trials.enrol, trials.test)), bool, len(trials))
        pair = trials.enrol.astype(np.int64) * (int(trials.test.max(initial=0)) + 1) + trials.test
    found.append(("recordings are compared with themselves", own))
    both = np.intersect1d(pair[trials.label], pair[~trials.label])
    twofold = np.isin(pair, both)
    found.append(("trials are of pairs that have both labels", twofold))
    if os.path.isfile(path):  # lists that are made repeat a pair now and then
        again = np.ones(len(pair), bool)
        again[np.unique(pair, return_index=True)[1]] = False  # the first occurrence of each pair
        found.append(("trials are of pairs that stand there before, and count again", again & ~twofold))
    return [
        f"{path}:{_line_of(path, int(rows.argmax()))}: {int(rows.sum())} {what}; this is the first"
        for what, rows in found
        if rows.any()
    ]


def _line_of(path: str, trial: int) -> int:
    """The line of a list that holds a trial."""
    if not os.path.isfile(path):
        return trial + 1  # of a list that is made, not read
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        filled = (number for number, line in enumerate(file, 1) if line.strip())
        return next(itertools.islice(filled, trial, None), 0)
