"""MGD's module in NumPy: all positions and channels, hidden or not, of all levels."""

import jax
import numpy as np
import pytest

from kdjax.losses import keep_mask
from kdjax.methods import build_method
from tests.methods import reference

PARAMS = reference.random_params(build_method({"name": "mgd"}))


def found(**options) -> jax.Array:
    return reference.apply(build_method({"name": "mgd"} | options), PARAMS)["mgd"]


@pytest.mark.parametrize(("ratio", "kept"), [(0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("mask", ["spatial", "channel"])
def test_it_generates_from_everything_or_from_nothing(ratio, kept, mask):
    keep = dict.fromkeys(reference.STRIDES, np.full((1, 1, 1, 1), kept))
    np.testing.assert_allclose(found(mask_ratio=ratio, mask=mask), reference.mgd(PARAMS, keep), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "mask_ratio", "mask"),
    [({}, 0.65, "spatial"), ({"mask_ratio": 0.3}, 0.3, "spatial"), ({"mask": "channel"}, 0.65, "channel")],
)
def test_it_hides_what_each_levels_own_keys_draw(options, mask_ratio, mask):
    keep = {}
    for index, (level, x) in enumerate(reference.TEACHERS.items()):
        keys = jax.vmap(jax.random.fold_in, (0, None))(reference.KEYS, index)
        keep[level] = np.asarray(keep_mask(x.shape, keys=keys, mask_ratio=mask_ratio, mask=mask), np.float64)
    np.testing.assert_allclose(found(**options), reference.mgd(PARAMS, keep), rtol=1e-5)
