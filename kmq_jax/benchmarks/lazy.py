"""A cascade from recordings beside single models for all of them, in turns in one run: seconds, cost, size, errors."""

import dataclasses
import functools
import time
from collections.abc import Callable

import numpy as np

from kmq_jax import quant
from kmq_jax.benchmarks.options import LazyBench
from kmq_jax.benchmarks.timing import Figures, in_turns, medians
from kmq_jax.cascade.policy import CascadePolicy
from kmq_jax.cascade.run import map_scores, run
from kmq_jax.cascade.verifier import Cascade, LazyRun, load_cascade
from kmq_jax.core.files import write_json
from kmq_jax.data import source, trials
from kmq_jax.frontend import num_frames
from kmq_jax.metrics.detection import eer
from kmq_jax.models import registry
from kmq_jax.models.speaker_model import SpeakerModel, embed_all, fingerprint, frontend_of, load_model
from kmq_jax.scoring.cosine import cosine_scores

CASCADE, FULL = "cascade", "full precision"
_DETECTOR_ROUNDS = 20


def thin(enrol: np.ndarray, test: np.ndarray, uses: int, seed: int = 0) -> np.ndarray:
    """Rows of a random part of a list in which no recording takes part in more than `uses` trials."""
    if not uses:
        return np.arange(len(enrol))
    count = np.zeros(max(enrol.max(), test.max()) + 1, int)
    kept = []
    for row in np.random.default_rng(seed).permutation(len(enrol)).tolist():
        a, b = enrol[row], test[row]
        if a != b and count[a] < uses and count[b] < uses:
            count[[a, b]] += 1
            kept.append(row)
    return np.sort(np.array(kept))


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A list of trials and the recordings that take part in it.

    Attributes:
        data: the DATA.
        utterances: the recordings.
        pairs: the trials; their sides are rows of these.
        frames: of a recording, on average.
    """

    data: str
    utterances: source.Utterances
    pairs: trials.Trials
    frames: int


def open_task(data: str, listed: str, uses: int, fbank: str) -> Task:
    """Reads a trial list, thins it, and keeps the recordings that take part.

    Raises:
        UserError: either cannot be read.
    """
    table = source.open_source(data)
    whole = trials.open_trials(listed, table)
    rows = thin(whole.enrol, whole.test, uses)
    used = np.union1d(whole.enrol[rows], whole.test[rows])
    enrol, test = (np.searchsorted(used, side[rows]).astype(np.int32) for side in (whole.enrol, whole.test))
    pairs = trials.Trials(enrol, test, whole.label[rows], whole.names, whole.enrol_name[rows], whole.test_name[rows])
    utterances = table.select(used)
    frames = int(num_frames(utterances.lengths(), frontend_of(fbank)).mean())
    return Task(data, utterances, pairs, frames)


def compare(options: LazyBench) -> Figures:
    """Measures all sides on all lists; each list after a round that is not counted."""
    cascade = load_cascade(options.cascade, options.compute, options.engine)
    reference = load_model(options.reference) if options.reference else cascade.model_at(len(cascade.policy.bits) - 1)
    models = {FULL: reference} | {place: load_model(place) for place in options.beside}
    sets = []
    for data, listed in zip(options.data, options.trials):
        task = open_task(data, listed, options.uses, reference.frontend)
        sets.append(compare_on(task, cascade, models, options))
    return {"sets": sets, "uses": options.uses, "compute": options.compute, "engine": options.engine}


def compare_on(task: Task, cascade: Cascade, models: dict[str, SpeakerModel], options: LazyBench) -> Figures:
    """Measures the cascade and single models on one list.

    Returns:
        What the list holds, how many trials were escalated, what the detector costs, and `rows`, one a side: `seconds`
        in all, a trial and a recording; multiplications likewise; `bytes` held; `eer` in percent; `harmful_flips`,
        trials that full precision decides right and this side wrong, at the policy's threshold; None of another network
        whose scores nothing maps to that scale.
    """
    policy, pairs = cascade.policy, task.pairs
    found: dict[str, np.ndarray] = {}
    lazy: list[LazyRun] = []

    def by_cascade() -> None:
        lazy[:] = [cascade.score(task.utterances, pairs)]
        found[CASCADE] = run(policy, lazy[0].scores, pairs.enrol, pairs.test).score

    def by_model(name: str) -> None:
        rows = embed_all(models[name], task.utterances, engine=options.engine)
        found[name] = cosine_scores(rows, rows, pairs.enrol, pairs.test)

    sides: dict[str, Callable[[], None]] = {CASCADE: by_cascade}
    sides |= {name: functools.partial(by_model, name) for name in models}
    seconds = medians(in_turns(sides, options.repeats))
    outcome = run(policy, lazy[0].scores, pairs.enrol, pairs.test)
    costs = cascade.costs(task.frames)
    embedded = {str(bits): count for bits, count in lazy[0].embedded.items()}
    macs = {name: len(task.utterances) * registry.macs(model.network(), task.frames) for name, model in models.items()}
    macs[CASCADE] = sum(costs["macs"][bits] * count for bits, count in embedded.items())
    held = {name: quant.size_bytes(model.variables).total for name, model in models.items()}
    held[CASCADE] = costs["resident_bytes"]
    right = (found[FULL] >= policy.threshold) == pairs.label
    flips = {
        name: None if scores is None else int((right & ((scores >= policy.threshold) != pairs.label)).sum())
        for name in sides
        for scores in [
            found[CASCADE] if name == CASCADE else _on_scale(policy, models[name], models[FULL], found[name])
        ]
    }
    rows = [
        {
            "system": name,
            "seconds": seconds[name],
            "ratio": seconds[name] / seconds[FULL],
            "seconds_a_trial": seconds[name] / len(pairs),
            "seconds_a_recording": seconds[name] / len(task.utterances),
            "macs_a_trial": macs[name] / len(pairs),
            "macs_a_recording": macs[name] / len(task.utterances),
            "bytes": held[name],
            "eer": 100 * float(eer(found[name], pairs.label)[0]),
            "harmful_flips": flips[name],
        }
        for name in sides
    ]
    return {
        "data": task.data,
        "trials": len(pairs),
        "targets": int(pairs.label.sum()),
        "recordings": len(task.utterances),
        "escalated": 1 - outcome.resolved[policy.bits[0]],
        "embedded": embedded,
        "detector_microseconds_a_trial": _detector(cascade, lazy[0], task) / len(pairs) * 1e6,
        "rows": rows,
    }


def _on_scale(policy: CascadePolicy, model: SpeakerModel, full: SpeakerModel, scores: np.ndarray) -> np.ndarray | None:
    """A model's scores on the scale of the policy's threshold; None where that is not known."""
    mark = fingerprint(model)
    if mark in policy.models and model is not full:
        level = policy.models.index(mark)
        return map_scores(policy, np.tile(scores, (len(policy.bits), 1)))[level]
    # Near full precision a model's scores are on the same scale. Those of another network are not.
    return scores if model.architecture == full.architecture else None


def _detector(cascade: Cascade, lazy: LazyRun, task: Task) -> float:
    """Seconds of maps, gates and decisions of all trials, once their scores are there; the median of some rounds."""
    times = []
    for _ in range(_DETECTOR_ROUNDS):
        start = time.perf_counter()
        run(cascade.policy, lazy.scores, task.pairs.enrol, task.pairs.test)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def _shown(flips: int | None) -> str:
    return "not known: another network's scores" if flips is None else str(flips)


def main(options: LazyBench) -> None:
    """Prints the comparison."""
    found = compare(options)
    for one in found["sets"]:
        embedded = ", ".join(f"{count:,} at {bits} bits" for bits, count in one["embedded"].items())
        print(
            f"{one['data']}: {one['trials']:,} trials of {one['recordings']:,} recordings, "
            f"{100 * one['escalated']:.1f} % escalated; embedded: {embedded}; "
            f"the detector: {one['detector_microseconds_a_trial']:.2f} microseconds a trial"
        )
        for row in one["rows"]:
            print(
                f"  {row['system']}: {row['seconds']:.2f} s ({row['ratio']:.3f} of full precision), "
                f"{1e3 * row['seconds_a_trial']:.1f} ms and {row['macs_a_trial'] / 1e9:.2f} G multiplications a trial, "
                f"{row['bytes'] / 1e6:.2f} MB, EER {row['eer']:.2f} %, harmful flips: {_shown(row['harmful_flips'])}"
            )
    if options.json:
        write_json(options.json, found)
