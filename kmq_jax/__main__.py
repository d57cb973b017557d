"""`python -m kmq_jax COMMAND`."""

from kmq_jax.cli.main import main

if __name__ == "__main__":
    main()
