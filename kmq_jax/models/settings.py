"""Checks of settings that networks share."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from kmq_jax.core.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")


def check(name: str, fits: bool, value: object, allowed: str) -> None:
    """Refuses a setting.

    Raises:
        UserError: `fits` is false; the message names the setting.
    """
    if not fits:
        raise UserError(f"model setting {name} (={value}) must be {allowed}")


def is_count(value: object) -> bool:
    """Whether a value is a positive integer.

    >>> is_count(3), is_count(0), is_count(True)
    (True, False, False)
    """
    # True is an int to Python.
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def check_counts(**settings: object) -> None:
    """Refuses settings that are no positive integers.

    Raises:
        UserError: the message names the first.

    >>> check_counts(width=8)
    """
    for name, value in settings.items():
        check(name, is_count(value), value, "a positive integer")


def check_dtype(dtype: DTypeLike | None) -> None:
    """Refuses a compute dtype that networks do not know.

    Raises:
        UserError: the message lists those that they do.
    """
    try:
        name = jnp.dtype("" if dtype is None else dtype).name  # numpy takes None for float64
    except TypeError:
        name = ""
    check("dtype", name in DTYPES, dtype, f"one of {', '.join(DTYPES)}")


def check_features(shape: tuple[int, ...], features: int) -> None:
    """Refuses an input that is not `[batch, time, features]`.

    Raises:
        UserError: the message has its shape.
    """
    if len(shape) != 3 or shape[-1] != features:
        raise UserError(f"input of shape {shape}: the network takes [batch, time, {features} features]")
