"""A cascade over a trial list: decisions, errors, flips and costs."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kmq_jax.cascade.costs import describe_costs, savings
from kmq_jax.cascade.options import CascadeOptions
from kmq_jax.cascade.policy import CascadePolicy, read_policy
from kmq_jax.cascade.run import Decisions, Outcome, map_scores, run
from kmq_jax.cascade.verifier import load_cascade
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json, Row, atomic_write, write_json
from kmq_jax.core.tree import Array
from kmq_jax.data import source
from kmq_jax.data.trials import Trials
from kmq_jax.metrics.bootstrap import enough, percentile_interval
from kmq_jax.metrics.calibration import cllr
from kmq_jax.metrics.detection import eer, min_dcf
from kmq_jax.metrics.operating import error_rates
from kmq_jax.metrics.paired import Errors
from kmq_jax.models.choices import Engine
from kmq_jax.scoring.join import join
from kmq_jax.scoring.levels import LevelScores, score_levels
from kmq_jax.scoring.table import EmbeddingTable

Place = str | os.PathLike[str]

_LINES = 1 << 16  # lines written at a time
BANDS = (0, 1, 2, 5, 10, 20, 50, 100)
"""Edges of bands of trials, in percent, from those nearest the threshold at full precision; flips count by band."""


class Evaluation(NamedTuple):
    """A cascade's run over a trial list: the policy, the scores it saw, what it decided, and its figures."""

    policy: CascadePolicy
    joined: LevelScores
    outcome: Outcome
    figures: Json


def evaluate_embeddings(
    policy_file: Place,
    levels: Sequence[tuple[int, str]],
    trials: str,
    options: CascadeOptions | None = None,
    reference: str | None = None,
    enrol_models: str | None = None,
    llr: bool = False,
) -> Evaluation:
    """Runs a cascade over a trial list from the embedding files of its levels.

    Args:
        policy_file: what `CascadePolicy.save` wrote.
        levels: bits and embedding file of each level, ascending.
        trials: the list, or `synthetic:SPLIT`.
        options: how it is evaluated; the defaults where left out.
        reference: embedding file of the full-precision model, to count flips against.
        enrol_models: list of enrolment models, where the trials enrol models.
        llr: whether likelihood ratios are wanted of it.

    Raises:
        UserError: the levels are not those of the policy, it has no likelihood ratios, or a file is at fault.
    """
    policy = read_policy(policy_file)
    check_ratios(policy, policy_file, llr)
    check_bits(policy, policy_file, levels)
    joined = score_levels(levels, reference, trials, policy.enrolment, enrol_models)
    check_tables(policy, levels, joined.tables)
    return _evaluated(policy, joined, options or CascadeOptions())


def check_bits(policy: CascadePolicy, policy_file: Place, levels: Sequence[tuple[int, str]]) -> None:
    """Refuses `levels` (bits and embedding file of each) whose bits are not the policy's.

    Raises:
        UserError: they differ.
    """
    if tuple(bits for bits, _ in levels) != policy.bits:
        given = ", ".join(str(bits) for bits, _ in levels)
        raise UserError(f"--stage: {policy_file} is for {', '.join(map(str, policy.bits))} bits, but {given} are given")


def check_tables(policy: CascadePolicy, levels: Sequence[tuple[int, str]], tables: Sequence[EmbeddingTable]) -> None:
    """Refuses embeddings of levels that the policy was not made for.

    Raises:
        UserError: as `CascadePolicy.check`.
    """
    for i, (bits, path) in enumerate(levels):
        policy.check(bits, i, tables[i].embeddings.shape[1], tables[i].model, path)
        policy.warn_of_vad(tables[i].vad)


def check_ratios(policy: CascadePolicy, place: Place, llr: bool) -> None:
    """Refuses a policy, which came from `place`, where `llr` asks for likelihood ratios that it does not have.

    Raises:
        UserError: it has none.
    """
    if llr and policy.llr_maps is None:
        raise UserError(f"--llr: {place} was fitted on trials of one class and has no likelihood ratios")


