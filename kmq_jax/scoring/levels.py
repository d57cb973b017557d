"""The embedding files of a cascade's levels, joined with one trial list."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kmq_jax.core.errors import UserError
from kmq_jax.data.trials import Trials
from kmq_jax.scoring.cosine import average, cosine_scores
from kmq_jax.scoring.join import Sides, join
from kmq_jax.scoring.table import EmbeddingTable, read_embeddings


@dataclass(frozen=True, eq=False)
class LevelScores:
    """Every level's scores of a trial list.

    Attributes:
        trials: the list.
        sides: its utterances and speakers, numbered as in the first level's file.
        tables: the levels' files; each but the first in the first one's order.
        scores: `[levels, trials]` float32.
        reference: `[trials]` float32, the reference's scores, or None.
    """

    trials: Trials
    sides: Sides
    tables: tuple[EmbeddingTable, ...]
    scores: np.ndarray
    reference: np.ndarray | None

    @property
    def one_table(self) -> bool:
        """Whether both sides of a trial number the same utterances."""
        return self.trials.models is None


def parse_levels(
    values: Sequence[str], flag: str = "stage", what: str = "EMBEDDINGS.npz", most: int = 64
) -> list[tuple[int, str]]:
    """Reads `--stage=BITS:EMBEDDINGS.npz` flags, or those of another name, and sorts them by bits.

    Args:
        values: of the flag.
        flag: its name, for messages.
        what: follows the bits, for messages.
        most: bits that are allowed.

    Raises:
        UserError: one has another form, or two have the same bits.

    >>> parse_levels(["4:e4.npz", "2:e2.npz"])
    [(2, 'e2.npz'), (4, 'e4.npz')]
    """
    levels = []
    for value in values:
        bits, colon, path = value.partition(":")
        if not (colon and path and bits.isascii() and bits.isdigit() and 1 <= int(bits) <= most):
            raise UserError(f"--{flag} (={value}) must be BITS:{what}, with 1 to {most} bits")
        levels.append((int(bits), path))
    levels.sort()
    for (one, _), (two, _) in zip(levels, levels[1:]):
        if one == two:
            raise UserError(f"--{flag} (={one}): {one} bits are given twice")
    return levels


def score_levels(
    levels: Sequence[tuple[int, str]],
    reference: str | None,
    trials_path: str,
    enrolment: str = "each",
    models_path: str | None = None,
) -> LevelScores:
    """Scores a trial list at every level by cosine.

    Args:
        levels: bits and embedding file of each level, ascending.
        reference: embedding file of the reference, if any; it may be one of the levels'.
        trials_path: the trial list.
        enrolment: "each": both sides at the level's bits; "top": the enrolled side from the last level's file.
        models_path: list of enrolment models, where the trials enrol models.

    Raises:
        UserError: a file cannot be read, lacks an utterance that the trials use, or, with "top", has other
            dimensions than the last level.
    """
    read: dict[str, EmbeddingTable] = {}
    for path in [path for _, path in levels] + ([reference] if reference else []):
        if path not in read:
            read[path] = read_embeddings(path)
    first = read[levels[0][1]]
    trials, sides = join(trials_path, first, first, models_path)
    used = np.zeros(len(first), bool)
    used[sides.test] = True
    used[sides.enrol if trials.models is None else np.concatenate(trials.models)] = True
    # Files may list utterances in different orders; trials number them as the first level's file does.
    aligned = {path: table if table is first else _align(table, first, used) for path, table in read.items()}
    tables = tuple(aligned[path] for _, path in levels)
    if enrolment == "top" and len({table.embeddings.shape[1] for table in tables}) > 1:
        raise UserError("`enrolment` (=top) compares embeddings of two levels, but the levels' dimensions differ")

    def score(enrolled: EmbeddingTable, tested: EmbeddingTable) -> np.ndarray:
        rows = enrolled.embeddings
        if trials.models is not None:
            rows = average(rows, trials.models)
        return cosine_scores(rows, tested.embeddings, sides.enrol, sides.test)

    scores = np.stack([score(tables[-1] if enrolment == "top" else table, table) for table in tables])
    own = score(aligned[reference], aligned[reference]) if reference else None
    return LevelScores(trials, sides, tables, scores, own)


def _align(table: EmbeddingTable, first: EmbeddingTable, used: np.ndarray) -> EmbeddingTable:
    """Puts a table's rows into the order of another; rows that no trial uses may be missing, and become ones."""
    row = dict(zip(table.ids, range(len(table))))
    rows = np.array([row.get(name, -1) for name in first.ids])
    if (missing := used & (rows < 0)).any():
        raise UserError(f"{table.source}: no embedding of {first.ids[int(missing.argmax())]}, which the trials use")
    embeddings = np.where(rows[:, None] >= 0, table.embeddings[rows], np.float32(1))
    return dataclasses.replace(table, ids=first.ids, paths=first.paths, speakers=first.speakers, embeddings=embeddings)
