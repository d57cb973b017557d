"""ReDimNet on VoxCeleb2 by WeSpeaker's recipe, in full precision.

    python -m kmq_jax.train --config=configs/voxceleb2_redimnet.py --workdir=runs/redimnet \
        --config.data.train=/data/voxceleb2/dev --config.data.noise=/data/musan/noise \
        --config.data.music=/data/musan/music --config.validation.data=/data/voxceleb1/test \
        --config.validation.trials=/data/voxceleb1/veri_test2.txt

B2 by WeSpeaker's table, on its filterbank of 72 bands: 4.89 M parameters. `:b0` to `:b6` are the other sizes.

`training.config.wespeaker_config` says what the recipe is and where this differs from it; ReDimNet has 120 epochs,
batches of 512, which need several accelerators, and weight decay 2e-5. Not run in full by this project: VoxCeleb2 was
not at hand. `:smoke` runs the same code in seconds on synthetic voices.
"""

import ml_collections

from kmq_jax.training.config import known_arg, smoke, wespeaker_config

SIZES = tuple(f"b{number}" for number in range(7))


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the configuration; `arg` is "b0" to "b6", "smoke" or nothing."""
    known_arg(arg, *SIZES, "smoke")
    size = arg if arg in SIZES else "b2"
    config = wespeaker_config(f"redimnet_{size}", epochs=120.0, batch_size=512, weight_decay=2e-5)
    return smoke(config) if arg == "smoke" else config
