"""Trains a teacher and distils a student from it: ``python -m kdjax.main --config=configs/mgd.py``."""

import itertools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict, config_flags

from kdjax import paths
from kdjax.config import find_config, leaves, load_config
from kdjax.config.schema import LOSS_WEIGHT, Data, Optimizer, Run, Stage
from kdjax.devices import cache_compilations
from kdjax.errors import Exit, NumericError, UsageError, UserError, quoted
from kdjax.methods import method_class
from kdjax.models import complete, model_class
from kdjax.options import declared, hint
from kdjax.processes import are_several, connect, everywhere, is_main, is_of_others, leave, speaker
from kdjax.stopping import Stopped


class _ConfigParser(flags.ArgumentParser):
    """Loads what ``--config`` names, with the options of its models that other flags set."""

    def parse(self, argument: str) -> ConfigDict:
        config = _with_options(load_config(argument), sys.argv)
        config.lock()
        return config


CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config by name, such as mgd, or its file; with a variant behind a colon, such as mgd:tiny."
)
flags.FLAGS["config"].parser = _ConfigParser()
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for all results, here or gs://bucket/folder; runs/<name of the config> by default."
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT where process 0 of several listens.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are, where nothing else tells.")
_PROCESS = flags.DEFINE_integer("process", None, "The number of this one, from 0.")

_REQUIRE_GAIN = flags.DEFINE_bool(
    "require_gain", False, "End with exit code 2 unless the students of config.seeds are better than their twins."
)


def main(argv: Sequence[str]) -> int:
    """Runs the stages of ``--config`` in ``--workdir``; returns the exit code, see :class:`kdjax.errors.Exit`."""
    # Orbax, Grain and TFDS take a second to import: --help and a typo are answered before.
    from kdjax.run import pipeline

    logging.set_verbosity(logging.FATAL)
    if _REQUIRE_GAIN.value and not CONFIG.value.get("seeds"):
        return refuse(UsageError("--require_gain asks what several seeds say: give --config.seeds='(0, 1, 2)'."))
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    workdir = WORKDIR.value or os.path.join("runs", name)

    def work() -> int:
        begin(workdir)
        summary = pipeline.run(CONFIG.value, workdir)
        failed = _REQUIRE_GAIN.value and summary["verdict"]["outcome"] != "gain"
        return Exit.NO_GAIN if failed else Exit.FINISHED

    return ended(work, "the same command goes on from the last checkpoint, if any")


def given_workdir() -> paths.Path:
    """The folder of a run that ``--workdir`` names, for programs that look into one.

    Raises:
        UsageError: it names none.
    """
    if not WORKDIR.value:
        raise UsageError("--workdir is missing; name the folder of a run, such as --workdir=runs/first.")
    return paths.as_path(WORKDIR.value)


