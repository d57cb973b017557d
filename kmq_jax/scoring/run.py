"""A trial list scored from embedding files and evaluated, as `kmq-jax score` does it."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json, Row, atomic_write, read_json, write_json
from kmq_jax.data.trials import Trials
from kmq_jax.metrics.calibration import AffineMap, IsotonicMap, fit_logistic, map_from_dict
from kmq_jax.metrics.evaluate import evaluate
from kmq_jax.metrics.paired import Errors, told_apart
from kmq_jax.scoring.cosine import average, cosine_scores
from kmq_jax.scoring.join import Sides, join
from kmq_jax.scoring.levels import score_levels
from kmq_jax.scoring.options import ScoringOptions
from kmq_jax.scoring.snorm import adaptive_snorm
from kmq_jax.scoring.table import EmbeddingTable, read_embeddings

Place = str | os.PathLike[str]

_TOP_N = 300
_LINES = 1 << 16  # lines written at a time


@dataclass(frozen=True, eq=False)
class Scored:
    """A scored trial list.

    Attributes:
        trials: the list.
        scores: `[trials]` float32, in its order.
        kind: "cosine" or "snorm".
        metrics: what `metrics.evaluate` tells of them, with `utterances`, `speakers_source` and `snorm`
            (what was done, or None).
    """

    trials: Trials
    scores: np.ndarray
    kind: str
    metrics: Json


def score(
    embeddings: Place,
    trials: str,
    options: ScoringOptions | None = None,
    *,
    enrol_embeddings: Place | None = None,
    enrol_models: str | None = None,
    cohort: Place | None = None,
    calibration: Place | None = None,
    reference: Place | None = None,
) -> Scored:
    """Scores a trial list by cosine, with adaptive S-norm if a cohort is given, and evaluates it.

    Args:
        embeddings: embedding file of the test utterances.
        trials: the list, or `synthetic:SPLIT`.
        options: how; the defaults where left out.
        enrol_embeddings: embedding file of the enrolment utterances; `embeddings` where left out.
        enrol_models: list of enrolment models (`data.trials.read_models`), where the trials enrol models.
        cohort: embedding file of other speakers, for adaptive S-norm.
        calibration: what `save_calibration` wrote; in place of a cross-validated one.
        reference: embedding file of another model; the metrics then also hold what changes against it, by `compare`.

    Raises:
        UserError: a file cannot be read or does not fit the others, or options need a cohort that is not there.
    """
    how = options or ScoringOptions()
    if reference and (enrol_embeddings or cohort):
        raise UserError(
            "`reference` is compared by cosine, of one file a model: without enrol_embeddings, snorm_cohort"
        )
    check_cohort_options(cohort, how)
    kind, changes = "snorm" if cohort else "cosine", {}
    if reference:
        changes = {
            **compare(embeddings, reference, trials, how, enrol_models=enrol_models),
            "reference": str(reference),
        }
    fitted = read_calibration(calibration, kind) if calibration else None
    test_table = read_embeddings(embeddings)
    enrol_table = read_embeddings(enrol_embeddings) if enrol_embeddings else test_table
    listed, sides = join(trials, enrol_table, test_table, enrol_models)
    scores = cosine_scores(sides.enrol_embeddings, sides.test_embeddings, sides.enrol, sides.test)
    notes = None
    if cohort:
        others = read_embeddings(cohort)
        warn_of_other_model(others, enrol_table, test_table)
        scores, notes = normalise(scores, sides, others, how.top_n, how.cohort_speaker_means)
    speakers = sides.enrol_speaker, sides.test_speaker
    try:
        metrics = evaluate(scores, listed.label, *speakers, how.p_target, fitted, how.replicates, how.seed)
    except UserError as error:
        raise UserError(f"{trials}: {error}") from error
    if calibration:
        metrics["calibration"] = f"given by {calibration}"
    metrics |= changes
    about = {"utterances": utterances_of(listed), "speakers_source": sides.speakers_source, "snorm": notes}
    return Scored(listed, scores, kind, metrics | about)


def compare(
    embeddings: Place,
    reference: Place,
    trials: str,
    options: ScoringOptions | None = None,
    *,
    enrol_models: str | None = None,
) -> Json:
    """What a network changes against another on one trial list, by cosine.

    Args:
        embeddings: embedding file of the network.
        reference: that of the network it is compared with.
        trials: the list, or `synthetic:SPLIT`.
        options: the draws, and the prior of minDCF.
        enrol_models: list of enrolment models, where the trials enrol models.

    Returns:
        As `metrics.paired.Errors.minus`.

    Raises:
        UserError: a file cannot be read or does not fit the others.
    """
    how = options or ScoringOptions()
    joined = score_levels([(1, str(embeddings)), (2, str(reference))], None, trials, models_path=enrol_models)
    about = joined.trials.label, joined.sides.enrol_speaker, joined.sides.test_speaker
    try:
        ours, theirs = (Errors.of(row, *about, how.replicates, how.seed, how.p_target) for row in joined.scores)
    except UserError as error:
        raise UserError(f"{trials}: {error}") from error
    return ours.minus(theirs)


def utterances_of(trials: Trials) -> int:
    """How many different utterances a trial list compares, those of enrolment models counted one by one."""
    enrolled = trials.enrol if trials.models is None else np.concatenate(trials.models)
    return len(np.union1d(enrolled, trials.test))


def check_cohort_options(cohort: Place | None, options: ScoringOptions) -> None:
    """Refuses options of a cohort that is not there."""
    if not cohort and (options.top_n is not None or options.cohort_speaker_means):
        raise UserError("`top_n` and `cohort_speaker_means` need a cohort (`snorm_cohort`)")


def cohort_members(cohort: EmbeddingTable, top_n: int | None, means: bool) -> tuple[np.ndarray, Json]:
    """What scores are normalised by, and how.

    Args:
        cohort: embeddings of other speakers.
        top_n: nearest cohort members that count; 300, or all if fewer, where left out.
        means: whether a cohort member is the mean of a speaker's embeddings.

    Returns:
        The members `[members, dim]`; and `cohort`, `members`, `top_n`.

    Raises:
        UserError: the cohort does not name its speakers, or is smaller than `top_n`.
    """
    members = cohort.embeddings
    if means:
        if cohort.speakers is None:
            raise UserError(f"`cohort_speaker_means`: {cohort.source} has no `speakers`")
        _, label = np.unique(np.array(cohort.speakers), return_inverse=True)
        # Rows of a speaker side by side, so that cutting between speakers gives the groups.
        order = np.argsort(label, kind="stable")
        members = average(members, np.split(order, np.flatnonzero(np.diff(label[order])) + 1))
    if top_n is not None and not 2 <= top_n <= len(members):
        raise UserError(f"`top_n` (={top_n}) must lie between 2 and the cohort's size, {len(members)}")
    top_n = min(_TOP_N, len(members)) if top_n is None else top_n
    return members, {"cohort": cohort.source, "members": len(members), "top_n": top_n}


def shared_speakers(cohort: EmbeddingTable, speakers: frozenset[str]) -> int:
    """How many of the trials' speakers a cohort has; a warning tells of them."""
    shared = len(speakers & set(cohort.speakers or ()))
    if shared:
        print(f"warning: {shared} speakers of the trials are also in the cohort {cohort.source}", file=sys.stderr)
    return shared


