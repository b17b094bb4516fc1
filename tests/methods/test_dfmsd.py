"""DFMSD's module in NumPy: stages, enhancements and alignments change the value by what the formula says."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from kdjax.methods import build_method
from kdjax.types import Terms
from tests.losses.reference import Options
from tests.methods import reference

PARAMS = reference.random_params(build_method({"name": "dfmsd"}))
THRESHOLD, OBJECTS = {"select": "threshold"}, {"enhance": "objects"}


def found(options: Mapping[str, Any]) -> Terms:
    return reference.apply(build_method({"name": "dfmsd"} | options), PARAMS)


def masks(options: Mapping[str, Any]):
    """By the names of the config, with the defaults of the page that describes the methods."""
    own = {"stage": 1, "enhance": "ratio", "eta": 1.0, "spatial_ratio": 0.45, "alignment": "norm"} | options
    stage, enhance, eta, first = (own.pop(name) for name in ("stage", "enhance", "eta", "spatial_ratio"))
    del own["alignment"]
    ratio = first + 0.1 * (stage - 1) if enhance == "ratio" else first
    chosen = Options(spatial_ratio=ratio, **own)
    return {level: reference.masks(level, chosen, eta if enhance == "objects" else 0.0) for level in reference.STRIDES}


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
        (OBJECTS, {}),
        ({"eta": 0.2}, OBJECTS),
        ({"tau": 2.0}, OBJECTS),
        ({"spatial_ratio": 0.3}, OBJECTS),
        ({"alignment": "separate"}, {}),
        ({"stage": 2}, {"alignment": "separate"}),
    ],
)
def test_an_option_changes_the_value_by_what_the_formula_says(change, others):
    assert abs(expected(others | change) / expected(others) - 1) > 1e-3, "the case does not show the option"
    np.testing.assert_allclose(found(others | change)["dfmsd"], expected(others | change), rtol=1e-5)


def test_where_objects_are_strengthened_the_stage_changes_nothing():
    np.testing.assert_allclose(found(OBJECTS | {"stage": 3})["dfmsd"], expected(OBJECTS), rtol=1e-5)


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
