"""The one exception for what a user can mend, and the commonest of its reasons: a package that was left out."""

import importlib
from types import ModuleType


class UserError(ValueError):
    """A user's mistake, told in one line that names the flag, file, line or value at fault.

    Commands print the message and exit with status 2; library callers may catch it as a ValueError.
    """


def needed(module: str, what: str) -> ModuleType:
    """Imports a module that light installs, or some platforms, lack.

    Args:
        module: its name.
        what: needs it, for the message.

    Raises:
        UserError: it is not installed.

    >>> needed("no_such.thing", "training")
    Traceback (most recent call last):
    kmq_jax.core.errors.UserError: training needs the package no_such: pip install no_such
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(f"{what} needs the package {package}: pip install {package}") from None
