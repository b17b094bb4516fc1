"""Trains a teacher and distils a student from it: ``python -m kdjax.main --config=configs/mgd.py``."""

import difflib
import itertools
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from kdjax.config import leaves, load_config, rule
from kdjax.devices import cache_compilations
from kdjax.errors import NumericError, UserError
from kdjax.paths import local_path

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, such as configs/mgd.py or, for another variant, configs/mgd.py:tiny."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for all results; runs/<name of the config> by default.")


def main(argv: Sequence[str]) -> int:
    """Runs the stages of ``--config`` in ``--workdir``; returns the exit code."""
    # Orbax, Grain and TFDS take a second to import: --help and a typo are answered before.
    from kdjax import pipeline

    logging.set_verbosity(logging.ERROR)
    cache_compilations()
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    try:
        pipeline.run(CONFIG.value, _WORKDIR.value or os.path.join("runs", name))
    except (UserError, NumericError) as error:
        return refuse(error)
    except KeyboardInterrupt:
        print("kdjax: interrupted; the same command goes on from the last checkpoint, if any.", file=sys.stderr)
        return 130
    return 0


def parse(argv: Sequence[str]) -> list[str]:
    """Parses the command line; whatever is wrong with it is one sentence and exit code 78."""
    try:
        argv = [_at_home(argument) for argument in argv]
        if not any(argument in ("--help", "-help", "--helpfull", "-?") for argument in argv):
            _check(argv)
        return flags.FLAGS(argv)
    except flags.Error as error:
        raise SystemExit(refuse(UserError(" ".join(str(error).split())))) from error
    except UserError as error:
        raise SystemExit(refuse(error)) from error


def _at_home(argument: str) -> str:
    """``--config=~/mine.py`` with the home directory written out, which the flag library would not understand."""
    flag, equals, path = argument.partition("=")
    return flag + equals + str(local_path(path)) if flag.lstrip("-") == "config" and path.startswith("~") else argument


def _check(argv: Sequence[str]) -> None:
    """Refuses in words what the flag library would refuse with a traceback, or not at all."""
    specs = [value for name, value in _values(argv) if name == "config"]
    if not specs:
        raise UserError("--config is missing; name a config file, such as --config=configs/mgd.py.")
    config = load_config(specs[-1])
    known = dict(leaves(config))
    for name, value in _values(argv):
        if not name.startswith("config."):
            continue
        key = name.removeprefix("config.")
        if any(path.startswith(key + ".") for path in known):
            raise UserError(f"config.{key} is a section, not a key; {_hint(key, known)}.")
        if key not in known:
            raise UserError(f"config.{key} (set to {value!r}) is not a key of this config; {_hint(key, known)}.")
        kind = _kind(config, key)
        if kind in (int, float) and not _is_number(value, kind):
            allowed = rule(key)
            raise UserError(f"config.{key} is {value!r}; it must be {allowed.words if allowed else kind.__name__}.")
    rest = [argument for argument in argv[1:] if not argument.startswith("-")]
    spaced = [value for name, value in _values(argv) if f"--{name}={value}" not in argv]
    if stray := [argument for argument in rest if argument not in spaced]:
        raise UserError(f"{stray[0]!r} is no flag; every option is --flag=value.")


def _kind(config: ConfigDict, key: str) -> type:
    """The type of a key by its dotted path, of one that is None so far as well."""
    *sections, name = key.split(".")
    for section in sections:
        config = config[section]
    return config.get_type(name)


def _values(argv: Sequence[str]) -> list[tuple[str, str]]:
    """Flags with their values, from ``--flag=value`` and ``--flag value``."""
    found = []
    for argument, following in itertools.zip_longest(argv[1:], argv[2:], fillvalue=""):
        if argument.startswith("-"):
            name, equals, value = argument.lstrip("-").partition("=")
            found.append((name, value if equals else following))
    return found


def _is_number(text: str, kind: type) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


def _hint(key: str, known: Iterable[str]) -> str:
    """What an unknown key may have meant: a key spelt alike, or what its section has."""
    if near := difflib.get_close_matches(key, known, n=1, cutoff=0.8):
        return f"the nearest is config.{near[0]}"
    section = key
    while section and not any(path.startswith(section + ".") for path in known):
        section = section.rpartition(".")[0]
    prefix = section + "." if section else ""
    keys = dict.fromkeys(path.removeprefix(prefix).split(".")[0] for path in known if path.startswith(prefix))
    return f"config{'.' * bool(section)}{section} has {', '.join(keys)}"


def refuse(error: UserError | NumericError) -> int:
    """Prints the one sentence that ends a program; returns its exit code."""
    print(f"kdjax: {error}", file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
