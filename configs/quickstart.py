"""A small network on the embedded corpus: no download, for two CPU cores.

    python -m kmq_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

An x-vector network, 16 channels wide, on 120 synthetic speakers: 720 steps of 32 crops of 1.5 s. It validates itself on
60 unseen speakers (`DEV`); 100 others are `TEST`:

    TEST="synthetic:test?speakers=100&utterances=6&seconds=3"
    kmq-jax extract --model=runs/quickstart --data="$TEST" --out=test.npz
    kmq-jax score --embeddings=test.npz --trials="$TEST" --out=scores.txt --json=metrics.json

The README's main job is the study of that network: 4, 3 and 2 bits without training, 2 bits trained, a diagnosis, and
cascades. The network is small on purpose: it can spare little.

    python -m kmq_jax.study --config=configs/quickstart.py --workdir=runs/study
"""

import ml_collections

from kmq_jax.study.config import smoke_study, study_config
from kmq_jax.training.config import default_config, known_arg

TRAIN = "synthetic:train?speakers=120&utterances=8&seconds=3"
DEV = "synthetic:dev?speakers=60&utterances=6&seconds=3"
TEST = "synthetic:test?speakers=100&utterances=6&seconds=3"


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the configuration; `arg` is "smoke" or nothing."""
    known_arg(arg, "smoke")
    config = default_config("xvector", features=81, width=16, pooled=48, embedding_size=64)
    config.data.update(train=TRAIN, crop_seconds=1.5, augment=False)
    config.spec_augment = 0.0
    config.loss.update(kind="aam", scale=20.0, margin=0.1, margin_start=3.6, margin_end=7.2)
    config.optimizer.update(name="adamw", weight_decay=1e-3)
    config.learning_rate.update(kind="cosine", peak=4e-3, warmup_epochs=0.25)
    config.validation.update(data=DEV, trials=DEV, epochs=4.0)
    config.update(batch_size=32, epochs=24.0)
    study_config(
        config,
        evaluate={name: {"data": data, "trials": data} for name, data in (("dev", DEV), ("test", TEST))},
        epochs={"2": 4.0},
        nested=False,
        engine="auto",  # on a CPU ONNX Runtime, which compiles nothing
        diagnose=("test",),
        diagnosis={"retention_utterances": 60, "layer_utterances": 16, "hessian_draws": 0, "replicates": 200},
        calibrate="dev",
        cascades=(("ptq", (2, 3, 4)), ("ptq", (2, 32)), ("trained", (2, 32))),
    )
    return smoke_study(config) if arg == "smoke" else config
