"""`kmq-jax verify`: are two recordings of one speaker? Decided at the fewest bits that suffice."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from kmq_jax.cli.command import Command
from kmq_jax.cli.flags import options_of
from kmq_jax.core.options import Options, option
from kmq_jax.scoring.options import Compute, Engine


@dataclass(frozen=True, kw_only=True)
class Files(Options):
    """What the command reads and writes."""

    cascade: Path = option("directory of a policy and its models", metavar="DIR")
    enrol: Path = option("recording of the claimed speaker")
    test: Path = option("recording to verify")
    compute: Compute = option("arithmetic below the last level", "float32")
    engine: Engine = option("auto: ONNX Runtime on a CPU, JAX on a GPU or TPU", "auto")
    json: Path | None = option("write `decision`, `score`, `llr`, `bits`, `seconds` here", None, writes="file")


COMMAND = Command(
    "verify",
    "Decides whether two recordings are of one speaker. The cascade's first level scores them; only where it is\n"
    "in doubt are models of more bits loaded. `calibrate --cascade` makes the directory.",
    "kmq-jax verify --cascade=runs/cascade --enrol=alice.wav --test=unknown.wav",
    (Files,),
)


def main() -> None:
    """Runs the command."""
    files = options_of(Files, COMMAND.parse())
    from kmq_jax.cascade.verifier import load_cascade
    from kmq_jax.core.files import write_json

    cascade = load_cascade(files.cascade, files.compute, files.engine)
    found = cascade.verify(files.enrol, files.test)
    if files.json:
        write_json(files.json, dataclasses.asdict(found))
    print(found.describe(cascade.policy.threshold))
