"""Every loss against what the authors' own code computed: values and gradients of every case that is there.

The cases are read from ``losses/`` of the folder named by the environment variable ``KDJAX_GOLDENS``; without it from
``../shared/goldens`` beside the repository where that exists, else from the copy that lies beside this file.
"""

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses

Arrays = dict[str, Any]
VALUE_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


def find_cases() -> list[Path]:
    here = Path(__file__).resolve().parent
    beside = here.parents[2] / "shared" / "goldens"
    default = beside if beside.is_dir() else here
    return sorted((Path(os.environ.get("KDJAX_GOLDENS", default)) / "losses").glob("*.npz"))


CASES = find_cases()


def nest(flat: Arrays) -> Arrays:
    """``{"a/b": x}`` to ``{"a": {"b": x}}``."""
    nested: Arrays = {}
    for name, value in flat.items():
        *parents, leaf = name.split("/")
        branch = nested
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = value
    return nested


def load(path: Path) -> tuple[Arrays, Arrays]:
    with np.load(path) as file:
        meta = json.loads(str(file["meta"]))
        return meta, nest({name: jnp.asarray(file[name]) for name in file.files if name != "meta"})


def convolve(features: jax.Array, parameters: Arrays) -> jax.Array:
    """A convolution of stride 1 with zero padding, as Flax's ``nn.Conv`` computes it."""
    layout = ("NHWC", "HWIO", "NHWC")
    result = jax.lax.conv_general_dilated(features, parameters["kernel"], (1, 1), "SAME", dimension_numbers=layout)
    return result + parameters["bias"][None, None, None]


def assert_value(actual: jax.Array, expected: jax.Array) -> None:
    np.testing.assert_allclose(actual, expected, rtol=VALUE_TOLERANCE, atol=1e-12)


def assert_close(actual: jax.Array, expected: jax.Array, what: str, tolerance: float = GRADIENT_TOLERANCE) -> None:
    """Every entry within ``tolerance`` of the largest one."""
    assert actual.shape == expected.shape, what
    largest = np.max(np.abs(expected), initial=0.0)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * largest + 1e-12, err_msg=what)


def check_mgd(meta: Arrays, case: Arrays) -> None:
    names = ("student", "align", "generation_0", "generation_1")

    def loss(inputs: Arrays) -> jax.Array:
        student = convolve(inputs["student"], inputs["align"]) if "align" in inputs else inputs["student"]
        generate = lambda masked: convolve(  # noqa: E731
            jax.nn.relu(convolve(masked, inputs["generation_0"])), inputs["generation_1"]
        )
        return meta["alpha"] * losses.mgd_loss(student, case["teacher"], keep=case["keep_mask"] > 0, generate=generate)

    value, gradient = jax.value_and_grad(loss)({name: case[name] for name in names if name in case})
    assert_value(value, case["loss"])
    assert_close(gradient["student"], case["grad_student"], "student")
    assert_close(gradient["generation_0"]["kernel"], case["grad_generation_0_kernel"], "generation block")
    if "align" in case:
        assert_close(gradient["align"]["kernel"], case["grad_align_kernel"], "alignment")


CHECKS = {"mgd": check_mgd}


def test_there_are_cases() -> None:
    folder = os.environ.get("KDJAX_GOLDENS", "the default folder")
    assert CASES, f"No case losses/*.npz in {folder}: a folder of goldens without cases is a failure."


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_loss_is_the_authors(path: Path) -> None:
    meta, case = load(path)
    family = "_".join(meta[part] for part in ("method", "stage") if part in meta)
    if family not in CHECKS:
        pytest.skip(f"unknown family of case: {family}")
    CHECKS[family](meta, case)
