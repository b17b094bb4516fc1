"""Which levels of two pyramids meet, on which grid, and what is said of it."""

import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.methods import METHODS
from kdjax.methods.levels import describe_pairs, pair_levels, partners
from kdjax.types import View

SIZE = 64


def pyramid(*levels: str, size: int = SIZE, images: int = 2) -> View:
    """Maps "p3", "c4", ... of stride 8, 16, ..."""
    rng = np.random.default_rng(0)
    strides = {level: 2 ** int(level[1:]) for level in levels}
    shapes = {level: (images, size // stride, size // stride, 4) for level, stride in strides.items()}
    return View({level: jnp.asarray(rng.normal(size=x), jnp.float32) for level, x in shapes.items()}, strides)


def sizes(height: int = SIZE, width: int = SIZE):
    return jnp.array([[height, width], [SIZE, SIZE]])


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ("p3 p4 p5", "p3 p4 p5", {"p3": "p3", "p4": "p4", "p5": "p5"}),
        ("p5 p4 p3 p2", "p6 p4 p3", {"p3": "p3", "p4": "p4"}),
        ("p3 p5", "p4", {"p4": "p3"}),
        ("p5", "p4 p3", {"p4": "p5"}),
        ("p4", "p3 p5 p6", {"p3": "p4", "p5": "p4"}),
        ("c3 p4", "p3 p4 c5", {"p3": "c3", "p4": "p4"}),
        ("p3 p4", "c3 c4", {"c3": "p3", "c4": "p4"}),
    ],
)
def test_levels_meet_by_name_then_by_stride_or_else_neighbours_do(student, teacher, expected):
    assert partners(pyramid(*student.split()), pyramid(*teacher.split())) == expected


@pytest.mark.parametrize(("student", "teacher"), [("p3", "p5 p6"), ("p6 p7", "p3 p4"), ("", "p3")])
def test_pyramids_that_cannot_meet_are_refused_by_name(student, teacher):
    words = f"the student has {', '.join(student.split()) or 'none'}, the teacher {', '.join(teacher.split())};"
    with pytest.raises(UserError, match=words):
        pair_levels(pyramid(*student.split()), pyramid(*teacher.split()), sizes())


def test_pyramids_of_different_batches_are_refused():
    with pytest.raises(ValueError, match="student's p3 holds 2 images and the teacher's p3 3"):
        pair_levels(pyramid("p3"), pyramid("p3", images=3), sizes())


def test_common_levels_of_one_grid_are_untouched():
    student, teacher = pyramid("p3", "p4"), pyramid("p3", "p4", "p5")
    pairs = pair_levels(student, teacher, sizes(height=30, width=50))
    assert [pair.level for pair in pairs] == ["p3", "p4"]
    for pair in pairs:
        assert pair.student is student.features[pair.level]
        assert pair.teacher is teacher.features[pair.level]
    assert np.asarray(pairs[0].where.sum((1, 2))).tolist() == [4 * 7, 8 * 8]


def test_a_finer_map_is_averaged_two_by_two():
    student = pyramid("p3")
    (pair,) = pair_levels(student, pyramid("p4"), sizes())
    # Half-pixel centres: a coarse position lies amid four fine ones.
    expected = np.asarray(student.features["p3"]).reshape(2, 4, 2, 4, 2, 4).mean((2, 4))
    np.testing.assert_allclose(pair.student, expected, rtol=1e-5, atol=1e-6)


def test_a_coarser_map_is_interpolated_and_its_padding_is_zero_first():
    student = View({"p4": jnp.full((2, 4, 4, 1), 7.0).at[:, :, :2].set(1.0)}, {"p4": 16})
    (pair,) = pair_levels(student, pyramid("p3"), sizes(width=32))
    # Weights 3/4 and 1/4 on both sides of the border between position 1 and 2, which in the first image is padding.
    np.testing.assert_allclose(pair.student[0, 0, :, 0], [1, 1, 1, 0.75, 0.25, 0, 0, 0])
    np.testing.assert_allclose(pair.student[1, 0, :, 0], [1, 1, 1, 2.5, 5.5, 7, 7, 7])


def test_another_grid_at_the_same_level_is_resized():
    (pair,) = pair_levels(pyramid("p3", size=48), pyramid("p3"), sizes())
    assert pair.student.shape == pair.teacher.shape == (2, 8, 8, 4)


@pytest.mark.parametrize(
    ("student", "teacher", "sentence"),
    [
        ("p3 p4", "p3 p4", "distils p3, p4."),
        ("p3 p4", "p3 p4 p5", "distils p3, p4; the teacher's p5 has no partner."),
        ("p2 p3", "p3 p4 p5", "distils p3; the teacher's p4, p5 have no partner; the student's p2 has no partner."),
        ("p3", "p4", "distils p4 from the student's p3 (8x8 resized to 4x4)."),
    ],
)
def test_the_person_is_told_what_is_distilled(student, teacher, sentence):
    assert describe_pairs(pyramid(*student.split()), pyramid(*teacher.split())) == sentence


def test_two_maps_of_one_stride_meet_one_each():
    """As those of a dilated backbone."""
    maps = {name: jnp.ones((2, 8, 8, 4)) for name in ("c3", "c4", "p3")}
    assert partners(View(maps, dict.fromkeys(maps, 8)), View({"x": maps["c3"], "y": maps["c4"]}, {"x": 8, "y": 8})) == {
        "x": "c3",
        "y": "c4",
    }


def test_there_are_methods_to_pair_levels_for():
    assert {name for name, method in METHODS.items() if "teacher" in method.requires} >= {"mimic", "mgd", "dmkd"}
