"""Scores of trial lists of any length in bounded memory, by one process or shared among several."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from kmq_jax.core import distributed
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json, atomic_write, write_json
from kmq_jax.core.progress import progress
from kmq_jax.data.trials import Trials, read_in_parts, read_models
from kmq_jax.metrics.histogram import ScoreHistogram
from kmq_jax.scoring.cosine import average, cosine_scores
from kmq_jax.scoring.options import ScoringOptions
from kmq_jax.scoring.snorm import cohort_statistics
from kmq_jax.scoring.table import read_embeddings

_LINES = 1 << 16  # lines written at a time
_WIDEST = 64.0  # S-norm scores beyond it share the outermost bins

Scorer = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Scores `[trials]` of rows of enrolments and rows of tests."""


def score_stream(
    embeddings: Path,
    trials: str,
    options: ScoringOptions,
    *,
    enrol_models: str | None = None,
    cohort: Path | None = None,
    out: Path | None = None,
    share: tuple[int, int] = (0, 1),
) -> Json:
    """Scores a list part by part. Figures come from a histogram of the scores, with the bounds that this leaves.

    Args:
        embeddings: embedding file of all utterances.
        trials: the list, a file.
        options: how; there are no intervals, as these need all scores at once.
        enrol_models: list of enrolment models (`data.trials.read_models`), where the trials enrol models.
        cohort: embedding file of other speakers, for adaptive S-norm.
        out: `enrol test score` lines, or where it ends in `.npy` float32 scores in the list's order.
        share: `(i, n)`: this process scores the i-th of n shares; all n must call this. `out` then gets `-i-of-n`
            before its suffix, and the figures are of all shares.

    Returns:
        `trials`, `targets`, `eer` and `eer_bounds` in percent, `threshold`, `min_dcf`, `min_dcf_bounds`, `p_target`.

    Raises:
        UserError: a file cannot be read or does not fit the others; a score is not finite.
    """
    if trials.startswith("synthetic:"):
        raise UserError(f"`stream` reads a list from a file, not {trials}")
    table = read_embeddings(embeddings)
    models = read_models(enrol_models) if enrol_models else None
    parts = read_in_parts(trials, table.ids, table.paths or table.ids, models, share)
    first = next(parts, None)
    enrolled = table.embeddings if first is None or first.models is None else average(table.embeddings, first.models)
    scorer = _cosine(enrolled, table.embeddings)
    low, high = -1.0, 1.0
    if cohort:
        low, high = -_WIDEST, _WIDEST
        scorer = _snorm(scorer, enrolled, table.embeddings, read_embeddings(cohort).embeddings, options.top_n)
    counts = ScoreHistogram(low, high)
    with _writer(_share_of(out, share)) as write:
        for part in progress(_again(first, parts), desc="scoring", unit="part"):
            scores = scorer(part.enrol, part.test)
            counts.add(scores, part.label)
            write(part, scores)
    counts.counts = distributed.sum_of_all(counts.counts)
    try:
        rates = dataclasses.asdict(counts.rates(options.p_target))
    except UserError as error:
        raise UserError(f"{trials}: {error}") from error
    percent = {"eer": 100 * rates["eer"], "eer_bounds": [100 * rate for rate in rates["eer_bounds"]]}
    return rates | percent | {"p_target": options.p_target, "kind": "snorm" if cohort else "cosine"}


def score_together(
    embeddings: Path,
    trials: str,
    enrol_models: str | None,
    cohort: Path | None,
    out: Path | None,
    json: Path | None,
    options: ScoringOptions,
) -> None:
    """`score_stream` by all processes that were started together; the first one prints and writes the figures.

    Args and errors as `score_stream`; `json` is the file of the figures.
    """
    distributed.join()
    import jax

    share = jax.process_index(), jax.process_count()
    figures = score_stream(embeddings, trials, options, enrol_models=enrol_models, cohort=cohort, out=out, share=share)
    if share[0] == 0:
        if json:
            write_json(json, figures)
        print(describe(figures))


def describe(figures: Json) -> str:
    """The figures as lines for the terminal."""
    low, high = figures["eer_bounds"]
    least, most = figures["min_dcf_bounds"]
    return (
        f"{figures['trials']:,} trials, {figures['targets']:,} of them targets\n"
        f"EER %     {figures['eer']:9.3f}   within {low:.5f} to {high:.5f}\n"
        f"minDCF    {figures['min_dcf']:9.4f}   within {least:.6f} to {most:.6f}\n"
        f"threshold {figures['threshold']:9.5f}"
    )


def _again(first: Trials | None, rest: Iterator[Trials]) -> Iterator[Trials]:
    if first is not None:
        yield first
        yield from rest


def _cosine(enrolled: np.ndarray, tests: np.ndarray) -> Scorer:
    return lambda enrol, test: cosine_scores(enrolled, tests, enrol, test)


def _snorm(scorer: Scorer, enrolled: np.ndarray, tests: np.ndarray, members: np.ndarray, top_n: int | None) -> Scorer:
    """S-norm of another scorer's scores: each utterance meets the cohort once, before the trials."""
    most = min(300, len(members)) if top_n is None else top_n
    of_test = cohort_statistics(tests, members, most)
    of_enrol = of_test if enrolled is tests else cohort_statistics(enrolled, members, most)

    def score(enrol: np.ndarray, test: np.ndarray) -> np.ndarray:
        scores = scorer(enrol, test)
        sides = ((of_enrol, enrol), (of_test, test))
        normed: np.ndarray = np.mean([(scores - mean[rows]) / spread[rows] for (mean, spread), rows in sides], axis=0)
        return normed

    return score


def _share_of(out: Path | None, share: tuple[int, int]) -> Path | None:
    return out.with_stem(f"{out.stem}-{share[0]}-of-{share[1]}") if out and share[1] > 1 else out


@contextlib.contextmanager
def _writer(out: Path | None) -> Iterator[Callable[[Trials, np.ndarray], None]]:
    """What writes the scores of each part; the file appears when all are there."""
    if out is None:
        yield lambda part, scores: None
        return
    with atomic_write(out) as temporary, temporary.open("wb") as file:
        if out.suffix == ".npy":
            with _numpy(file) as write:
                yield write
        else:
            yield lambda part, scores: _lines(file, part, scores)


@contextlib.contextmanager
def _numpy(file: IO[bytes]) -> Iterator[Callable[[Trials, np.ndarray], None]]:
    """Writes float32 scores as one array; its length is filled in at the end."""
    count = 0

    def header() -> None:
        # Twenty digits, so that the header keeps its length.
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


def _lines(file: IO[bytes], part: Trials, scores: np.ndarray) -> None:
    """Writes `enrol test score` lines. Nine digits give every float32 back exactly."""
    names = np.array(part.names, object)
    for start in range(0, len(scores), _LINES):
        some = slice(start, start + _LINES)
        rows = zip(names[part.enrol_name[some]], names[part.test_name[some]], scores[some].tolist())
        file.write("".join([f"{enrol} {test} {score:.9g}\n" for enrol, test, score in rows]).encode())
