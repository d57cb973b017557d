"""The exception for mistakes that a user can mend, and the commonest of them: a package that is not installed."""

import importlib
from types import ModuleType


class UserError(ValueError):
    """A user's mistake, told in one line that names the flag, file, line or value at fault.

    Commands print the message and exit with status 2; library callers may catch it as a ValueError.
    """


def needed(module: str, what: str) -> ModuleType:
    """Imports a module that may be missing: light installs and some platforms lack it.

    Args:
        module: its dotted name.
        what: what needs it, for the message.

    Returns:
        The module.

    Raises:
        UserError: it is not installed, or cannot be imported.

    >>> needed("no_such.thing", "training")
    Traceback (most recent call last):
    kmq_jax.core.errors.UserError: training needs the package no_such: pip install no_such
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == package:
            raise UserError(f"{what} needs the package {package}: pip install {package}") from None
        raise UserError(f"{what} needs the package {package}, which cannot be imported: {error}") from error
