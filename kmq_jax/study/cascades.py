"""The cascades of a study: calibrated on one evaluation set, run on all."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from kmq_jax.cascade.calibrate import calibrate
from kmq_jax.cascade.evaluate import evaluate_embeddings
from kmq_jax.cascade.figures import draw_front
from kmq_jax.cascade.options import CalibrationOptions
from kmq_jax.cascade.verifier import save_cascade
from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json, Row, atomic_write, read_json, write_json
from kmq_jax.data import source, trials
from kmq_jax.study.networks import Network, epochs_of, runs_of
from kmq_jax.study.options import FULL, MIXED, NESTED, CascadePlan, EvaluationSet, StudyOptions
from kmq_jax.study.steps import Steps

RECIPES = {"halves": 1, "calibrate": 4, "cascade": 4}
"""To be raised when a change of the code changes what a step computes: studies then repeat it (see `study.steps`)."""

HALVES = ("a", "b")
MEANT = (
    "eer", "reference_eer", "harmful_flip_rate", "beneficial_flip_rate", "sequential_bits", "incremental_bits",
    "utterance_bits", "utterance_incremental_bits", "resolved", "remaining_flips", "each_level_alone", "saved",
    "min_dcf", "reference_min_dcf",
)  # fmt: skip
"""Figures of two halves that are averaged: those that the report shows."""


def family_steps(family: str, all_bits: Sequence[int]) -> set[str]:
    """The steps that make the networks of a family, such as "distilled" or "ptq-nested".

    >>> sorted(family_steps("distilled", (2, 3)))
    ['distilled-2', 'distilled-3']
    """
    return {family} if family.endswith(NESTED) else {f"{family}-{bits}" for bits in all_bits}


@dataclasses.dataclass(frozen=True)
class StudiedCascade:
    """A cascade within a study: its networks, and the steps that calibrate and run it.

    Attributes:
        steps: of the study.
        options: of the study.
        plan: what is asked for.
        reference: the full-precision network.
        levels: the networks of its levels, ascending in bits.
    """

    steps: Steps
    options: StudyOptions
    plan: CascadePlan
    reference: Network
    levels: tuple[Network, ...]

    @property
    def name(self) -> str:
        """Names its steps and its directory, such as "distilled-2-4"."""
        published = "-published" if self.plan.gates == "published" else ""
        return f"{self.plan.family}-{'-'.join(map(str, self.plan.bits))}{published}"

    @property
    def about(self) -> list[object]:
        """What all of its steps depend on."""
        # Seconds are named only where they are set, so that studies done before they were there are not repeated.
        how = {name: value for name, value in dataclasses.asdict(self.how).items() if name != "seconds" or value}
        return [list(self.plan.bits), how]

    @property
    def how(self) -> CalibrationOptions:
        """How it is calibrated: bits are counted as new ones only where codebooks nest."""
        nested = self.plan.family.endswith(NESTED)
        how = dataclasses.replace(self.options.calibration, nested=nested)
        if self.plan.gates == "published":
            how = dataclasses.replace(how, rule="pareto", objective="eer", cost="sequential", symmetric=True)
        return how

    def file(self, network: Network, evaluated: EvaluationSet) -> str:
        """The embedding file of a network on a set."""
        return f"{self.steps.directory}/embeddings/{network.name}-{evaluated.name}.npz"

    def files(self, evaluated: EvaluationSet) -> list[tuple[int, str]]:
        """Bits and embedding file of each level on a set."""
        return [(int(one.bits), self.file(one, evaluated)) for one in self.levels]

    def needs(self, evaluated: EvaluationSet) -> list[str]:
        """The steps that make the embeddings of a set."""
        return [f"embed-{one.name}-{evaluated.name}" for one in (self.reference, *self.levels)]

    def calibrate(self, listed: str, suffix: str, needs: Sequence[str], data: Sequence[str] = ()) -> None:
        """Calibrates on the trial list `listed` of the calibration set; without a suffix it also keeps the models."""
        base = self.options.sets[self.options.calibrate]

        def action(out: Path) -> None:
            policy = calibrate(self.files(base), self.file(self.reference, base), listed, self.how, base.models)
            policy.save(out)
            draw_front(out.with_suffix(".png"), policy)
            if not suffix:  # policies of halves only serve to evaluate
                save_cascade(out.parent, policy, {int(one.bits): str(one.path) for one in self.levels})

        name, out = f"calibrate-{self.name}{suffix}", f"cascades/{self.name}{suffix}/policy.json"
        self.steps.run(name, [self.about, listed], needs, out, action, data=data, recipe=RECIPES["calibrate"])

    def evaluate(
        self, policy: str, listed: str, evaluated: EvaluationSet, suffix: str, data: Sequence[str] = ()
    ) -> Json:
        """The figures of a policy on a set.

        Args:
            policy: suffix of the policy, as in `calibrate`.
            listed: trial list of the set, or of a half of it.
            evaluated: the set.
            suffix: tells this step from others on the same set.
            data: lists that the user named; those of halves are made by a step before.

        Returns:
            As `cascade.evaluate.evaluate_embeddings` gives them.
        """
        directory = f"cascades/{self.name}{policy}"

        def action(out: Path) -> None:
            file, reference = self.steps.directory / directory / "policy.json", self.file(self.reference, evaluated)
            found = evaluate_embeddings(
                file, self.files(evaluated), listed, reference=reference, enrol_models=evaluated.models
            )
            write_json(out, found.figures)

        step = f"cascade-{self.name}-{evaluated.name}{suffix}"
        needs = [f"calibrate-{self.name}{policy}", *self.needs(evaluated)]
        made = self.steps.run(
            step, [self.about, listed], needs, f"{directory}/{step}.json", action, data=data, recipe=RECIPES["cascade"]
        )
        found: Json = read_json(made)
        return found


def check_plans(options: StudyOptions) -> None:
    """Refuses a cascade of networks that the study does not make, before any is made.

    Raises:
        UserError: a plan names bits that its family does not have.
    """
    made: set[tuple[str, int]] = set()
    for run in runs_of(options):
        if run.name != MIXED:  # whose bits are known afterwards, and which is in no family
            found = (*([run.untrained_step] if run.untrained else ()), *([run.step] if epochs_of(options, run) else ()))
            made |= {(step, bits) for step in found for bits in (run.bits, *run.coarse)}
    for plan in options.cascades:
        known = {FULL} | {bits for step, bits in made if step in family_steps(plan.family, options.bits)}
        if missing := [bits for bits in plan.bits if bits not in known]:
            what = f"{missing[0]} bits in {plan.family!r}"
            raise UserError(f"study.cascades: there is no network of {what}, by study.bits, epochs, nested and also")


def run_cascade(steps: Steps, options: StudyOptions, networks: Sequence[Network], plan: CascadePlan) -> Json:
    """Calibrates a cascade on one set and runs it on all.

    The calibration set itself is evaluated crosswise: its speakers are halved, and each half is decided by a policy
    from the other half.

    Args:
        steps: of the study.
        options: of the study.
        networks: all there are, full precision first.
        plan: the cascade.

    Returns:
        `name`, `family`, `bits`, `gates`, `directory`; the figures of `sets` by name; the mean EER of `groups`.
    """
    known = {int(one.bits): one for one in networks if one.step in family_steps(plan.family, options.bits)}
    known[FULL] = networks[0]
    cascade = StudiedCascade(steps, options, plan, networks[0], tuple(known[bits] for bits in plan.bits))
    base = options.sets[options.calibrate]
    cascade.calibrate(base.trials, "", cascade.needs(base), data=base.lists)
    results = {base.name: crosswise(cascade, base)}
    for evaluated in options.sets.values():
        if evaluated is not base:
            results[evaluated.name] = cascade.evaluate("", evaluated.trials, evaluated, "", data=evaluated.lists)
    groups = {group: [results[one]["eer"] for one in members] for group, members in options.groups.items()}
    return {
        "name": ">".join("FP32" if bits == FULL else str(bits) for bits in plan.bits),
        "family": plan.family,
        "bits": list(plan.bits),
        "gates": plan.gates,
        "directory": f"cascades/{cascade.name}",
        "sets": results,
        "groups": {group: float(np.mean(eers)) for group, eers in groups.items()},
    }


def crosswise(cascade: StudiedCascade, base: EvaluationSet) -> Json:
    """The figures on the calibration set: each half of its speakers is decided by a policy from the other half."""
    lists = halve(cascade.steps, base)
    crossed = []
    # A policy never decides the speakers that it was calibrated on.
    for half, other in zip(HALVES, reversed(HALVES)):
        cascade.calibrate(str(lists / f"{half}.txt"), f"-{half}", [*cascade.needs(base), f"halves-{base.name}"])
        crossed.append(cascade.evaluate(f"-{half}", str(lists / f"{other}.txt"), base, f"-{other}"))
    return {"halves": crossed, **mean_of(crossed)}


def halve(steps: Steps, evaluated: EvaluationSet) -> Path:
    """Trial lists `a.txt` and `b.txt` of each half of a set's speakers, dealt at random; trials across are left out."""
    places = [evaluated.data, *evaluated.lists]
    action = functools.partial(_write_halves, evaluated)
    name = f"halves-{evaluated.name}"
    return steps.run(name, places, (), f"halves/{evaluated.name}", action, data=places, recipe=RECIPES["halves"])


