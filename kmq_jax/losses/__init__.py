"""Training objectives on embeddings and logits."""
