"""`kmq-jax identify`: whose voice of a store is a recording?"""

from dataclasses import dataclass
from pathlib import Path

from kmq_jax.cli.command import Command
from kmq_jax.cli.flags import options_of
from kmq_jax.core.errors import UserError
from kmq_jax.core.options import Options, option
from kmq_jax.scoring.options import HearOptions


@dataclass(frozen=True, kw_only=True)
class Files(Options):
    """What the command reads and writes."""

    store: Path = option("directory of a store, as `enroll` makes it", metavar="DIR")
    recording: Path = option("recording of somebody", positional=True, metavar="RECORDING")
    top: int = option("speakers to show", 5, at_least=1)
    threshold: str | None = option("scores from here on are accepted: a number, or a file of `threshold`", None)
    false_accept: float | None = option(
        "rate at which one comparison accepts a stranger at --threshold; left out: what its file says",
        None,
        at_least=0,
        at_most=1,
    )
    model: str | None = option("MODEL; left out: the one that the store remembers", None, metavar="MODEL")
    json: Path | None = option(
        "write `speaker`, `score`, `accepted` of the best, and `ranking`, here", None, writes="file"
    )


COMMAND = Command(
    "identify",
    "Compares a recording with every speaker of a store. The set is open: with --threshold, the answer may be that it\n"
    "is none of them. Without, the best are shown and nothing is decided.",
    "kmq-jax identify --store=runs/people unknown.wav --threshold=0.5 --false_accept=0.01",
    (Files, HearOptions),
)


def main() -> None:
    """Runs the command."""
    args = COMMAND.parse()
    files, how = options_of(Files, args), options_of(HearOptions, args)
    if files.false_accept is not None and files.threshold is None:
        raise UserError("`false_accept` is a rate at a threshold: give `threshold`, too")
    from kmq_jax.core.files import write_json
    from kmq_jax.speakers.store import SpeakerStore, describe_strangers, false_accept_rates, threshold_of

    store = SpeakerStore(files.store, files.model, how.bits, how.engine, how.vad)
    threshold = threshold_of(files.threshold, store)
    matches = store.identify(files.recording, threshold.value if threshold else None)
    # All speakers are compared, not only those that are shown: the rates grow with their number.
    rates = false_accept_rates(threshold, files.false_accept, len(matches))
    shown = matches[: files.top]
    if files.json:
        found = {"speaker": matches[0].speaker, "score": matches[0].score, "accepted": matches[0].decision}
        found |= {"ranking": [{"speaker": match.speaker, "score": match.score} for match in shown]}
        write_json(files.json, found | {"speakers": len(matches)} | rates)
    for match in shown:
        print(f"{match.score:7.4f}  {match.speaker}")
    if threshold is None:
        print(f"nothing is decided among {len(matches)} speakers: --threshold is not given")
    elif matches[0].decision:
        print(f"{matches[0].speaker}: the score is at least the threshold {threshold.value:.4f}")
    else:
        print(f"none of {len(matches)} speakers: all scores are below the threshold {threshold.value:.4f}")
    if rates["false_accept_rate"] is not None:
        print(describe_strangers(rates, len(matches)))
