"""What the command line turns into a single clear line instead of a traceback."""

import errno

# Of network file systems and connections, that come back.
_PASSING = {getattr(errno, name) for name in (
    "ESTALE", "ETIMEDOUT", "ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN",
    "ENETUNREACH", "ENETRESET", "EREMOTEIO", "EAGAIN", "EPIPE") if hasattr(errno, name)}


class InputError(ValueError):
    """Something the user gave is wrong: the message names the value, what is allowed and what to do. Exit code 2."""


class MachineError(RuntimeError):
    """A machine does not do what it should; starting again, perhaps without it, may help. Exit code 1."""


def exit_code(error: BaseException) -> int:
    """2 where the user has to change something before the same command can succeed; 1 where it may by itself."""
    passing = isinstance(error, OSError) and error.errno in _PASSING
    return 2 if isinstance(error, (InputError, OSError)) and not passing else 1
