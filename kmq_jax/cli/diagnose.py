"""`kmq-jax diagnose`: where low-bit errors come from, as tables, figures and a report."""

import argparse
from pathlib import Path

from kmq_jax.cli import command
from kmq_jax.cli.flags import add_flags, options_of
from kmq_jax.diagnosis import run
from kmq_jax.diagnosis.diagnosis import Diagnosis
from kmq_jax.diagnosis.options import DiagnosisOptions


def flags() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = command.parser(
        "diagnose",
        "Compares quantized models with the full-precision model they were made from, and writes tables, figures and\n"
        "a report. Given embeddings (.npz of `extract`) in place of every model, it tells what scores alone tell.",
        "kmq-jax diagnose --reference=runs/quickstart --quantized=2:runs/quickstart-2bit.kmq\n"
        "      --data=synthetic:dev --trials=synthetic:dev --out=runs/diagnosis",
    )
    parser.add_argument("--reference", required=True, help="full-precision MODEL, or its embeddings (.npz)")
    parser.add_argument(
        "--quantized", required=True, action="append", metavar="BITS:MODEL", help="MODEL or .npz; repeatable"
    )
    parser.add_argument("--data", help="DATA that the trials compare; with embeddings: for durations, gender and age")
    parser.add_argument("--trials", default="", help="trial list, or synthetic:SPLIT (default: pairs drawn at random)")
    parser.add_argument("--out", required=True, type=Path, help="directory for tables, figures and report.html")
    add_flags(parser, DiagnosisOptions)
    return parser


def diagnose(args: argparse.Namespace) -> Diagnosis:
    """Does what the flags ask for; returns what was found and written."""
    options, quantized = options_of(DiagnosisOptions, args), run.parse_quantized(args.quantized)
    from kmq_jax.diagnosis import report  # matplotlib takes a second to import; here, before any work is done

    found = run.diagnose(args.reference, quantized, args.data, args.trials, options)
    report.write(args.out, found)
    return found


def main() -> None:
    """Runs the command."""
    args = flags().parse_args()
    found = diagnose(args)
    from kmq_jax.diagnosis import report

    print(report.describe(found))
    print(f"{args.out / 'report.html'}")
