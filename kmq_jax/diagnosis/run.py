"""The diagnosis of models or of their embeddings, from files to a directory of tables, figures and a report."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kmq_jax import quant
from kmq_jax.core.errors import UserError
from kmq_jax.data import source
from kmq_jax.data.trials import Trials, open_trials
from kmq_jax.diagnosis import people, report, scores
from kmq_jax.diagnosis.diagnosis import Diagnosis, Networks, diagnose_scores
from kmq_jax.diagnosis.layers import correlation_rows
from kmq_jax.diagnosis.options import DiagnosisOptions
from kmq_jax.models.speaker_model import SpeakerModel, fingerprint, load_model
from kmq_jax.scoring.cosine import cosine_scores
from kmq_jax.scoring.levels import LevelScores, score_levels

Place = str | Path


def diagnose(
    reference: str,
    quantized: Mapping[int, str],
    out: Path,
    options: DiagnosisOptions | None = None,
    *,
    data: str | None = None,
    trials: str = "",
) -> Diagnosis:
    """Compares quantized models with the full-precision model they were made from, and writes what is found.

    Args:
        reference: full-precision MODEL, or its embeddings (.npz).
        quantized: the MODEL, or embeddings, at each number of bits.
        out: directory for tables, figures and `report.html`.
        options: how much is computed; the defaults where left out.
        data: DATA that the trials compare. With embeddings only durations, gender and age are taken from it.
        trials: trial list, or `synthetic:SPLIT`; pairs drawn at random where left out.

    Raises:
        UserError: models and embeddings are mixed, one is missing, or a file is at fault.
    """
    how = options or DiagnosisOptions()
    tables = [place.endswith(".npz") for place in (reference, *quantized.values())]
    if any(tables) and not all(tables):
        raise UserError("--reference and --quantized must be all models or all embeddings (.npz)")
    if all(tables):
        found = diagnose_embeddings(reference, quantized, trials, how, data)
    else:
        found = diagnose_models(reference, quantized, data, trials, how)
    found.notes["data"], found.notes["trial_list"] = data, trials or "pairs drawn at random"
    report.write(out, found)
    return found


def diagnose_models(
    reference: str, quantized: Mapping[int, str], data: str | None, trials: str, options: DiagnosisOptions
) -> Diagnosis:
    """The diagnosis of models; see `diagnose`."""
    if not data:
        raise UserError("--data is needed: the recordings that the models embed")
    full = load_model(reference)
    models = {bits: load_at(place, bits) for bits, place in quantized.items()}
    table = source.open_source(data)
    utterances, listed = used_only(table, open_trials(trials, table))
    try:
        networks = Networks(full, models, utterances, options)
        scored = networks.score(listed)
    except UserError as error:
        raise UserError(f"{trials or data}: {error}") from error
    recordings = people.Recordings(
        ids=utterances.ids,
        places=utterances.paths if utterances.reader else [str(utterances.location(i)) for i in range(len(utterances))],
        speakers=utterances.speakers,
        enrol=listed.enrol,
        test=listed.test,
        seconds=utterances.lengths() / source.SAMPLE_RATE,
        snr=networks.snr,
        genders=utterances.genders,
        ages=utterances.ages,
    )
    start = time.perf_counter()
    found = diagnose_scores(scored, recordings, options)
    networks.seconds["statistics"] = time.perf_counter() - start
    found.tables["retention"] = networks.retention(listed)
    found.tables["layers"], found.tables["blocks"] = networks.layers()
    found.tables["correlations"] = correlation_rows(found.tables["layers"], seed=options.seed)
    found.notes["seconds"] = networks.seconds
    found.notes["compute"] = options.compute
    found.notes["models"] = {str(bits): fingerprint(m) for bits, m in [(32, full), *models.items()]}
    return found


def diagnose_embeddings(
    reference: str, quantized: Mapping[int, str], trials: str, options: DiagnosisOptions, data: str | None = None
) -> Diagnosis:
    """The diagnosis of embeddings, which is that of scores; see `diagnose`."""
    if not trials:
        raise UserError("--trials is needed with embeddings")
    all_bits = sorted(quantized)
    joined = score_levels([*((bits, quantized[bits]) for bits in all_bits), (32, reference)], None, trials)
    sides, tables = joined.sides, joined.tables
    own, test_only = tables[-1].embeddings, None
    if all(table.embeddings.shape == own.shape for table in tables):
        test_only = {
            bits: cosine_scores(own, table.embeddings, sides.enrol, sides.test) for bits, table in zip(all_bits, tables)
        }
    at_bits = dict(zip(all_bits, joined.scores))
    speakers = sides.enrol_speaker, sides.test_speaker
    try:
        scored = scores.scored_trials(joined.scores[-1], at_bits, test_only, joined.trials.label, *speakers)
    except UserError as error:
        raise UserError(f"{trials}: {error}") from error
    return diagnose_scores(scored, _recordings(joined, data), options)


def _recordings(joined: LevelScores, data: str | None) -> people.Recordings:
    """What is known of the utterances of embedding files, and of the same utterances in `data`."""
    first, sides = joined.tables[0], joined.sides
    speakers: list[str] = list(first.speakers or ())
    if not speakers:
        number = np.zeros(len(first), int)
        number[sides.enrol], number[sides.test] = sides.enrol_speaker, sides.test_speaker
        speakers = [f"speaker {n}" for n in number.tolist()]
    seconds, genders, ages, places = None, {}, {}, list(first.paths or first.ids)
    if data:
        known = source.open_source(data)
        index = dict(zip(known.ids, range(len(known))))
        rows = np.array([index.get(name, -1) for name in first.ids])
        lengths = np.append(known.lengths() / source.SAMPLE_RATE, np.nan)
        seconds = lengths[rows]
        places = [str(known.location(i)) if i >= 0 else place for i, place in zip(rows.tolist(), places)]
        genders, ages = dict(known.genders), dict(known.ages)
    return people.Recordings(first.ids, places, speakers, sides.enrol, sides.test, seconds, None, genders, ages)


def load_at(place: Place, bits: int) -> SpeakerModel:
    """Loads a model that is to be diagnosed as one of `bits` bits; a nested one is read at these.

    Raises:
        UserError: the model is quantized, but nothing in it to this number of bits.
    """
    loaded = load_model(place)
    leaves = jax.tree.leaves(loaded.variables, is_leaf=quant.is_codebook_tensor)
    tensors = [leaf for leaf in leaves if quant.is_codebook_tensor(leaf)]
    held: list[Any] = sorted({own for tensor in tensors for own in tensor.all_bits})
    if tensors and bits not in held:
        raise UserError(f"--quantized={bits}:{place} holds {', '.join(map(str, held))} bits, not {bits}")
    return load_model(place, bits) if any(tensor.coarse for tensor in tensors) else loaded


def used_only(utterances: source.Utterances, trials: Trials) -> tuple[source.Utterances, Trials]:
    """Leaves out the utterances that no trial compares."""
    rows = np.union1d(trials.enrol, trials.test)
    enrol, test = (np.searchsorted(rows, side).astype(np.int32) for side in (trials.enrol, trials.test))
    return utterances.select(rows), Trials(enrol, test, trials.label, trials.names, trials.enrol_name, trials.test_name)
