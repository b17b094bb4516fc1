"""DFMSD's module in NumPy: stages, objects and alignments change the value by what the formula says."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.methods import build_method
from kdjax.types import Terms
from tests.losses.reference import Options
from tests.methods import calls, reference

PARAMS = reference.random_params(build_method({"name": "dfmsd"}))
THRESHOLD = {"select": "threshold"}


def found(options: Mapping[str, Any]) -> Terms:
    return reference.apply(build_method({"name": "dfmsd"} | options), PARAMS)


def masks(options: Mapping[str, Any]):
    """By the names of the config, with the defaults of the page that describes the methods."""
    own = {"stage": 1, "eta": 1.0, "spatial_ratio": 0.45, "alignment": "norm"} | options
    stage, eta, first = (own.pop(name) for name in ("stage", "eta", "spatial_ratio"))
    del own["alignment"]
    chosen = Options(spatial_ratio=first + 0.1 * (stage - 1), **own)
    return {level: reference.masks(level, chosen, eta * stage) for level in reference.STRIDES}


@functools.cache
def _expected(options: tuple[tuple[str, Any], ...]) -> float:
    keep = masks(dict(options))
    return reference.dmkd(PARAMS, keep) if ("alignment", "separate") in options else reference.dfmsd(PARAMS, keep)


def expected(options: Mapping[str, Any]) -> float:
    return _expected(tuple(sorted(options.items())))


def test_the_defaults_are_the_formulas():
    terms = found({})
    assert terms.keys() == {"dfmsd"}
    np.testing.assert_allclose(terms["dfmsd"], expected({}), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "others"),
    [
        ({"stage": 2}, {}),
        ({"stage": 3}, {}),
        ({"spatial_ratio": 0.3}, {"stage": 2}),
        ({"channel_ratio": 0.2}, {}),
        ({"hide": "low"}, {}),
        (THRESHOLD, {}),
        ({"threshold": 1.2}, THRESHOLD),
        ({"tau": 0.1}, THRESHOLD),
        ({"eta": 0.0}, {}),
        ({"eta": 0.2}, {"stage": 2}),
        ({"tau": 2.0}, {}),
        ({"alignment": "separate"}, {}),
        ({"stage": 2}, {"alignment": "separate"}),
    ],
)
def test_an_option_changes_the_value_by_what_the_formula_says(change, others):
    assert abs(expected(others | change) / expected(others) - 1) > 1e-3, "the case does not show the option"
    np.testing.assert_allclose(found(others | change)["dfmsd"], expected(others | change), rtol=1e-5)


def test_of_the_selected_places_none_is_hidden_with_probability_zero():
    nothing = {"spatial_ratio": 0.0, "channel_ratio": 0.0}
    np.testing.assert_allclose(found({"keep_probability": 0.0})["dfmsd"], expected(nothing), rtol=1e-5)


def test_separate_alignment_is_a_term_of_its_own():
    terms = found({"alignment": "separate"})
    assert terms.keys() == {"dfmsd", "dfmsd_alignment"}
    np.testing.assert_allclose(terms["dfmsd_alignment"], reference.dfmsd_alignment(PARAMS), rtol=1e-5)


def test_another_alignment_is_refused():
    with pytest.raises(ValueError, match="one of norm, separate"):
        build_method({"name": "dfmsd", "alignment": "none"})


EQUAL = {level: x[..., : reference.STUDENT] for level, x in reference.TEACHERS.items()}
"""The teacher's maps as narrow as the student's."""


def at_equal_width(**options: Any):
    """The term "dfmsd" as a function of parameters where student and teacher have one width."""
    method = build_method({"name": "dfmsd"} | options)
    return lambda params: calls.terms(method, params, reference.STUDENTS, EQUAL, **reference.given())["dfmsd"]


def test_at_equal_width_the_student_is_adapted_by_a_layer_that_starts_as_the_identity_and_learns():
    method = build_method({"name": "dfmsd"})
    params = jax.jit(lambda: calls.init(method, reference.STUDENTS, EQUAL, **reference.given()))()
    value, gradient = jax.jit(jax.value_and_grad(at_equal_width()))(params)
    layers = {name: gradient[name]["align"]["kernel"] for name in params if name.startswith("align_")}
    assert layers.keys() == {"align_p3", "align_p4"}
    assert all(jnp.abs(kernel).max() > 1e-4 for kernel in layers.values())
    others = {name: x for name, x in params.items() if name not in layers}
    np.testing.assert_allclose(jax.jit(at_equal_width(adapt=False))(others), value, rtol=1e-6)


def test_at_other_widths_there_is_such_a_layer_either_way():
    method = build_method({"name": "dfmsd", "adapt": False})
    np.testing.assert_array_equal(reference.apply(method, PARAMS)["dfmsd"], found({})["dfmsd"])
