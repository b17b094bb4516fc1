"""The recipes of CONTRIBUTING.md, carried out in a copy of the project."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import ROOT, blocks, commands, read, write_files

COPIED = ("kdjax", "configs", "tests", "docs", "experiments", "pyproject.toml", "README.md", "mkdocs.yml")
RECIPES = read("CONTRIBUTING.md").split("\n## Recipe: ")[1:]


def test_there_are_two_recipes():
    assert [recipe.splitlines()[0] for recipe in RECIPES] == ["a method", "a detector"]
    assert all(commands(recipe) and blocks(recipe, "diff") and blocks(recipe, "python") for recipe in RECIPES)


@pytest.fixture
def project(tmp_path) -> Path:
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=["method", "detector"])
def test_a_recipe_is_whole(recipe, project, data_dir):
    write_files(recipe, project)
    for block in blocks(recipe, "diff"):
        patch = ["git", "apply", "-"]
        done = subprocess.run(patch, cwd=project, input=block.text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    users = os.environ | {"PYTHONPATH": str(project), "PATH": path, "TFDS_DATA_DIR": str(data_dir)}
    for line in commands(recipe):
        done = subprocess.run(["bash", "-c", line], cwd=project, env=users, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
