"""Runs a cascade over trial lists of any length in bounded memory, in one process or shared among several.

Decisions are those of `cascade.run`. Counts are 64-bit whole numbers, so rates of decisions, flips and costs are exact,
and the same however many processes share the list. EER and minDCF come from histograms, which bound them.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from kmq_jax.cascade import evaluate
from kmq_jax.cascade.options import CascadeOptions
from kmq_jax.cascade.policy import CascadePolicy, read_policy
from kmq_jax.cascade.run import Decisions, costs_of, decider
from kmq_jax.core import distributed
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json, atomic_write, write_json
from kmq_jax.core.progress import progress
from kmq_jax.data.trials import Trials, model_rows, read_in_parts, read_models
from kmq_jax.metrics.calibration import AffineMap, IsotonicMap
from kmq_jax.metrics.histogram import ScoreHistogram
from kmq_jax.scoring.levels import read_levels
from kmq_jax.scoring.stream import Doubts, Names, Share, check_streamable, own_share, rates_of, share_of

_MARGINS = 1 << 16  # bins of distances from the threshold
_BOUNDED = ("eer", "min_dcf")  # figures from a histogram, with bounds beside them


def cascade_stream(
    policy_file: evaluate.Place,
    levels: Sequence[tuple[int, str]],
    trials: str,
    options: CascadeOptions,
    *,
    reference: str | None = None,
    enrol_models: str | None = None,
    out: Path | None = None,
    llr: bool = False,
    share: Share = (0, 1),
) -> Json:
    """Runs a cascade over a list part by part, from the embedding files of its levels.

    Args:
        policy_file: what `CascadePolicy.save` wrote.
        levels: bits and embedding file of each level, ascending.
        trials: the list, a file.
        options: how it is evaluated; there are no intervals, which would need all scores at once.
        reference: embedding file of the full-precision model, to count flips against.
        enrol_models: list of enrolment models, where the trials enrol models.
        out: CSV of decisions, as `evaluate.write_decisions` has it.
        llr: whether it gets the column `llr`.
        share: this process takes the i-th of n shares; all n must call this. With several, `out` gets `-i-of-n` before
            its suffix, and the figures are of all shares.

    Returns:
        The figures of `evaluate.figures_of`, without intervals. EER and minDCF have `..._bounds` beside them. The bands
        of `remaining_flips` end at edges of bins, so each says from and to which percent of the trials it goes.

    Raises:
        UserError: the levels are not those of the policy, a file is at fault, or another process failed.
    """
    with distributed.all_or_none():
        check_streamable(trials)
        policy = read_policy(policy_file)
        evaluate.check_bits(policy, policy_file, levels)
        evaluate.check_ratios(policy, policy_file, llr)
        read = read_levels(levels, reference, policy.enrolment)
        evaluate.check_tables(policy, levels, read.tables)
        first = read.tables[0]
        names = first.ids, first.paths or first.ids
        models = read_models(enrol_models) if enrol_models else None
        rows = model_rows(models, *names) if models else None
        if rows:
            read.check(np.concatenate(rows))
        score = read.scorer(rows)
    tally = Tally(policy, (len(first), len(rows) if rows else 0), reference is not None)
    doubts, decide = Doubts(first, rows), decider(policy)
    with distributed.entered_by_all(_writer(share_of(out, share), policy, llr)) as write:
        for part in progress(read_in_parts(trials, *names, models, share), desc="deciding", unit="part"):
            read.check(part.test)
            if rows is None:
                read.check(part.enrol)
            scores = score(part.enrol, part.test)
            # The reference's scores, where there is one, come last.
            decided = decide(scores[: len(levels)])
            tally.add(part, decided, scores[-1] if reference else None)
            doubts.add(part)
            write(part, decided)
    tally.gather()
    doubts.warn(trials, share)
    if not tally.trials:
        raise UserError(f"{trials}: lists no trial")
    return tally.figures(options.p_target)


def cascade_together(
    policy_file: evaluate.Place,
    levels: Sequence[tuple[int, str]],
    trials: str,
    options: CascadeOptions,
    reference: str | None,
    enrol_models: str | None,
    out: Path | None,
    llr: bool,
    json: Path | None,
) -> None:
    """Runs `cascade_stream` in all processes that were started together; the first prints and writes the figures.

    Arguments and errors are those of `cascade_stream`; `json` is the file that the figures are written to.
    """
    share = own_share()
    given = policy_file, levels, trials, options
    figures = cascade_stream(*given, reference=reference, enrol_models=enrol_models, out=out, llr=llr, share=share)
    if share[0] == 0:
        if json:
            write_json(json, figures)
        print(describe(figures))


def describe(figures: Json) -> str:
    """The figures as lines for the terminal."""
    lines = [evaluate.describe(figures)]
    if figures["eer_bounds"]:
        low, high = figures["eer_bounds"]
        lines.append(f"the cascade's EER lies within {low:.5f} and {high:.5f} %: it comes from a histogram")
    return "\n".join(lines)


def span(policy: CascadePolicy) -> tuple[float, float]:
    """The lowest and the highest score that any level gives on the reference's scale, for cosines from -1 to 1.

    >>> line = AffineMap(0.5, 0.25)
    >>> span(CascadePolicy((2,), (line,), (), 0.0))
    (-0.25, 0.75)
    """

    # No map falls, so the ends of the cosines give the ends of the scale.
    def ends(fitted: AffineMap | IsotonicMap) -> tuple[float, float]:
        low, high = fitted([-1.0, 1.0]).tolist()
        return low, high

    lows, highs = zip(*map(ends, policy.maps))
    low, high = min(lows), max(highs)
    return (low, high) if low < high else (low, low + 1.0)


class Tally:
    """Counts what a cascade does with a list, part by part. The counts of all parts add up to those of the list."""

    def __init__(self, policy: CascadePolicy, sizes: tuple[int, int], reference: bool):
        """Makes an empty one.

        Args:
            policy: the cascade.
            sizes: utterances, and enrolment models; 0 where trials enrol utterances.
            reference: whether flips against a reference are counted.
        """
        levels = len(policy.bits)
        self._policy, self._models = policy, bool(sizes[1])
        self._top = policy.enrolment == "top"
        self.decided = np.zeros(levels, np.int64)
        self.accepted = np.zeros((2, 2), np.int64)
        """By label and decision, `[2, 2]`."""
        self.flips = np.zeros((levels + 1, 2), np.int64) if reference else None
        """Harmful and beneficial ones, `[levels + 1, 2]`: of each level alone, then of the cascade."""
        self.near = np.zeros((levels + 1, _MARGINS), np.int64) if reference else None
        """Trials by distance of the reference's score from the threshold, `[levels + 1, bins]`: the cascade's harmful
        flips, a row for each level that decided, then all trials."""
        self._cost = np.zeros(2)  # of likelihood ratios: nontargets, targets
        self._reached = np.full(sizes[0], -1, np.int8)
        self._enrolled = np.full(sizes[1] or sizes[0], -1, np.int8)
        self.histograms = [ScoreHistogram(*span(policy)) for _ in range(levels + 1)]
        """Scores of each level alone, then of the cascade."""
        self.of_reference = ScoreHistogram(-1.0, 1.0) if reference else None
        # A cosine lies at most 1 + |threshold| from the threshold.
        self._width = (1.0 + abs(policy.threshold)) / _MARGINS

    @property
    def trials(self) -> int:
        """How many were counted."""
        return int(self.decided.sum())

    def add(self, part: Trials, decided: Decisions, reference: np.ndarray | None) -> None:
        """Counts a part of the list.

        Args:
            part: its trials.
            decided: what the cascade did with them.
            reference: the reference's scores `[trials]`.
        """
        levels, labels = len(self._policy.bits), part.label
        self.decided += np.bincount(decided.level, minlength=levels)
        # Label and decision as one number from 0 to 3.
        self.accepted += np.bincount(2 * labels + decided.accept, minlength=4).reshape(2, 2)
        for histogram, scores in zip(self.histograms, (*decided.mapped, decided.score)):
            histogram.add(scores, labels)
        self._climb(part, decided.level)
        if self._policy.llr_maps is not None:
            ratios = evaluate.log_ratios(self._policy, decided)
            assert ratios is not None
            # As `metrics.calibration.cllr`: a high ratio costs in nontargets, a low one in targets.
            for label, sign in ((0, 1.0), (1, -1.0)):
                self._cost[label] += np.logaddexp(0, sign * ratios[labels == label]).sum()
        if reference is not None:
            self._count_flips(decided, reference, labels)

    def _climb(self, part: Trials, level: np.ndarray) -> None:
        """Notes the highest level that the trials of each utterance reach."""
        sides = [(self._reached, part.test)]
        if self._top:
            self._enrolled[part.enrol] = 0  # counted there, and priced at the last level by `costs_of`
        else:
            sides.append((self._enrolled if self._models else self._reached, part.enrol))
        for reached, rows in sides:
            for i in range(len(self._policy.bits)):
                # Level by level: where an utterance has several trials, an assignment keeps only one of the values.
                up = rows[level == i]
                reached[up] = np.maximum(reached[up], i)

    def _count_flips(self, decided: Decisions, reference: np.ndarray, labels: np.ndarray) -> None:
        """Counts flips against the reference's scores `[trials]`, of each level alone and of the cascade."""
        assert self.flips is not None and self.near is not None and self.of_reference is not None
        threshold, levels = self._policy.threshold, len(self._policy.bits)
        self.of_reference.add(reference, labels)
        theirs = (reference >= threshold) == labels
        ours = [*((row >= threshold) == labels for row in decided.mapped), decided.accept == labels]
        for counts, right in zip(self.flips, ours):
            counts += np.count_nonzero(theirs & ~right), np.count_nonzero(right & ~theirs)
        margin = (np.abs(reference - threshold) / self._width).astype(np.int64).clip(max=_MARGINS - 1)
        harmful = theirs & ~ours[-1]
        # Level and bin as one number; int8 levels would overflow.
        place = decided.level[harmful].astype(np.int64) * _MARGINS + margin[harmful]
        self.near[:levels] += np.bincount(place, minlength=levels * _MARGINS).reshape(levels, _MARGINS)
        self.near[levels] += np.bincount(margin, minlength=_MARGINS)

    def gather(self) -> None:
        """Adds up what all processes counted. All processes must call it."""
        self.decided, self.accepted = distributed.sum_of_all(self.decided), distributed.sum_of_all(self.accepted)
        self._cost = distributed.sum_of_all(self._cost)
        self._reached = distributed.highest_of_all(self._reached)
        self._enrolled = distributed.highest_of_all(self._enrolled)
        for histogram in [*self.histograms, *([self.of_reference] if self.of_reference else [])]:
            histogram.counts = distributed.sum_of_all(histogram.counts)
        if self.flips is not None and self.near is not None:
            self.flips, self.near = distributed.sum_of_all(self.flips), distributed.sum_of_all(self.near)

    def figures(self, p_target: float) -> Json:
        """All figures, from what was counted, as `cascade_stream` returns them."""
        policy, trials = self._policy, self.trials
        of_label = self.accepted.sum(axis=1)
        both = bool(of_label.all())
        # The last histogram is that of the cascade.
        *alone, own = (_rates(histogram, p_target) for histogram in self.histograms)
        cost = float(np.mean(self._cost / of_label) / np.log(2)) if both and policy.llr_maps is not None else None
        reference = _rates(self.of_reference, p_target) if self.of_reference else _unknown()
        return {
            **own,
            "eer_ci95": None,
            "min_dcf_ci95": None,
            "cllr": cost,
            "threshold": policy.threshold,
            "false_accept_rate": _share(self.accepted[0, 1], of_label[0]),
            "false_reject_rate": _share(self.accepted[1, 0], of_label[1]),
            **evaluate.cost_figures(policy, self._costs()),
            "changes": {},
            **self._flip_rates(-1),
            **{f"reference_{name}": value for name, value in reference.items()},
            "p_target": p_target,
            "trials": trials,
            "targets": int(of_label[1]),
            "remaining_flips": self._remaining() if self.near is not None else None,
            "each_level_alone": {
                str(bits): {name: rates[name] for name in ("eer", "eer_bounds")}
                | (self._flip_rates(level) if self.flips is not None else {})
                for level, (bits, rates) in enumerate(zip(policy.bits, alone))
            },
        }

    def _costs(self) -> Json:
        levels = len(self._policy.bits)
        reached, enrolled, both = self._reached, self._enrolled, self._reached[:0]
        if self._top and not self._models:  # as `run._counts`: those enrolled, and of them those also tested, apart
            kept = enrolled >= 0
            reached, enrolled, both = reached[~kept], enrolled[kept & (reached < 0)], reached[kept]
        kinds = {"reached": reached, "enrolled": enrolled, "both": both}
        counts = {name: np.bincount(rows[rows >= 0], minlength=levels) for name, rows in kinds.items()}
        found = costs_of(self._policy.bits, self._top, self.decided, **counts, seconds=self._policy.seconds)
        resolved = {str(bits): share for bits, share in zip(self._policy.bits, found.pop("resolved").tolist())}
        return {"resolved": resolved} | {name: float(value) for name, value in found.items()}

    def _flip_rates(self, which: int) -> dict[str, float | None]:
        kinds = ("harmful_flip_rate", "beneficial_flip_rate")
        if self.flips is None:
            return dict.fromkeys(kinds)
        return {kind: int(count) / self.trials for kind, count in zip(kinds, self.flips[which])}

    def _remaining(self) -> list[Json]:
        """As `evaluate.remaining_flips`, in bands that end at the edges of bins."""
        assert self.near is not None
        # How many trials lie nearer than each edge of a bin, `[levels + 1, bins + 1]`.
        *harmful, everyone = np.pad(np.cumsum(self.near, axis=1), ((0, 0), (1, 0)))
        wanted = [evaluate.BANDS[0], *(share / 100 * self.trials for share in evaluate.BANDS[1:])]
        # The first edge that takes in each share. Half a trial less, so that rounding does not add a bin.
        ends = np.searchsorted(everyone, np.array(wanted) - 0.5)
        rows = []
        for begin, end in zip(ends, ends[1:]):
            nearest = [100 * int(everyone[edge]) / self.trials for edge in (begin, end)]
            counts = [int(one[end] - one[begin]) / self.trials for one in harmful]
            rates = {str(bits): rate for bits, rate in zip(self._policy.bits, counts)}
            rows.append({"nearest": nearest, "margin": float(end * self._width), "harmful_flip_rate": rates})
        return rows


