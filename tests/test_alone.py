"""The losses without the trainer: as docs/own-loop.md says, with JAX and NumPy alone."""

import os
import re
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest

from tests.pages import ROOT, blocks, commands, read, write_files

PAGE = read("docs/own-loop.md").partition("\n## Without the trainer\n")[2]


def needed(package: str) -> set[str]:
    """A package and all that it asks for here, without what only extras or other versions of Python need."""
    found, left = set(), [package]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            always = (text for text in metadata.requires(name) or [] if ";" not in text)
            left += [re.split(r"[^\w.-]", text)[0].lower() for text in always]
    return found


@pytest.fixture
def environment(tmp_path) -> Path:
    """A virtual environment with nothing but links to JAX as it is installed here, and what JAX needs."""
    venv.create(tmp_path / "alone", with_pip=False)
    (site,) = (tmp_path / "alone" / "lib").glob("python*/site-packages")
    for name in needed("jax"):
        distribution = metadata.distribution(name)
        for top in {path.parts[0] for path in distribution.files or () if path.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    return site


@pytest.mark.slow
def test_one_loss_needs_jax_alone(environment, tmp_path):
    assert commands(PAGE) == ["pip install jax", "pip install --no-deps .", "python alone.py"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    copy = tmp_path / "clone"
    copy.mkdir()
    for name in ("kdjax", "configs", "pyproject.toml", "README.md", "LICENSE"):
        (copy / name).symlink_to(ROOT / name)
    subprocess.run([*pip, "--target", environment, copy], check=True, capture_output=True)
    write_files(PAGE, tmp_path)
    users = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    python = tmp_path / "alone" / "bin" / "python"
    done = subprocess.run([python, "alone.py"], cwd=tmp_path, env=users, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["mgd", "dmkd", "mimic", "cwd"]
    assert not {path.name for path in environment.iterdir()} & {"flax", "optax", "orbax", "etils", "absl", "clu"}
    (block,) = blocks(PAGE, "python")
    assert block.title == "alone.py"
