"""The configuration of a training run, and the recipes that change it. Files in `configs/` start from here."""

import dataclasses
from typing import Any

import ml_collections

from kmq_jax.core.errors import UserError
from kmq_jax.models import registry
from kmq_jax.training.options import QatOptions, TrainOptions, section

_THREADS = 4  # faster than 16 on the 16 cores beside an H200, see .github/results/accelerator-h200.jsonl


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
    # The command line can change a tuple, but not a list.
    network = {key: tuple(value) if isinstance(value, list) else value for key, value in (known | settings).items()}
    options = TrainOptions(model={"name": model, **network})
    return ml_collections.ConfigDict(dataclasses.asdict(options))


def known_arg(arg: str | None, *known: str) -> None:
    """Refuses an argument (`--config=NAME:ARG`) that the configuration does not know. It would go unnoticed.

    Raises:
        UserError: it is none of these.

    >>> known_arg("smok", "smoke")
    Traceback (most recent call last):
    kmq_jax.core.errors.UserError: the configuration's argument (=smok) must be smoke, or left out
    """
    if arg not in (None, *known):
        raise UserError(f"the configuration's argument (={arg}) must be {', '.join(known)}, or left out")


def distilled(config: ml_collections.ConfigDict, bits: int, **settings: Any) -> ml_collections.ConfigDict:
    """Turns a run into quantization-aware training by this project's own recipe: distillation from full precision.

    Latents are in units of a channel's standard deviation. Fewer bits place centroids farther apart, so the learning
    rate is larger. Scales, centroids, biases, the stem and the classifier move more slowly.

    Args:
        config: changed in place.
        bits: of every kernel; 0 where something else chooses them.
        **settings: of the `quant` section.

    Returns:
        `config`.
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
    trained = (*sorted(config.quant.coarse)[1:], bits)  # the fewest nested bits are the parent's, see `quant.grow_from`
    # 1e-2 up to 2 bits on average; each bit more divides it by the square root of 10.
    peak = 1e-2 * 10 ** (min(2 - sum(trained) / len(trained), 0) / 2)
    config.learning_rate.update(kind="cosine", peak=peak, warmup_epochs=0.1)
    return config


def published_kmqat(config: ml_collections.ConfigDict, bits: int, **settings: Any) -> ml_collections.ConfigDict:
    """Turns a run into KMQAT as published: quantization-aware training on speaker labels, without a teacher.

    It begins at the full-precision checkpoint, and its loss is that run's classification loss at its final margin.
    What the paper leaves open is taken from its first author's public code, which keeps a codebook and a scale for each
    output channel. Where both leave something open, it is chosen here: indices are assigned anew at every step; scales
    and the classifier do not decay. `study.paper` lists all of it, line by line.

    Between two assignments latents move, but weights do not while scales are frozen: no gradient sees what latents
    gather, and the next assignment lets all of it in at once. So a period of many steps needs small ones.

    Args:
        config: of the full-precision training; changed in place.
        bits: of every kernel; 0 where `average_bits` chooses them.
        **settings: of the `quant` section.

    Returns:
        `config`.
    """
    config.quant.update(
        bits=bits,
        recipe="weights",  # equal-mass bins of weights clamped to their central 90 %, see `quant.kmqat_codebook`
        granularity="channel",
        retention=0.9,
        symmetric=False,
        init="equal-mass",
        fit_crops=0,
        bn_passes=2,
        thaw_epochs=2.0,
        centroids="lloyd",
        lloyd_epochs=1.0,
        lloyd_rate=0.1,
        lloyd_unused_rate=0.2,
        lloyd_clip=1.0,
        lloyd_until=1.0,
        reassign_every=1,
        biases="float16",
    )
    config.quant.update(settings)
    config.loss.update(weight=1.0, margin_start=0.0, margin_end=0.0)
    config.distill.weight = 0.0
    config.data.update(augment=False, speeds=(1.0,))
    config.spec_augment = 0.0
    config.optimizer.update(
        name="sgd",
        momentum=0.9,
        weight_decay=1e-4,
        clip=0.0,
        groups=(
            (r"/raw_scale$", {"peak": 0.75e-4, "momentum": 0.0, "clip": 1.5, "decay": 0.0}),
            (r"/centroids$", 0.0, 0.0),  # Lloyd's steps alone move them
            (r"/(bias|scale)$|classifier", 1.0, 0.0),
        ),
    )
    config.learning_rate.update(kind="cosine", start=0.0, peak=1e-4, final=1e-7, warmup_epochs=0.0)
    return config


def paper_config(model: str, public: bool = False) -> ml_collections.ConfigDict:
    """The FP32 recipe of the paper on VoxCeleb2 for `model`, without the places of the data.

    5,994 speakers, batches of 512 crops of 350 frames, SGD with momentum 0.9 and weight decay 2e-4, 42 epochs. What the
    paper leaves open is taken from its first author's public code: the mean is removed over the whole utterance before
    the crop; AM-softmax of scale 30 whose margin rises from 0 at epoch 5 to 0.3 at epoch 20; learning rate 1e-5 -> 0.2
    over 5 epochs, flat to epoch 19, then divided by 5 every 10 epochs.

    Args:
        model: a name of `models.registry`.
        public: as the public code has it where it differs from the paper: 51 epochs and weight decay 1e-4.
    """
    config = default_config(model)
    config.data.update(crop_seconds=3.515, normalize="utterance")  # 350 frames: 25 ms and 349 of 10 ms
    config.data.threads = _THREADS
    config.optimizer.weight_decay = 1e-4 if public else 2e-4
    config.loss.update(kind="am", scale=30.0, margin=0.3, margin_start=5.0, margin_end=20.0)
    config.learning_rate.update(
        kind="step", start=1e-5, peak=0.2, warmup_epochs=5.0, flat_until=19.0, every=10.0, factor=5.0
    )
    config.update(batch_size=512, epochs=51.0 if public else 42.0, dtype="bfloat16")
    return config


def wespeaker_config(
    model: str, epochs: float = 150.0, batch_size: int = 256, weight_decay: float = 1e-4
) -> ml_collections.ConfigDict:
    """WeSpeaker's recipe for VoxCeleb2 and `model`, without the places of the data.

    5,994 speakers at three speeds, crops of 200 frames, AAM-softmax of scale 32 whose margin rises from 0 at epoch 20
    to 0.2 at epoch 40, SGD with Nesterov's momentum 0.9; learning rate up to 0.1 for every 64 crops of a batch within
    6 epochs, then down to 5e-5, exponentially; mean of the last 10 checkpoints. Here the margin rises linearly (there
    most of it within the first epochs), the learning rate falls from the end of the warm-up on (there from the
    start), and crops are augmented as `data.augment` says (there six of ten).

    Args:
        model: a name of `models.registry`.
        epochs: of the run.
        batch_size: over all devices.
        weight_decay: of every parameter.

    Source:
        wenet-e2e/wespeaker, examples/voxceleb/v2/conf: ecapa_tdnn.yaml, xvec.yaml, campplus.yaml, redimnet.yaml; the
        learning rate's scale is in bin/train.py.
    """
    config = default_config(model)
    config.frontend = "wespeaker" if config.model.features == 80 else f"wespeaker{config.model.features}"
    config.data.update(crop_seconds=2.015, speeds=(1.0, 0.9, 1.1))  # 200 frames: 25 ms and 199 of 10 ms
    config.data.threads = _THREADS
    config.spec_augment = 0.0
    config.loss.update(kind="aam", scale=32.0, margin=0.2, margin_start=20.0, margin_end=40.0)
    config.optimizer.update(weight_decay=weight_decay, nesterov=True, groups=())
    scale = batch_size / 64
    config.learning_rate.update(kind="exponential", peak=0.1 * scale, final=5e-5 * scale, warmup_epochs=6.0)
    config.update(batch_size=batch_size, epochs=epochs, average_last=10, keep_checkpoints=10, dtype="bfloat16")
    return config


def smoke(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Shrinks a run so that all of it passes in seconds: a tiny network, four steps, synthetic voices."""
    tiny = registry.smoke_settings(config.model.name)
    config.model.update({name: value for name, value in tiny.items() if name != "features"})  # the front end stays
    speakers = "synthetic:{}?speakers=8&utterances=4"
    config.data.update(train=speakers.format("train"), noise="synthetic:noise", music="", crop_seconds=1.0)
    config.data.update(babble="", rooms="", utterance_seconds=2.0)
    config.validation.update(data=speakers.format("dev"), trials=speakers.format("dev"))
    if config.distill.weight and not config.distill.teacher:  # no model is at hand to start and to learn from
        config.distill.weight, config.loss.weight = 0.0, 1.0
    config.quant.fit_crops = min(config.quant.fit_crops, 8)  # 0 stays 0
    config.update(init_from="", batch_norm="batch", batch_size=8, epochs=2.0, epoch_steps=2, log_every=1)
    config.average_last = 0 if section(QatOptions, config.quant.to_dict(), "quant.").on else 2
    return config
