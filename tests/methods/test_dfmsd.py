"""DFMSD beyond the contract: its stages, enhancements and alignments reach the loss functions they name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.losses import pearson_loss
from kdjax.methods import build_method
from tests.methods.test_contract import STEP, keys, pyramids, setup, targets


def terms(**options):
    method = build_method({"name": "dfmsd"} | options)
    arguments = (*pyramids("dfmsd"), targets())
    return jax.jit(method.apply)({"params": setup("dfmsd")[0]}, *arguments, keys=keys(2), step=STEP)


def test_options_change_the_masks():
    values = [
        float(terms(**options)["dfmsd"])
        for options in (
            {},
            {"stage": 2},
            {"enhance": "objects"},
            {"hide": "low"},
            {"select": "threshold", "threshold": 0.9},
            {"keep_probability": 0.3},
        )
    ]
    assert len(set(values)) == len(values), values


def test_a_later_stage_hides_what_the_larger_ratio_hides():
    late, wide = terms(stage=3), terms(spatial_ratio=0.65)
    np.testing.assert_allclose(late["dfmsd"], wide["dfmsd"], rtol=1e-6)


def test_separate_alignment_is_a_term_of_its_own_that_moves_the_student():
    student, teacher = pyramids("dfmsd")
    found = terms(alignment="separate")
    assert found.keys() == build_method({"name": "dfmsd", "alignment": "separate"}).terms.keys()
    params = setup("dfmsd")[0]
    where = {"p4": (4, 4, 16), "p5": (2, 2, 32)}
    expected = 0.0
    for level, (height, width, stride) in where.items():
        conv = params[f"align_{level}"]["align"]["conv"]
        aligned = student[level] @ conv["kernel"][0, 0] + conv["bias"][None, None, None]
        size = targets().image_size[:, None, None, :]
        inside = (jnp.arange(height)[None, :, None] * stride < size[..., 0]) & (
            jnp.arange(width)[None, None] * stride < size[..., 1]
        )
        expected += pearson_loss(aligned, teacher[level], where=inside)
    np.testing.assert_allclose(found["dfmsd_alignment"], expected, rtol=1e-5)


def test_another_alignment_is_refused():
    with pytest.raises(ValueError, match='"norm" or "separate"'):
        build_method({"name": "dfmsd", "alignment": "none"})
