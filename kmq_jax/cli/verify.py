"""`kmq-jax verify`: are recordings of one speaker? By a cascade, by one model, or against a speaker of a store."""

import dataclasses
from pathlib import Path
from typing import Any

from kmq_jax.cli.command import Command
from kmq_jax.cli.flags import options_of, way_of
from kmq_jax.core.files import write_json
from kmq_jax.core.options import Options, option
from kmq_jax.scoring.options import Compute, HearOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files(Options):
    """What the command reads and writes."""

    cascade: Path | None = option("directory of a policy and its models", None, metavar="DIR")
    model: str | None = option("MODEL to decide by alone; with --store: in place of its own", None, metavar="MODEL")
    store: Path | None = option("a store of speakers, as `enroll` makes it", None, metavar="DIR")
    enrol: tuple[Path, ...] = option("recording of the claimed speaker; several are averaged", (), metavar="FILE")
    test: Path | None = option("recording to verify; with --store it may stand without the flag", None)
    speaker: str | None = option("with --store: name of the claimed speaker", None)
    recording: Path | None = option("with --store: recording to verify", None, positional=True, metavar="RECORDING")
    threshold: str | None = option("of --model or --store: a number, or a file of `threshold`", None, metavar="X|FILE")
    compute: Compute = option("arithmetic below the cascade's last level", "float32")
    json: Path | None = option("write the decision, the score and what else is known here", None, writes="file")


COMMAND = Command(
    "verify",
    "Decides whether recordings are of one speaker: by a cascade, which loads models of more bits only where it is in\n"
    "doubt (`calibrate --cascade`); by --model and a --threshold, which `threshold` finds; or by a store of speakers:\n"
    "--store=runs/people --speaker=alice unknown.wav --threshold=0.5",
    "kmq-jax verify --cascade=runs/cascade --enrol=alice.wav --test=unknown.wav",
    (Files, HearOptions),
)
_WAYS = {  # what each needs, what else it may take; "store" comes before "model", since it takes a --model
    "cascade": (("enrol", "test"), ("compute",)),
    "store": (("speaker", "recording"), ("model", "threshold", "bits")),
    "model": (("enrol", "test"), ("threshold", "bits")),
}


def main() -> None:
    """Runs the command."""
    args = COMMAND.parse()
    files, how = options_of(Files, args), options_of(HearOptions, args)
    if files.store and files.test and not files.recording:  # --test names the same recording
        files = dataclasses.replace(files, recording=files.test, test=None)
    way = way_of((files, how), _WAYS, ("engine", "vad", "json"))
    found, threshold = {"cascade": _by_cascade, "store": _by_store, "model": _by_model}[way](files, how)
    if files.json:
        write_json(files.json, dataclasses.asdict(found))
    print(found.describe(threshold))


def _by_cascade(files: Files, how: HearOptions) -> tuple[Any, Any]:
    from kmq_jax.cascade.verifier import load_cascade
    from kmq_jax.data.speech import heard

    cascade = load_cascade(files.cascade or "", files.compute, how.engine, how.vad)
    return cascade.verify(*heard(files.enrol, files.test or Path(), how.vad)), cascade.policy.threshold


def _by_store(files: Files, how: HearOptions) -> tuple[Any, Any]:
    from kmq_jax.speakers.store import SpeakerStore, threshold_of

    store = SpeakerStore(files.store or "", files.model, how.bits, how.engine, how.vad)
    threshold = threshold_of(files.threshold, store)
    return store.verify(files.speaker or "", files.recording or "", threshold.value if threshold else None), threshold


def _by_model(files: Files, how: HearOptions) -> tuple[Any, Any]:
    from kmq_jax.data.speech import heard
    from kmq_jax.scoring.threshold import decide, needed_threshold

    threshold = needed_threshold(files.threshold, files.model or "", how.vad)
    given = heard(files.enrol, files.test or Path(), how.vad)
    return decide(files.model or "", *given, threshold, how.bits, how.engine), threshold
