"""Scores trial lists of any length in bounded memory, in one process or shared among several."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from kmq_jax.core import distributed
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json, Row, atomic_write, write_json
from kmq_jax.core.progress import progress
from kmq_jax.data.trials import Trials, model_rows, read_in_parts, read_models
from kmq_jax.metrics.histogram import ScoreHistogram
from kmq_jax.scoring.cosine import Scorer, average, cosine_scorer
from kmq_jax.scoring.join import warn_of_mixed_models
from kmq_jax.scoring.options import ScoringOptions
from kmq_jax.scoring.run import (
    check_cohort_options,
    cohort_members,
    score_lines,
    shared_speakers,
    warn_of_other_model,
)
from kmq_jax.scoring.snorm import FlatScores, block_statistics, blocks, check_spread, checked_rows
from kmq_jax.scoring.table import EmbeddingTable, read_embeddings, warn_of_vad

_WIDEST = 64.0  # ends of the histogram of S-norm scores; those beyond share the outermost bins

Share: TypeAlias = tuple[int, int]
"""`(i, n)`: the i-th of n processes that work together."""


def score_stream(
    embeddings: Path,
    trials: str,
    options: ScoringOptions,
    *,
    enrol_models: str | None = None,
    cohort: Path | None = None,
    out: Path | None = None,
    share: Share = (0, 1),
) -> Json:
    """Scores a list part by part. EER and minDCF come from a histogram of the scores, which bounds them.

    The histogram is the same however many processes share the list.

    Args:
        embeddings: embedding file of all utterances.
        trials: the list, a file.
        options: how it is scored; there are no intervals, which would need all scores at once.
        enrol_models: list of enrolment models (`data.trials.read_models`), where the trials enrol models.
        cohort: embedding file of other speakers, for adaptive S-norm.
        out: file of `enrol test score` lines; where it ends in `.npy`, of float32 scores in the list's order.
        share: this process scores the i-th of n shares; all n must call this. With several, `out` gets `-i-of-n` before
            its suffix, and the figures are of all shares.

    Returns:
        `trials`, `targets`, `eer` and `eer_bounds` in percent, `threshold`, `min_dcf`, `min_dcf_bounds`, `p_target`,
        `kind` ("cosine" or "snorm") and `snorm` (what was done, or None).

    Raises:
        UserError: a file cannot be read or does not fit the others; a score is not finite; another process failed.
    """
    # A mistake that one process finds ends all of them, before they wait for one another.
    with distributed.all_or_none():
        check_streamable(trials)
        check_cohort_options(cohort, options)
        table = read_embeddings(embeddings)
        models = read_models(enrol_models) if enrol_models else None
        rows = model_rows(models, table.ids, table.paths or table.ids) if models else None
        enrolled = average(table.embeddings, rows) if rows else table.embeddings
        if rows and enrol_models and share[0] == 0:  # one process warns
            warn_of_mixed_models(enrol_models, rows, table.speakers)
        scorer, notes = cosine_scorer(enrolled, table.embeddings), None
        if cohort:
            others = read_embeddings(cohort)
            members, notes = cohort_members(others, options.top_n, options.cohort_speaker_means)
            if share[0] == 0:  # one process warns
                warn_of_other_model(others, table)
                warn_of_vad(others, table)
    if notes:
        scorer = _normalised(scorer, enrolled, table.embeddings, members, notes["top_n"], share)
    # Cosines have fixed ends; normalised scores have none.
    counts = ScoreHistogram(-_WIDEST, _WIDEST) if notes else ScoreHistogram(-1.0, 1.0)
    doubts = Doubts(table, rows)
    with distributed.entered_by_all(part_writer(share_of(out, share))) as write:
        parts = read_in_parts(trials, table.ids, table.paths or table.ids, models, share)
        for part in progress(parts, desc="scoring", unit="part"):
            scores = scorer(part.enrol, part.test)
            counts.add(scores, part.label)
            doubts.add(part)
            write(part, scores)
    # From here on all processes exchange what they counted, in the same order.
    counts.counts = distributed.sum_of_all(counts.counts)
    doubts.warn(trials, share)
    met = doubts.speakers()
    if notes:
        notes["shared_speakers"] = shared_speakers(others, met, warn=share[0] == 0)
    try:
        rates = rates_of(counts, options.p_target)
    except UserError as error:
        raise UserError(f"{trials}: {error}") from error
    return rates | {"p_target": options.p_target, "kind": "snorm" if cohort else "cosine", "snorm": notes}


def score_together(
    embeddings: Path,
    trials: str,
    enrol_models: str | None,
    cohort: Path | None,
    out: Path | None,
    json: Path | None,
    options: ScoringOptions,
) -> None:
    """Runs `score_stream` in all processes that were started together; the first one prints and writes the figures.

    Arguments and errors are those of `score_stream`; `json` is the file that the figures are written to.
    """
    share = own_share()
    figures = score_stream(embeddings, trials, options, enrol_models=enrol_models, cohort=cohort, out=out, share=share)
    if share[0] == 0:
        if json:
            write_json(json, figures)
        print(describe(figures))


def own_share() -> Share:
    """Joins the processes that were started together. Returns which one this is, and how many there are."""
    distributed.join()
    import jax

    return jax.process_index(), jax.process_count()


def describe(figures: Row) -> str:
    """The figures as lines for the terminal."""
    low, high = figures["eer_bounds"]
    least, most = figures["min_dcf_bounds"]
    return (
        f"{figures['trials']:,} trials, {figures['targets']:,} of them targets\n"
        f"EER %     {figures['eer']:9.3f}   within {low:.5f} to {high:.5f}\n"
        f"minDCF    {figures['min_dcf']:9.4f}   within {least:.6f} to {most:.6f}\n"
        f"threshold {figures['threshold']:9.5f}"
    )


def check_streamable(trials: str) -> None:
    """Refuses a trial list that is made up (`synthetic:SPLIT`): there is no file to read in parts.

    Raises:
        UserError: it is one.
    """
    if trials.startswith("synthetic:"):
        raise UserError(f"`stream` reads a list from a file, not {trials}")


def rates_of(counts: ScoreHistogram, p_target: float) -> Json:
    """The rates of a histogram as figures: `eer` and `eer_bounds` in percent, the others as `Rates` has them.

    Raises:
        UserError: there is no target or no nontarget trial.

    >>> counts = ScoreHistogram(-1.0, 1.0)
    >>> counts.add(np.float32([0.9, 0.1]), np.array([True, False]))
    >>> rates_of(counts, p_target=0.01)["eer"]
    0.0
    """
    rates = dataclasses.asdict(counts.rates(p_target))
    return rates | {"eer": 100 * rates["eer"], "eer_bounds": [100 * rate for rate in rates["eer_bounds"]]}


class Doubts:
    """Counts doubtful trials part by part: labels that contradict the speakers, recordings against themselves.

    It also keeps which speakers the trials compare. `data.trials.doubts` finds pairs with both labels as well, which
    needs the whole list at once.
    """

    def __init__(self, table: EmbeddingTable, models: Sequence[np.ndarray] | None):
        """Takes the table whose rows the list names, and each enrolment model's rows, where models are enrolled."""
        self._size = len(table)
        # A number for each model and utterance of it, as `add` makes them of trials.
        own = [i * self._size + rows.astype(np.int64) for i, rows in enumerate(models or ())]
        self._own = np.concatenate(own) if own else None
        self._speaker: tuple[np.ndarray, np.ndarray] | None = None
        self._names, self._met = np.empty(0, str), np.empty(0, np.int8)
        if table.speakers:
            self._names, label = np.unique(np.array(table.speakers), return_inverse=True)
            self._met = np.zeros(len(self._names), np.int8)
            # A model's speaker is that of its first utterance.
            self._speaker = label if models is None else label[[rows[0] for rows in models]], label
        self._counts = np.zeros(2, np.int64)

    def add(self, part: Trials) -> None:
        """Counts the doubtful trials of a part."""
        if self._speaker is not None:
            enrol, test = self._speaker
            sides = enrol[part.enrol], test[part.test]
            self._counts[0] += np.count_nonzero((sides[0] == sides[1]) != part.label)
            for side in sides:
                self._met[side] = 1
        if self._own is None:
            own = part.enrol == part.test
        else:
            own = np.isin(part.enrol.astype(np.int64) * self._size + part.test, self._own)
        self._counts[1] += np.count_nonzero(own)

    def speakers(self) -> frozenset[str]:
        """Names of the speakers that any process met. All processes must call it."""
        return frozenset(self._names[distributed.highest_of_all(self._met) > 0].tolist())

    def warn(self, trials: str, share: Share) -> None:
        """Prints in the first process what all of them found. All processes must call it."""
        counts = distributed.sum_of_all(self._counts)
        what = "labels contradict the speakers' names", "recordings are compared with themselves"
        for count, line in zip(counts.tolist(), what):
            if count and share[0] == 0:
                print(f"warning: {trials}: {count} {line}", file=sys.stderr)


