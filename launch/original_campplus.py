#!/usr/bin/env python3
r"""Embeddings of CAM++ by 3D-Speaker's own code, to set beside those of kmq_jax.

    launch/original_campplus.py --code=3D-Speaker --checkpoint=campplus_cn_en_common.pt \
        --data=words/dev --out=theirs.npz
    kmq-jax import_model --source=campplus_cn_en_common.pt --out=runs/campplus --activation=none
    kmq-jax extract --model=runs/campplus --data=words/dev --out=ours.npz
    kmq-jax score --embeddings=ours.npz --reference=theirs.npz --trials=words/dev/trials.txt --json=ours.json

`--code` is a clone of github.com/modelscope/3D-Speaker, whose network is run by PyTorch, one whole recording at a
time, on features of kaldi-native-fbank. `--relu` puts a ReLU on the embedding, as `import_model` does where nothing
else is asked (`--activation`), and `--full_scale` multiplies samples by 32,768 first. Needs torch and
kaldi-native-fbank; nothing of the clone but its network is run.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from kmq_jax.benchmarks.frontend import kaldi_fbank
from kmq_jax.data import source
from kmq_jax.models.speaker_model import frontend_of
from kmq_jax.scoring.table import write_embeddings


def main() -> None:
    """Runs the network over the data and writes the embeddings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, about in (("code", "clone of 3D-Speaker"), ("checkpoint", "its .pt"), ("data", "DATA"), ("out", ".npz")):
        parser.add_argument(f"--{name}", required=True, help=about)
    parser.add_argument("--relu", action="store_true", help="put a ReLU on the embedding")
    parser.add_argument("--full_scale", action="store_true", help="multiply samples by 32,768")
    options = parser.parse_args()
    sys.path.insert(0, options.code)
    from speakerlab.models.campplus.DTDNN import CAMPPlus

    network = CAMPPlus(feat_dim=80, embedding_size=192).eval()
    network.load_state_dict(torch.load(options.checkpoint, weights_only=True, map_location="cpu"))
    table, fbank, rows = source.open_source(options.data), frontend_of("3dspeaker"), []
    for i in range(len(table)):
        features = kaldi_fbank(table.load(i) * (32768.0 if options.full_scale else 1.0), fbank)
        with torch.inference_mode():
            row = network(torch.from_numpy(features - features.mean(axis=0))[None])[0]
        rows.append((row.relu() if options.relu else row).numpy())
    paths = [str(Path(table.location(i))) for i in range(len(table))]
    write_embeddings(options.out, table.ids, paths, table.speakers, np.stack(rows), "3D-Speaker's own code")


if __name__ == "__main__":
    main()
