"""A real WeSpeaker ResNet34 at 4, 3 or 2 bits, or all of them in one file, trained on two CPU cores.

By distillation from the full-precision network, with margin softmax of the speaker labels beside it:

    python -m kmq_jax.train --config=configs/wespeaker34_distilled.py:2 --workdir=runs/r34-2bit \
        --config.init_from=runs/wespeaker34 --config.data.root=DIR

Batches of 16 crops of 2 s of 3,465 utterances of 166 speakers, for 216, 324 and 1,620 steps at 4, 3 and 2 bits and 648
of the nested network; the stem stays in full precision. The nested network needs the 2-bit one:
`--config.quant.grow_from=runs/r34-2bit`. `--config.loss.weight=0` leaves the labels out.

These are the networks that configs/wespeaker_so762.py trains with `--config.study.label_weight=0.1`, a weight that was
chosen on training speakers left out for that; epochs were compared on so762/dev and words/dev. What labels do and what
few bits do, `configs/wespeaker_so762.py:compare` tells apart (`.github/results/README.md`).
"""

import ml_collections

from kmq_jax.core.errors import UserError
from kmq_jax.study.config import EPOCHS
from kmq_jax.training.config import default_config, distilled, smoke


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the configuration; `arg` is the bits (4, 3, 2), "nested" or "smoke"."""
    bits = arg if arg and arg != "smoke" else "2"
    config = default_config("wespeaker_resnet34", norm="bias")
    epochs = EPOCHS.get(bits)
    if not epochs:
        raise UserError(f"configs/wespeaker34_distilled.py:{arg} must be 2, 3, 4, nested or smoke")
    config.frontend = "wespeaker"
    root = ml_collections.FieldReference("data")
    config.data.root = root
    config.data.update(train=root + "/so762/train," + root + "/words/train", crop_seconds=2.0)
    config.validation.update(data=root + "/so762/dev", trials=root + "/so762/dev/trials.txt", epochs=epochs)
    nested = {"coarse": (2, 3), "grow_from": "runs/r34-2bit"} if bits == "nested" else {}
    distilled(config, 4 if nested else int(bits), rules=(("^stem/", 0),), **nested)
    config.loss.weight = 0.1
    config.update(batch_size=16, epochs=epochs, checkpoint_epochs=1.0, dtype="bfloat16")
    return smoke(config) if arg == "smoke" else config
