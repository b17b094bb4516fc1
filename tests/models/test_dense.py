"""What dense heads share, where the tests of the detectors do not see it."""

import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.models.dense import best_pairs


@pytest.mark.parametrize("limit", [7, 50, 1000])
def test_the_best_pairs_are_those_of_a_full_sort(limit):
    # Whole numbers: many ties, of which a stable sort takes the first.
    scores = np.random.default_rng(0).integers(-9, 9, (2, 40, 5)).astype(np.float32)
    best, anchor, label = best_pairs(jnp.asarray(scores), limit)
    for image, row in enumerate(scores.reshape(2, -1)):
        order = np.argsort(-row, kind="stable")[:limit]
        np.testing.assert_array_equal(best[image], row[order])
        np.testing.assert_array_equal(anchor[image] * 5 + label[image], order)
