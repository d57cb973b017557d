"""ECAPA-TDNN on VoxCeleb2 by WeSpeaker's recipe, in full precision.

    python -m kmq_jax.train --config=configs/voxceleb2_ecapa.py --workdir=runs/ecapa \
        --config.data.train=/data/voxceleb2/dev --config.data.noise=/data/musan/noise \
        --config.data.music=/data/musan/music --config.validation.data=/data/voxceleb1/test \
        --config.validation.trials=/data/voxceleb1/veri_test2.txt

WeSpeaker's network with global context: 6.19 M parameters of width 512; `:c1024` has width 1,024 and 14.66 M.
`training.config.wespeaker_config` says what the recipe is and where this differs from it. Batches of 256 need an
accelerator.

Published by WeSpeaker for its own training, without score normalisation: an EER of 1.069 / 1.209 / 2.310 % on
VoxCeleb1-O/E/H (cleaned) with width 512, 0.856 / 1.072 / 2.059 % with 1,024. Not run in full by this project:
VoxCeleb2 was not at hand. `:smoke` runs the same code in seconds on synthetic voices.
"""

import ml_collections

from kmq_jax.training.config import known_arg, smoke, wespeaker_config


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the configuration; `arg` is "c1024", "smoke" or nothing."""
    known_arg(arg, "c1024", "smoke")
    config = wespeaker_config("ecapa_c1024" if arg == "c1024" else "ecapa_c512")
    return smoke(config) if arg == "smoke" else config
