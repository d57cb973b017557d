"""From waveforms to features, in JAX: filterbanks, normalisation, augmentation."""
