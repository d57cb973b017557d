"""Benchmarks as commands: `kmq-jax bench NAME`. Each measures ours beside what a user would pick instead."""
