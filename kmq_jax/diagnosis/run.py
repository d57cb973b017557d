"""Diagnoses from start to end: of models, or of embeddings that were extracted before."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from kmq_jax import quant
from kmq_jax.core.errors import UserError
from kmq_jax.core.options import refuse_given
from kmq_jax.data import source
from kmq_jax.data.trials import Trials, open_trials
from kmq_jax.diagnosis import people, scores
from kmq_jax.diagnosis.diagnosis import Diagnosis, diagnose_scores
from kmq_jax.diagnosis.layers import correlation_rows
from kmq_jax.diagnosis.networks import Networks
from kmq_jax.diagnosis.options import DiagnosisOptions
from kmq_jax.models.speaker_model import SpeakerModel, fingerprint, load_model
from kmq_jax.scoring.cosine import average, cosine_scores
from kmq_jax.scoring.levels import LevelScores, score_levels
from kmq_jax.scoring.table import EmbeddingTable

_OF_NETWORKS = ("retention_utterances", "retention_bits", "layer_utterances", "hessian_draws", "hessian_utterances",
                "hessian_seconds", "compute", "max_seconds", "max_frames")  # fmt: skip


def parse_quantized(given: Iterable[str]) -> dict[int, str]:
    """Reads "BITS:MODEL" once for each quantized model.

    >>> parse_quantized(["2:runs/r36-2bit.kmq", "4:runs/r36-4bit.kmq"])
    {2: 'runs/r36-2bit.kmq', 4: 'runs/r36-4bit.kmq'}

    Raises:
        UserError: a number of bits is missing, is not 1 to 16, or comes twice.
    """
    found: dict[int, str] = {}
    for text in given:
        number, colon, place = text.partition(":")
        if not (colon and place and number.isdigit() and 1 <= int(number) <= 16):
            raise UserError(f"--quantized={text} must be BITS:MODEL with 1 to 16 bits, such as 2:runs/r36-2bit.kmq")
        if int(number) in found:
            raise UserError(f"--quantized={text}: {number} bits are given twice")
        found[int(number)] = place
    return found


def diagnose(
    reference: str | Path,
    quantized: Mapping[int, str | Path],
    data: str | None,
    trials: str,
    options: DiagnosisOptions,
    enrol_models: str | None = None,
) -> Diagnosis:
    """The diagnosis of models, or of embeddings where every file is an `.npz` of `extract`.

    Args:
        reference: the full-precision MODEL, or its embeddings.
        quantized: by bits, the quantized models, or their embeddings.
        data: DATA that the trials compare; with embeddings it only adds durations, gender and age.
        trials: a trial list; empty draws pairs at random (of models only).
        options: how much is computed.
        enrol_models: list of enrolment models, where the trials enrol models.

    Raises:
        UserError: models and embeddings are mixed, or an option of networks is given with embeddings; or as
            `diagnose_models` and `diagnose_embeddings`.
    """
    tables = [str(place).endswith(".npz") for place in (reference, *quantized.values())]
    if any(tables) and not all(tables):
        raise UserError("--reference and --quantized must be all models or all embeddings (.npz)")
    if all(tables):
        refuse_given(options, _OF_NETWORKS, "needs models: nothing is embedded where embeddings are given")
        found = diagnose_embeddings(reference, quantized, trials, data, options, enrol_models)
    else:
        if not data:
            raise UserError("--data is needed: the recordings that the models embed")
        models = {bits: load_at(place, bits) for bits, place in quantized.items()}
        found = diagnose_models(load_model(reference), models, data, trials, options, enrol_models)
    found.notes["data"], found.notes["trial_list"] = data, trials or "pairs drawn at random"
    return found


def load_at(place: str | Path, bits: int) -> SpeakerModel:
    """Loads a model that is to be diagnosed as one of `bits` bits; a nested one is read at these.

    Raises:
        UserError: the model is quantized, but nothing in it at these bits.
    """
    loaded = load_model(place)
    tensors = quant.codebook_tensors(loaded.variables)
    held = sorted({one for tensor in tensors for one in tensor.all_bits})
    if tensors and bits not in held:
        raise UserError(f"--quantized={bits}:{place} holds {', '.join(map(str, held))} bits, not {bits}")
    # Bits can be chosen where there are nested tensors; without them the model is read as it is.
    return load_model(place, bits) if any(tensor.coarse for tensor in tensors) else loaded


def used_only(utterances: source.Utterances, trials: Trials) -> tuple[source.Utterances, Trials]:
    """Leaves out the utterances that no trial compares. Utterances of enrolment models all stay.

    Returns:
        The table of those that are left, and the same trials as indices into it.
    """
    enrolled = trials.enrol if trials.models is None else np.concatenate(trials.models)
    rows = np.union1d(enrolled, trials.test)

    def place(side: np.ndarray) -> np.ndarray:
        return np.searchsorted(rows, side).astype(np.int32)

    models = None if trials.models is None else tuple(place(members) for members in trials.models)
    enrol = place(trials.enrol) if models is None else trials.enrol
    return utterances.select(rows), dataclasses.replace(trials, enrol=enrol, test=place(trials.test), models=models)


def enrolled_utterances(trials: Trials) -> np.ndarray:
    """The enrolled utterance of each trial `[trials]`; of a model the first, which stands for it in tables."""
    if trials.models is None:
        return trials.enrol
    return np.array([members[0] for members in trials.models])[trials.enrol]


def diagnose_models(
    reference: SpeakerModel,
    quantized: Mapping[int, SpeakerModel],
    data: str,
    trials: str,
    options: DiagnosisOptions,
    enrol_models: str | None = None,
) -> Diagnosis:
    """The diagnosis of models: scores, components, layers.

    Args:
        reference: the full-precision model.
        quantized: by bits, the same network.
        data: DATA that the trials compare.
        trials: a trial list; empty draws pairs at random.
        options: how much is computed.
        enrol_models: list of enrolment models, where the trials enrol models.

    Raises:
        UserError: the networks differ, or the trials or recordings cannot be used.
    """
    table = source.open_source(data)
    utterances, listed = used_only(table, open_trials(trials, table, enrol_models))
    try:
        networks = Networks(reference, quantized, utterances, options)
        scored = networks.score(listed)
    except UserError as error:
        raise UserError(f"{trials or data}: {error}") from error
    recordings = people.Recordings(
        ids=utterances.ids,
        places=utterances.paths if utterances.reader else [str(utterances.location(i)) for i in range(len(utterances))],
        speakers=utterances.speakers,
        enrol=enrolled_utterances(listed),
        test=listed.test,
        seconds=utterances.lengths() / source.SAMPLE_RATE,
        snr=networks.snr,
        genders=utterances.genders,
        ages=utterances.ages,
    )
    with networks.timed("statistics"):
        found = diagnose_scores(scored, recordings, options)
    found.tables["retention"] = networks.retention(listed)
    found.tables["layers"], found.tables["blocks"] = networks.layers()
    found.tables["correlations"] = correlation_rows(found.tables["layers"], seed=options.seed)
    found.notes["seconds"] = networks.seconds
    found.notes["compute"] = options.compute
    found.notes["models"] = {str(bits): fingerprint(m) for bits, m in [(32, reference), *quantized.items()]}
    return found


def diagnose_embeddings(
    reference: str | Path,
    quantized: Mapping[int, str | Path],
    trials: str,
    data: str | None,
    options: DiagnosisOptions,
    enrol_models: str | None = None,
) -> Diagnosis:
    """The diagnosis of embeddings, which is that of scores.

    Args:
        reference: `.npz` of the full-precision model.
        quantized: by bits, those of the quantized models.
        trials: a trial list.
        data: where durations, gender and age are looked up, or None.
        options: how much is computed.
        enrol_models: list of enrolment models, where the trials enrol models.

    Raises:
        UserError: there are no trials, the files do not fit them, or DATA has none of their utterances.
    """
    if not trials:
        raise UserError("--trials is needed with embeddings")
    ascending = sorted(quantized)
    places = [*((bits, str(quantized[bits])) for bits in ascending), (32, str(reference))]
    joined = score_levels(places, None, trials, models_path=enrol_models)
    sides, tables = joined.sides, joined.tables
    own = tables[-1].embeddings
    test_only = None
    if all(table.embeddings.shape == own.shape for table in tables):
        enrolled = own if joined.trials.models is None else average(own, joined.trials.models)
        test_only = {
            bits: cosine_scores(enrolled, table.embeddings, sides.enrol, sides.test)
            for bits, table in zip(ascending, tables)
        }
    full = dict(zip(ascending, joined.scores))
    speakers = sides.enrol_speaker, sides.test_speaker
    try:
        scored = scores.scored_trials(joined.scores[-1], full, test_only, joined.trials.label, *speakers)
    except UserError as error:
        raise UserError(f"{trials}: {error}") from error
    return diagnose_scores(scored, _recordings(tables[0], joined, data), options)


def _recordings(table: EmbeddingTable, joined: LevelScores, data: str | None) -> people.Recordings:
    """What is known of the utterances from a table of embeddings and, where it is given, from DATA."""
    sides, enrolled = joined.sides, enrolled_utterances(joined.trials)
    speakers: list[str] = list(table.speakers or ())
    if not speakers:
        number = np.zeros(len(table), int)
        number[enrolled], number[sides.test] = sides.enrol_speaker, sides.test_speaker
        speakers = [f"speaker {n}" for n in number.tolist()]
    places, seconds = list(table.paths or table.ids), None
    genders: dict[str, str] = {}
    ages: dict[str, float] = {}
    if data:
        known = source.open_source(data)
        index = dict(zip(known.ids, range(len(known))))
        rows = np.array([index.get(name, -1) for name in table.ids])
        if rows.max() < 0:
            raise UserError(f"`data` (={data}) has none of the utterances of {table.source}, such as {table.ids[0]}")
        lengths = np.append(known.lengths() / source.SAMPLE_RATE, np.nan)  # -1, of the unknown, reads the NaN
        seconds = lengths[rows]
        places = [str(known.location(i)) if i >= 0 else place for i, place in zip(rows.tolist(), places)]
        genders, ages = dict(known.genders), dict(known.ages)
    return people.Recordings(table.ids, places, speakers, enrolled, sides.test, seconds, None, genders, ages)
