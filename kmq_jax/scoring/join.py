"""Joins a trial list with embedding files: which rows each trial compares, and which speakers they are of."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kmq_jax.core.errors import UserError
from kmq_jax.core.progress import say_once
from kmq_jax.data.trials import Trials, check_models, doubts, read_models, read_trials, utterance_index
from kmq_jax.metrics.bootstrap import speakers_from_targets
from kmq_jax.scoring.cosine import average
from kmq_jax.scoring.table import EmbeddingTable


@dataclass(frozen=True, eq=False)
class Sides:
    """What each trial compares.

    Attributes:
        enrol_embeddings: `[enrolments, dim]`; with enrolment models, one row for each model.
        test_embeddings: `[tests, dim]`.
        enrol: `[trials]`, rows of `enrol_embeddings`.
        test: `[trials]`, rows of `test_embeddings`.
        enrol_speaker: `[trials]`, nonnegative integers.
        test_speaker: `[trials]`, nonnegative integers.
        speaker_names: of the trials' speakers; empty where the embedding files name none.
        speakers_source: how the speakers are known, in words for a report.
    """

    enrol_embeddings: np.ndarray
    test_embeddings: np.ndarray
    enrol: np.ndarray
    test: np.ndarray
    enrol_speaker: np.ndarray
    test_speaker: np.ndarray
    speaker_names: frozenset[str]
    speakers_source: str


def join(
    trials_path: str, enrol_table: EmbeddingTable, test_table: EmbeddingTable, models_path: str | None = None
) -> tuple[Trials, Sides]:
    """Reads a trial list and finds the embeddings and the speakers of each trial.

    Where an embedding file does not name the speakers, they are found from the target trials: these join the utterances
    of one speaker. Doubtful trials are warned of.

    Args:
        trials_path: the list, or `synthetic:SPLIT`.
        enrol_table: embeddings of the enrolment side.
        test_table: embeddings of the test side; may be the same.
        models_path: the list of enrolment models' utterances (`read_models`), where the trials enrol models.

    Returns:
        The trials, whose rows are of one numbering of both files' utterances; and what each of them compares.

    Raises:
        UserError: the list cannot be read, or names an utterance without an embedding; or models are given with
            `synthetic:SPLIT`, whose trials enrol utterances.
    """
    # One numbering of the utterances of both files: the enrolment file's rows, then what only the test file has.
    known = set(enrol_table.ids)
    extra = [i for i, name in enumerate(test_table.ids) if name not in known]
    ids = enrol_table.ids + tuple(test_table.ids[i] for i in extra)
    paths = (enrol_table.paths or enrol_table.ids) + tuple((test_table.paths or test_table.ids)[i] for i in extra)
    trials = _read(trials_path, ids, paths, models_path)

    # Rows from the length of the enrolment file on are utterances that only the test file has.
    enrol_rows = trials.enrol if trials.models is None else np.concatenate(trials.models)
    if (missing := enrol_rows >= len(enrol_table)).any():
        name = ids[enrol_rows[np.argmax(missing)]]
        raise UserError(f"{models_path or trials_path}: the enrolment utterance {name} is not in {enrol_table.source}")
    # From the one numbering back to rows of the test file; -1 where it lacks the utterance.
    test_row = dict(zip(test_table.ids, range(len(test_table))))
    test = np.array([test_row.get(name, -1) for name in ids])[trials.test]
    if (missing := test < 0).any():
        name = ids[trials.test[np.argmax(missing)]]
        raise UserError(f"{trials_path}: the test utterance {name} is not in {test_table.source}")

    enrol_embeddings = enrol_table.embeddings
    if trials.models is not None:
        enrol_embeddings = average(enrol_embeddings, trials.models)
        warn_of_mixed_models(models_path or trials_path, trials.models, enrol_table.speakers)
    speakers = _speakers(trials, test, enrol_table, test_table)
    # Speakers found from the labels cannot contradict them, so only named ones are looked at for doubts.
    named = speakers[:2] if enrol_table.speakers and test_table.speakers else (test[:0], test[:0])
    for line in doubts(trials_path, trials, *named):
        say_once(f"warning: {line}")
    return trials, Sides(enrol_embeddings, test_table.embeddings, trials.enrol, test, *speakers)


def warn_of_mixed_models(path: str, models: Sequence[np.ndarray], speakers: Sequence[str] | None) -> None:
    """Warns of enrolment models whose utterances are of several speakers; a model counts as of its first one's.

    Args:
        path: of the list of models.
        models: rows of each model's utterances, in the order of the list.
        speakers: of the rows; None: not known.
    """
    mixed = [i for i, rows in enumerate(models) if speakers and len({speakers[row] for row in rows}) > 1]
    if mixed:
        first = list(read_models(path))[mixed[0]]
        say_once(f"warning: {path}: {len(mixed)} models are of several speakers' utterances; the first is {first}")


def _read(path: str, ids: Sequence[str], paths: Sequence[str], models_path: str | None) -> Trials:
    """The trials at `path`, as rows of `ids`."""
    check_models(path, models_path)
    if not path.startswith("synthetic:"):
        return read_trials(path, ids, paths, read_models(models_path) if models_path else None)
    from kmq_jax.data.synthetic import synthetic_trials  # the voices take a second to import

    trials = synthetic_trials(path)
    index = utterance_index(ids)
    row = np.array([index.get(name, -1) for name in trials.names], np.int32)
    enrol, test = row[trials.enrol_name], row[trials.test_name]
    for rows, names in ((enrol, trials.enrol_name), (test, trials.test_name)):
        if rows.min() < 0:
            raise UserError(f"{path}: the utterance {trials.names[names[rows.argmin()]]} has no embedding")
    return Trials(enrol, test, trials.label, trials.names, trials.enrol_name, trials.test_name)


def _speakers(
    trials: Trials, test: np.ndarray, enrol_table: EmbeddingTable, test_table: EmbeddingTable
) -> tuple[np.ndarray, np.ndarray, frozenset[str], str]:
    """The last four fields of `Sides`; `test` are rows of `test_table`."""
    if enrol_table.speakers is None or test_table.speakers is None:
        utterances = len(enrol_table) + len(test_table)  # at least as many as the one numbering has
        # A model is a node of its own: the target trials join it to its speaker's utterances.
        node = trials.enrol if trials.models is None else trials.enrol + utterances
        found = speakers_from_targets(node, trials.test, trials.label, utterances + len(trials.models or ()))
        return found[node], found[trials.test], frozenset(), "told apart by the target trials"
    # One numbering for both sides: the same name is the same speaker.
    number: dict[str, int] = {}
    of_enrol, of_test = (
        np.array([number.setdefault(name, len(number)) for name in names])
        for names in (enrol_table.speakers, test_table.speakers)
    )
    if trials.models is not None:
        of_enrol = of_enrol[[rows[0] for rows in trials.models]]  # a model's speaker is that of its first utterance
    enrol_speaker, test_speaker = of_enrol[trials.enrol], of_test[test]
    present = np.array(list(number))[np.union1d(enrol_speaker, test_speaker)]
    return enrol_speaker, test_speaker, frozenset(present.tolist()), "named in the embedding file"
