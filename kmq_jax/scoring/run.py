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
from kmq_jax.scoring.table import EmbeddingTable, read_embeddings, warn_of_vad

Place = str | os.PathLike[str]

_TOP_N = 300  # nearest cohort members that count in S-norm, unless told otherwise
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
        model: fingerprint of the model that embedded both sides, where it is known and one.
    """

    trials: Trials
    scores: np.ndarray
    kind: str
    metrics: Json
    model: str | None = None


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
        options: how it is scored; the defaults where left out.
        enrol_embeddings: embedding file of the enrolment utterances; `embeddings` where left out.
        enrol_models: list of enrolment models (`data.trials.read_models`), where the trials enrol models.
        cohort: embedding file of other speakers, for adaptive S-norm.
        calibration: a file that `save_calibration` wrote, used in place of a cross-validated calibration.
        reference: embedding file of another model. The metrics then also hold the changes against it (`compare`).

    Raises:
        UserError: a file cannot be read or does not fit the others; options need a cohort that is not given; or a
            reference is given with `enrol_embeddings` or a cohort.
    """
    how = options or ScoringOptions()
    if reference and (enrol_embeddings or cohort):
        raise UserError(
            "`reference` is compared by cosine, of one file a model: without enrol_embeddings, snorm_cohort"
        )
    check_cohort_options(cohort, how)
    kind, changes = "snorm" if cohort else "cosine", {}
    test_table = read_embeddings(embeddings)
    enrol_table = read_embeddings(enrol_embeddings) if enrol_embeddings else test_table
    warn_of_vad(enrol_table, test_table)
    model = test_table.model if test_table.model == enrol_table.model else None
    fitted = read_calibration(calibration, kind, model) if calibration else None
    if reference:
        changes = {
            **compare(embeddings, reference, trials, how, enrol_models=enrol_models),
            "reference": str(reference),
        }
    listed, sides = join(trials, enrol_table, test_table, enrol_models)
    scores = cosine_scores(sides.enrol_embeddings, sides.test_embeddings, sides.enrol, sides.test)
    notes = None
    if cohort:
        others = read_embeddings(cohort)
        warn_of_other_model(others, enrol_table, test_table)
        warn_of_vad(others, test_table)
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
    return Scored(listed, scores, kind, metrics | about, model)


def compare(
    embeddings: Place,
    reference: Place,
    trials: str,
    options: ScoringOptions | None = None,
    *,
    enrol_models: str | None = None,
) -> Json:
    """Compares two networks on one trial list, by cosine: how EER and minDCF change, with paired intervals.

    Args:
        embeddings: embedding file of the network.
        reference: embedding file of the network that it is compared with.
        trials: the list, or `synthetic:SPLIT`.
        options: the draws, and the prior of minDCF.
        enrol_models: list of enrolment models, where the trials enrol models.

    Returns:
        As `metrics.paired.Errors.minus`.

    Raises:
        UserError: a file cannot be read or does not fit the others.
    """
    how = options or ScoringOptions()
    # As two levels, so that both files are scored on one numbering of the trials. Their bits have no meaning here.
    joined = score_levels([(1, str(embeddings)), (2, str(reference))], None, trials, models_path=enrol_models)
    about = joined.trials.label, joined.sides.enrol_speaker, joined.sides.test_speaker
    try:
        ours, theirs = (Errors.of(row, *about, how.replicates, how.seed, how.p_target) for row in joined.scores)
    except UserError as error:
        raise UserError(f"{trials}: {error}") from error
    return ours.minus(theirs)


def utterances_of(trials: Trials) -> int:
    """How many different utterances a trial list compares; those of an enrolment model count one by one.

    >>> row = np.arange(2)
    >>> utterances_of(Trials(row, row + 1, row > 0, ("a", "b", "c"), row, row + 1))
    3
    """
    enrolled = trials.enrol if trials.models is None else np.concatenate(trials.models)
    return len(np.union1d(enrolled, trials.test))


def check_cohort_options(cohort: Place | None, options: ScoringOptions) -> None:
    """Refuses options about a cohort where none is given.

    Raises:
        UserError: there is such an option.
    """
    if not cohort and (options.top_n is not None or options.cohort_speaker_means):
        raise UserError("`top_n` and `cohort_speaker_means` need a cohort (`snorm_cohort`)")


def cohort_members(cohort: EmbeddingTable, top_n: int | None, means: bool) -> tuple[np.ndarray, Json]:
    """Makes the cohort members that scores are normalised by.

    Args:
        cohort: embeddings of other speakers.
        top_n: how many of the nearest cohort members count; None: 300, or all if there are fewer.
        means: whether a cohort member is the mean of a speaker's embeddings.

    Returns:
        The members `[members, dim]`; and what they are: `cohort` (the file), `members` (how many) and `top_n`.

    Raises:
        UserError: means are asked for and the cohort does not name its speakers, or it is smaller than `top_n` or than
            two members.
    """
    members = cohort.embeddings
    if means:
        if cohort.speakers is None:
            raise UserError(f"`cohort_speaker_means`: {cohort.source} has no `speakers`")
        _, label = np.unique(np.array(cohort.speakers), return_inverse=True)
        # Rows of a speaker side by side, so that cutting between speakers gives the groups.
        order = np.argsort(label, kind="stable")
        members = average(members, np.split(order, np.flatnonzero(np.diff(label[order])) + 1))
    if len(members) < 2:
        raise UserError(f"the cohort {cohort.source} makes {len(members)} members: it takes two or more")
    if top_n is not None and not 2 <= top_n <= len(members):
        raise UserError(f"`top_n` (={top_n}) must lie between 2 and the cohort's size, {len(members)}")
    top_n = min(_TOP_N, len(members)) if top_n is None else top_n
    return members, {"cohort": cohort.source, "members": len(members), "top_n": top_n}


