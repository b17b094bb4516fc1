"""Batch norm against its formula: what normalises is the biased variance, what is kept the unbiased one."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.models.norm import BatchNorm

RNG = np.random.default_rng(0)
X = RNG.normal(1, 2, (8, 30, 11, 4)).astype(np.float32)
VARIABLES = {
    "params": {name: RNG.uniform(0.5, 1.5, 4).astype(np.float32) for name in ("scale", "bias")},
    "batch_stats": {name: RNG.uniform(0.5, 1.5, 4).astype(np.float32) for name in ("mean", "var")},
}


def normalised(x, mean, var, epsilon):
    scale, bias = VARIABLES["params"]["scale"], VARIABLES["params"]["bias"]
    return (x - mean) / np.sqrt(var + epsilon) * scale + bias


def test_training_normalises_by_the_biased_variance_and_keeps_the_unbiased_one():
    y, updated = BatchNorm(True, epsilon=0.1).apply(VARIABLES, X, mutable=["batch_stats"])
    axes = (0, 1, 2)
    np.testing.assert_allclose(y, normalised(X, X.mean(axes), X.var(axes), 0.1), rtol=1e-4, atol=1e-5)
    before, after = VARIABLES["batch_stats"], updated["batch_stats"]
    np.testing.assert_allclose(after["mean"], 0.9 * before["mean"] + 0.1 * X.mean(axes), rtol=1e-5)
    np.testing.assert_allclose(after["var"], 0.9 * before["var"] + 0.1 * X.var(axes, ddof=1), rtol=1e-5)


def test_inference_uses_the_running_statistics_and_leaves_them_alone():
    y, updated = BatchNorm(False).apply(VARIABLES, X, mutable=["batch_stats"])
    expected = normalised(X, VARIABLES["batch_stats"]["mean"], VARIABLES["batch_stats"]["var"], 1e-5)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, updated["batch_stats"], VARIABLES["batch_stats"])


def test_a_single_value_has_no_variance():
    y, updated = BatchNorm(True).apply(VARIABLES, X[:1, :1, :1], mutable=["batch_stats"])
    np.testing.assert_allclose(y, np.broadcast_to(VARIABLES["params"]["bias"], y.shape), rtol=1e-5)
    np.testing.assert_allclose(updated["batch_stats"]["var"], 0.9 * VARIABLES["batch_stats"]["var"], rtol=1e-6)


def test_of_few_values_the_variance_keeps_its_digits():
    x = np.array([[1000.0], [1000.01]], np.float32)
    variables = {
        "params": {"scale": np.ones(1), "bias": np.zeros(1)},
        "batch_stats": {"mean": np.zeros(1), "var": np.ones(1)},
    }
    _, updated = BatchNorm(True).apply(jax.tree.map(np.float32, variables), x, mutable=["batch_stats"])
    np.testing.assert_allclose((updated["batch_stats"]["var"] - 0.9) / 0.1, x.var(ddof=1), atol=1e-6)


@pytest.mark.parametrize("devices", [2, 8])
def test_any_number_of_devices_has_the_statistics_of_one(devices):
    expected, stats = BatchNorm(True).apply(VARIABLES, X, mutable=["batch_stats"])
    across = BatchNorm(True, axis_name="devices")
    run = jax.pmap(
        lambda x: across.apply(VARIABLES, x, mutable=["batch_stats"]),
        axis_name="devices",
        out_axes=(0, None),
        devices=jax.devices()[:devices],
    )
    y, updated = run(X.reshape(devices, -1, *X.shape[1:]))
    np.testing.assert_allclose(np.reshape(y, X.shape), expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), updated, stats)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("train", [True, False])
def test_but_for_that_variance_it_is_flaxs(train, dtype):
    x = jnp.asarray(X, dtype)
    ours = BatchNorm(train, epsilon=1e-3, dtype=dtype)
    theirs = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-3, dtype=dtype)
    fresh = ours.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, fresh, theirs.init(jax.random.key(0), x))
    y, updated = ours.apply(VARIABLES, x, mutable=["batch_stats"])
    expected, stats = theirs.apply(VARIABLES, x, mutable=["batch_stats"])
    assert y.dtype == expected.dtype == dtype
    # Statistics of a batch differ by rounding, in which ours is the closer one.
    within = {"rtol": 2e-2 if dtype == jnp.bfloat16 else 1e-5, "atol": 2e-6} if train else {"rtol": 0}
    np.testing.assert_allclose(np.float32(y), np.float32(expected), **within)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], stats["batch_stats"]["mean"], rtol=1e-5 * train)
