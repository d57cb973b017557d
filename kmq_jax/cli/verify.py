"""`kmq-jax verify`: are recordings of one speaker? By a cascade, or against a speaker of a store."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kmq_jax.cli.command import Command
from kmq_jax.cli.flags import options_of
from kmq_jax.core.errors import UserError
from kmq_jax.core.options import Options, option
from kmq_jax.scoring.options import Compute, Engine


@dataclass(frozen=True, kw_only=True)
class Files(Options):
    """What the command reads and writes."""

    cascade: Path | None = option("directory of a policy and its models", None, metavar="DIR")
    enrol: tuple[Path, ...] = option("recording of the claimed speaker; several are averaged", (), metavar="FILE")
    test: Path | None = option("recording to verify", None)
    compute: Compute = option("arithmetic below the cascade's last level", "float32")
    store: Path | None = option("in place of --cascade: a store, as `enroll` makes it", None, metavar="DIR")
    speaker: str | None = option("with --store: name of the claimed speaker", None)
    recording: Path | None = option("with --store: recording to verify", None, positional=True, metavar="RECORDING")
    threshold: float | None = option("with --store: scores from here on are accepted", None, at_least=-1, at_most=1)
    model: str | None = option("with --store: MODEL; left out: the one it remembers", None, metavar="MODEL")
    engine: Engine = option("auto: ONNX Runtime on a CPU, JAX on a GPU or TPU", "auto")
    json: Path | None = option("write the decision, the score and what else is known here", None, writes="file")


COMMAND = Command(
    "verify",
    "Decides whether recordings are of one speaker. The cascade's first level scores them; only where it is\n"
    "in doubt are models of more bits loaded. `calibrate --cascade` makes the directory. With --store, a recording\n"
    "is compared with an enrolled speaker: --store=runs/people --speaker=alice unknown.wav --threshold=0.5",
    "kmq-jax verify --cascade=runs/cascade --enrol=alice.wav --test=unknown.wav",
    (Files,),
)
_OWN = {"cascade": ("enrol", "test", "compute"), "store": ("speaker", "recording", "threshold", "model")}


def main() -> None:
    """Runs the command."""
    files = options_of(Files, COMMAND.parse())
    _check(files)
    from kmq_jax.core.files import write_json

    found, line = (_by_cascade if files.cascade else _by_store)(files)
    if files.json:
        write_json(files.json, dataclasses.asdict(found))
    print(line)


def _by_cascade(files: Files) -> tuple[Any, str]:
    from kmq_jax.cascade.verifier import load_cascade

    cascade = load_cascade(files.cascade or "", files.compute, files.engine)
    found = cascade.verify(list(files.enrol), files.test or "")
    return found, found.describe(cascade.policy.threshold)


def _by_store(files: Files) -> tuple[Any, str]:
    from kmq_jax.speakers.store import SpeakerStore

    store = SpeakerStore(files.store or "", files.model, engine=files.engine)
    found = store.verify(files.speaker or "", files.recording or "", files.threshold)
    return found, found.describe(files.threshold)


def _check(files: Files) -> None:
    if bool(files.cascade) == bool(files.store):
        raise UserError("either `cascade` or `store` must be given")
    here, other = ("cascade", "store") if files.cascade else ("store", "cascade")
    for name in _OWN[here][:2]:
        if not getattr(files, name):
            raise UserError(f"`{name}` must be given with `{here}`")
    for name in _OWN[other]:
        if getattr(files, name) not in (None, (), "float32"):
            raise UserError(f"`{name}` does not go with `{here}`")
