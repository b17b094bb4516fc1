"""Samples are as large as wanted, hold at most the wanted share of positives, and prefer nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.models.sample import sample

KIND = np.random.default_rng(0).permutation(np.repeat([1, 0, -1], [10, 30, 20]))
"""10 positives, 30 negatives and 20 that are neither."""


@functools.partial(jax.jit, static_argnames=("number", "fraction"))
def draw(kind, key, number, fraction):
    return sample(kind == 1, kind == 0, key, number=number, fraction=fraction)


@pytest.mark.parametrize(
    ("number", "fraction", "positives", "negatives"),
    [
        (16, 0.25, 4, 12),
        (32, 0.5, 10, 22),  # Negatives fill what positives leave.
        (38, 0.05, 1, 30),  # Slots stay empty; the fraction is rounded down.
        (8, 0.0, 0, 8),
        (60, 1.0, 10, 30),  # All are kept.
        (100, 0.5, 10, 30),  # More slots than candidates.
    ],
)
def test_as_many_as_wanted_and_there(number, fraction, positives, negatives):
    drawn = draw(KIND, jax.random.key(3), number, fraction)
    assert [x.shape for x in drawn] == [(number,)] * 3
    for kind, which, count in ((1, drawn.positive, positives), (0, drawn.negative, negatives)):
        chosen = np.asarray(drawn.candidate)[which]
        assert len(chosen) == len(set(chosen.tolist())) == count
        assert (KIND[chosen] == kind).all()
    assert not np.any(drawn.positive & drawn.negative)
    # Positives come first, empty slots last.
    order = np.select([drawn.positive, drawn.negative], [0, 1], 2)
    assert (np.diff(order) >= 0).all()


@pytest.mark.parametrize("kind", [-1, 0, 1])
def test_one_kind_alone(kind):
    drawn = draw(jnp.full(20, kind), jax.random.key(0), 8, 0.25)
    assert (drawn.positive.sum(), drawn.negative.sum()) == {-1: (0, 0), 0: (0, 8), 1: (2, 0)}[kind]


def test_every_candidate_is_equally_likely():
    keys = jax.random.split(jax.random.key(1), 4000)
    drawn = jax.vmap(lambda key: draw(KIND, key, 16, 0.25))(keys)
    counts = np.bincount(np.asarray(drawn.candidate)[drawn.positive | drawn.negative], minlength=len(KIND))
    for kind, share in ((1, 4 / 10), (0, 12 / 30)):
        expected = 4000 * share
        # Five standard deviations of a binomial count.
        assert np.abs(counts[kind == KIND] - expected).max() < 5 * np.sqrt(expected * (1 - share))
    assert counts[KIND < 0].sum() == 0


def test_an_image_draws_by_its_own_key():
    keys = jax.random.split(jax.random.key(2), 4)
    together = jax.vmap(lambda key: draw(KIND, key, 16, 0.25))(keys)
    for i, key in enumerate(keys):
        np.testing.assert_array_equal(together.candidate[i], draw(KIND, key, 16, 0.25).candidate)
    assert len(np.unique(together.candidate, axis=0)) == 4
