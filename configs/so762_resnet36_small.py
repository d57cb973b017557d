"""A narrow ResNet-36 trained on four hours of real speech, on two CPU cores.

    python -m kmq_jax.train --config=configs/so762_resnet36_small.py --workdir=runs/so762 --config.data.root=DIR

DIR holds the Kaldi directories `so762/train` (speechocean762: English read by Mandarin speakers), `words/train`
(spoken words in Arabic, Mandarin and English), `so762/dev` (validation, other speakers) and `noise/train`.
"""

import ml_collections

from kmq_jax.train_config import default_config, smoke


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the configuration; `arg` is "smoke" or nothing."""
    config = default_config("resnet36", width=32)
    root = ml_collections.FieldReference("data")
    config.data.root = root
    config.data.update(train=root + "/so762/train," + root + "/words/train", noise=root + "/noise/train")
    config.data.update(speeds=(1.0, 0.9, 1.1), crop_seconds=2.0)
    config.validation.update(data=root + "/so762/dev", trials=root + "/so762/dev/trials.txt", epochs=1.0)
    config.loss.update(kind="aam", scale=30.0, margin=0.2, margin_start=0.75, margin_end=1.5)
    config.optimizer.update(name="adamw", weight_decay=1e-2)
    config.learning_rate.update(kind="cosine", peak=2e-3, warmup_epochs=0.15)
    config.update(batch_size=32, epochs=3.0, checkpoint_epochs=0.5, dtype="bfloat16")
    return smoke(config) if arg == "smoke" else config
