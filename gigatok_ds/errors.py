"""The one exception that the command line turns into a single clear line and exit code 2."""


class InputError(ValueError):
    """Something the user gave is wrong: the message names the value, what is allowed and what to do."""
