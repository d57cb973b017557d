"""The one exception for what a user can mend."""


class UserError(ValueError):
    """A user's mistake, told in one line that names the flag, file, line or value at fault.

    Commands print the message and exit with status 2; library callers may catch it as a ValueError.
    """
