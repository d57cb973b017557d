"""The exception for mistakes that a user can mend; what other errors say, in a line; a package that is missing."""

import importlib
from types import ModuleType


class UserError(ValueError):
    """A user's mistake, told in one line that names the flag, file, line or value at fault.

    Commands print the message and exit with status 2; library callers may catch it as a ValueError.
    """


def reason_of(error: Exception) -> str:
    """What is wrong: of an error of the system its own words, of any other error its text.

    >>> reason_of(OSError(28, "No space left on device", "a.npz")), reason_of(ValueError("embedded null byte"))
    ('No space left on device', 'embedded null byte')
    """
    return getattr(error, "strerror", None) or str(error)


def first_line(error: BaseException) -> str:
    r"""The first line of an error's text, or the name of its class where it has no text.

    >>> first_line(RuntimeError("no such tensor\nat 0x7f")), first_line(MemoryError())
    ('no such tensor', 'MemoryError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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
