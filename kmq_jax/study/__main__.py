"""`python -m kmq_jax.study`, the same as `kmq-jax study`."""

from kmq_jax.cli import command, study

if __name__ == "__main__":
    command.run("study", study.main)
