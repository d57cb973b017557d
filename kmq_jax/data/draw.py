"""Trial lists drawn from data that come without one."""

import os
import sys
from collections.abc import Sequence

import numpy as np

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import atomic_write
from kmq_jax.data.table import Trials, Utterances, require_utf8

AGES = (12, 18)
"""Years at which a group of ages ends and the next begins: children, youths, adults."""


def draw_trials(
    utterances: Utterances, targets: int = 5000, nontargets: int = 20000, seed: int = 0, matched: float = 0.0
) -> Trials:
    """Draws trials at random, without the same pair twice: a list for data that comes without one.

    Args:
        utterances: the table.
        targets: at most this many pairs of the same speaker.
        nontargets: at most this many of different speakers.
        seed: the same seed gives the same trials.
        matched: at least this share of the nontargets, 0 to 1, is of two speakers of one gender and one group of ages
            (`AGES`): harder than pairs of anybody. Speakers whose gender is not known are in none of these. A warning
            tells where there are too few such pairs.

    Raises:
        UserError: no two utterances share a speaker, there is only one speaker, or no two speakers are alike where
            some should be.

    >>> from kmq_jax.data.source import open_source
    >>> trials = draw_trials(open_source("synthetic:dev?speakers=3&utterances=2"))
    >>> len(trials), int(trials.label.sum())
    (15, 3)
    """
    rng = np.random.default_rng(seed)
    labels = utterances.labels
    by_speaker = np.argsort(labels, kind="stable")
    groups = np.split(by_speaker, np.flatnonzero(np.diff(labels[by_speaker])) + 1)
    same = np.concatenate([_some_pairs(rows, targets, rng) for rows in groups])
    if len(groups) < 2 or not len(same):
        raise UserError("trials need two speakers, one of them with two utterances")
    same = rng.permutation(same)[:targets]
    alike = _alike(utterances, round(matched * nontargets), rng) if matched else np.empty((0, 2), np.int64)
    # Four times as many as are asked for: repeated pairs, and pairs of one speaker, fall away.
    drawn = np.sort(rng.integers(len(labels), size=(4 * nontargets, 2)), axis=1)
    other = _once(np.concatenate((alike, drawn[labels[drawn[:, 0]] != labels[drawn[:, 1]]])))[:nontargets]
    if len(alike) < round(matched * len(other)):
        print(
            f"warning: {len(alike)} of {len(other)} nontargets are sure to be of one gender and group of ages, fewer "
            f"than the share of {matched:g}",
            file=sys.stderr,
        )
    enrol, test = rng.permutation(np.concatenate((same, other))).T.astype(np.int32)
    return Trials(enrol, test, labels[enrol] == labels[test], utterances.ids, enrol, test)


def _once(pairs: np.ndarray) -> np.ndarray:
    """Each pair once, in the order drawn; in `unique`'s own order a cut would favour the first rows."""
    return pairs[np.sort(np.unique(pairs, axis=0, return_index=True)[1])]


def _some_pairs(rows: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """All pairs of `rows` `[pairs, 2]`; of very many rows, those of a random few, so that memory stays bounded."""
    # n rows have about n^2 / 2 pairs: so many rows have twice as many pairs as are asked for.
    rows = rng.permutation(rows)[: max(2, 2 * int(most**0.5))]
    first, second = np.triu_indices(len(rows), 1)
    return np.stack((rows[first], rows[second]), axis=1)


def group_of(utterances: Utterances, speaker: str) -> tuple[str, int] | None:
    """A speaker's gender and group of ages; None where the gender is not known. Without an age all are of one group.

    >>> group_of(Utterances((), (), (), genders={"a": "f"}, ages={"a": 9}), "a")
    ('f', 0)
    """
    gender, age = utterances.genders.get(speaker), utterances.ages.get(speaker)
    return None if gender is None else (gender, -1 if age is None else sum(age >= end for end in AGES))


def _alike(utterances: Utterances, count: int, rng: np.random.Generator) -> np.ndarray:
    """At most `[count, 2]` rows of different speakers of one group, a group drawn as often as it has pairs."""
    labels = utterances.labels
    of_speaker = [group_of(utterances, name) for name in utterances.speaker_names]
    places = {group: number for number, group in enumerate(dict.fromkeys(filter(None, of_speaker)))}
    group = np.array([places.get(one, -1) if one else -1 for one in of_speaker])[labels]
    members = [rows for rows in (np.flatnonzero(group == number) for number in places.values())
               if len(np.unique(labels[rows])) > 1]  # fmt: skip
    if not members:
        raise UserError("no two speakers are known to be of one gender and group of ages: `matched` must be 0")
    sizes = np.array([float(len(rows)) ** 2 for rows in members])  # pairs, but for a factor
    # Four times as many as are asked for, as in `draw_trials`.
    counts = np.bincount(rng.choice(len(members), 4 * count, p=sizes / sizes.sum()), minlength=len(members))
    drawn = [np.sort(rng.choice(rows, size=(many, 2)), axis=1) for rows, many in zip(members, counts)]
    pairs = rng.permutation(np.concatenate(drawn))
    return _once(pairs[labels[pairs[:, 0]] != labels[pairs[:, 1]]])[:count]


def write_trials(path: str | os.PathLike[str], trials: Trials, names: Sequence[str] = ()) -> None:
    """Writes a list in VoxCeleb's form, `1 enrol test` for the same speaker, `0` for two.

    Args:
        path: of the list.
        trials: what it holds.
        names: `[utterances]`, how the rows are called; the trials' own where left out.

    Raises:
        UserError: it cannot be written, or a name holds a blank, which a list cannot, or is not UTF-8.
    """
    called = np.array(names or trials.names, object)
    if split := next((name for name in called if len(str(name).split()) != 1), None):
        raise UserError(f"{split!r} holds a blank, which a trial list cannot hold: rename the recording")
    require_utf8(called, "a trial list")
    rows = zip(trials.label.astype(int), called[trials.enrol], called[trials.test])
    with atomic_write(path) as temporary:
        temporary.write_text("".join(f"{label} {enrol} {test}\n" for label, enrol, test in rows), encoding="utf-8")
