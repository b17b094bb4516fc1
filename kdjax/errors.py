"""The two ways in which a run ends early by design; everything else is a bug and keeps its traceback."""

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """Something given to kdjax cannot be used: one sentence says what was wrong, where, and what would be right.

    It is raised where that sentence is written. Other exceptions are turned into one only where they are about what was
    given: those of the operating system about files, of a config file, and of libraries that parse, by :func:`parsing`.
    """

    exit_code = 78
    everywhere = False
    """Whether all processes of a run raise one here."""


class NumericError(ArithmeticError):
    """The loss left the finite numbers; what was saved before stays."""

    exit_code = 70
    everywhere = True


@contextlib.contextmanager
def parsing() -> Iterator[None]:
    """Turns whatever a library raises over damaged input into a :class:`UserError` with the library's words.

    Only calls of the library may stand inside: a mistake of ours would be taken for the user's.
    """
    try:
        yield
    except Exception as error:
        raise UserError(" ".join(str(error).split()).rstrip(".") or type(error).__name__) from error
