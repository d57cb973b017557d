"""Cascades that start from recordings beside single models, in turns in one run: seconds, cost, size, errors."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from kmq_jax import quant
from kmq_jax.benchmarks.options import LazyBench
from kmq_jax.benchmarks.timing import Figures, in_turns, medians
from kmq_jax.cascade.policy import CascadePolicy
from kmq_jax.cascade.run import map_scores, run
from kmq_jax.cascade.verifier import Cascade, LazyRun, load_cascade
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Row, write_json
from kmq_jax.data import source, trials
from kmq_jax.frontend import num_frames
from kmq_jax.metrics.detection import eer
from kmq_jax.models import registry
from kmq_jax.models.speaker_model import SpeakerModel, embed_all, fingerprint, frontend_of, load_model
from kmq_jax.scoring.cosine import cosine_scores

CASCADE, FULL = "cascade", "full precision"
_DETECTOR_ROUNDS = 20  # a round is short: their median is steadier


def thin(enrol: np.ndarray, test: np.ndarray, uses: int, seed: int = 0) -> np.ndarray:
    """Rows of a random part of a list in which no recording takes part in more than `uses` trials; 0 keeps all.

    >>> len(thin(np.array([0, 0, 2]), np.array([1, 1, 3]), uses=1))
    2
    """
    if not uses:
        return np.arange(len(enrol))
    count = np.zeros(max(enrol.max(), test.max()) + 1, int)
    kept = []
    for row in np.random.default_rng(seed).permutation(len(enrol)).tolist():
        a, b = enrol[row], test[row]
        # A recording beside itself is no trial that a service sees.
        if a != b and count[a] < uses and count[b] < uses:
            count[[a, b]] += 1
            kept.append(row)
    return np.sort(np.array(kept, int))


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A list of trials and the recordings that take part in it.

    Attributes:
        data: the DATA.
        utterances: the recordings.
        pairs: the trials; their sides are rows of these.
        frames: of a recording, the mean.
    """

    data: str
    utterances: source.Utterances
    pairs: trials.Trials
    frames: int


def open_task(data: str, listed: str, uses: int, fbank: str) -> Task:
    """Reads a trial list, thins it, and keeps the recordings that take part.

    Raises:
        UserError: either cannot be read, or no errors can be counted on what is left.
    """
    table = source.open_source(data)
    whole = trials.open_trials(listed, table)
    rows = thin(whole.enrol, whole.test, uses)
    if len(set(whole.label[rows].tolist())) < 2:
        raise UserError(f"`trials` (={listed}): no target or no nontarget trials are left with `uses` (={uses})")
    used = np.union1d(whole.enrol[rows], whole.test[rows])
    # Rows of the table become rows of `used`, which is sorted.
    enrol, test = (np.searchsorted(used, side[rows]).astype(np.int32) for side in (whole.enrol, whole.test))
    pairs = trials.Trials(enrol, test, whole.label[rows], whole.names, whole.enrol_name[rows], whole.test_name[rows])
    utterances = table.select(used)
    frames = int(num_frames(utterances.lengths(), frontend_of(fbank)).mean())
    return Task(data, utterances, pairs, frames)


@dataclasses.dataclass(eq=False)
class _Lazy:
    """A cascade that takes part, and what its last run gave."""

    cascade: Cascade
    lazy: LazyRun | None = None


def names_of(places: Sequence[str]) -> list[str]:
    """What cascades are called: "cascade" where there is one, else the names of their directories.

    >>> names_of(["runs/a"]), names_of(["runs/2-32", "runs/2-8/"])
    (['cascade'], ['cascade 2-32', 'cascade 2-8'])
    """
    return [CASCADE] if len(places) == 1 else [f"{CASCADE} {Path(place).name}" for place in places]


def compare(options: LazyBench) -> Figures:
    """Measures all sides on all lists; each list after a round that is not counted.

    Returns:
        `sets`, one a list, as `compare_on` gives them; and the settings.
    """
    opened = [load_cascade(place, options.compute, options.engine) for place in options.cascade]
    cascades = {name: _Lazy(one) for name, one in zip(names_of(options.cascade), opened)}
    first = opened[0]
    reference = load_model(options.reference) if options.reference else first.model_at(len(first.policy.bits) - 1)
    models = {FULL: reference} | {place: load_model(place) for place in options.beside}
    sets = []
    for data, listed in zip(options.data, options.trials):
        task = open_task(data, listed, options.uses, reference.frontend)
        sets.append(compare_on(task, cascades, models, options))
    return {"sets": sets, "uses": options.uses, "compute": options.compute, "engine": options.engine}