def warn_of_other_model(cohort: EmbeddingTable, *tables: EmbeddingTable) -> None:
    """Warns where a cohort is known to be of a model that embedded neither side of the trials."""
    known = {table.model for table in tables}
    if cohort.model and None not in known and cohort.model not in known:
        print(f"warning: the cohort {cohort.source} is of another model than {tables[-1].source}", file=sys.stderr)


def normalise(
    scores: np.ndarray, sides: Sides, cohort: EmbeddingTable, top_n: int | None, means: bool
) -> tuple[np.ndarray, Json]:
    """Applies adaptive S-norm to cosine scores `[trials]`; arguments and errors as of `cohort_members`.

    Returns:
        The new scores `[trials]`, and what was done: as `cohort_members`, and `shared_speakers`.
    """
    members, notes = cohort_members(cohort, top_n, means)
    notes["shared_speakers"] = shared_speakers(cohort, sides.speaker_names)
    tables = sides.enrol_embeddings, sides.test_embeddings
    return adaptive_snorm(scores, *tables, sides.enrol, sides.test, members, notes["top_n"]), notes


def read_calibration(path: Place, kind: str) -> AffineMap | IsotonicMap:
    """Reads what `save_calibration` wrote, for scores of the same kind, "cosine" or "snorm".

    Raises:
        UserError: it is no calibration, or one for scores of the other kind.
    """
    value = read_json(path)
    try:
        calibration = map_from_dict(value)
    except UserError as error:
        raise UserError(f"--calibration={path}: {error}") from error
    if value.get("scores", kind) != kind:
        raise UserError(f"--calibration={path} is for {value['scores']} scores, but these are {kind} scores")
    return calibration


