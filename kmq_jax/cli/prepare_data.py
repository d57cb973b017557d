"""`kmq-jax prepare_data`: recordings of any form into array_record shards at 16 kHz."""

import argparse
import os
from pathlib import Path

from kmq_jax.cli import command
from kmq_jax.core.errors import UserError
from kmq_jax.data import writer
from kmq_jax.data.source import open_source


def flags() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = command.parser(
        "prepare_data",
        "Decodes recordings once, mixes to mono, resamples to 16 kHz and writes array_record shards that tfds reads. "
        "Recordings that cannot be used are listed in rejected.csv. An interrupted run goes on when started again.",
        "kmq-jax prepare_data --source=voxceleb2/dev --out=data/voxceleb2 --workers=8",
    )
    parser.add_argument("--source", required=True, help="DATA: a Kaldi directory, VoxCeleb tree, folder or CSV")
    parser.add_argument("--out", required=True, type=Path, help="the directory to write")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--min_seconds", type=float, default=0.5, help="shorter recordings are rejected")
    return parser


def main() -> None:
    """Runs the command."""
    args = flags().parse_args()
    if args.workers < 1:
        raise UserError(f"--workers={args.workers} must be at least 1")
    if not 0 <= args.min_seconds < 3600:
        raise UserError(f"--min_seconds={args.min_seconds} must be between 0 and an hour")
    done = writer.prepare(open_source(args.source), args.out, workers=args.workers, min_seconds=args.min_seconds)
    print(
        f"{args.out}: {done['utterances']} utterances of {done['speakers']} speakers, {done['hours']:.2f} hours, "
        f"{done['rejected']} rejected"
    )
