"""Training objectives on embeddings and logits."""

from kmq_jax.losses.distill import cosine_distance, distillation
from kmq_jax.losses.jeffreys import jeffreys
from kmq_jax.losses.margin import MarginSchedule, class_cosines, cross_entropy, init_centres, margin_logits

__all__ = [
    "MarginSchedule",
    "class_cosines",
    "cosine_distance",
    "cross_entropy",
    "distillation",
    "init_centres",
    "jeffreys",
    "margin_logits",
]
