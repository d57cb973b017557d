"""Enrolled speakers: a store of their embeddings; verification and identification against it."""
