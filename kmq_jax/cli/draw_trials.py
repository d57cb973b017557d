"""`kmq-jax draw_trials`: a trial list for data that come without one."""

from dataclasses import dataclass
from pathlib import Path

from kmq_jax.cli.command import Command
from kmq_jax.cli.flags import options_of
from kmq_jax.core.options import Options, option


@dataclass(frozen=True, kw_only=True)
class Flags(Options):
    """What trials are drawn from, and how many."""

    data: str = option("DATA", metavar="DATA")
    out: Path = option("the list to write", writes="file")
    targets: int = option("at most so many pairs of one speaker", 5000, at_least=1, at_most=10_000_000)
    nontargets: int = option("at most so many pairs of two", 20_000, at_least=1, at_most=10_000_000)
    matched: float = option(
        "share of the nontargets whose speakers are of one gender and group of ages, as far as DATA tells",
        0.0,
        at_least=0,
        at_most=1,
    )
    seed: int = option("another one draws other trials", 0, at_least=0, at_most=2**32 - 1)


COMMAND = Command(
    "draw_trials",
    "Draws a trial list at random, no pair twice, in VoxCeleb's form: 1 for one speaker, 0 for two, then both ids.",
    "kmq-jax draw_trials --data=recordings --out=trials.txt --targets=1000 --nontargets=4000",
    (Flags,),
)


def main() -> None:
    """Runs the command."""
    flags = options_of(Flags, COMMAND.parse())
    from kmq_jax.data.draw import draw_trials, write_trials
    from kmq_jax.data.source import open_source

    utterances = open_source(flags.data)
    trials = draw_trials(utterances, flags.targets, flags.nontargets, flags.seed, flags.matched)
    write_trials(flags.out, trials)
    print(f"{flags.out}: {len(trials):,} trials, {int(trials.label.sum()):,} of them targets")
