"""Cascades of different networks, such as CAM++ before ResNet34, beside single models: seconds, bytes, errors, flips.

Costs are seconds, since bits do not say how much two networks compute. Each model is timed on the same recordings, in
turns, and gates are chosen by those seconds. Scores of two networks share no scale. So every level has a map to the
last model's scores, fitted on other speakers than those it decides.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from kmq_jax import quant
from kmq_jax.benchmarks.extract import cosines
from kmq_jax.benchmarks.options import AcrossBench
from kmq_jax.benchmarks.timing import Figures, in_turns, medians
from kmq_jax.cascade.fit import Calibration, fit, pareto, split_speakers
from kmq_jax.cascade.options import CalibrationOptions
from kmq_jax.cascade.policy import CascadePolicy
from kmq_jax.cascade.run import run
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import write_json
from kmq_jax.data import source
from kmq_jax.metrics.paired import Errors
from kmq_jax.models.speaker_model import SpeakerModel, embed_all, fingerprint, load_model
from kmq_jax.scoring.levels import LevelScores, parse_levels, score_levels
from kmq_jax.scoring.table import EmbeddingTable, read_embeddings, write_embeddings

_LOOKED_AT, _ALIKE = 4, 0.999  # recordings of a set that are embedded again, and the least cosine to those kept


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model and where it lies.

    Attributes:
        name: as tables show it, the file's.
        place: the MODEL.
        loaded: from there.
        mark: its fingerprint.
        bytes: as packed.
    """

    name: str
    place: str
    loaded: SpeakerModel
    mark: str
    bytes: int

    @classmethod
    def read(cls, place: str) -> "Model":
        """Reads a MODEL."""
        loaded = load_model(place)
        return cls(Path(place).stem, place, loaded, fingerprint(loaded), quant.size_bytes(loaded.variables).total)


@dataclasses.dataclass(frozen=True, eq=False)
class System:
    """A cascade of two models, or one model alone.

    Attributes:
        levels: bits and MODEL of each level, ascending.
        alpha: the most harmful flips a trial that its gates may cause; None for one model.
    """

    levels: tuple[tuple[int, str], ...]
    alpha: float | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A trial list with the scores of every model.

    Attributes:
        data: the DATA.
        joined: the trials and their sides; its scores are the last model's.
        scores: `[trials]` float32, by MODEL.
        seconds: what a recording takes, by MODEL.
        recordings: how many the set has.
    """

    data: str
    joined: LevelScores
    scores: Mapping[str, np.ndarray]
    seconds: Mapping[str, float]
    recordings: int

    def calibration(self, system: System, reference: str) -> Calibration:
        """The scores of a system's levels beside the reference's."""
        sides = self.joined.sides
        return Calibration(
            tuple(bits for bits, _ in system.levels),
            np.stack([self.scores[place] for _, place in system.levels]),
            self.scores[reference],
            self.joined.trials.label,
            sides.enrol_speaker,
            sides.test_speaker,
            reference_level=system.levels[-1][1] == reference,
            enrol=sides.enrol,
            test=sides.test,
        )


def compare(options: AcrossBench) -> Figures:
    """Measures all systems on all lists. Policies come from the first list, and never decide their own speakers.

    Returns:
        `sets`, one a list: `data`, the numbers of `trials`, `targets` and `speakers` that are judged and of all
        `recordings`, `seconds` of a recording by model, and `rows`, one a system, as `judge` gives them, those of
        cascades with `beaten_by`; and the settings.

    Raises:
        UserError: the models' names or bits do not go together, or a file cannot be read.
    """
    # One at a time: two first models may have the same bits.
    first = sorted({level for given in options.first for level in parse_levels([given], "first", "MODEL")})
    ((top, last),) = parse_levels([options.last], "last", "MODEL")
    if late := [bits for bits, _ in first if bits >= top]:
        raise UserError(f"`first` (={late[0]}) must have fewer bits than the last model's {top}")
    # A MODEL may be given twice: it is read and timed once.
    places = dict.fromkeys([last, *(place for _, place in first), *options.beside])
    models = {place: Model.read(place) for place in places}
    if len({model.name for model in models.values()}) < len(models):
        raise UserError("`first`, `last` and `beside` must name files of different names")
    # A model alone has no order of levels: the bits of `beside` are a placeholder.
    alone = [(top, last), *first, *((top, place) for place in options.beside)]
    systems = [System((level,)) for level in dict.fromkeys(alone)]
    systems += [System((level, (top, last)), alpha) for level in first for alpha in options.alpha]
    counted = "trial" if options.cost == "sequential" else "recording"
    tasks = [task_of(models, last, data, listed, options) for data, listed in zip(options.data, options.trials)]
    return {
        "sets": [
            {
                "data": task.data,
                **counts([new for _, new in parts_of(systems[0], tasks[0], task, last)]),
                "recordings": task.recordings,
                "seconds": {models[place].name: seconds for place, seconds in task.seconds.items()},
                "rows": compared([judge(system, models, tasks[0], task, options) for system in systems], counted),
            }
            for task in tasks
        ],
        "cost": options.cost,
        "engine": options.engine,
        "timed": options.recordings,
        "repeats": options.repeats,
    }


def task_of(models: Mapping[str, Model], last: str, data: str, listed: str, options: AcrossBench) -> Task:
    """Embeds a set by every model, scores its list, and times the models on some of its recordings."""
    utterances = source.open_source(data)
    files = {place: embedded(model, data, utterances, options) for place, model in models.items()}
    # One file at a time, as a single level of placeholder bits: orders of files may differ, trials' order does not.
    joined = score_levels([(1, str(files[last]))], None, listed)
    scores = {place: score_levels([(1, str(file))], None, listed).scores[0] for place, file in files.items()}
    rows = np.unique(np.linspace(0, len(utterances) - 1, options.recordings).astype(int))  # evenly over the set
    some = utterances.select(rows)

    def run_model(model: Model) -> None:
        embed_all(model.loaded, some, engine=options.engine)

    sides = {place: functools.partial(run_model, model) for place, model in models.items()}
    seconds = {place: value / len(rows) for place, value in medians(in_turns(sides, options.repeats)).items()}
    return Task(data, joined, scores, seconds, len(utterances))


def embedded(model: Model, data: str, utterances: source.Utterances, options: AcrossBench) -> Path:
    """The file of a model's embeddings of a set: one that `options.kept` already holds, or a new one there."""
    options.kept.mkdir(parents=True, exist_ok=True)
    for path in sorted(options.kept.glob("*.npz")):
        if _is_of(read_embeddings(str(path)), model, utterances, options):
            return path
    place = Path(data)
    path = options.kept / f"{model.name}-{'-'.join(place.relative_to(place.anchor).parts[-2:])}.npz"
    made = embed_all(model.loaded, utterances, engine=options.engine)
    write_embeddings(path, utterances.ids, utterances.paths, utterances.speakers, made, model.mark)
    return path


