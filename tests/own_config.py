"""The smoke form of a training of tests/own_network.py, for commands: `--config=tests/own_config.py`."""

import ml_collections
import own_network  # noqa: F401  # registers the network

from kmq_jax.training.config import default_config, published_kmqat, smoke


def plain(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The same without augmentation, most of what there would be to compile."""
    config.data.augment, config.spec_augment = False, 0.0
    return config


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the configuration; "kmqat" is KMQAT as published with 2 to 4 bits a kernel, 2.5 in the mean."""
    if arg == "kmqat":
        return plain(smoke(published_kmqat(default_config("own_tdnn"), 0, average_bits=2.5)))
    return plain(smoke(default_config("own_tdnn")))
