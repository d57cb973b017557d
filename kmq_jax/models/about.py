"""What a model tells of itself beside its weights: where it comes from, its licence, what it was fitted on.

It travels in the manifest of a `.kmq` file, as `about`. A file without it is read as ever.
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
    "fitted_on": "fitted on",
    "made_by": "made by",
}
METRICS = "metrics"
_LONGEST, _MOST = 2000, 200  # letters of a text, and metrics


def made_by() -> str:
    """This program and its version.

    >>> made_by().split()[0]
    'kmq_jax'
    """
    from kmq_jax import __version__

    return f"kmq_jax {__version__}"


def told(place: str | os.PathLike[str]) -> str:
    """A place as it may be told to others: of an absolute path only the last two parts, without anybody's home.

    >>> told("/home/alice/corpora/words/train"), told("synthetic:train")
    ('words/train', 'synthetic:train')
    """
    parts = [Path(*Path(one).parts[-2:]) if Path(one).is_absolute() else one for one in str(place).split(",")]
    return ",".join(map(str, parts))


def numbers(metrics: Row) -> Json:
    """The numbers among what `score --json` wrote.

    >>> numbers({"eer": 2.5, "eer_ci95": [1, 2], "calibration": "none"})
    {'eer': 2.5}
    """
    return {
        name: value
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def checked(value: object, where: str) -> About:
    """What a file from anyone tells of itself, if it is of the form that `About` says.

    Args:
        value: from the manifest.
        where: it comes from, for messages.

    Raises:
        UserError: it is not.
    """
    if not isinstance(value, dict):
        raise UserError(f"{where}: `about` is not an object")
    for name, held in value.items():
        if name == METRICS:
            fine = isinstance(held, dict) and len(held) <= _MOST and numbers(held) == held
            fine = fine and all(len(one) <= _LONGEST and math.isfinite(held[one]) for one in held)
        else:
            fine = isinstance(held, str) and len(held) <= _LONGEST
        if not fine or len(name) > _LONGEST or len(value) > _MOST:
            raise UserError(f"{where}: `about` holds {printable(name)[:80]!r}, which it must not in this form")
    return value


def describe(about: About) -> list[str]:
    """Lines for people; empty where nothing is known.

    >>> describe({"license": "mit", "metrics": {"eer": 2.5}})
    ['licence: mit', 'eer: 2.5']
    """
    texts = [f"{NAMES.get(name, name)}: {value}" for name, value in about.items() if name != METRICS]
    measured = [f"{name}: {value:.6g}" for name, value in about.get(METRICS, {}).items()]
    return [printable(line) for line in texts + measured]


def printable(text: str) -> str:
    r"""A text without what could steer a terminal.

    >>> printable("a\x1b[2Jb")
    'a?[2Jb'
    """
    return "".join(letter if letter.isprintable() else "?" for letter in text)
