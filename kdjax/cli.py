"""The command ``kdjax``: ``kdjax train --config=mgd`` is ``python -m kdjax.main --config=mgd``, and so on."""

import difflib
import runpy
import sys
from collections.abc import Sequence

from kdjax.errors import Exit

PROGRAMS = {
    "train": ("kdjax.main", "train a teacher, and distil a student from it"),
    "evaluate": ("kdjax.evaluate", "measure a saved model on any split"),
    "predict": ("kdjax.predict", "ask a saved model about photographs"),
    "export": ("kdjax.export", "make a file of a saved model for other programs"),
    "report": ("kdjax.html_report", "make a page of a run: what the method was worth, and why"),
    "show": ("kdjax.show", "show what a method does inside: features, masks, and what pulls"),
    "inspect": ("kdjax.inspect", "show what a config trains on"),
    "convert": ("kdjax.convert", "make a model folder of somebody else's weights"),
    "preflight": ("kdjax.preflight", "compile a step for TPUs that are not there"),
    "benchmark": ("kdjax.benchmark", "measure the parts of a step"),
}
"""The word behind ``kdjax`` to the module that it runs, which is all that is imported: flags belong to a process."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program that the first argument names, by its own flags; returns the exit code where there is none.

    Args:
        argv: the command line, by default that of the process.
    """
    command, *arguments = list(sys.argv if argv is None else argv)[1:] or [""]
    if command in ("", "help", "-h", "--help", "-help", "--helpfull", "-?"):
        print(usage(), file=sys.stdout if command else sys.stderr)
        return Exit.FINISHED if command else Exit.USAGE
    if command not in PROGRAMS:
        near = difflib.get_close_matches(command, PROGRAMS)
        meant = f"perhaps {' or '.join(near)} is meant" if near else f"there are {', '.join(PROGRAMS)}"
        first = " The program comes first, its flags behind it." * command.startswith("-")
        print(f"kdjax: {command!r} is no program of kdjax; {meant}.{first}", file=sys.stderr)
        return Exit.USAGE
    module, _ = PROGRAMS[command]
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return Exit.FINISHED


def usage() -> str:
    """What there is, one program in a line."""
    wide = max(map(len, PROGRAMS))
    lines = [f"  {name:{wide}}  {what}" for name, (_, what) in PROGRAMS.items()]
    return "\n".join(
        ["usage: kdjax <program> [--flag=value ...]", "", *lines, "", "kdjax <program> --help has its flags."]
    )


if __name__ == "__main__":
    raise SystemExit(main())
