"""`kmq-jax verify`: are two recordings of one speaker? Decided at the least width that suffices."""

import argparse
import dataclasses

from kmq_jax.cascade.verifier import load_cascade
from kmq_jax.cli import command
from kmq_jax.core.files import write_json
from kmq_jax.models.speaker_model import COMPUTE


def flags() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = command.parser(
        "verify",
        "Decides whether two recordings are of one speaker. The cascade's first width scores them; only where it is\n"
        "in doubt are wider models loaded. `calibrate --cascade` makes the directory.",
        "kmq-jax verify --cascade=runs/cascade --enrol=alice.wav --test=unknown.wav",
    )
    parser.add_argument("--cascade", required=True, help="directory of a policy and its models")
    parser.add_argument("--enrol", required=True, help="recording of the claimed speaker")
    parser.add_argument("--test", required=True, help="recording to verify")
    parser.add_argument("--compute", default="float32", choices=COMPUTE, help="arithmetic below the last width")
    parser.add_argument("--json", help="write `decision`, `score`, `llr`, `bits`, `seconds` here")
    return parser


def main() -> None:
    """Runs the command."""
    args = flags().parse_args()
    cascade = load_cascade(args.cascade, args.compute)
    found = cascade.verify(args.enrol, args.test)
    if args.json:
        write_json(args.json, dataclasses.asdict(found))
    sides = f"{'at least' if found.decision else 'below'} the threshold {cascade.policy.threshold:.4f}"
    ratio = "" if found.llr is None else f", log likelihood ratio {found.llr:+.2f}"
    print(
        f"{'same speaker' if found.decision else 'different speakers'}: score {found.score:.4f} is {sides}{ratio}; "
        f"decided at {found.bits} bits in {found.seconds:.2f} s"
    )