def _is_of(table: EmbeddingTable, model: Model, utterances: source.Utterances, options: AcrossBench) -> bool:
    """Whether a table holds a model's embeddings of a set.

    Two sets may use the same ids, so a few recordings are embedded again and compared.
    """
    if table.model != model.mark or not set(utterances.ids) <= set(table.ids):
        return False
    some = np.unique(np.linspace(0, len(utterances) - 1, _LOOKED_AT).astype(int))
    rows = [table.ids.index(utterances.ids[i]) for i in some]
    made = embed_all(model.loaded, utterances.select(some), engine=options.engine)
    return bool(cosines(made, table.embeddings[rows]).min() > _ALIKE)


def policy_of(system: System, data: Calibration, seconds: Sequence[float], cost: str) -> CascadePolicy:
    """The policy with the cheapest gates by time on the trials of `data`; of one model, its map alone."""
    policy = dataclasses.replace(fit(data), seconds=tuple(seconds))
    if system.alpha is None:
        return policy
    how = CalibrationOptions(alpha=system.alpha, cost=cost, seconds=tuple(seconds))
    return pareto(data, policy, how)[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Decided:
    """What a system did with some trials.

    Attributes:
        data: the trials.
        score: `[trials]`, what errors are counted by.
        accept: `[trials]` bool, at the policy's threshold.
        wanted: `[trials]` bool, what the reference decides there.
        trials: `[levels]`, the share of the trials that each level scores.
        recordings: `[levels]`, the share of the recordings that each level embeds.
        used: how many recordings take part.
    """

    data: Calibration
    score: np.ndarray
    accept: np.ndarray
    wanted: np.ndarray
    trials: np.ndarray
    recordings: np.ndarray
    used: int


def decide(policy: CascadePolicy, data: Calibration) -> Decided:
    """Runs a policy over trials."""
    assert data.enrol is not None and data.test is not None
    outcome = run(policy, data.scores, data.enrol, data.test)
    # The highest level at which some trial needs each recording; -1 where it takes part in none.
    highest = np.full(max(data.enrol.max(), data.test.max()) + 1, -1)
    for side in (data.enrol, data.test):
        np.maximum.at(highest, side, outcome.level)
    levels, highest = np.arange(len(policy.bits)), highest[highest >= 0]
    # A map makes ties. A model alone needs none: its errors are those of its own scores.
    score = outcome.score if len(levels) > 1 else data.scores[0]
    # What reached level k has passed all levels up to k.
    trials, recordings = (np.mean(reached[:, None] >= levels, axis=0) for reached in (outcome.level, highest))
    wanted = data.reference >= policy.threshold
    return Decided(data, score, outcome.accept, wanted, trials, recordings, len(highest))


def parts_of(system: System, base: Task, task: Task, reference: str) -> list[tuple[Calibration, Calibration]]:
    """Trials that make a policy, each with those that it decides: of the first list each half of its speakers."""
    whole = base.calibration(system, reference)
    if task is not base:
        return [(whole, task.calibration(system, reference))]
    one, two = split_speakers(whole, 0.5, 0)  # trials across the halves are in neither
    return [(one, two), (two, one)]


def counts(judged: Sequence[Calibration]) -> Figures:
    """Numbers of `trials`, `targets` and `speakers`."""
    sides = [side for part in judged for side in (part.enrol_speaker, part.test_speaker)]
    targets = sum(int(part.labels.sum()) for part in judged)
    return {"trials": sum(map(len, judged)), "targets": targets, "speakers": len(np.unique(np.concatenate(sides)))}


def judge(system: System, models: Mapping[str, Model], base: Task, task: Task, options: AcrossBench) -> Figures:
    """What a system does on a list, and what changes against the last model alone on the same trials.

    Returns:
        `eer` (percent), `min_dcf` and their paired changes; `harmful_flip_rate`, `beneficial_flip_rate`; `escalated`,
        the share of trials that go on; two times relative to the last model's: `trial_ratio`, of the tested recording
        of a trial, and `recording_ratio`, of a recording that is embedded once at every level that some trial needs;
        the same in seconds, `trial_seconds` and `recording_seconds`; `bytes` of all its models.
    """
    last = options.last.partition(":")[2]
    seconds = [base.seconds[place] for _, place in system.levels]
    parts = parts_of(system, base, task, last)
    decided = [decide(policy_of(system, known, seconds, options.cost), new) for known, new in parts]
    labels, enrol, test, reference = (
        np.concatenate([getattr(part.data, key) for part in decided])
        for key in ("labels", "enrol_speaker", "test_speaker", "reference")
    )
    score, accept, wanted = (
        np.concatenate([getattr(part, key) for part in decided]) for key in ("score", "accept", "wanted")
    )
    errors, theirs = (
        Errors.of(scores, labels, enrol, test, replicates=options.replicates) for scores in (score, reference)
    )
    trials = np.average([part.trials for part in decided], axis=0, weights=[len(part.data) for part in decided])
    used = [part.used for part in decided]
    recordings = np.average([part.recordings for part in decided], axis=0, weights=used)
    took = np.array([task.seconds[place] for _, place in system.levels])
    ratios = took / task.seconds[last]
    return {
        "system": " > ".join(models[place].name for _, place in system.levels),
        "alpha": system.alpha,
        "eer": errors.eer,
        "min_dcf": errors.min_dcf,
        **errors.minus(theirs),
        "harmful_flip_rate": float(np.mean((wanted == labels) & (accept != labels))),
        "beneficial_flip_rate": float(np.mean((wanted != labels) & (accept == labels))),
        "escalated": float(trials[-1]) if len(system.levels) > 1 else 0.0,
        "trial_ratio": float(trials @ ratios),
        "recording_ratio": float(recordings @ ratios),
        "trial_seconds": float(trials @ took),
        "recording_seconds": float(recordings @ took),
        "bytes": sum(models[place].bytes for place in dict.fromkeys(place for _, place in system.levels)),
    }


def compared(rows: Sequence[Figures], counted: str) -> list[Figures]:
    """The rows of a list, those of cascades with `beaten_by`: single models that take no longer and err no more.

    Args:
        rows: as `judge` gives them.
        counted: whose time it is, "trial" or "recording".

    Returns:
        The same rows. In `beaten_by` the cheapest model comes first; with one, a cascade does not win.

    >>> single, slow = {"system": "a", "alpha": None, "eer": 2}, {"system": "b", "alpha": None, "eer": 1}
    >>> rows = [single | {"trial_ratio": 0.5}, slow | {"trial_ratio": 1.0}]
    >>> rows += [{"system": "a > b", "alpha": alpha, "eer": 2, "trial_ratio": 0.9 + alpha} for alpha in (0.0, 0.1)]
    >>> [row["beaten_by"] for row in compared(rows, "trial")[2:]]
    [['a'], ['a', 'b']]
    """
    takes = f"{counted}_ratio"
    singles = sorted((row for row in rows if row["alpha"] is None), key=lambda row: row[takes])

    def better(row: Figures) -> list[str]:
        return [one["system"] for one in singles if one[takes] <= row[takes] and one["eer"] <= row["eer"]]

    return [row if row["alpha"] is None else row | {"beaten_by": better(row)} for row in rows]


def _verdict(row: Figures) -> str:
    better = row.get("beaten_by")
    return f"; does not win: {better[0]} takes no longer and errs no more" if better else ""


def main(options: AcrossBench) -> None:
    """Prints the comparison."""
    found = compare(options)
    for one in found["sets"]:
        print(f"{one['data']}: {one['trials']:,} trials, {one['speakers']} speakers, {one['recordings']:,} recordings")
        for row in one["rows"]:
            gates = "" if row["alpha"] is None else f" (flips at most {100 * row['alpha']:g} %)"
            print(
                f"  {row['system']}{gates}: EER {row['eer']:.2f} %, "
                f"harmful flips {100 * row['harmful_flip_rate']:.2f} %, {100 * row['escalated']:.1f} % go on; "
                f"of the last model's time {row['trial_ratio']:.2f} by trial, "
                f"{row['recording_ratio']:.2f} by recording; {1e3 * row['trial_seconds']:.1f} and "
                f"{1e3 * row['recording_seconds']:.1f} ms; {row['bytes'] / 1e6:.2f} MB" + _verdict(row)
            )
    if options.json:
        write_json(options.json, found)
