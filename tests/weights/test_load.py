"""Loading by path and shape: every kind of misfit, by hand."""

import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.weights import inherit, load_into


def tree(**shapes):
    return {"params": {name: {"kernel": np.full(shape, fill, np.float32)} for name, (shape, fill) in shapes.items()}}


def test_a_perfect_match_takes_everything_in_the_targets_dtype():
    source = {"params": {"a": {"kernel": np.full((2, 3), 7, np.float16)}}}
    filled, report = load_into(tree(a=((2, 3), 0)), source, origin="x")
    assert report.clean
    assert filled["params"]["a"]["kernel"].dtype == np.float32
    assert (filled["params"]["a"]["kernel"] == 7).all()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (tree(a=((2, 3), 1)), r"1 missing.*params/b/kernel"),
        (tree(a=((2, 3), 1), b=((4,), 1), c=((1,), 1)), r"1 unexpected.*params/c/kernel"),
        (tree(a=((3, 2), 1), b=((4,), 1)), r"1 mismatched.*params/a/kernel \(3, 2\) for \(2, 3\)"),
    ],
)
def test_a_misfit_is_refused_in_words_unless_told_otherwise(source, words):
    target = tree(a=((2, 3), 0), b=((4,), 0))
    with pytest.raises(UserError, match="weights of teacher.npz do not fit.*" + words):
        load_into(target, source, origin="teacher.npz")
    filled, report = load_into(target, source, origin="teacher.npz", strict=False)
    assert not report.clean
    for path in report.matched:
        assert (filled["params"][path.split("/")[1]]["kernel"] == 1).all()


def test_nothing_in_common_is_refused_even_when_lenient():
    with pytest.raises(UserError, match="0 matched"):
        load_into(tree(a=((2,), 0)), tree(b=((2,), 1)), origin="x", strict=False)


def test_a_long_report_is_shortened():
    source = tree(a=((2,), 0), **{f"extra{i}": ((1,), 0) for i in range(9)})
    _, report = load_into(tree(a=((2,), 0)), source, origin="x", strict=False)
    assert "and 4 more" in str(report)


def test_inherit_takes_the_named_parts_where_shapes_match():
    student = {"params": {"backbone": {"k": np.zeros(2)}, "neck": {"in": np.zeros(3), "out": np.zeros(4)}}}
    teacher = {"params": {"backbone": {"k": np.ones(2)}, "neck": {"in": np.ones(5), "out": np.ones(4)}}}
    variables, report = inherit(student, teacher, ("neck",))
    assert variables["params"]["backbone"]["k"].sum() == 0
    assert variables["params"]["neck"]["in"].sum() == 0
    assert variables["params"]["neck"]["out"].sum() == 4
    assert report.matched == ("params/neck/out",)
    assert report.mismatched == ("params/neck/in (5,) for (3,)",)
    assert student["params"]["neck"]["out"].sum() == 0
    words = "1 of 2 arrays taken; 1 of 2 differs in width, as it should: params/neck/in (5,) for (3,)"
    assert report.as_inherited() == words


def test_what_only_one_side_has_is_told_apart_from_what_differs_in_width():
    student = {"params": {"neck": {"p3": np.zeros(4), "p7": np.zeros(2), "a": np.zeros(2), "b": np.zeros(2)}}}
    teacher = {"params": {"neck": {"p3": np.ones(4), "p2": np.ones(2), "a": np.ones(3), "b": np.ones(3)}}}
    words = inherit(student, teacher, ("neck",))[1].as_inherited()
    assert "1 of 4 arrays taken; 2 of 4 differ in width, as they should" in words
    assert words.endswith("; 1 of 4 only the student has: params/neck/p7; 1 more only the teacher has: params/neck/p2")


def test_inherit_names_the_parts_that_there_are():
    student = {"params": {"neck": {"out": np.zeros(4)}}}
    with pytest.raises(UserError, match="parts are neck"):
        inherit(student, student, ("nekc",))
