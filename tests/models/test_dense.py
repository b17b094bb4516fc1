"""What dense heads share, where the tests of the detectors do not see it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.models import build_model
from kdjax.models.dense import best_pairs
from kdjax.types import Targets
from tests.slow import slow_but


@pytest.mark.parametrize("name", slow_but(("retinanet", "gfl"), ("retinanet", "fcos", "atss", "gfl", "reppoints")))
def test_the_loss_keeps_nothing_for_its_gradient_that_is_as_large_as_the_logits_but_them(name):
    detector = build_model({"name": name}, num_classes=80, dtype=jnp.bfloat16)
    images, size = jnp.zeros((2, 64, 64, 3)), jnp.full((2, 2), 64)
    shapes = jax.eval_shape(lambda: detector.init_with_output(jax.random.key(0), images)[0][1])
    targets = Targets(jnp.zeros((2, 3, 4)), jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3), bool))

    def kept(predictions):
        return jax.vjp(lambda predictions: detector.loss(predictions, targets, size), predictions)[1]

    logits = sum(x.size for x in jax.tree.leaves(shapes.logits))
    arrays = jax.tree.leaves(jax.eval_shape(kept, shapes))
    assert logits <= sum(x.size for x in arrays if x.dtype == jnp.bfloat16) < 1.2 * logits
    assert sum(x.size for x in arrays if x.dtype != jnp.bfloat16) < logits


@pytest.mark.parametrize("limit", [7, 50, 1000])
def test_the_best_pairs_are_those_of_a_full_sort(limit):
    # Whole numbers: many ties, of which a stable sort takes the first.
    scores = np.random.default_rng(0).integers(-9, 9, (2, 40, 5)).astype(np.float32)
    best, anchor, label = best_pairs(jnp.asarray(scores), limit)
    for image, row in enumerate(scores.reshape(2, -1)):
        order = np.argsort(-row, kind="stable")[:limit]
        np.testing.assert_array_equal(best[image], row[order])
        np.testing.assert_array_equal(anchor[image] * 5 + label[image], order)
