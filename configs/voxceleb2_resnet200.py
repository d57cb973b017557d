"""ResNet-200 on VoxCeleb2 by the recipe of "On Low-Bit Quantization Errors in Speaker Verification" (FP32).

    python -m kmq_jax.train --config=configs/voxceleb2_resnet200.py --workdir=runs/r200 \
        --config.data.train=/data/voxceleb2/dev --config.data.noise=/data/musan/noise \
        --config.data.music=/data/musan/music --config.validation.data=/data/voxceleb1/test \
        --config.validation.trials=/data/voxceleb1/veri_test2.txt

61.47 M parameters with the classifier and 140.6 G multiply-accumulates for 3 s, 3.4 times ResNet-36's. Each block is
recomputed in the backward pass (`remat`): a third more arithmetic, a fraction of the memory.

`:public` is the recipe of the first author's public code where it differs from the paper: 51 epochs and weight decay
1e-4 in place of 42 and 2e-4. `--config.data.babble=/data/musan/speech` makes babble of MUSAN's speech, and
`--config.data.rooms=DIR` takes measured rooms in place of simulated ones.

Published by the paper for this network: mean EER 0.984 % over VoxCeleb1-O/E/H. Not run in full by this project:
neither VoxCeleb2 nor such hardware was at hand. `:smoke` runs the same code in seconds on synthetic voices.
"""

import ml_collections

from kmq_jax.training.config import known_arg, paper_config, smoke


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the configuration; `arg` is "public", "smoke" or nothing."""
    known_arg(arg, "public", "smoke")
    config = paper_config("resnet200", public=arg == "public")
    config.model.remat = True
    return smoke(config) if arg == "smoke" else config
