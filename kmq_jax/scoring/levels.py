"""The embedding files of a cascade's levels, joined with one trial list."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from kmq_jax.core.errors import UserError
from kmq_jax.data.trials import Trials
from kmq_jax.scoring.cosine import Scorer, average, cosine_scorer
from kmq_jax.scoring.join import Sides, join
from kmq_jax.scoring.table import EmbeddingTable, read_embeddings, warn_of_vad

_MOST = 64


@dataclass(frozen=True, eq=False)
class LevelScores:
    """Every level's scores of a trial list.

    Attributes:
        trials: the list.
        sides: its utterances and speakers, numbered as in the first level's file.
        tables: the levels' files, their rows in the order of the first one.
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
        """Whether both sides of a trial are rows of the same utterances, as they are where no models are enrolled."""
        return self.trials.models is None


def parse_levels(values: Sequence[str], flag: str = "stage", what: str = "EMBEDDINGS.npz") -> list[tuple[int, str]]:
    """Reads the values of `--stage=BITS:EMBEDDINGS.npz` flags, or of another such flag, and sorts them by bits.

    Args:
        values: of the flag, `BITS:PATH` each.
        flag: its name, for messages.
        what: what follows the bits, for messages.

    Returns:
        Bits and path of each, ascending.

    Raises:
        UserError: a value has another form, or two have the same bits.

    >>> parse_levels(["4:e4.npz", "2:e2.npz"])
    [(2, 'e2.npz'), (4, 'e4.npz')]
    """
    levels = []
    for value in values:
        bits, colon, path = value.partition(":")
        # `isdigit` alone holds for digits such as superscripts, which `int` refuses, as it does thousands of digits.
        if not (colon and path and bits.isascii() and bits.isdigit() and len(bits) < 10 and 1 <= int(bits) <= _MOST):
            raise UserError(f"--{flag} (={value[:200]}) must be BITS:{what}, with 1 to {_MOST} bits")
        levels.append((int(bits), path))
    levels.sort()
    for (one, _), (two, _) in zip(levels, levels[1:]):
        if one == two:
            raise UserError(f"--{flag} (={one}): {one} bits are given twice")
    return levels


@dataclass(frozen=True, eq=False)
class LevelTables:
    """The embedding files of a cascade's levels, which score any trial between their utterances.

    Attributes:
        tables: the levels' files, their rows in the order of the first one.
        reference: the reference's file, likewise, or None.
        top: whether the enrolled side is always scored with the last level's embeddings.
        lacks: by file, `[utterances]` bool: which rows of the first file it lacks. Its embeddings are ones there.
    """

    tables: tuple[EmbeddingTable, ...]
    reference: EmbeddingTable | None
    top: bool
    lacks: Mapping[str, np.ndarray]

    def check(self, rows: np.ndarray) -> None:
        """Checks that every file has the utterances at `rows`, those that trials or enrolment models use.

        Raises:
            UserError: one lacks an utterance.
        """
        for source, missing in self.lacks.items():
            if (found := missing[rows]).any():
                name = self.tables[0].ids[int(rows[found].min())]
                raise UserError(f"{source}: no embedding of {name}, which the trials use")

    def scorer(self, models: Sequence[np.ndarray] | None = None) -> Callable[[ArrayLike, ArrayLike], np.ndarray]:
        """Makes a function that scores trials by cosine at every level.

        It takes rows of enrolments and of tests, each `[trials]`, and returns `[levels, trials]` float32. Where there
        is a reference, its scores are one more row, the last.

        Args:
            models: rows of each enrolment model's utterances, where the trials enrol models.
        """
        pairs = [(self.tables[-1] if self.top else table, table) for table in self.tables]
        pairs += [(self.reference, self.reference)] if self.reference is not None else []

        def made(enrolled: EmbeddingTable, tested: EmbeddingTable) -> Scorer:
            rows = enrolled.embeddings if models is None else average(enrolled.embeddings, models)
            return cosine_scorer(rows, tested.embeddings)

        names = [(enrolled.source, tested.source) for enrolled, tested in pairs]
        # By file, so that a level which is the reference itself is scored once.
        scorers = {name: made(*pair) for name, pair in zip(names, pairs)}

        def score(enrol: ArrayLike, test: ArrayLike) -> np.ndarray:
            found = {name: one(enrol, test) for name, one in scorers.items()}
            return np.stack([found[name] for name in names])

        return score


def read_levels(levels: Sequence[tuple[int, str]], reference: str | None, enrolment: str = "each") -> LevelTables:
    """Reads the embedding files of levels.

    Args:
        levels: bits and embedding file of each level, ascending.
        reference: embedding file of the reference, if any; it may be one of the levels'.
        enrolment: "each": both sides at the level's bits; "top": the enrolled side from the last level's file.

    Raises:
        UserError: a file cannot be read, or, with "top", has other dimensions than the last level.
    """
    aligned: dict[str, EmbeddingTable] = {}
    lacks: dict[str, np.ndarray] = {}
    first: EmbeddingTable | None = None
    for path in [path for _, path in levels] + ([reference] if reference else []):
        if path not in aligned:
            table = read_embeddings(path)
            first = table if first is None else first
            # Files may list utterances in different orders; trials number them as the first level's file does.
            aligned[path], missing = _align(table, first)
            if missing.any():
                lacks[path] = missing
    warn_of_vad(*aligned.values())
    tables = tuple(aligned[path] for _, path in levels)
    if enrolment == "top" and len({table.embeddings.shape[1] for table in tables}) > 1:
        raise UserError("`enrolment` (=top) compares embeddings of two levels, but the levels' dimensions differ")
    return LevelTables(tables, aligned[reference] if reference else None, enrolment == "top", lacks)


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
    read = read_levels(levels, reference, enrolment)
    first = read.tables[0]
    trials, sides = join(trials_path, first, first, models_path)
    read.check(sides.test)
    read.check(sides.enrol if trials.models is None else np.concatenate(trials.models))
    scores = read.scorer(trials.models)(sides.enrol, sides.test)
    return LevelScores(trials, sides, read.tables, scores[: len(levels)], scores[-1] if reference else None)


def _align(table: EmbeddingTable, first: EmbeddingTable) -> tuple[EmbeddingTable, np.ndarray]:
    """A table with its rows in the order of `first`, and which of these it lacks `[utterances]`: they become ones."""
    if table.ids == first.ids:
        return dataclasses.replace(table, paths=first.paths, speakers=first.speakers), np.zeros(len(first), bool)
    row = dict(zip(table.ids, range(len(table))))
    rows = np.array([row.get(name, -1) for name in first.ids])
    # Row -1 reads the last embedding, which `where` replaces. Ones, for zeros could not be scored.
    embeddings = np.where(rows[:, None] >= 0, table.embeddings[rows], np.float32(1))
    of_first = dataclasses.replace(
        table, ids=first.ids, paths=first.paths, speakers=first.speakers, embeddings=embeddings
    )
    return of_first, rows < 0