def evaluate_recordings(
    directory: Place,
    data: Place,
    trials: str,
    options: CascadeOptions | None = None,
    reference: str | None = None,
    compute: str = "float32",
    engine: Engine = "auto",
    llr: bool = False,
) -> Evaluation:
    """Runs a cascade over a trial list lazily: each level embeds only the recordings of trials still in doubt.

    Args:
        directory: of the cascade, as `verifier.save_cascade` wrote it.
        data: the DATA whose recordings the trials compare.
        trials: the list, or `synthetic:SPLIT`.
        options: how it is evaluated; the defaults where left out.
        reference: embedding file of the full-precision model, to count flips against.
        compute: arithmetic of the levels below the last, "float32" or "bfloat16".
        engine: what runs the networks.
        llr: whether likelihood ratios are wanted of it.

    Returns:
        The run. Its figures also tell `seconds`, `embedded`, `resident_bytes`, `macs` and `sequential_macs`.

    Raises:
        UserError: the policy has no likelihood ratios, or a file or a recording is at fault.
    """
    cascade = load_cascade(directory, compute, engine)
    check_ratios(cascade.policy, directory, llr)  # before anything is embedded
    utterances = source.open_source(data)
    names = tuple(utterances.ids), tuple(utterances.paths), tuple(utterances.speakers)
    # The trials are joined by names alone, before anything is embedded: ones stand for the embeddings.
    table = EmbeddingTable(*names, np.ones((len(utterances), 1), np.float32), str(data))
    listed, sides = join(trials, table, table)
    # The reference is the only "level" here; its bits have no meaning.
    own = score_levels([(32, reference)], None, trials).scores[0] if reference else None
    lazy = cascade.score(utterances, listed)
    joined = LevelScores(listed, sides, (), lazy.scores, own)
    found = _evaluated(cascade.policy, joined, options or CascadeOptions())
    embedded = {str(bits): count for bits, count in lazy.embedded.items()}
    found.figures.update({"seconds": sum(lazy.seconds.values()), "embedded": embedded} | cascade.costs())
    # Mean multiply-accumulates of a trial: levels may be different networks, whose bits say little about their work.
    reached = [float(np.mean(found.outcome.level >= level)) for level in range(len(cascade.policy.bits))]
    macs = found.figures["macs"].values()
    found.figures["sequential_macs"] = sum(share * count for share, count in zip(reached, macs))
    return found


def _evaluated(policy: CascadePolicy, joined: LevelScores, options: CascadeOptions) -> Evaluation:
    outcome = run(policy, joined.scores, joined.sides.enrol, joined.sides.test, joined.one_table)
    return Evaluation(policy, joined, outcome, figures_of(policy, outcome, joined, options))


def figures_of(policy: CascadePolicy, outcome: Outcome, joined: LevelScores, options: CascadeOptions) -> Json:
    """All figures of a cascade on a trial list; a figure that cannot be computed is None.

    A lazy run (`evaluate_recordings`) does not score every trial at every level, so it has no figures of a level alone.

    Args:
        policy: the cascade.
        outcome: what it decided.
        joined: the trials, and the scores that it saw.
        options: the prior of a target for minDCF, and the draws of speakers.
    """
    labels, reference, p_target = joined.trials.label, joined.reference, options.p_target
    both = bool(labels.any() and not labels.all())
    far, frr = error_rates(outcome.score, labels, policy.threshold)
    llrs = log_ratios(policy, outcome)
    result: Json = {
        "eer": equal_error(outcome.score, labels),
        "eer_ci95": None,
        "min_dcf": min_dcf(outcome.score, labels, p_target) if both else None,
        "min_dcf_ci95": None,
        "cllr": cllr(llrs, labels) if llrs is not None and both else None,
        "threshold": policy.threshold,
        "false_accept_rate": far,
        "false_reject_rate": frr,
        **cost_figures(policy, outcome.costs()),
        "harmful_flip_rate": None,
        "beneficial_flip_rate": None,
        "reference_eer": None,
        "reference_min_dcf": None,
        "p_target": p_target,
        "trials": len(labels),
        "targets": int(labels.sum()),
        "remaining_flips": None,
        "each_level_alone": each_alone(policy, joined) if joined.tables else None,
        "changes": {},
    }
    if reference is not None:
        result |= flip_rates(outcome.score, policy.threshold, reference, labels)
        result["remaining_flips"] = remaining_flips(policy, outcome, reference, labels)
        result["reference_eer"] = equal_error(reference, labels)
        result["reference_min_dcf"] = min_dcf(reference, labels, p_target) if both else None
    return result | (_intervals(outcome, joined, options) if options.replicates and both else {})


