"""From waveforms to features, in JAX: filterbanks, normalisation, augmentation."""

from kmq_jax.frontend.augment import (
    RoomConfig,
    SpecAugmentConfig,
    add_noise,
    augment_batch,
    from_int16,
    reverberate,
    simulate_rir,
    spec_augment,
)
from kmq_jax.frontend.fbank import (
    KIWANO,
    SPEAKER3D,
    WESPEAKER,
    FbankConfig,
    FrontEnd,
    fbank,
    features_of,
    num_frames,
    spectrum_operators,
)
from kmq_jax.frontend.mel import REDIMNET, RESEMBLYZER, SPEECHBRAIN, MelConfig
from kmq_jax.frontend.normalize import crop_frames, mean_normalize

__all__ = [
    "KIWANO",
    "REDIMNET",
    "RESEMBLYZER",
    "SPEAKER3D",
    "SPEECHBRAIN",
    "WESPEAKER",
    "FbankConfig",
    "FrontEnd",
    "MelConfig",
    "RoomConfig",
    "SpecAugmentConfig",
    "add_noise",
    "augment_batch",
    "crop_frames",
    "fbank",
    "features_of",
    "from_int16",
    "mean_normalize",
    "num_frames",
    "reverberate",
    "simulate_rir",
    "spec_augment",
    "spectrum_operators",
]