def _write_halves(evaluated: EvaluationSet, out: Path) -> None:
    table = source.open_source(evaluated.data)
    pairs = trials.open_trials(evaluated.trials, table, evaluated.models)
    speakers, speaker = np.unique(np.array(table.speakers), return_inverse=True)
    # Parities of a permutation: drawn at random, and the halves differ by one speaker at most.
    half = np.random.default_rng(0).permutation(len(speakers)) % 2
    # Trials across the halves would show a policy a speaker of the other half: they are left out below.
    # All recordings of a model are of one speaker.
    of_enrol = speaker if pairs.models is None else speaker[[members[0] for members in pairs.models]]
    sides = half[of_enrol[pairs.enrol]], half[speaker[pairs.test]]
    ids, names = np.array(table.ids), np.array(pairs.names)
    # In trial lists a model has its own name, an utterance its id.
    enrolled = ids[pairs.enrol] if pairs.models is None else names[pairs.enrol_name]
    for number, name in enumerate(HALVES):
        rows = np.flatnonzero((sides[0] == number) & (sides[1] == number))
        columns = pairs.label[rows].astype(int), enrolled[rows], ids[pairs.test[rows]]
        with atomic_write(out / f"{name}.txt") as temporary:
            temporary.write_text("".join(f"{y} {a} {b}\n" for y, a, b in zip(*columns)), encoding="utf-8")


def mean_of(halves: Sequence[Row]) -> Json:
    """The mean of two halves' figures, of those in `MEANT`."""
    # Counts and intervals of halves have no mean that says anything.
    shown = [{key: half[key] for key in MEANT} for half in halves]
    # Some figures are themselves by level or by band.
    mean: Json = jax.tree.map(lambda *values: float(np.mean(values)), *shown)
    return mean
