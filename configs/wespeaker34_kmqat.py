"""A real WeSpeaker ResNet34 at 4, 3 or 2 bits, or all of them in one file, trained on two CPU cores.

By distillation from the full-precision network, with margin softmax of the speaker labels beside it:

    python -m kmq_jax.train --config=configs/wespeaker34_kmqat.py:2 --workdir=runs/r34-2bit \
        --config.init_from=runs/wespeaker34 --config.data.root=DIR

Batches of 16 crops of 2 s of 3,465 utterances of 166 speakers; the stem stays in full precision. On two cores of an AMD
EPYC (AVX-512), Python 3.11, jax 0.10; EER in percent, full precision 2.52 and 2.60; minutes with the fit that training
begins with. With labels, at 9 examples a second, and without (`--config.loss.weight=0`), on a host of up to 14:

    bits    steps   minutes   so762/dev   words/dev   without: minutes   so762/dev   words/dev
    4         216         9        2.12        2.43                  6        2.53        2.67
    3         324        11        2.25        2.20                  7        2.50        2.40
    2       1,620        47        2.55        2.49                 31        2.73        2.48
    nested    648        22        2.25        2.48                 33        2.55        2.45    read at 4 bits
                                   2.17        2.30                           2.58        2.29    at 3
                                   2.55        2.49                           2.73        2.48    at 2: the 2-bit one

These are the networks that configs/wespeaker_so762.py trained, as two studies, with `--config.study.label_weight=0.1`
and without; beside the nested one without labels another job ran. The nested network needs the 2-bit one:
`--config.quant.grow_from=runs/r34-2bit`.

With labels, EER is below full precision's on so762 by 0.40 at 4 bits (0.18 to 0.57 in 95 % of draws of speakers) and by
0.27 at 3 (0.07 to 0.53), and the same at 2 (-0.29 to 0.37); on words, 11 speakers, no difference is beyond chance. Full
precision was not trained on those labels: the gain is theirs, not that of fewer bits. Their weight was chosen at 4
bits, on 33 training speakers left out for that, where EER was 1.01 and 1.65 with 0.1, 1.08 and 1.71 with 0.01, 1.10
and 1.68 at full precision.

Without labels more steps at 4 bits bring the network nearer to its teacher, but its errors no lower: the cosine of
their embeddings of training crops is .993 after one epoch, .995 with `--config.epochs=3` and .996 with 7.5; EER 2.53
and 2.67, 2.55 and 2.62, 2.50 and 2.70. On words the last one's 0.10 above full precision is two of 2,000 target trials,
and between -0.20 and 0.28 in 95 % of draws of speakers (`kmq_jax.diagnose`).

Without training: 2.70 and 2.41 at 4 bits, 2.60 and 2.12 at 3, 4.05 and 3.66 at 2, in one minute each. On another
machine, where sums round otherwise, 2.65 and 2.57, 2.66 and 2.45, 4.03 and 3.19.
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
        raise UserError(f"configs/wespeaker34_kmqat.py:{arg} must be 2, 3, 4, nested or smoke")
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
