"""The whole study of 3D-Speaker's CAM++ on real speech: the road of configs/wespeaker_so762.py for another network.

    python -m kmq_jax.study --config=configs/campplus_so762.py --workdir=runs/campplus-so762 \
        --config.init_from=3dspeaker-campplus-zh-en.pt --config.data.root=DIR

DIR is as in configs/wespeaker_so762.py. CAM++ is densely connected and normalises before it convolves, so that what
helps a ResNet need not help it. The first convolution stays in full precision.
Quantized by distillation from itself, without speaker labels, by running statistics (see configs/campplus.py). It
computes in float32, for a processor; `--config.dtype=bfloat16` is for accelerators.

`configs/campplus_so762.py:free` is the study without training at 8, 4, 3 and 2 bits, as `wespeaker_so762.py:free` is;
`kmq-jax tables` sets several such studies side by side (KIND `architectures` and `fragile`).
"""

import ml_collections

from kmq_jax.study.config import add_evaluation_sets, smoke_study, study_config, without_training
from kmq_jax.training.config import default_config, known_arg


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the configuration; `arg` is "smoke", "free" or nothing."""
    known_arg(arg, "smoke", "free")
    config = default_config("campplus", embedding_size=192, floor=1e-12, activation="relu")
    config.frontend, config.init_from = "3dspeaker", "3dspeaker-campplus-zh-en.pt"
    root = ml_collections.FieldReference("data")
    config.data.root = root
    config.data.update(train=root + "/so762/train," + root + "/words/train", crop_seconds=2.0)
    config.update(batch_size=16, checkpoint_epochs=1.0, dtype="float32", batch_norm="running")
    study_config(
        config,
        rules=(("^stem/conv1/", 0),),
        nested=False,
        diagnose=("so762", "words"),
        diagnosis={"retention_utterances": 120, "layer_utterances": 24, "hessian_draws": 6},
        learning_rate=1e-3,
        calibrate="so762",
        cascades=(("trained", (2, 3, 4)), ("trained", (2, 32))),
    )
    if arg == "free":
        without_training(config)
    add_evaluation_sets(config, root, {"so762": "so762/dev", "words": "words/dev"})
    return smoke_study(config) if arg == "smoke" else config
