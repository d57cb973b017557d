"""Every setting of a training run with its default. Files in `configs/` change what they need."""

from typing import Any

import ml_collections

from kmq_jax.core.errors import UserError
from kmq_jax.models import registry


def default_config(model: str, **settings: Any) -> ml_collections.ConfigDict:
    """Returns the configuration of a run of `model`; its keys are all there are, so a misspelt one is an error.

    Times are in epochs. An epoch is `epoch_steps` steps; 0 means one crop of every training utterance (at every speed).

    Args:
        model: a name of `models.registry`.
        **settings: changes of the model's settings; what is left out takes the registry's default.

    Raises:
        UserError: the model or a setting is unknown.
    """
    known = registry.default_settings(model)
    del known["dtype"]  # a run's, below: the same network is trained in one and used in another
    for setting in settings:
        if setting not in known:
            raise UserError(f"model {model} has no setting {setting!r}; it has {', '.join(sorted(known))}")
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            # A MODEL to start from: its network, and its classifier where that has at least as many classes.
            "init_from": "",
            "model": dict(name=model, **{**known, **settings}),
            "frontend": "kiwano",  # or "wespeaker": the two filterbank settings in use
            "dtype": "float32",  # of the network's arithmetic; parameters and statistics stay float32
            "data": {
                "train": "",  # one DATA, or several separated by commas
                "crop_seconds": 2.0,
                "speeds": (1.0,),  # speed perturbation: each speed other than 1 makes new speakers
                "augment": True,  # noise, music, babble, clean, reverberation: one of those at hand, uniformly
                "noise": "",  # DATA of noise clips
                "music": "",  # DATA of music clips
                "threads": 2,
            },
            "spec_augment": 0.6,  # probability of masking one band and one stretch of time; 0 turns it off
            "loss": {
                "weight": 1.0,  # of this classification loss; 0 trains by distillation alone, without speaker labels
                "kind": "aam",  # softmax, am, aam
                "scale": 30.0,
                "margin": 0.2,
                "margin_start": 0.0,  # epochs; the margin rises linearly from 0 at the start
                "margin_end": 0.0,  # to `margin` at the end
                "sub_centres": 1,
                "jeffreys": False,  # instead of cross entropy
                "smoothing": 0.1,  # Jeffreys' c1
                "spread": 0.025,  # Jeffreys' c2
            },
            # Distillation from a full-precision network: what the student gets wrong about its teacher.
            "distill": {
                "weight": 0.0,  # 0: no teacher
                "teacher": "",  # a MODEL; empty: init_from
                "cosine": 1.0,  # weight of 1 - cosine of the embeddings
                "embedding": 0.5,  # of their relative squared error
                "stage": 1.0,  # of the mean relative squared error of the four stages' outputs
            },
            # Quantization-aware training, where `bits` or `rules` are given.
            "quant": {
                "bits": 0,  # width of every kernel
                "rules": (),  # (pattern, bits) before that, first match wins; 0 keeps full precision
                "granularity": "channel",  # or "tensor": what shares a codebook
                "coarse": (),  # further, smaller widths that the same indices serve
                "grow_from": "",  # MODEL trained at the smallest of them: it is kept, wider widths train in its cells
                "recipe": "normalized",  # latents in units of a channel's deviation; or "kmqat", of the weights
                "init": "optimal",  # of the centroids, see quant.kmeans
                "retention": 0.9,
                "symmetric": False,
                "pinned_zero": False,
                "recalibrate": 100,  # crops to fit layers on before (see kmqat.begin), and BN statistics after; 0: none
                "learn_scale": True,
                "thaw_epochs": 0.0,  # the scales stay as they are until then
                "centroids": "gradient",  # or "lloyd", or "fixed"
                "reduction": "sum",  # of the centroids' gradients over their members, or "mean"
                "clip": 0.0,  # latents beyond this multiple of the outermost centroid get no gradient; 0: all do
                "lloyd_every": 100,  # steps
                "lloyd_rate": 0.1,  # share of the way to the members' mean
                "lloyd_unused_rate": 0.2,  # where many centroids have no members
                "lloyd_until": 0.67,  # share of the run after which centroids rest
                "reassign_every": 0,  # steps between assignments of latents to centroids; 0: at every step
                "budget": 0.0,  # mixed precision within this share of the kernels' float32 bytes; 0: widths as above
                "budget_bits": (2, 3, 4),  # that the budget is spent on
                "sections": 4,  # groups of tensors of like sensitivity that share a width; 0: each has its own
                "hessian_draws": 10,
                "multi_stage": False,  # tensors of the smallest width are quantized first, wider ones later
            },
            "optimizer": {
                "name": "sgd",
                "momentum": 0.9,
                "nesterov": False,
                "b1": 0.9,
                "b2": 0.999,
                "weight_decay": 1e-4,
                "clip": 0.0,
                # (pattern, learning-rate factor, weight-decay factor): none on normalisation, biases and classifier
                "groups": ((r"/(bias|scale)$|classifier", 1.0, 0.0),),
            },
            "learning_rate": {
                "kind": "cosine",  # cosine, exponential, step
                "start": 0.0,
                "peak": 0.1,
                "final": 0.0,
                "warmup_epochs": 1.0,
                "flat_until": 0.0,
                "every": 10.0,
                "factor": 2.0,
            },
            "batch_size": 128,  # over all devices
            "epochs": 10.0,
            "epoch_steps": 0,
            # (pattern, axis): parameters split over the mesh; the rest is replicated
            "sharding": (),
            "log_every": 10,  # steps
            "checkpoint_epochs": 1.0,  # 0: only at the end
            "keep_checkpoints": 2,
            "average_last": 0,  # average this many last checkpoints into the final model
            "validation": {
                "data": "",  # DATA; empty: no validation
                "trials": "",
                "epochs": 1.0,  # how often
            },
        }
    )


def quantized(config: ml_collections.ConfigDict, bits: int, **settings: Any) -> ml_collections.ConfigDict:
    """Turns a run into quantization-aware training by distillation from the network it starts from.

    Latents are in units of a channel's standard deviation, which is what the learning rate is about: the closer the
    centroids, the smaller it must be. Scales, centroids, biases and what is kept in full precision move more slowly.

    Args:
        config: changed in place.
        bits: width of every kernel.
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


def steps_of(epochs: float, epoch_steps: int) -> int:
    """Turns epochs into whole steps; at least one where epochs is above zero.

    Raises:
        UserError: negative.
    """
    if epochs < 0:
        raise UserError(f"epochs (={epochs}) must not be negative")
    return max(1, round(epochs * epoch_steps)) if epochs else 0


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
    """Shrinks a run so that all of it passes in seconds: a narrow, shallow network, four steps, synthetic voices."""
    config.model.update(width=8, blocks=(1, 1, 1, 1), embedding_size=32)
    speakers = "synthetic:{}?speakers=8&utterances=4"
    config.data.update(train=speakers.format("train"), noise="synthetic:noise", music="", crop_seconds=1.0)
    config.validation.update(data=speakers.format("dev"), trials=speakers.format("dev"))
    if config.distill.weight and not config.distill.teacher:  # no model is at hand to start and to learn from
        config.distill.weight, config.loss.weight = 0.0, 1.0
    config.quant.recalibrate = min(config.quant.recalibrate, 8)
    config.update(init_from="", batch_size=8, epochs=2.0, epoch_steps=2, log_every=1)
    config.average_last = 0 if config.quant.bits else 2
    return config
