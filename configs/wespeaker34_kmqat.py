"""A real WeSpeaker ResNet34 at 4, 3 or 2 bits, or all of them in one file, trained on two CPU cores.

By distillation from the full-precision network, without speaker labels:

    python -m kmq_jax.train --config=configs/wespeaker34_kmqat.py:2 --workdir=runs/r34-2bit \
        --config.init_from=runs/wespeaker34 --config.data.root=DIR
"""

import ml_collections

from kmq_jax.core.errors import UserError
from kmq_jax.train_config import default_config, quantized, smoke

EPOCHS = {"4": 1.0, "3": 1.5, "2": 9.0, "nested": 9.0}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the configuration; `arg` is the width, "nested" or "smoke"."""
    width = {None: "2", "smoke": "2"}.get(arg, arg)
    if width not in EPOCHS:
        raise UserError(f"configs/wespeaker34_kmqat.py:{arg} must be 2, 3, 4, nested or smoke")
    config = default_config("wespeaker_resnet34", norm="bias")
    config.frontend = "wespeaker"
    root = ml_collections.FieldReference("data")
    config.data.root = root
    config.data.update(train=root + "/so762/train," + root + "/words/train", crop_seconds=2.0)
    config.validation.update(data=root + "/so762/dev", trials=root + "/so762/dev/trials.txt", epochs=EPOCHS[width])
    quantized(config, 4 if width == "nested" else int(width), rules=(("^stem/", 0),))
    config.learning_rate.peak = 1e-2
    if width == "nested":
        config.quant.update(coarse=(2, 3), cycle=(2, 3, 2, 4))
    config.update(batch_size=16, epochs=EPOCHS[width], checkpoint_epochs=1.0, dtype="bfloat16")
    return smoke(config) if arg == "smoke" else config
