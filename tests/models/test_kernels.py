"""Which kernels of a teacher are cast; that it then says the same is in test_contract."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax.models.kernels import cast_kernels


class Standardised(nn.Dense):
    """What is derived from a layer may compute with its kernel in float32."""


class Own(nn.Module):
    """A model that takes images of one size."""

    @nn.compact
    def __call__(self, images):
        assert images.shape[1:] == (96, 32, 3)
        x = nn.Dense(2, dtype=jnp.bfloat16, name="plain")(images)
        x = Standardised(2, dtype=jnp.bfloat16, name="derived")(x)
        x = nn.Dense(2, dtype="bfloat16", name="by_name")(x)
        x = nn.Dense(2, dtype=jnp.float16, name="other")(x)
        return nn.LayerNorm(dtype=jnp.bfloat16, name="norm")(nn.Dense(2, name="as_given")(x))


def test_kernels_of_layers_that_compute_in_the_dtype_are_cast_and_nothing_else():
    variables = Own().init(jax.random.key(0), jnp.zeros((1, 96, 32, 3)))
    cast = cast_kernels(Own(), variables, jnp.bfloat16, (96, 32))
    dtypes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x.dtype.name
        for path, x in jax.tree_util.tree_leaves_with_path(cast["params"])
    }
    found = {path for path, dtype in dtypes.items() if dtype == "bfloat16"}
    assert found == {"plain/kernel", "by_name/kernel"}
    assert set(dtypes.values()) == {"bfloat16", "float32"}
    assert cast_kernels(Own(), variables, "float32", (96, 32)) is variables
