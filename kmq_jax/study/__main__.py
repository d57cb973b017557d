"""`python -m kmq_jax.study`, the same as `kmq-jax study`."""

from kmq_jax.cli.main import run

if __name__ == "__main__":
    run("study")