def cost_figures(policy: CascadePolicy, costs: Json) -> Json:
    """The costs of a cascade (`Outcome.costs`), with what they save against its last level alone (`costs.savings`)."""
    nested = bool(policy.notes.get("nested"))
    return {
        **costs,
        "top_bits": policy.bits[-1],
        "nested": nested,
        "seconds_a_recording": policy.seconds and dict(zip(map(str, policy.bits), policy.seconds)),
        "saved": savings(costs, policy.bits[-1], nested, policy.seconds),
    }


def _intervals(outcome: Outcome, joined: LevelScores, options: CascadeOptions) -> Json:
    """95 % intervals over draws of speakers, and `changes`; nothing where the speakers are too few to draw.

    `changes` compares the cascade with its first level alone (`first`) and with full precision (`reference`), where
    they are known. Both sides of a comparison share their draws (`Errors.minus`).
    """

    def errors_of(scores: Array) -> Errors:
        sides = joined.sides.enrol_speaker, joined.sides.test_speaker
        return Errors.of(scores, joined.trials.label, *sides, options.replicates, options.seed, options.p_target)

    ours = errors_of(outcome.score)
    if not enough(len(ours.eer_draws), options.replicates):
        return {}
    others = {"reference": joined.reference}
    if joined.tables:  # a lazy run knows no level alone
        others["first"] = joined.scores[0]  # its own scores: an isotonic map's plateaus would tie some of them
    return {
        "eer_ci95": list(percentile_interval(ours.eer_draws)),
        "min_dcf_ci95": list(percentile_interval(ours.min_dcf_draws)),
        "changes": {name: ours.minus(errors_of(scores)) for name, scores in others.items() if scores is not None},
    }


def equal_error(scores: Array, labels: Array) -> float | None:
    """EER in percent, or None where a class has no trials.

    >>> equal_error(np.array([0.9, 0.2, 0.4, 0.1]), np.array([True, True, False, False]))
    50.0
    """
    return None if labels.all() or not labels.any() else 100 * eer(scores, labels)[0]


def flip_rates(scores: Array, threshold: float, reference: Array, labels: Array) -> dict[str, float]:
    """Flips against a reference: shares of all trials.

    A flip is harmful where the reference decides right and the scores decide wrong, and beneficial where it is the
    other way round.

    Args:
        scores: `[trials]`, on the reference's scale.
        threshold: on that scale, of both.
        reference: `[trials]`, the reference's scores.
        labels: `[trials]` bool.

    >>> labels, reference = np.array([True, True, False]), np.array([0.9, 0.4, 0.1])
    >>> found = flip_rates(np.array([0.3, 0.6, 0.2]), 0.5, reference, labels)
    >>> {name: round(rate, 3) for name, rate in found.items()}
    {'harmful_flip_rate': 0.333, 'beneficial_flip_rate': 0.333}
    """
    ours, theirs = (scores >= threshold) == labels, (reference >= threshold) == labels
    return {
        "harmful_flip_rate": float(np.mean(theirs & ~ours)),
        "beneficial_flip_rate": float(np.mean(ours & ~theirs)),
    }


