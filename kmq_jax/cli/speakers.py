"""`kmq-jax speakers`: lists the speakers of a store, or removes one."""

from dataclasses import dataclass
from pathlib import Path

from kmq_jax.cli.command import Command
from kmq_jax.cli.flags import options_of
from kmq_jax.core.options import Options, option


@dataclass(frozen=True, kw_only=True)
class Files(Options):
    """What the command reads and writes."""

    store: Path = option("directory of a store, as `enroll` makes it", metavar="DIR")
    remove: str | None = option("name of a speaker to remove", None)


COMMAND = Command(
    "speakers",
    "Lists the speakers of a store: name, recordings, seconds, since when. --remove takes one out.",
    "kmq-jax speakers --store=runs/people --remove=alice",
    (Files,),
)


def main() -> None:
    """Runs the command."""
    files = options_of(Files, COMMAND.parse())
    from kmq_jax.speakers.store import SpeakerStore

    store = SpeakerStore(files.store)
    if files.remove is not None:
        print(f"{files.store}: {files.remove} is removed; recordings: {store.remove(files.remove)}")
        return
    listed = store.speakers()
    width = max([len("speaker"), *(len(speaker.name) for speaker in listed)])
    print(f"{'speaker':{width}}  recordings  seconds  since (UTC)")
    for one in listed:
        print(f"{one.name:{width}}  {one.recordings:10}  {one.seconds:7.1f}  {one.since:%Y-%m-%d %H:%M}")
