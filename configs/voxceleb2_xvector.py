"""An x-vector network (TDNN) on VoxCeleb2 by WeSpeaker's recipe, in full precision.

    python -m kmq_jax.train --config=configs/voxceleb2_xvector.py --workdir=runs/xvector \
        --config.data.train=/data/voxceleb2/dev --config.data.noise=/data/musan/noise \
        --config.data.music=/data/musan/music --config.validation.data=/data/voxceleb1/test \
        --config.validation.trials=/data/voxceleb1/veri_test2.txt

WeSpeaker's network, 4.61 M parameters; its convolutions have no padding, so that an utterance loses 14 frames.
`training.config.wespeaker_config` says what the recipe is and where this differs from it. Batches of 256 need an
accelerator.

Published by WeSpeaker for its own training, without score normalisation: an EER of 1.962 / 1.918 / 3.389 % on
VoxCeleb1-O/E/H (cleaned). Not run in full by this project: VoxCeleb2 was not at hand. `:smoke` runs the same code in
seconds on synthetic voices.
"""

import ml_collections

from kmq_jax.training.config import known_arg, smoke, wespeaker_config


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the configuration; `arg` is "smoke" or nothing."""
    known_arg(arg, "smoke")
    config = wespeaker_config("xvector")
    return smoke(config) if arg == "smoke" else config