def each_alone(policy: CascadePolicy, joined: LevelScores) -> dict[str, Json]:
    """The figures of every level alone, by its bits: `eer` in percent, and with a reference those of `flip_rates`."""
    labels, mapped = joined.trials.label, map_scores(policy, joined.scores)
    result = {}
    for bits, row in zip(policy.bits, mapped):
        figures: Json = {"eer": equal_error(row, labels)}
        if joined.reference is not None:
            figures |= flip_rates(row, policy.threshold, joined.reference, labels)
        result[str(bits)] = figures
    return result


def remaining_flips(policy: CascadePolicy, outcome: Outcome, reference: np.ndarray, labels: np.ndarray) -> list[Json]:
    """Counts the harmful flips by distance of the reference's score from the threshold, and by the level that decided.

    Args:
        policy: the cascade.
        outcome: what it decided.
        reference: full precision's scores `[trials]`.
        labels: `[trials]` bool.

    Returns:
        A row for each band between two edges of `BANDS`: `nearest`, its two edges in percent; `margin`, the distance of
        its last trial from the threshold; `harmful_flip_rate`, by bits of the deciding level, in shares of all trials.
    """
    margin = np.abs(reference - policy.threshold)
    order = np.argsort(margin, kind="stable")
    ours, theirs = (outcome.score >= policy.threshold) == labels, (reference >= policy.threshold) == labels
    harmful, ends = (theirs & ~ours)[order], np.round(np.array(BANDS) / 100 * len(order)).astype(int)
    level, rows = outcome.level[order], []
    for low, high, begin, end in zip(BANDS, BANDS[1:], ends, ends[1:]):
        counts = np.bincount(level[begin:end][harmful[begin:end]], minlength=len(policy.bits)) / len(order)
        rates = {str(bits): float(rate) for bits, rate in zip(policy.bits, counts)}
        far = float(margin[order[end - 1]]) if end else 0.0
        rows.append({"nearest": [low, high], "margin": far, "harmful_flip_rate": rates})
    return rows


def log_ratios(policy: CascadePolicy, outcome: Outcome | Decisions) -> np.ndarray | None:
    """Natural log likelihood ratio of each trial `[trials]` float64, by the map of the level that decided it.

    None where the policy has no such maps.
    """
    if policy.llr_maps is None:
        return None
    scale, offset = np.array([[fitted.scale, fitted.offset] for fitted in policy.llr_maps]).T
    return scale[outcome.level] * outcome.score + offset[outcome.level]


def write_decisions(path: Place, trials: Trials, outcome: Outcome, llrs: np.ndarray | None = None) -> None:
    """Writes decisions as CSV, `enrol,test,score,decision,bits[,llr]`, a row for each trial, with the list's names.

    Nine digits give every float32 back exactly.

    Args:
        path: the file.
        trials: the list.
        outcome: what the cascade decided.
        llrs: `[trials]`, for the column `llr`.

    Raises:
        UserError: the file cannot be written.
    """
    names = np.array([quoted(name) for name in trials.names], object)
    with atomic_write(Path(path)) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(header(llrs is not None))
        for lines in decision_lines(names, trials, outcome.score, outcome.accept, outcome.bits, llrs):
            file.write(lines)


def deliver(found: Evaluation, policy: Place, out: Path | None, llr: bool, json: Path | None) -> None:
    """Writes the decisions and the figures of a run, and prints the figures.

    Args:
        found: the run.
        policy: where its policy came from, for messages.
        out: file of decisions.
        llr: whether it gets the column `llr`.
        json: file of the figures.

    Raises:
        UserError: `llr` is asked for, but the policy has no likelihood ratios; or a file cannot be written.
    """
    check_ratios(found.policy, policy, llr)
    llrs = log_ratios(found.policy, found.outcome)
    if out:
        write_decisions(out, found.joined.trials, found.outcome, llrs if llr else None)
    if json:
        write_json(json, found.figures)
    print(describe(found.figures))


