"""MGD beyond the contract."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.methods import build_method
from tests.methods.test_contract import STEP, keys, pyramids, targets


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_mgd_generates_from_everything_or_nothing(ratio):
    method = build_method({"name": "mgd", "mask_ratio": ratio})
    student, teacher = pyramids("mgd")
    arguments = {"keys": keys(2), "step": STEP}
    variables = jax.jit(method.init)(jax.random.key(0), student, teacher, targets(), **arguments)

    @jax.jit
    @jax.value_and_grad
    def loss(student):
        return method.apply(variables, student, teacher, targets(), **arguments)["mgd"]

    value, gradient = loss(student)
    assert np.isfinite(value)
    assert (sum(jnp.abs(x).sum() for x in gradient.values()) > 0) == (ratio == 0)
