"""What ``pip install`` brings, used outside of the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

PROGRAM = """
import sys
import jax.numpy as jnp
from kdjax.losses import mgd_loss

features = jnp.ones((1, 4, 4, 8))
loss = mgd_loss(features, 2 * features, keep=jnp.ones((1, 4, 4, 1)), generate=lambda x: x)
unwanted = {"flax", "optax", "orbax", "tensorflow_datasets"} & sys.modules.keys()
import kdjax
from kdjax.config import load_config
print(kdjax.__file__, float(loss), unwanted, *load_config(sys.argv[1]).student.methods)
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """A wheel of the package, unpacked."""
    root = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, root)
    for name in ("kdjax", "configs"):
        shutil.copytree(REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", root / "wheels", root], check=True, capture_output=True)
    (wheel,) = (root / "wheels").glob("kdjax-*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(root / "site")
    return root / "site"


def test_every_module_is_in_the_wheel(unpacked):
    def modules(root):
        return {str(path.relative_to(root)) for path in (root / "kdjax").rglob("*.py")}

    configs = {f"kdjax/configs/{path.name}" for path in (REPOSITORY / "configs").glob("*.py")}
    assert modules(unpacked) == modules(REPOSITORY) | configs
    assert {path.name.partition("-")[0] for path in unpacked.iterdir()} == {"kdjax"}


def test_the_wheel_works_elsewhere(unpacked, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "mgd:tiny"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # The sum of (1 - 2)^2 over 4 x 4 positions of 8 channels.
    assert done.stdout.split() == [str(unpacked / "kdjax" / "__init__.py"), "128.0", "set()", "mgd"]