def _normalised(
    scorer: Scorer, enrolled: np.ndarray, tests: np.ndarray, members: np.ndarray, top_n: int, share: Share
) -> Scorer:
    """Wraps a scorer in S-norm. Each utterance is scored against the cohort once, before any trial is read."""
    of_test = _shared_statistics(tests, members, top_n, share)
    of_enrol = of_test if enrolled is tests else _shared_statistics(enrolled, members, top_n, share)

    def score(enrol: ArrayLike, test: ArrayLike) -> np.ndarray:
        scores = scorer(enrol, test)
        sides = ((of_enrol, enrol), (of_test, test))
        for (_, spread), rows in sides:
            _check_spread(spread, np.asarray(rows), top_n)
        normed: np.ndarray = np.mean([(scores - mean[rows]) / spread[rows] for (mean, spread), rows in sides], axis=0)
        return normed

    return score


def _check_spread(spread: np.ndarray, rows: np.ndarray, top_n: int) -> None:
    """Checks the deviations at the rows that trials compare; those of other utterances are never divided by."""
    try:
        check_spread(spread[rows], top_n)
    except FlatScores as error:
        raise FlatScores(int(rows[error.row]), top_n) from None


def _shared_statistics(embeddings: np.ndarray, cohort: np.ndarray, top_n: int, share: Share) -> np.ndarray:
    """As `snorm.cohort_statistics`, `[2, utterances]`: each process works on blocks of its own, and has all of them."""
    # Below any value, so that the highest over all processes is the one that was computed.
    found = np.full((2, len(embeddings)), -np.inf, np.float32)
    with distributed.all_or_none():
        unit, members = checked_rows(embeddings, cohort, top_n)
        # Every n-th block of those that a single process has: blocks of other sizes would round differently.
        for rows in progress(blocks(len(unit), len(members))[share[0] :: share[1]], desc="cohort", unit="block"):
            found[:, rows] = block_statistics(unit[rows], members, top_n)
    return distributed.highest_of_all(found)


