"""How programs end: the table of exit codes, and what ends one early by design; all else is a bug with a traceback."""

import contextlib
import enum
import traceback
from collections.abc import Iterator


class Exit(enum.IntEnum):
    """The exit codes of all programs, each with how such an end came about, and what is to be done then.

    Those from 64 to 78 are named as in BSD's ``sysexits.h``, 130 as shells have it.

    >>> Exit(65).name, Exit.DATA.cause
    ('DATA', 'annotations, images, weights or a model are damaged, or not what they should be')
    """

    cause: str
    """How a program comes to end so."""
    remedy: str
    """What to do then."""

    def __new__(cls, code: int, cause: str, remedy: str) -> "Exit":
        """A member that is its code."""
        member = int.__new__(cls, code)
        member._value_, member.cause, member.remedy = code, cause, remedy
        return member

    FINISHED = 0, "everything is done", "nothing"
    BUG = 1, "a mistake in kdjax, or in a class of yours, with its traceback", "report it, or mend yours"
    NO_GAIN = 2, "with `--require_gain` alone: the method was not worth anything", "read the verdict"
    USAGE = 64, "a flag or the command line is wrong", "correct the command"
    DATA = 65, "annotations, images, weights or a model are damaged, or not what they should be", "mend the files"
    NUMBERS = 70, "the loss left the finite numbers", "lower the learning rate, or look at the data"
    STORAGE = 74, "the storage refuses to be written or read", "make room, or mend it; then give the same command again"
    AGAIN = (
        75,
        "a signal stopped it, it hung, or a process or a bucket that it needs was not there",
        "give the same command again",
    )
    CONFIG = 78, "a key of the config is wrong, or what it names is not there or does not fit", "correct the config"
    INTERRUPTED = 130, "somebody pressed Ctrl-C", "give the same command again, to go on"


class UserError(ValueError):
    """Something given to kdjax cannot be used: one sentence says what was wrong, where, and what would be right.

    It is raised where that sentence is written. Other exceptions are turned into one only where they are about what was
    given: those of the operating system about files, of a config file, and of libraries that parse, by :func:`parsing`.
    This one itself is about the config, or about what does not fit it; those below are about the rest.
    """

    exit_code = Exit.CONFIG
    everywhere = False
    """Whether all processes of a run raise one here."""


class UsageError(UserError):
    """A flag, or the command line."""

    exit_code = Exit.USAGE


class DataError(UserError):
    """Annotations, images, weights or a model's folder: damaged, or not what they should be."""

    exit_code = Exit.DATA


class StorageError(UserError):
    """A disk, a bucket or another place of files that does not do what it should: full, away, or not to be written."""

    exit_code = Exit.STORAGE


class UnreachedError(UserError):
    """What a run needs over a network, processes or a bucket, is not there; it may be when the run is started again."""

    exit_code = Exit.AGAIN


class AwayError(RuntimeError):
    """A bucket does not answer, in its client's words; where it would end a program it is an :class:`UnreachedError`.

    It is no error of the operating system, and none of a value: whoever meets those would take what the bucket holds
    for missing or damaged.
    """


class NumericError(ArithmeticError):
    """Too many steps in a row were not finite; what was saved before stays."""

    exit_code = Exit.NUMBERS
    everywhere = True


def quoted(error: BaseException, most: int = 300) -> str:
    r"""A library's words in one line, no more than so many characters of them: some repeat what they read.

    >>> quoted(ValueError("no such\n  thing."))
    'no such thing'
    """
    return " ".join(str(error).split())[:most].rstrip(".") or type(error).__name__


def reason(error: OSError) -> str:
    """In one line, why the operating system, or the client of a bucket in its place, refused."""
    return error.strerror or quoted(error)


@contextlib.contextmanager
def parsing(kind: type[UserError] = DataError) -> Iterator[None]:
    """Turns whatever a library raises over what it was given into an error of ``kind`` with the library's words.

    Only calls of the library may stand inside: a mistake of ours would be taken for the user's.
    """
    try:
        yield
    except AwayError:  # It is about what holds that.
        raise
    except Exception as error:
        raise kind(quoted(error)) from error


@contextlib.contextmanager
def harmless(what: str) -> Iterator[None]:
    """Lets a run go on where something fails that is only looked at; a bug keeps its traceback in the log.

    >>> with harmless("report.html"):
    ...     raise UserError("There is no such place.")
    report.html is not made: There is no such place.

    Args:
        what: is made inside, in words.
    """
    try:
        yield
    except UserError as error:
        print(f"{what} is not made: {error}", flush=True)
    except Exception as error:
        traceback.print_exc()
        print(f"{what} is not made ({type(error).__name__}: {error}); all else is as it should be.", flush=True)
