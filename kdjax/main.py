"""Trains a teacher and distils a student from it: ``python -m kdjax.main --config=configs/mgd.py``."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from kdjax import pipeline
from kdjax.errors import NumericError, UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, such as configs/mgd.py or configs/mgd.py:tiny.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for all results; runs/<name of the config> by default.")

_CACHE = Path.home() / ".cache" / "kdjax" / "xla"


def main(_: Sequence[str]) -> None:
    """Runs the stages of ``--config`` in ``--workdir``."""
    logging.set_verbosity(logging.ERROR)
    # A second start compiles nothing anew; JAX_COMPILATION_CACHE_DIR moves the cache.
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(_CACHE))
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    pipeline.run(_CONFIG.value, _WORKDIR.value or os.path.join("runs", name))


def _parse(argv: Sequence[str]) -> list[str]:
    """Parses the command line; whatever is wrong with it is one sentence."""
    try:
        rest = flags.FLAGS(argv)
    except (flags.Error, UserError, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise SystemExit(_refuse(UserError(_sentence(error)))) from error
    if _CONFIG.value is None:
        raise SystemExit(
            _refuse(UserError("--config is missing; name a config file, such as --config=configs/mgd.py."))
        )
    if len(rest) > 1:
        raise SystemExit(_refuse(UserError(f"{rest[1]!r} is no flag; every option is --flag=value.")))
    return rest


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())


def _refuse(error: UserError | NumericError) -> int:
    print(f"kdjax: {error}", file=sys.stderr)
    return error.exit_code


def _run(argv: Sequence[str]) -> int:
    try:
        main(argv)
    except (UserError, NumericError) as error:
        return _refuse(error)
    except KeyboardInterrupt:
        print("kdjax: interrupted; the same command continues from the last checkpoint.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    app.run(_run, flags_parser=_parse)
