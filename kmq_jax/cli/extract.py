"""`kmq-jax extract`: embeddings of every utterance of a dataset."""

import argparse

import numpy as np

from kmq_jax.cli import command
from kmq_jax.core.files import atomic_write
from kmq_jax.data import source
from kmq_jax.models.speaker_model import BATCH_SIZE, COMPUTE, embed_all, fingerprint, load_model


def flags() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = command.parser(
        "extract",
        "Embeds every utterance of a dataset with a model.",
        "kmq-jax extract --model=runs/quickstart --data=synthetic:dev --out=runs/dev.npz",
    )
    parser.add_argument(
        "--model", required=True, help="MODEL: a training workdir, a .kmq file or an imported directory"
    )
    parser.add_argument("--bits", type=int, help="width at which a nested model is read (default: its widest)")
    parser.add_argument("--data", required=True, help="DATA: Kaldi directory, VoxCeleb tree, folder, CSV, prepared set")
    parser.add_argument("--out", required=True, help="the .npz to write: ids, paths, speakers, embeddings, model")
    parser.add_argument("--compute", default="float32", choices=COMPUTE, help="the network's arithmetic")
    parser.add_argument("--max_seconds", type=float, default=0.0, help="only so much of each recording (0: all)")
    parser.add_argument("--batch_size", type=int, default=BATCH_SIZE, help="recordings in one batch")
    return parser


def extract(args: argparse.Namespace) -> np.ndarray:
    """Does what the flags ask for; returns the embeddings."""
    speaker_model = load_model(args.model, args.bits)
    utterances = source.open_source(args.data)
    embeddings = embed_all(speaker_model, utterances, args.compute, args.max_seconds, args.batch_size)
    with atomic_write(args.out) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            ids=np.array(utterances.ids),
            paths=np.array(utterances.paths),
            speakers=np.array(utterances.speakers),
            embeddings=embeddings,
            model=np.array(fingerprint(speaker_model)),
        )
    return embeddings


def main() -> None:
    """Runs the command."""
    args = flags().parse_args()
    embeddings = extract(args)
    print(f"{args.out}: {len(embeddings)} embeddings of {embeddings.shape[1]} dimensions")
