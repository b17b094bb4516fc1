"""Float noise in every initial weight: what another processor does to a training, made on this one.

    KDJAX_NOISE=1e-3 KDJAX_NOISE_SEED=1 python -m pytest -p tests.noise

A plugin of pytest. A test whose verdict changes with the seed hangs on the path that one training takes. What else a
processor changes is tried by ``XLA_FLAGS=--xla_cpu_max_isa=AVX2`` (or ``SSE4_2``) and by ``taskset -c 0``, which leaves
XLA one thread.
"""

import os
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp

_SIZE, _SEED = float(os.environ.get("KDJAX_NOISE", "1e-3")), int(os.environ.get("KDJAX_NOISE_SEED", "0"))
_exact_param = nn.Module.param


def _noisy_param(self: nn.Module, name: str, init_fn, *init_args, **options):
    """``nn.Module.param`` with every weight of a kind that is drawn multiplied by 1 + noise."""

    def init(key: jax.Array, *args, **kwargs):
        value = init_fn(key, *args, **kwargs)
        place = zlib.crc32("/".join((*self.path, name)).encode())
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(_SEED), place), jnp.shape(value))
        return value * (1 + _SIZE * noise).astype(jnp.asarray(value).dtype)

    return _exact_param(self, name, init, *init_args, **options)


def pytest_configure() -> None:
    nn.Module.param = _noisy_param