def share_of(out: Path | None, share: Share) -> Path | None:
    """The file that a share is written to.

    >>> share_of(Path("scores.txt"), (0, 2)).name
    'scores-0-of-2.txt'
    """
    return out.with_stem(f"{out.stem}-{share[0]}-of-{share[1]}") if out and share[1] > 1 else out


class Names:
    """The names of a list that is read in parts, as an array that grows with them."""

    def __init__(self, form: Callable[[str], str] = str):
        """Takes a function for the form of a name, such as the quotes of a CSV cell; it is applied once to each."""
        self._form, self._names = form, np.empty(0, object)

    def of(self, part: Trials) -> np.ndarray:
        """All names so far `[names]`, for the part's `enrol_name` and `test_name`."""
        # Names grow from part to part and keep their order: only those behind the known ones are new.
        fresh = [self._form(name) for name in part.names[len(self._names) :]]
        if fresh:
            self._names = np.append(self._names, np.array(fresh, object))
        return self._names


@contextlib.contextmanager
def part_writer(out: Path | None) -> Iterator[Callable[[Trials, np.ndarray], None]]:
    """Yields a function that writes the scores of a part. The file appears only when the block ends well."""
    if out is None:
        yield lambda part, scores: None
        return
    with atomic_write(out) as temporary, temporary.open("wb") as file:
        if out.suffix == ".npy":
            with _numpy(file) as write:
                yield write
        else:
            names = Names()
            yield lambda part, scores: file.writelines(score_lines(names.of(part), part, scores))


@contextlib.contextmanager
def _numpy(file: IO[bytes]) -> Iterator[Callable[[Trials, np.ndarray], None]]:
    """Writes float32 scores as one array; its length is filled in at the end."""
    count = 0

    def header() -> None:
        # The length takes twenty digits whatever it is, so the header keeps its size: 128 bytes, as the form wants.
        shape = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({count:20d},), }}"
        text = shape.ljust(117) + "\n"
        file.write(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode())

    def write(part: Trials, scores: np.ndarray) -> None:
        nonlocal count
        file.write(scores.astype("<f4").tobytes())
        count += len(scores)

    header()
    yield write
    file.seek(0)
    header()
