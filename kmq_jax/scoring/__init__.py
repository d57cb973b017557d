"""Scores of trials from embeddings."""
