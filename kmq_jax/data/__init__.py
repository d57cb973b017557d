"""Recordings, trial lists, prepared datasets and the training pipeline."""
