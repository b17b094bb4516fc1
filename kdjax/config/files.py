"""Config files, and the keys that they have."""

import difflib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import kdjax
from kdjax.errors import UsageError, UserError
from kdjax.paths import as_path


def config_names() -> dict[str, Path]:
    """The configs that come with kdjax, by name: those in ``configs/``, which is ``kdjax.configs`` once installed."""
    installed = importlib.util.find_spec("kdjax.configs")
    places = (installed.submodule_search_locations or []) if installed else []
    for folder in (*map(Path, places), Path(kdjax.__file__).parents[1] / "configs"):
        if files := {path.stem: path for path in sorted(folder.glob("*.py"))}:
            return files
    return {}


def find_config(spec: str) -> tuple[Path, list[str]]:
    """The file that ``name`` or ``path`` stands for, and what follows a colon: the variant, if any.

    >>> path, variant = find_config("mgd:tiny")
    >>> path.name, variant
    ('mgd.py', ['tiny'])

    Raises:
        UsageError: there is no such config or file.
    """
    name, *variant = spec.split(":", 1)
    known = config_names()
    if name in known:
        return known[name], variant
    if as_path(name).is_file():
        return as_path(name), variant
    near = difflib.get_close_matches(Path(name).stem, known, n=1)
    meant = f", perhaps {near[0]}" if near else ""
    raise UsageError(
        f"--config={spec} cannot be read: there is no file {as_path(name)}; name one, or one of the configs that "
        f"come with kdjax ({', '.join(known)}){meant}."
    )


def load_config(spec: str) -> ConfigDict:
    """The config that ``name``, ``path``, ``name:variant`` or ``path:variant`` stands for, before any override.

    >>> list(load_config("mgd:tiny").student.methods)
    ['mgd']

    Raises:
        UsageError: there is no such config or file.
        UserError: there is no such variant, or the file fails.
    """
    path, variant = find_config(spec)
    module_spec = importlib.util.spec_from_file_location("config", path)
    if module_spec is None or module_spec.loader is None:
        raise UsageError(f"--config={spec} is no Python file.")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        config = module.get_config(*variant)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--config={spec} fails with {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={spec}: get_config returns a {type(config).__name__}, it must be a ConfigDict.")
    return config


def leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a config by its dotted path, with its value."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
