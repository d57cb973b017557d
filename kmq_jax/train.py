"""`python -m kmq_jax.train`, the same as `kmq-jax train`."""

from kmq_jax.cli.main import run

if __name__ == "__main__":
    run("train")
