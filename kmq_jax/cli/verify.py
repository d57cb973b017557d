"""`kmq-jax verify`: are two recordings of one speaker? Decided at the fewest bits that suffice."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from kmq_jax.cli.command import Command
from kmq_jax.cli.flags import options_of
from kmq_jax.core.errors import UserError
from kmq_jax.core.options import Options, option
from kmq_jax.scoring.options import Compute, Engine


@dataclass(frozen=True, kw_only=True)
class Files(Options):
    """What the command reads and writes."""

    cascade: Path | None = option("directory of a policy and its models", None, metavar="DIR")
    model: str | None = option("MODEL to decide by alone, with --threshold", None, metavar="MODEL")
    threshold: str | None = option("of --model: a number, or a file of `threshold`", None, metavar="X|FILE")
    bits: int | None = option("bits at which a nested --model is read; left out: the most", None, at_least=1)
    enrol: Path = option("recording of the claimed speaker")
    test: Path = option("recording to verify")
    compute: Compute = option("arithmetic below the last level", "float32")
    engine: Engine = option("auto: ONNX Runtime on a CPU, JAX on a GPU or TPU", "auto")
    json: Path | None = option("write `decision`, `score` and how they came about here", None, writes="file")


COMMAND = Command(
    "verify",
    "Decides whether two recordings are of one speaker. The cascade's first level scores them; only where it is\n"
    "in doubt are models of more bits loaded. `calibrate --cascade` makes the directory. With --model one model\n"
    "decides, by --threshold; `threshold` finds one from your own recordings, with its error rates.",
    "kmq-jax verify --cascade=runs/cascade --enrol=alice.wav --test=unknown.wav",
    (Files,),
)


def main() -> None:
    """Runs the command."""
    files = options_of(Files, COMMAND.parse())
    from kmq_jax.core.files import write_json

    if files.model:
        found, told = by_model(files)
    else:
        found, told = by_cascade(files)
    if files.json:
        write_json(files.json, found)
    print(told)


def by_cascade(files: Files) -> tuple[dict[str, object], str]:
    """Decides by a cascade, whose threshold its policy keeps."""
    if not files.cascade:
        raise UserError("one of `cascade` and `model` must be given")
    if files.threshold or files.bits:
        raise UserError("`threshold` and `bits` go with `model`; a cascade's gates lie around a threshold of its own")
    from kmq_jax.cascade.verifier import load_cascade

    cascade = load_cascade(files.cascade, files.compute, files.engine)
    found = cascade.verify(files.enrol, files.test)
    return dataclasses.asdict(found), found.describe(cascade.policy.threshold)


def by_model(files: Files) -> tuple[dict[str, object], str]:
    """Decides by one model and a threshold."""
    if files.cascade:
        raise UserError("`cascade` and `model` cannot both be given")
    if not files.threshold:
        how = f"kmq-jax threshold --model={files.model} --data=FOLDER --out=threshold.json"
        raise UserError(f"`model` needs `threshold`; to get one from recordings of a few speakers: {how}")
    from kmq_jax.scoring.threshold import decide, describe_decision, read_threshold

    threshold = read_threshold(files.threshold)
    found = decide(str(files.model), files.enrol, files.test, threshold, files.bits, files.engine)
    return dataclasses.asdict(found), describe_decision(found, threshold)
