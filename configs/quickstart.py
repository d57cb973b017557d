"""A small network on the embedded corpus: no download, for two CPU cores.

    python -m kmq_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

ResNet-18 of width 16, 200 training speakers, 372 steps of 32 crops of 1.5 s. It validates itself on 40 unseen
speakers (`synthetic:dev`); another 40 are `synthetic:test`:

    kmq-jax extract --model=runs/quickstart --data=synthetic:test --out=test.npz
    kmq-jax score --embeddings=test.npz --trials=synthetic:test --out=scores.txt --json=metrics.json

The README's main job is the study of that network: 4, 3 and 2 bits without training, 2 bits and a nested network
trained, diagnosis, cascades. README shows its table, from `.github/results/quickstart.json`.

    python -m kmq_jax.study --config=configs/quickstart.py --workdir=runs/study
"""

import ml_collections

from kmq_jax.study.config import smoke_study, study_config
from kmq_jax.training.config import default_config, known_arg


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the configuration; `arg` is "smoke" or nothing."""
    known_arg(arg, "smoke")
    config = default_config("resnet18", width=16, embedding_size=128)
    config.data.update(train="synthetic:train?speakers=200&utterances=10", crop_seconds=1.5, augment=False)
    config.spec_augment = 0.0
    config.loss.update(kind="aam", scale=20.0, margin=0.1, margin_start=1.8, margin_end=3.6)
    config.optimizer.update(name="adamw", weight_decay=1e-3)
    config.learning_rate.update(kind="cosine", peak=4e-3, warmup_epochs=0.25)
    config.validation.update(data="synthetic:dev", trials="synthetic:dev", epochs=3.0)
    config.update(batch_size=32, epochs=6.0, dtype="bfloat16")
    study_config(
        config,
        evaluate={name: {"data": f"synthetic:{name}", "trials": f"synthetic:{name}"} for name in ("dev", "test")},
        epochs={"2": 1.5, "nested": 2.0},
        diagnose=("test",),
        diagnosis={"retention_utterances": 120, "hessian_draws": 4, "replicates": 200},
        calibrate="dev",
        cascades=(("distilled-nested", (2, 3, 4)), ("trained", (2, 32))),
    )
    return smoke_study(config) if arg == "smoke" else config
