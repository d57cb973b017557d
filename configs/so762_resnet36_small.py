"""A narrow ResNet-36 trained on four hours of real speech, on two CPU cores.

    python -m kmq_jax.train --config=configs/so762_resnet36_small.py --workdir=runs/so762 --config.data.root=DIR

DIR holds the Kaldi directories `so762/train` (speechocean762: English read by Mandarin speakers), `words/train`
(spoken words in Arabic, Mandarin and English), `so762/dev` (validation, other speakers) and `noise/train`.

ResNet-36 of width 32 (1.21 M parameters), 166 speakers at three speeds, 972 steps of 32 crops of 2 s with noise,
babble, reverberation and SpecAugment, bfloat16. Evaluated on unseen speakers of the same corpus (60, so762/dev)
and of other languages and microphones (11, words/dev):

    kmq-jax extract --model=runs/so762 --data=DIR/so762/dev --out=dev.npz --compute=bfloat16
    kmq-jax score --embeddings=dev.npz --trials=DIR/so762/dev/trials.txt --out=scores.txt --json=metrics.json

Its study at 4, 3 and 2 bits, by this project's recipe or, with `--config.study.recipe=kmqat`, by KMQAT as published:

    python -m kmq_jax.study --config=configs/so762_resnet36_small.py --workdir=runs/so762-study --config.data.root=DIR

`:compare` sets recipes and sets of levels side by side at equal steps, with three seeds: this project's recipe, KMQAT
as published, uniform levels of a learned scale and of the weights' range, powers of two, and full precision trained on
as the control. Its network is a ResNet-18 of width 8, and each training takes 40 epochs, as KMQAT was published with.
An epoch is 10 steps of 16 crops of 1.5 s there, far less than a pass over the data (`--config.epoch_steps=`): scales
are frozen for two of them, and centroids move forty times. `study.json` then holds `differences` with paired intervals,
and the seconds of every step. `:levels` puts sets of levels side by side that are fitted to that network alike, without
training.

`:free` quantizes it without training at 8, 4, 3 and 2 bits, and `:ecapa` an ECAPA-TDNN of as many parameters that is
trained alike: is one of them more fragile? `kmq-jax tables` sets such studies side by side (KIND `architectures`).
"""

from typing import Any

import ml_collections

from kmq_jax.study.config import NO_EPOCHS, add_evaluation_sets, smoke_study, study_config, without_training
from kmq_jax.study.options import PATTERNED
from kmq_jax.training.config import default_config, known_arg

Network = tuple[str, dict[str, Any]]  # a name of `models.registry`, and settings

SMALL: Network = ("resnet36", {"width": 8, "blocks": (2, 2, 2, 2)})
ECAPA: Network = ("ecapa_c512", {"width": 32, "aggregated": 64, "embedding_size": 256, "features": 81})
NETWORKS = {"compare": SMALL, "levels": SMALL, "free": SMALL, "ecapa": ECAPA}  # 118,048 and 118,540 parameters


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the configuration; `arg` is "compare", "levels", "free", "ecapa", "smoke" or nothing."""
    known_arg(arg, "compare", "levels", "free", "ecapa", "smoke")
    name, network = NETWORKS.get(arg or "", ("resnet36", {"width": 32}))
    config = default_config(name, **network)
    root = ml_collections.FieldReference("data")
    config.data.root = root
    config.data.update(train=root + "/so762/train," + root + "/words/train", noise=root + "/noise/train")
    config.data.update(speeds=(1.0, 0.9, 1.1), crop_seconds=2.0)
    config.validation.update(data=root + "/so762/dev", trials=root + "/so762/dev/trials.txt", epochs=1.0)
    config.loss.update(kind="aam", scale=30.0, margin=0.2, margin_start=0.75, margin_end=1.5)
    config.optimizer.update(name="adamw", weight_decay=1e-2)
    config.learning_rate.update(kind="cosine", peak=2e-3, warmup_epochs=0.15)
    config.update(batch_size=32, epochs=3.0, checkpoint_epochs=0.5, dtype="bfloat16")
    study_config(
        config,
        diagnose=("so762",),
        diagnosis={"retention_utterances": 120, "layer_utterances": 24, "hessian_draws": 6},
        calibrate="so762",
        cascades=(("trained", (2, 3, 4)), ("trained", (2, 32))),
    )
    if arg in NETWORKS:
        side_by_side(config)
    if arg == "levels":
        config.study.update(also=PATTERNED, seeds=1, epochs=NO_EPOCHS)
    if arg in ("free", "ecapa"):
        config.study.update(also=(), seeds=1)
        without_training(config)
    add_evaluation_sets(config, root, {"so762": "so762/dev", "words": "words/dev"})
    return smoke_study(config) if arg == "smoke" else config


def side_by_side(config: ml_collections.ConfigDict) -> None:
    """Shortens training so that 36 of them pass, and asks for them."""
    config.data.crop_seconds = 1.5
    config.loss.update(margin_start=30.0, margin_end=60.0)
    config.learning_rate.warmup_epochs = 6.0
    config.validation.epochs = 0.0
    config.update(batch_size=16, epoch_steps=10, epochs=120.0, checkpoint_epochs=20.0)
    config.study.update(also=("kmqat", *PATTERNED), seeds=3, label_weight=0.1, nested=False)
    config.study.update(epochs=NO_EPOCHS | dict.fromkeys(("3", "2", "32"), 40.0), cascades=(), diagnose=())
