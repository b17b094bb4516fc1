"""Prints the dependencies of pyproject.toml, and those of its buckets, at their lower bounds: constraints for pip."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
for dependency in [*project["dependencies"], *project["optional-dependencies"]["gcs"]]:
    found = re.fullmatch(r"([\w.-]+)>=([\w.]+)(,<[\w.]+)?", dependency)
    if not found:
        raise SystemExit(f"{dependency!r} of pyproject.toml declares no lower bound.")
    print(f"{found[1]}=={found[2]}")
