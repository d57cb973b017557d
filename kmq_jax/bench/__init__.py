"""Benchmarks as commands: `python -m kmq_jax.bench NAME`. Each measures ours beside what a user would pick instead."""
