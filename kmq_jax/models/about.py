"""What a model tells of itself beside its weights: where it comes from, its licence, what it was fitted on.

It travels in the manifest of a `.kmq` file, as `about`. A file without it can still be read.
"""

import math
import os
from pathlib import Path
from typing import TypeAlias

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json, Row

About: TypeAlias = Row
"""Texts by the names of `NAMES`, and under "metrics" numbers by name."""

NAMES = {
    "source": "made from",
    "source_sha256": "its SHA-256",
    "license": "licence",
    "unfolded_on": "normalisation measured on",
    "fitted_on": "fitted on",
    "made_by": "made by",
}
METRICS = "metrics"
_LONGEST, _MOST = 2000, 200  # letters of a text, and metrics
_HOMES = ("home", "homes", "users")  # directories of people's homes, wherever they lie


def made_by() -> str:
    """This program and its version.

    >>> made_by().split()[0]
    'kmq_jax'
    """
    from kmq_jax import __version__

    return f"kmq_jax {__version__}"


def told(place: str | os.PathLike[str]) -> str:
    """A place as it may be told to others: of an absolute path only the last two parts, without anybody's home.

    >>> told("/home/alice/corpora/words/train"), told("/home/alice/words"), told("synthetic:train")
    ('words/train', 'words', 'synthetic:train')
    """
    # A DATA argument may name several places, with commas between them, and spaces around those.
    return ",".join(_without_home(one.strip()) for one in str(place).split(","))


def _without_home(place: str) -> str:
    parts = Path(place).parts
    if not Path(place).is_absolute():
        return place
    # Whoever lies right below one of these is a person.
    first = max((i + 2 for i, one in enumerate(parts[:-1]) if one.lower() in _HOMES), default=1)
    return str(Path(*parts[first:][-2:])) if parts[first:] else "~"


def numbers(metrics: Row) -> Json:
    """The numbers among what `score --json` wrote.

    >>> numbers({"eer": 2.5, "eer_ci95": [1, 2], "calibration": "none"})
    {'eer': 2.5}
    """
    return {
        name: value
        for name, value in metrics.items()
        # True is an int to Python.
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def checked(value: object, where: str) -> About:
    """Checks what a file tells of itself. The file may come from anyone.

    Args:
        value: from the manifest.
        where: the file, for messages.

    Returns:
        `value`.

    Raises:
        UserError: it is not of the form that `About` says.

    >>> checked({"license": "mit"}, "a.kmq")
    {'license': 'mit'}
    """
    if not isinstance(value, dict):
        raise UserError(f"{where}: `about` is not an object")
    for name, held in value.items():
        if name == METRICS:
            # `numbers` drops what is no number: equal means that all of them are.
            fine = isinstance(held, dict) and len(held) <= _MOST and numbers(held) == held
            fine = fine and all(len(one) <= _LONGEST and _is_finite(held[one]) for one in held)
        else:
            fine = isinstance(held, str) and len(held) <= _LONGEST
        if not fine or len(name) > _LONGEST or len(value) > _MOST:
            raise UserError(f"{where}: `about` holds {printable(name)[:80]!r}, which it must not in this form")
    return value


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floating point
        return False


def describe(about: About) -> list[str]:
    """Lines for people; empty where nothing is known.

    >>> describe({"license": "mit", "metrics": {"eer": 2.5}})
    ['licence: mit', 'eer: 2.5']
    """
    texts = [f"{NAMES.get(name, name)}: {value}" for name, value in about.items() if name != METRICS]
    measured = [f"{name}: {value:.6g}" for name, value in about.get(METRICS, {}).items()]
    return [printable(line) for line in texts + measured]


def printable(text: str) -> str:
    r"""A text with a question mark for every character that could steer a terminal.

    >>> printable("a\x1b[2Jb")
    'a?[2Jb'
    """
    return "".join(letter if letter.isprintable() else "?" for letter in text)