def _share(count: int, of: int) -> float | None:
    return int(count) / int(of) if of else None


def _unknown() -> dict[str, None]:
    return dict.fromkeys(name + end for name in _BOUNDED for end in ("", "_bounds"))


def _rates(histogram: ScoreHistogram, p_target: float) -> Json:
    """EER in percent and minDCF with their bounds; None where a class has no trials."""
    if not histogram.counts.any(axis=1).all():
        return dict(_unknown())
    found = rates_of(histogram, p_target)
    return {name: found[name] for name in _unknown()}


@contextlib.contextmanager
def _writer(out: Path | None, policy: CascadePolicy, llr: bool) -> Iterator[Callable[[Trials, Decisions], None]]:
    """Yields a function that writes the decisions of a part. The file appears only when the block ends well."""
    if out is None:
        yield lambda part, decided: None
        return
    names, bits = Names(evaluate.quoted), np.array(policy.bits, np.int16)
    with atomic_write(out) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(evaluate.header(llr))

        def write(part: Trials, decided: Decisions) -> None:
            ratios = evaluate.log_ratios(policy, decided) if llr else None
            columns = decided.score, decided.accept, bits[decided.level]
            for lines in evaluate.decision_lines(names.of(part), part, *columns, ratios):
                file.write(lines)

        yield write