def compare_on(
    task: Task, cascades: Mapping[str, _Lazy], models: Mapping[str, SpeakerModel], options: LazyBench
) -> Figures:
    """Measures cascades and single models on one list.

    Returns:
        What the list holds, and `rows`, one a side: `seconds` in all, a trial and a recording; multiplications
        likewise; `bytes` held; `eer` in percent; `harmful_flips`, trials that full precision decides right and this
        side wrong, at the policy's threshold (for single models, that of the first cascade). Cascades' rows also tell
        how many trials were `escalated`, what was `embedded`, what the detector costs, and which single models they are
        `beaten_by`. Flips are None of another network whose scores nothing maps to the threshold's scale.
    """
    pairs = task.pairs
    found: dict[str, np.ndarray] = {}

    def by_cascade(name: str) -> None:
        one = cascades[name]
        one.lazy = one.cascade.score(task.utterances, pairs)
        found[name] = run(one.cascade.policy, one.lazy.scores, pairs.enrol, pairs.test).score

    def by_model(name: str) -> None:
        rows = embed_all(models[name], task.utterances, engine=options.engine)
        found[name] = cosine_scores(rows, rows, pairs.enrol, pairs.test)

    sides: dict[str, Callable[[], None]] = {name: functools.partial(by_cascade, name) for name in cascades}
    sides |= {name: functools.partial(by_model, name) for name in models}
    seconds = medians(in_turns(sides, options.repeats))
    policies = {name: one.cascade.policy for name, one in cascades.items()}
    rows: dict[str, Figures] = {}
    for name in sides:
        policy = policies.get(name, next(iter(policies.values())))
        scores = found[name] if name in cascades else _on_scale(policy, models[name], models[FULL], found[name])
        rows[name] = {
            "system": name,
            **(_costs(task, cascades[name]) if name in cascades else _single_costs(task, models[name])),
            "seconds": seconds[name],
            "ratio": seconds[name] / seconds[FULL],
            "eer": 100 * float(eer(found[name], pairs.label)[0]),
            "harmful_flips": _harmful_flips(found[FULL], scores, pairs.label, policy.threshold),
        }
        for kind in ("seconds", "macs"):
            rows[name][f"{kind}_a_trial"] = rows[name][kind] / len(pairs)
            rows[name][f"{kind}_a_recording"] = rows[name][kind] / len(task.utterances)
    for name in cascades:
        rows[name]["beaten_by"] = beaten_by(rows[name], [rows[model] for model in models])
    return {
        "data": task.data,
        "trials": len(pairs),
        "targets": int(pairs.label.sum()),
        "recordings": len(task.utterances),
        "rows": list(rows.values()),
    }


def beaten_by(cascade: Row, singles: Sequence[Row]) -> list[str]:
    """Which single models take no longer than a cascade and flip no more trials: with one, the cascade does not win.

    >>> quick, slow = {"seconds": 1, "harmful_flips": 3}, {"seconds": 9, "harmful_flips": 0}
    >>> beaten_by({"seconds": 2, "harmful_flips": 3}, [quick | {"system": "W8A8"}, slow | {"system": "full"}])
    ['W8A8']
    """
    better = ("seconds", "harmful_flips")
    known = [row for row in singles if row["harmful_flips"] is not None]
    return [row["system"] for row in known if all(row[name] <= cascade[name] for name in better)]


def _single_costs(task: Task, model: SpeakerModel) -> Figures:
    return {
        "macs": len(task.utterances) * registry.macs(model.network(), task.frames),
        "bytes": quant.size_bytes(model.variables).total,
    }


def _costs(task: Task, one: _Lazy) -> Figures:
    """What a cascade computed and holds, how many trials it escalated, and what the detector costs."""
    assert one.lazy is not None
    policy, pairs = one.cascade.policy, task.pairs
    costs = one.cascade.costs(task.frames)
    embedded = {str(bits): count for bits, count in one.lazy.embedded.items()}
    outcome = run(policy, one.lazy.scores, pairs.enrol, pairs.test)
    return {
        "macs": sum(costs["macs"][bits] * count for bits, count in embedded.items()),
        "bytes": costs["resident_bytes"],
        "escalated": 1 - outcome.resolved[policy.bits[0]],
        "embedded": embedded,
        "detector_microseconds_a_trial": _detector(one.cascade, one.lazy, task) / len(pairs) * 1e6,
    }


def _harmful_flips(full: np.ndarray, scores: np.ndarray | None, label: np.ndarray, threshold: float) -> int | None:
    """Trials that full precision decides right and `scores` wrong; None without scores on its scale."""
    if scores is None:
        return None
    right = (full >= threshold) == label
    return int((right & ((scores >= threshold) != label)).sum())


def _on_scale(policy: CascadePolicy, model: SpeakerModel, full: SpeakerModel, scores: np.ndarray) -> np.ndarray | None:
    """A model's scores on the scale of the policy's threshold; None where that is not known."""
    mark = fingerprint(model)
    if mark in policy.models and model is not full:
        level = policy.models.index(mark)
        # `map_scores` wants a row for every level; the others are not used.
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
        print(f"{one['data']}: {one['trials']:,} trials of {one['recordings']:,} recordings")
        for row in one["rows"]:
            print(
                f"  {row['system']}: {row['seconds']:.2f} s ({row['ratio']:.3f} of full precision), "
                f"{1e3 * row['seconds_a_trial']:.1f} ms and {row['macs_a_trial'] / 1e9:.2f} G multiplications a trial, "
                f"{row['bytes'] / 1e6:.2f} MB, EER {row['eer']:.2f} %, harmful flips: {_shown(row['harmful_flips'])}"
            )
            if "embedded" in row:
                print(f"    {_about(row)}")
    if options.json:
        write_json(options.json, found)


def _about(row: Row) -> str:
    """What is told of a cascade alone."""
    embedded = ", ".join(f"{count:,} at {bits} bits" for bits, count in row["embedded"].items())
    better = ", ".join(row["beaten_by"])
    verdict = f"does not win: {better} takes no longer and flips no more" if better else "no single model beats it"
    return (
        f"{100 * row['escalated']:.1f} % escalated; embedded: {embedded}; the detector: "
        f"{row['detector_microseconds_a_trial']:.2f} microseconds a trial; {verdict}"
    )