def shared_speakers(cohort: EmbeddingTable, speakers: frozenset[str], warn: bool = True) -> int:
    """Counts the trials' speakers that are also in a cohort, and warns of them: they bias the normalisation."""
    shared = len(speakers & set(cohort.speakers or ()))
    if shared and warn:
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
    """Applies adaptive S-norm to cosine scores `[trials]`.

    Args:
        scores: `[trials]`, cosine scores.
        sides: what each trial compares.
        cohort: as of `cohort_members`.
        top_n: likewise.
        means: likewise.

    Returns:
        The new scores `[trials]`, and what was done: the notes of `cohort_members`, with `shared_speakers`.

    Raises:
        UserError: as of `cohort_members` and `snorm.adaptive_snorm`.
    """
    members, notes = cohort_members(cohort, top_n, means)
    notes["shared_speakers"] = shared_speakers(cohort, sides.speaker_names)
    tables = sides.enrol_embeddings, sides.test_embeddings
    return adaptive_snorm(scores, *tables, sides.enrol, sides.test, members, notes["top_n"]), notes


def read_calibration(path: Place, kind: str, model: str | None = None) -> AffineMap | IsotonicMap:
    """Reads a map to log likelihood ratios, as `save_calibration` wrote it. Warns of one for another model's scores.

    Args:
        path: the file.
        kind: of the scores that it is wanted for, "cosine" or "snorm".
        model: fingerprint of the model that they are of, where known.

    Raises:
        UserError: the file holds no calibration, or one for scores of the other kind.
    """
    value = read_json(path)
    try:
        calibration = map_from_dict(value)
    except UserError as error:
        raise UserError(f"--calibration={path}: {error}") from error
    # A file that does not name its scores is taken as it is: it may come from elsewhere.
    if value.get("scores", kind) != kind:
        raise UserError(f"--calibration={path} is for {value['scores']} scores, but these are {kind} scores")
    if model and value.get("model") not in (None, model):
        print(f"warning: --calibration={path} is for the scores of another model", file=sys.stderr)
    return calibration


def save_calibration(path: Place, scored: Scored) -> None:
    """Fits a logistic calibration on all trials and writes it as JSON, for `read_calibration`.

    Raises:
        UserError: there are no target or no nontarget trials, targets score below nontargets, or the file cannot be
            written.
    """
    fitted = fit_logistic(scored.scores, scored.trials.label)
    if fitted.scale < 0:  # `read_calibration` refuses a map that falls
        raise UserError(f"{path}: no calibration fits these trials: targets score below nontargets")
    write_json(path, fitted.to_dict() | {"scores": scored.kind, "model": scored.model})


def write_scores(path: Place, trials: Trials, scores: np.ndarray) -> None:
    """Writes `enrol test score` lines, with the list's names; where the path ends in `.npy`, float32 scores alone."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        if Path(path).suffix == ".npy":
            np.save(file, np.asarray(scores, "<f4"))
        else:
            file.writelines(score_lines(np.array(trials.names, object), trials, scores))


def score_lines(names: np.ndarray, trials: Trials, scores: np.ndarray) -> Iterator[bytes]:
    r"""Yields blocks of `enrol test score` lines in UTF-8. Nine digits give every float32 back exactly.

    Args:
        names: `[names]`, which the trials' `enrol_name` and `test_name` index.
        trials: the list, or a part of it.
        scores: `[trials]`.

    >>> row = np.array([0])
    >>> one = Trials(row, row + 1, np.array([True]), ("a", "b"), row, row + 1)
    >>> list(score_lines(np.array(one.names), one, np.float32([0.5])))
    [b'a b 0.5\n']
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
    """The figures of `Scored.metrics` as a short table, with the change against a reference where there is one."""

    def line(name: str, value: float | None, interval: list[float] | None, digits: int) -> str:
        if value is None:
            return f"{name:10}{'-':>9}"
        span = f"   [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else ""
        return f"{name:10}{value:9.{digits}f}{span}"

    def change(title: str, name: str, digits: int) -> str:
        value, interval = metrics[f"{name}_change"], metrics[f"{name}_change_ci95"]
        if interval is None:
            # "none" alone: no draws were asked for.
            why = "" if metrics["intervals"] == "none" else "   too few speakers for an interval"
            return f"{title:12}{value:+.{digits}f}{why}"
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