def header(llr: bool) -> str:
    r"""The first line of a file of decisions.

    >>> header(llr=False)
    'enrol,test,score,decision,bits\n'
    """
    return "enrol,test,score,decision,bits" + (",llr\n" if llr else "\n")


def decision_lines(
    names: np.ndarray,
    trials: Trials,
    score: np.ndarray,
    accept: np.ndarray,
    bits: np.ndarray,
    llrs: np.ndarray | None = None,
) -> Iterator[str]:
    r"""Yields blocks of rows for a file of decisions.

    Args:
        names: `[names]`, quoted for CSV; `enrol_name` and `test_name` of the trials index them.
        trials: the list or a part of it.
        score: `[trials]`.
        accept: `[trials]` bool.
        bits: `[trials]`, of the level that decided.
        llrs: `[trials]`, for another column.

    >>> row, yes = np.array([0]), np.array([True])
    >>> one = Trials(row, row + 1, yes, ("a", "b"), row, row + 1)
    >>> list(decision_lines(np.array(one.names), one, np.float32([0.5]), yes, np.array([2])))
    ['a,b,0.5,1,2\n']
    """
    for start in range(0, len(trials), _LINES):
        part = slice(start, start + _LINES)
        columns = [
            names[trials.enrol_name[part]],
            names[trials.test_name[part]],
            score[part].tolist(),
            accept[part].astype(int).tolist(),
            bits[part].tolist(),
        ]
        if llrs is None:
            yield "".join([f"{e},{t},{s:.9g},{d},{b}\n" for e, t, s, d, b in zip(*columns)])
        else:
            rows = zip(*columns, llrs[part].tolist())
            yield "".join([f"{e},{t},{s:.9g},{d},{b},{r:.6g}\n" for e, t, s, d, b, r in rows])


def quoted(name: str) -> str:
    """A name as a cell of a CSV row.

    >>> quoted("a,b")
    '"a,b"'
    """
    return '"' + name.replace('"', '""') + '"' if set(name) & set(',"\n\r') else name


def describe(figures: Row) -> str:
    """The figures as a short table."""

    def number(value: float | None, digits: int, factor: float = 1.0) -> str:
        return "-" if value is None else f"{factor * value:.{digits}f}"

    lines = [f"{figures['trials']:,} trials, {figures['targets']:,} of them targets"]
    lines.append(f"{'':14}{'EER %':>9}{'harmful flips %':>18}{'decides %':>12}")
    for bits, resolved in figures["resolved"].items():
        alone = (figures["each_level_alone"] or {}).get(bits, {})
        flips, share = number(alone.get("harmful_flip_rate"), 4, 100), number(resolved, 2, 100)
        lines.append(f"{bits + ' bits':14}{number(alone.get('eer'), 3):>9}{flips:>18}{share:>12}")
    lines.append(f"{'cascade':14}{number(figures['eer'], 3):>9}{number(figures['harmful_flip_rate'], 4, 100):>18}")
    lines.append(f"{'reference':14}{number(figures['reference_eer'], 3):>9}")
    seconds = figures["seconds_a_recording"] or {}
    lines += describe_costs(figures, figures["top_bits"], figures["nested"], tuple(seconds.values()))
    return "\n".join([*lines, *(_lazily(figures) if "embedded" in figures else ())])


def _lazily(figures: Row) -> list[str]:
    """The lines about the costs of a lazy run."""
    embedded = ", ".join(f"{count:,} at {bits} bits" for bits, count in figures["embedded"].items())
    macs = ", ".join(f"{count / 1e9:.2f} G at {bits} bits" for bits, count in figures["macs"].items())
    return [
        f"recordings embedded: {embedded}; {figures['seconds']:.1f} s; models of {figures['resident_bytes']:,} bytes",
        f"multiplications for 300 frames: {macs}; a trial: {figures['sequential_macs'] / 1e9:.2f} G",
    ]
