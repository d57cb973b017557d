"""`kmq-jax enroll`: adds recordings of a speaker to a store."""

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

    store: Path = option("directory of the store; made where it is missing", metavar="DIR", writes="directory")
    model: str | None = option("MODEL; left out: the one that the store remembers", None, metavar="MODEL")
    speaker: str | None = option("name of the speaker", None)
    recordings: tuple[Path, ...] = option(
        "recordings of the speaker; they are read again by --again", (), positional=True, metavar="RECORDING"
    )
    replace: bool = option("drop the speaker's recordings so far", False)
    again: bool = option("embed all recordings of all speakers again, with another --model", False)


COMMAND = Command(
    "enroll",
    "Adds recordings of a speaker to a store. `verify` and `identify` compare with the mean of a speaker's\n"
    "length-normalised embeddings. A store is of one model; --again moves it to another.",
    "kmq-jax enroll --store=runs/people --model=runs/r34-4bit.kmq --speaker=alice a1.wav a2.wav",
    (Files, HearOptions),
)


def main() -> None:
    """Runs the command."""
    args = COMMAND.parse()
    files, how = options_of(Files, args), options_of(HearOptions, args)
    _check(files)
    from kmq_jax.speakers.store import SpeakerStore

    store = SpeakerStore(files.store, files.model, how.bits, how.engine, how.vad)
    if files.again:
        print(f"{files.store}: recordings embedded with {files.model}: {store.enrol_again()}")
        return
    assert files.speaker is not None  # checked
    found = store.enrol(files.speaker, files.recordings, files.replace)
    print(f"{files.store}: {found.name}: recordings: {found.recordings}, {found.seconds:.1f} s")


def _check(files: Files) -> None:
    """Refuses flags that do not go together.

    Raises:
        UserError: they do not.
    """
    if files.again and (files.speaker or files.recordings or files.replace):
        raise UserError("`again` embeds all recordings of the store: it takes `store` and `model` alone")
    if files.again and not files.model:
        raise UserError("`again` needs `model`")
    if not files.again and not (files.speaker and files.recordings):
        raise UserError("`speaker` and at least one RECORDING must be given")
