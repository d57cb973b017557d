"""The steps that lie before a study, in order, and how long they may take."""

from collections.abc import Collection, Mapping, Sequence

from kmq_jax.core.files import Row
from kmq_jax.study.networks import epochs_of, runs_of
from kmq_jax.study.options import FULL, MIXED, StudyOptions
from kmq_jax.study.steps import Work
from kmq_jax.training.options import QatOptions

USUAL = {
    "fp32": 1.0, "distilled": 2.0, "kmqat": 1.2, "uniform": 2.0, "minmax": 2.0, "powers": 2.0, "ptq": 0.2,
    "embed": 0.15, "score": 0.005, "compare": 0.005, "det": 0.01, "diagnose": 1.0, "halves": 0.001, "calibrate": 0.02,
    "cascade": 0.01,
}  # fmt: skip
"""How long steps take relative to each other, roughly, in a study of WeSpeaker's ResNet34; of training, an epoch. Used
for a kind until a step of that kind is done."""
TRAINING = ("fp32", "distilled", "kmqat", "uniform", "minmax", "powers")
"""Kinds of steps that train, whose amount is epochs."""


def planned(options: StudyOptions, epochs: float, only: Sequence[str] = ()) -> list[Work]:
    """The steps of a study in the order in which it takes them.

    Args:
        options: of the study.
        epochs: of the full-precision training; 0 where it is imported.
        only: names of training steps: the plan is then of these networks alone, see `networks.make_networks`.
    """
    sets = len(options.sets)
    plan = [Work("fp32", epochs, "fp32")]
    plan += _measured(("embed", "score"), f"fp32-{FULL}", options)  # full precision is compared with nothing
    for run in runs_of(options):
        if only and run.step not in only:
            continue
        trained = epochs_of(options, run)
        if run.name == MIXED:
            trained *= len(QatOptions().budget_bits)  # phases, of `epochs` each; fewer where some bits go to no tensor
        made = [Work("ptq", name=run.untrained_step)] if run.untrained and run.name != MIXED else []
        for work in [*made, *([Work(run.recipe, trained, run.step)] if trained else [])]:
            plan.append(work)
            for bits in (run.bits or FULL, *run.coarse):  # a nested network is measured at each of its bits
                # Of mixed precision nobody knows the bits, which its name has, before it is trained.
                name = "" if run.name == MIXED else f"{work.name}-{bits}"
                plan += _measured(("embed", "score", "compare"), name, options)
    if only:
        return plan
    plan += [Work("det")] * sets
    plan += [Work("diagnose")] * len(options.diagnose)
    for number, _ in enumerate(options.cascades):
        crosswise = [Work("calibrate"), Work("cascade")] * 2
        plan += [Work("calibrate"), *([] if number else [Work("halves")]), *crosswise]  # all share the halves
        plan += [Work("cascade")] * (sets - 1)
    return plan


def _measured(kinds: Sequence[str], network: str, options: StudyOptions) -> list[Work]:
    """The steps of these kinds that measure a network on every evaluation set; its name is empty where not known."""
    return [Work(kind, name=network and f"{kind}-{network}-{one}") for kind in kinds for one in options.sets]


def seconds_left(plan: Sequence[Work], behind: Collection[int], done: Mapping[str, Row]) -> float | None:
    """Seconds that the steps which are not behind may take, by those that are done; None where nothing is known.

    A kind of which some steps are done is taken to go on at their rate. For any other, the usual ratio to those that
    are done decides: for training to other training, as far as some is done, since networks differ in what an epoch
    is.

    Args:
        plan: all steps.
        behind: the numbers of those that are.
        done: by kind, `seconds` and `amount` of the steps that are done.

    >>> plan = [Work("fp32", 4), Work("distilled", 2), Work("distilled", 2)]
    >>> seconds_left(plan, {0}, {"fp32": {"seconds": 8.0, "amount": 4}})  # two seconds an epoch, so four when distilled
    16.0
    >>> seconds_left(plan, {0, 1}, {"fp32": {"seconds": 8.0, "amount": 4}, "distilled": {"seconds": 6.0, "amount": 2}})
    6.0
    """
    rates = {kind: known["seconds"] / known["amount"] for kind, known in done.items() if known["amount"]}
    if not rates:
        return None

    def rate(kind: str) -> float:
        alike = {one for one in rates if (one in TRAINING) == (kind in TRAINING)} or rates
        # Seconds that one unit of `USUAL` takes on this machine, for this network.
        scale = sum(done[one]["seconds"] for one in alike) / sum(USUAL[one] * done[one]["amount"] for one in alike)
        return rates.get(kind, scale * USUAL[kind])

    return sum(work.amount * rate(work.kind) for i, work in enumerate(plan) if i not in behind)
