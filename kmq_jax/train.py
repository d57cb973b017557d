"""`python -m kmq_jax.train`, the same as `kmq-jax train`."""

from kmq_jax.cli import command, train

if __name__ == "__main__":
    command.run("train", train.main)
