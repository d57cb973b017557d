"""The study of any imported MODEL on real speech, ONNX graphs of no known family too: fitted, distilled, diagnosed.

    kmq-jax import_model --source=x.onnx --out=runs/mine
    python -m kmq_jax.study --config=configs/imported.py:runs/mine --workdir=runs/mine-study --config.data.root=DIR

DIR holds `train` and `dev`, both DATA of any form, and `dev/trials.txt`; or `--config.data.train` and
`--config.study.evaluate.dev.data` and `.trials` name them. The network is quantized without training at 8, 4, 3 and 2
bits and by distillation from itself, without speaker labels, at 4 and 2; `--config.study.epochs.2=7.5` and the like say
how long. A cascade of 2 bits and full precision is calibrated on dev, crosswise.
"""

import ml_collections

from kmq_jax.models.speaker_model import load_model
from kmq_jax.study.config import smoke_study, study_config
from kmq_jax.training.config import default_config


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the configuration; `arg` is the MODEL, "smoke" for a tiny network of its own, or nothing."""
    if arg in (None, "smoke"):
        config = default_config("wespeaker_resnet34", norm="bias")
        config.frontend, config.init_from = "wespeaker", "runs/mine"
    else:
        model = load_model(arg)
        config = default_config(model.architecture, **model.settings)
        config.frontend, config.init_from = model.frontend, arg
    root = ml_collections.FieldReference("data")
    config.data.root = root
    config.data.update(train=root + "/train", crop_seconds=2.0)
    config.update(batch_size=16, checkpoint_epochs=1.0)
    study_config(
        config,
        bits=(8, 4, 3, 2),
        epochs={"4": 1.0, "2": 2.0},
        nested=False,
        engine="auto",
        diagnose=("dev",),
        diagnosis={"retention_utterances": 120, "layer_utterances": 24, "hessian_draws": 6},
        calibrate="dev",
        cascades=(("trained", (2, 32)),),
    )
    config.study.evaluate.dev = {"data": root + "/dev", "trials": root + "/dev/trials.txt"}
    return smoke_study(config) if arg == "smoke" else config
