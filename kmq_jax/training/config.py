"""The configuration of a training run, and the recipes that change it. Files in `configs/` start from here."""

import dataclasses
from typing import Any

import ml_collections

from kmq_jax.core.errors import UserError
from kmq_jax.models import registry
from kmq_jax.training.options import TrainOptions


def default_config(model: str, **settings: Any) -> ml_collections.ConfigDict:
    """Returns the configuration of a run of `model`: every option of `training.options` with its default.

    Its keys are all there are, so a misspelt one is an error.

    Args:
        model: a name of `models.registry`.
        **settings: changes of the network's settings; what is left out takes the registry's default.

    Raises:
        UserError: the model or a setting is unknown.
    """
    known = registry.default_settings(model)
    del known["dtype"]  # a run's, not the network's: the same network is trained in one and used in another
    for setting in settings:
        if setting not in known:
            raise UserError(f"model {model} has no setting {setting!r}; it has {', '.join(sorted(known))}")
    options = TrainOptions(model={"name": model, **known, **settings})
    return ml_collections.ConfigDict(dataclasses.asdict(options))


def quantized(config: ml_collections.ConfigDict, bits: int, **settings: Any) -> ml_collections.ConfigDict:
    """Turns a run into quantization-aware training by distillation from the network it starts from.

    The fewer bits, the farther apart the centroids and the larger the learning rate: latents are in units of a
    channel's standard deviation. Scales, centroids, biases and what stays in full precision move more slowly.

    Args:
        config: changed in place.
        bits: of every kernel.
        **settings: of the `quant` section.
    """
    config.quant.update(bits=bits, **settings)
    config.loss.weight = 0.0
    config.distill.weight = 1.0
    config.data.augment = False
    config.spec_augment = 0.0
    config.optimizer.update(
        name="adamw",
        weight_decay=0.0,
        groups=((r"raw_scale|centroids|coarse", 0.2, 0.0), (r"/(bias|scale)$|stem|classifier", 0.1, 0.0)),
    )
    trained = (*sorted(config.quant.coarse)[1:], bits)
    peak = 1e-2 * 10 ** (min(2 - sum(trained) / len(trained), 0) / 2)
    config.learning_rate.update(kind="cosine", peak=peak, warmup_epochs=0.1)
    return config


def paper_config(model: str) -> ml_collections.ConfigDict:
    """The FP32 recipe of the paper on VoxCeleb2 for `model`, without the places of the data.

    5,994 speakers, batches of 512 crops of 3.5 s, SGD with momentum 0.9. AM-softmax of scale 30 whose margin rises from
    0 at epoch 5 to 0.3 at epoch 20. Learning rate 1e-5 -> 0.2 over 5 epochs, flat to epoch 19, then divided by 5 every
    10 epochs; 51 epochs. What the paper leaves open is taken from its first author's public code.
    """
    config = default_config(model)
    config.data.update(crop_seconds=3.5, threads=16)
    config.loss.update(kind="am", scale=30.0, margin=0.3, margin_start=5.0, margin_end=20.0)
    config.learning_rate.update(
        kind="step", start=1e-5, peak=0.2, warmup_epochs=5.0, flat_until=19.0, every=10.0, factor=5.0
    )
    config.update(batch_size=512, epochs=51.0, dtype="bfloat16")
    return config


def smoke(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Shrinks a run so that all of it passes in seconds: a tiny network, four steps, synthetic voices."""
    config.model.update(registry.smoke_settings(config.model.name))
    speakers = "synthetic:{}?speakers=8&utterances=4"
    config.data.update(train=speakers.format("train"), noise="synthetic:noise", music="", crop_seconds=1.0)
    config.validation.update(data=speakers.format("dev"), trials=speakers.format("dev"))
    if config.distill.weight and not config.distill.teacher:  # no model is at hand to start and to learn from
        config.distill.weight, config.loss.weight = 0.0, 1.0
    config.quant.fit_crops = min(config.quant.fit_crops, 8)
    config.update(init_from="", batch_size=8, epochs=2.0, epoch_steps=2, log_every=1)
    config.average_last = 0 if config.quant.bits else 2
    return config