def ended(work: Callable[[], int], interrupted: str) -> int:
    """The exit code of a program's work, however it ends; a process that fails alone among several leaves at once.

    Args:
        work: returns the exit code.
        interrupted: what to say where somebody stops it.
    """
    try:
        with paths.reaching():
            return work()
    except (UserError, NumericError) as error:
        return refuse(error)
    except Stopped as stopped:
        print(f"{speaker()}: {stopped}.", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print(f"kdjax: interrupted; {interrupted}.", file=sys.stderr)
        if are_several():
            leave(Exit.INTERRUPTED)
        return Exit.INTERRUPTED
    except Exception as error:
        if are_several() and is_of_others(error):
            what = f"another process of this run is gone ({quoted(error)})"
            print(f"{speaker()}: {what}; {interrupted}.", file=sys.stderr)
            leave(Exit.AGAIN)
        if are_several():
            traceback.print_exc()
            leave(Exit.BUG)
        raise


def begin(workdir: str = "") -> None:
    """What comes before a program's first array: the other processes, if any, and the cache of what XLA compiled.

    Args:
        workdir: of a run.

    Raises:
        UsageError: what is said of the processes makes no sense together.
        UnreachedError: they do not find each other.
        StorageError: the workdir's bucket cannot be reached.
    """
    sys.unraisablehook = _unraisable
    if "://" in (cache := os.environ.get("JAX_COMPILATION_CACHE_DIR", "")):
        paths.take_client(cache)  # JAX looks there for the first thing that it compiles, with which processes connect.
    connect(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    everywhere(lambda: cache_compilations(workdir))
    if not is_main():
        # The main process alone tells; what is wrong here goes to standard error.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _unraisable(found: "sys.UnraisableHookArgs") -> None:
    """Leaves out what TensorStore gives up after its loop is closed: what went wrong there is told elsewhere."""
    if not (isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(found)


def parse(argv: Sequence[str]) -> list[str]:
    """Parses the command line; whatever is wrong with it is one sentence and an exit code, 64 of flags, 78 of keys."""
    return _parsed(argv, _check)


def parse_flags(argv: Sequence[str], foreign: Sequence[str] = ("config", "workdir")) -> list[str]:
    """As :func:`parse`, of programs that take no config; ``foreign`` flags are there, but not for them."""

    def check(argv: Sequence[str]) -> None:
        for name, _ in _values(argv):
            if name.partition(".")[0] in foreign:
                raise UsageError(f"--{name} is no flag of this program: what it needs is in the folder that it reads.")
        _check_stray(argv)

    return _parsed(argv, check)


def _parsed(argv: Sequence[str], check: Callable[[Sequence[str]], None]) -> list[str]:
    try:
        argv = _with_config_path(argv)
        if not any(argument in ("--help", "-help", "--helpfull", "-?") for argument in argv):
            check(argv)
        return flags.FLAGS(argv)
    except flags.Error as error:
        kind = UserError if "--config." in str(error) else UsageError
        raise SystemExit(refuse(kind(" ".join(str(error).split())))) from error
    except UserError as error:
        raise SystemExit(refuse(error)) from error


def _with_config_path(argv: Sequence[str]) -> list[str]:
    """``--config=mgd:tiny`` and ``--config=~/mine.py`` as paths: the flag library knows no others."""
    written = list(argv)
    for place, argument in enumerate(argv):
        flag, equals, spec = argument.partition("=")
        if flag.lstrip("-") != "config" or not flag.startswith("-"):
            continue
        if equals:
            written[place] = f"{flag}={_path(spec)}" if spec else argument
        elif place + 1 < len(argv):
            written[place + 1] = _path(argv[place + 1])
    return written


def _path(spec: str) -> str:
    path, variant = find_config(spec)
    return ":".join([str(path), *variant])


def _check(argv: Sequence[str]) -> None:
    """Refuses in words what the flag library would refuse with a traceback, or not at all."""
    specs = [value for name, value in _values(argv) if name == "config"]
    if not specs or not specs[-1]:
        raise UsageError("--config is missing; name a config, such as --config=mgd, or the path of a config file.")
    config = _with_options(load_config(specs[-1]), argv)
    known = dict(leaves(config))
    for key, value in _overrides(argv):
        if any(path.startswith(key + ".") for path in known):
            raise UserError(f"config.{key} is a section, not a key; {hint(key, known)}.")
        if key not in known:
            meant = hint(key, [*known, *_model_options(config)])
            raise UserError(f"config.{key} (set to {value!r}) is not a key of this config; {meant}.")
        kind = _kind(config, key)
        if kind in (int, float) and not _is_number(value, kind):
            raise UserError(f"config.{key} is {value!r}; it must be {_words(config, key, kind)}.")
    _check_stray(argv)


def _with_options(config: ConfigDict, argv: Sequence[str]) -> ConfigDict:
    """A config with the options of its models that it leaves out and flags set, at their defaults."""
    if named := dict(_overrides(argv)).keys() - dict(leaves(config)).keys():
        left_out = {path: default for path, default in _model_options(config).items() if path in named}
        with config.unlocked():
            config.update(unflatten_dict(left_out, sep="."))
    return config


def _model_options(config: ConfigDict) -> dict[str, Any]:
    """The options of all models of a config by their dotted paths, and their defaults where it leaves them out."""
    options = {}
    for stage, section in config.items():
        if isinstance(section, ConfigDict) and isinstance(section.get("model"), ConfigDict):
            for path, value in flatten_dict(complete(section.model.to_dict()), sep=".").items():
                options[f"{stage}.model.{path}"] = value
    return options


def _check_stray(argv: Sequence[str]) -> None:
    """Refuses what belongs to no flag."""
    rest = [argument for argument in argv[1:] if not argument.startswith("-")]
    spaced = [value for name, value in _values(argv) if f"--{name}={value}" not in argv]
    if stray := [argument for argument in rest if argument not in spaced]:
        raise UsageError(f"{stray[0]!r} is no flag; every option is --flag=value.")


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


def _overrides(argv: Sequence[str]) -> list[tuple[str, str]]:
    """Keys of the config that flags set, by their dotted paths, with their values."""
    return [(name.removeprefix("config."), value) for name, value in _values(argv) if name.startswith("config.")]


def _is_number(text: str, kind: type) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


def _words(config: ConfigDict, key: str, kind: type) -> str:
    """What a number may be."""
    *section, name = key.split(".")
    if section[1:] == ["loss_weights"]:
        return LOSS_WEIGHT.words
    options = declared(_declaring(config, section))
    return options[name].rule.words.removesuffix(", or None") if name in options else f"a number ({kind.__name__})"


def _declaring(config: ConfigDict, section: Sequence[str]) -> type:
    """The class that declares the keys of a section, which is given as its path."""
    match section:
        case []:
            return Run
        case ["data"]:
            return Data
        case [*_, "optimizer"]:
            return Optimizer
        case [stage, "methods", method]:
            return method_class(config[stage].methods[method].name)
        case [stage, "model", *part]:
            model = model_class(config[stage].model.name)
            return model.parts.get("".join(part), model)
    return Stage


def refuse(error: UserError | NumericError) -> int:
    """Prints the one sentence that ends a program; returns its exit code."""
    print(f"{speaker()}: {error}", file=sys.stderr)
    if are_several() and not error.everywhere:
        leave(error.exit_code)
    return error.exit_code


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
