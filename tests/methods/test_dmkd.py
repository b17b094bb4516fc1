"""DMKD's module in NumPy: every option changes the value by what the formula says."""

import functools

import jax
import numpy as np
import pytest

from kdjax.methods import build_method
from tests.losses.reference import Options
from tests.methods import reference

NOTHING = Options(spatial_ratio=0.0, channel_ratio=0.0)
PARAMS = reference.random_params(build_method({"name": "dmkd"}))


@functools.cache
def expected(options: Options) -> float:
    return reference.dmkd(PARAMS, {level: reference.masks(level, options) for level in reference.STRIDES})


def found(**options) -> jax.Array:
    return reference.apply(build_method({"name": "dmkd"} | options), PARAMS)["dmkd"]


def test_the_defaults_are_the_formulas():
    np.testing.assert_allclose(found(), expected(Options()), rtol=1e-5)


@pytest.mark.parametrize(
    ("option", "value", "others"),
    [
        ("spatial_ratio", 0.3, {}),
        ("spatial_ratio", 0.0, {}),
        ("spatial_ratio", 1.0, {}),
        ("channel_ratio", 0.2, {}),
        ("channel_ratio", 0.0, {}),
        ("channel_ratio", 1.0, {}),
        ("hide", "low", {}),
        ("select", "threshold", {}),
        ("threshold", 1.2, {"select": "threshold"}),
        ("hide", "low", {"select": "threshold"}),
        # The order of places, hence a share of them, is the same at any temperature.
        ("tau", 0.1, {"select": "threshold"}),
    ],
)
def test_an_option_changes_the_value_by_what_the_formula_says(option, value, others):
    before, after = (expected(Options(**others | change)) for change in ({}, {option: value}))
    assert abs(after / before - 1) > 1e-3, "the case does not show the option"
    np.testing.assert_allclose(found(**others, **{option: value}), after, rtol=1e-5)


def test_of_the_selected_places_none_is_hidden_with_probability_zero():
    np.testing.assert_allclose(found(keep_probability=0.0), expected(NOTHING), rtol=1e-5)


def test_a_selected_place_is_hidden_with_that_probability():
    """The mean over draws is NumPy's, which draws its own."""
    probability, draws, level = 0.3, 200, "p4"
    method = build_method({"name": "dmkd", "keep_probability": probability})
    keys = jax.random.split(jax.random.key(11), (draws, len(reference.SIZES)))
    values = jax.jit(jax.vmap(lambda keys: reference.apply(method, PARAMS, keys=keys, levels=[level])["dmkd"]))(keys)

    rng = np.random.default_rng(0)

    def mean_and_error(probability: float) -> tuple[float, float]:
        selected = reference.masks(level, Options())
        thin = lambda mask: 1 - (1 - mask) * (rng.random(mask.shape) < probability)  # noqa: E731
        drawn = [reference.dmkd(PARAMS, {level: [tuple(map(thin, x)) for x in selected]}) for _ in range(draws)]
        return float(np.mean(drawn)), float(np.std(drawn) / draws**0.5)

    mean, error = mean_and_error(probability)
    tolerance = 4 * np.hypot(error, np.std(values) / draws**0.5)
    assert abs(np.mean(values) - mean) < tolerance
    for other in (0.0, 1 - probability):
        assert abs(mean_and_error(other)[0] - mean) > 2 * tolerance, "too few draws to tell"
