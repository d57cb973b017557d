"""Large-margin fine-tuning of a ResNet-36 that `voxceleb2_resnet36.py` trained: longer crops, a wider margin.

    python -m kmq_jax.train --config=configs/voxceleb2_large_margin.py --workdir=runs/r36-lm \
        --config.init_from=runs/r36 --config.data.train=/data/voxceleb2/dev --config.data.noise=/data/musan/noise

Network and classifier go on from `init_from`; crops of 5 s, AAM margin 0.5, a small learning rate that falls
exponentially over 5 epochs, and neither SpecAugment nor speed perturbation (WeSpeaker's recipe; after Thienpondt
et al. 2021, "The IDLab VoxSRC-20 submission"). Another network: `--config.model.*` as it was trained.

Not run in full by this project, for lack of VoxCeleb2. `:smoke` runs the same code in seconds on synthetic voices.
"""

import ml_collections

from kmq_jax.training.config import known_arg, paper_config, smoke


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the configuration; `arg` is "smoke" or nothing."""
    known_arg(arg, "smoke")
    config = paper_config("resnet36")
    config.data.crop_seconds = 5.0
    config.optimizer.weight_decay = 1e-4
    config.spec_augment = 0.0
    config.loss.update(kind="aam", margin=0.5, margin_start=0.0, margin_end=0.0)
    config.learning_rate.update(kind="exponential", start=1e-4, peak=1e-4, final=2.5e-5, warmup_epochs=0.0)
    config.update(batch_size=256, epochs=5.0, average_last=3)
    return smoke(config) if arg == "smoke" else config
