"""What the command line turns into a single clear line instead of a traceback."""


class InputError(ValueError):
    """Something the user gave is wrong: the message names the value, what is allowed and what to do. Exit code 2."""


class MachineError(RuntimeError):
    """A machine does not do what it should; starting again, perhaps without it, may help. Exit code 1."""