def save_calibration(path: Place, scored: Scored) -> None:
    """Writes the logistic calibration fitted on all trials, as JSON."""
    write_json(path, fit_logistic(scored.scores, scored.trials.label).to_dict() | {"scores": scored.kind})


def write_scores(path: Place, trials: Trials, scores: np.ndarray) -> None:
    """Writes `enrol test score` lines, with names as in the list; into an `.npy`, the scores alone as float32."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        if Path(path).suffix == ".npy":
            np.save(file, np.asarray(scores, "<f4"))
        else:
            file.writelines(score_lines(np.array(trials.names, object), trials, scores))


def score_lines(names: np.ndarray, trials: Trials, scores: np.ndarray) -> Iterator[bytes]:
    """`enrol test score` lines in UTF-8, many at a time. Nine digits give every float32 back exactly.

    Args:
        names: `[names]`, for the trials' `enrol_name` and `test_name`.
        trials: the list, or a part of it.
        scores: `[trials]`.
    """
    for start in range(0, len(scores), _LINES):
        part = slice(start, start + _LINES)
        rows = zip(names[trials.enrol_name[part]], names[trials.test_name[part]], scores[part].tolist())
        yield "".join([f"{enrol} {test} {score:.9g}\n" for enrol, test, score in rows]).encode()


def draw_det(path: Place, scored: Scored) -> None:
    """Draws the DET curve.

    Raises:
        UserError: the file's name does not end in .png, .pdf or .svg.
    """
    from kmq_jax.metrics.det_plot import save_det  # matplotlib takes a second to import

    with atomic_write(Path(path)) as temporary:
        save_det(temporary, {scored.kind: (scored.scores, scored.trials.label)})


def describe(metrics: Row) -> str:
    """The figures as a short table, with the change against a reference where there is one."""

    def line(name: str, value: float | None, interval: list[float] | None, digits: int) -> str:
        if value is None:
            return f"{name:10}{'-':>9}"
        span = f"   [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else ""
        return f"{name:10}{value:9.{digits}f}{span}"

    def change(title: str, name: str, digits: int) -> str:
        value, interval = metrics[f"{name}_change"], metrics[f"{name}_change_ci95"]
        if interval is None:
            return f"{title:12}{value:+.{digits}f}   too few speakers for an interval"
        apart = "beyond chance" if told_apart(interval) else "not told apart"
        return f"{title:12}{value:+.{digits}f}   [{interval[0]:+.{digits}f}, {interval[1]:+.{digits}f}]   {apart}"

    changes = []
    if "reference" in metrics:
        changes = [
            f"against {metrics['reference']}, paired:",
            change("EER, points", "eer", 3),
            change("minDCF", "min_dcf", 4),
        ]
    return "\n".join(
        [
            f"{metrics['trials']:,} trials, {metrics['targets']:,} of them targets, {metrics['speakers']:,} speakers "
            f"({metrics['speakers_source']})",
            line("EER %", metrics["eer"], metrics["eer_ci95"], 3),
            line("minDCF", metrics["min_dcf"], metrics["min_dcf_ci95"], 4),
            line("actDCF", metrics["act_dcf"], None, 4),
            line("Cllr", metrics["cllr"], None, 4),
            line("minCllr", metrics["min_cllr"], None, 4),
            line("threshold", metrics["threshold"], None, 5),
            f"target prior {metrics['p_target']:g}; intervals: {metrics['intervals']}",
            f"calibration: {metrics['calibration']}",
            *changes,
        ]
    )
