"""The study of Resemblyzer's GE2E on real speech: an LSTM on the road of configs/wespeaker_so762.py, without training.

    pip download --no-deps Resemblyzer && unzip Resemblyzer-*.whl resemblyzer/pretrained.pt
    python -m kmq_jax.study --config=configs/ge2e_so762.py --workdir=runs/ge2e \
        --config.init_from=resemblyzer/pretrained.pt --config.data.root=DIR

DIR is as in configs/wespeaker_so762.py. The network has no convolution over time and no normalisation: each frame meets
the same kernels, and so does what an LSTM keeps of the past. Quantized without training, fitted on so762/train and
words/train. Silences stay, which Resemblyzer itself cuts. `.github/results/README.md` shows the results (`ge2e.json`).
"""

import ml_collections

from kmq_jax.study.config import add_evaluation_sets, smoke_study, study_config
from kmq_jax.training.config import default_config, known_arg


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the configuration; `arg` is "smoke" or nothing."""
    known_arg(arg, "smoke")
    config = default_config("ge2e")
    config.frontend, config.init_from = "resemblyzer", "resemblyzer/pretrained.pt"
    root = ml_collections.FieldReference("data")
    config.data.root = root
    config.data.update(train=root + "/so762/train," + root + "/words/train", crop_seconds=2.0)
    config.update(batch_size=16, checkpoint_epochs=1.0)
    study_config(
        config,
        bits=(8, 4, 3, 2),
        epochs={},
        nested=False,
    )
    add_evaluation_sets(config, root, {"so762": "so762/dev", "words": "words/dev"})
    return smoke_study(config) if arg == "smoke" else config
