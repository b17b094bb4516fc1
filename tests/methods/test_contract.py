"""What every method promises, on the dict of methods: a new one is tested by being there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.config import rule
from kdjax.devices import AXIS
from kdjax.losses import uniform_statistics, valid_positions
from kdjax.methods import METHODS, build_method, method_options, term_names
from kdjax.types import Targets, stride
from tests import tiny

NAMES = sorted(METHODS)
STUDENT, TEACHER = 4, 8
"""Channels."""
OPTIONS = {"icd": {"heads": 2, "queries": 12}}
"""What a method needs to run on pyramids this narrow."""
DETERMINISTIC = {"mgd": {"mask_ratio": 0.0}}
"""Options without random numbers by position: another crop would draw others."""
STEP = jnp.asarray(100_000, jnp.int32)
"""After every warm-up."""


def build(name: str, **options):
    config = {"name": name} | OPTIONS.get(name, {}) | options.pop("options", {})
    return build_method(config, statistics=uniform_statistics(tiny.CLASSES), **options)


def keys(images: int) -> jax.Array:
    return jax.random.split(jax.random.key(1), images)


def targets(images: int = 2) -> Targets:
    found = jax.tree.map(jnp.asarray, tiny.batch(images, seed=3)["targets"])
    return found._replace(valid=found.valid.at[0, 0].set(True))


def pyramids(name: str, images: int = 2):
    """Two levels of the student's features and of the teacher's, or {} for methods without one."""

    def two(features):
        return {level: features[level] for level in ("p4", "p5")}

    taught = two(tiny.pyramid(TEACHER, images=images, seed=1)) if "teacher" in METHODS[name].needs else {}
    return two(tiny.pyramid(STUDENT, images=images)), taught


def task(features):
    """Stands in for a detector's heads and loss."""
    return {
        "cls": sum(jnp.mean(jnp.square(x.astype(jnp.float32))) for x in features.values()),
        "box": sum(jnp.mean(jnp.abs(x.astype(jnp.float32))) for x in features.values()),
    }


@functools.cache
def setup(name: str):
    """The method's parameters, its terms jitted, the gradients of each term jitted, its terms not jitted."""
    method = build(name)
    init = jax.jit(functools.partial(method.init, task=task))
    variables = init(jax.random.key(0), *pyramids(name), targets(), keys=keys(2), step=STEP)

    def terms(params, student, teacher, targets, keys, step):
        return method.apply({"params": params}, student, teacher, targets, keys=keys, step=step, task=task)

    def gradients(params, student, teacher, targets, keys, step):
        found, pull = jax.vjp(lambda *x: terms(*x, targets, keys, step), params, student, teacher)
        zeros = jax.tree.map(jnp.zeros_like, found)
        return {
            term: dict(zip(("method", "student", "teacher"), pull(zeros | {term: 1.0}), strict=True)) for term in found
        }

    return variables.get("params", {}), jax.jit(terms), jax.jit(gradients), terms


@pytest.mark.parametrize("name", NAMES)
def test_terms_are_the_declared_ones_float32_and_finite(name):
    params, terms, _, _ = setup(name)
    found = terms(params, *pyramids(name), targets(), keys(2), STEP)
    assert found.keys() == set(term_names(build(name), ("cls", "box")))
    for value in found.values():
        assert value.dtype == jnp.float32
        assert value.shape == ()
        assert np.isfinite(value)


@pytest.mark.parametrize("name", NAMES)
def test_each_term_moves_what_it_declares_and_nothing_else(name):
    params, _, gradients, _ = setup(name)
    declared = {
        term: parts
        for pattern, parts in build(name).terms.items()
        for term in ([pattern[:-1] + x for x in ("cls", "box")] if pattern.endswith("*") else [pattern])
    }
    for term, moved in gradients(params, *pyramids(name), targets(), keys(2), STEP).items():
        for part, gradient in moved.items():
            biggest = max([float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(gradient)], default=0.0)
            assert (biggest > 0) == (part in declared[term]), (term, part)


@pytest.mark.parametrize("name", NAMES)
def test_padding_has_no_influence(name):
    params, terms, _, _ = setup(name)
    small = targets()._replace(image_size=jnp.array([[40, 24], [16, 64]]))

    def disturbed(features):
        return {
            level: jnp.where(valid_positions(small.image_size, x.shape[1:3], stride(level))[..., None], x, 1e3)
            for level, x in features.items()
        }

    clean = terms(params, *pyramids(name), small, keys(2), STEP)
    noisy = terms(params, *map(disturbed, pyramids(name)), small, keys(2), STEP)
    for term in clean:
        np.testing.assert_allclose(noisy[term], clean[term], rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if "teacher" in METHODS[name].needs])
def test_a_padded_image_counts_as_the_image_without_its_padding(name):
    height, width = 40, 24
    method, params = build(name, options=DETERMINISTIC.get(name, {})), setup(name)[0]
    same = targets()._replace(image_size=jnp.array([[height, width]] * 2))

    def cropped(features):
        return {
            level: x[:, : -(-height // stride(level)), : -(-width // stride(level))] for level, x in features.items()
        }

    def terms(student, teacher):
        return method.apply({"params": params}, student, teacher, same, keys=keys(2), step=STEP, task=task)

    padded, without = jax.jit(terms)(*pyramids(name)), jax.jit(terms)(*map(cropped, pyramids(name)))
    for term in padded:
        np.testing.assert_allclose(padded[term], without[term], rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if "teacher" in METHODS[name].needs])
def test_pyramids_without_a_common_stride_are_distilled_through_their_neighbours(name):
    method = build(name)
    student = {"p3": tiny.pyramid(STUDENT)["p3"]}
    teacher = {level: tiny.pyramid(TEACHER, seed=1)[level] for level in ("p4", "p6")}
    small = targets()._replace(image_size=jnp.array([[40, 24], [16, 64]]))
    noisy = {"p3": jnp.where(valid_positions(small.image_size, (8, 8), 8)[..., None], student["p3"], 1e3)}

    @jax.jit
    def loss(student):
        total = lambda found: sum(found.values())  # noqa: E731
        arguments = dict(keys=keys(2), step=STEP, task=task)
        variables = method.init(jax.random.key(0), student, teacher, small, **arguments)
        return jax.value_and_grad(lambda x: total(method.apply(variables, x, teacher, small, **arguments)))(student)

    (value, gradient), (disturbed, _) = loss(student), loss(noisy)
    assert np.isfinite(value)
    assert jnp.abs(gradient["p3"]).max() > 0
    np.testing.assert_allclose(disturbed, value, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if "teacher" in METHODS[name].needs])
def test_pyramids_that_cannot_meet_are_refused_by_every_method(name):
    student, teacher = ({level: tiny.pyramid(4)[level]} for level in ("p3", "p6"))
    with pytest.raises(ValueError, match="the student has p3, the teacher p6"):
        jax.eval_shape(build(name).init, jax.random.key(0), student, teacher, targets(), keys=keys(2), step=STEP)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ["no boxes", "constant features", "all padding"])
def test_extremes_stay_finite_with_their_gradients(name, case):
    params, terms, gradients, _ = setup(name)
    (student, teacher), truth = pyramids(name), targets()
    if case == "no boxes":
        truth = truth._replace(valid=jnp.zeros_like(truth.valid))
    elif case == "constant features":
        student, teacher = (jax.tree.map(jnp.ones_like, x) for x in (student, teacher))
    else:
        truth = truth._replace(image_size=jnp.zeros_like(truth.image_size), valid=jnp.zeros_like(truth.valid))
    arguments = (params, student, teacher, truth, keys(2), STEP)
    for x in jax.tree.leaves((terms(*arguments), gradients(*arguments))):
        assert np.isfinite(x).all()


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_features_give_float32_terms_close_to_float32s(name):
    params, terms, _, _ = setup(name)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), pyramids(name))
    exact = terms(params, *pyramids(name), targets(), keys(2), STEP)
    found = terms(params, *rounded, targets(), keys(2), STEP)
    for term in exact:
        assert found[term].dtype == jnp.float32
        np.testing.assert_allclose(found[term], exact[term], rtol=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_jit_changes_nothing_and_another_step_does_not_retrace(name):
    params, terms, _, plain = setup(name)
    arguments = (params, *pyramids(name), targets(), keys(2))
    jitted, eager = terms(*arguments, STEP), plain(*arguments, STEP)
    for term in jitted:
        np.testing.assert_allclose(jitted[term], eager[term], rtol=1e-5)
    traced = terms._cache_size()
    terms(*arguments, jnp.zeros_like(STEP))
    assert terms._cache_size() == traced


@pytest.mark.parametrize("name", NAMES)
def test_several_devices_compute_what_one_does(name):
    params, terms, _, _ = setup(name)
    method = build(name, axis_name=AXIS)
    arguments = (*pyramids(name, images=4), targets(4), keys(4))
    one = terms(params, *arguments, STEP)

    def per_device(params, student, teacher, targets, keys):
        found = method.apply({"params": params}, student, teacher, targets, keys=keys, step=STEP, task=task)
        return jax.lax.pmean(found, AXIS)

    parts = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), arguments)
    several = jax.pmap(per_device, AXIS, in_axes=(None, 0, 0, 0, 0), devices=jax.devices()[:2])(params, *parts)
    for term in one:
        np.testing.assert_allclose(several[term][0], one[term], rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_has_a_rule_which_its_default_obeys(name):
    for option, default in method_options(name).items():
        allowed = rule(f"student.method.{option}")
        assert allowed is not None, option
        assert allowed.holds(default), option


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"name": "mdg"}, "Unknown method 'mdg'.*none, mimic, mgd"),
        ({"name": "mgd", "ratio": 0.5}, "no option 'ratio'.*mask_ratio"),
        ({"name": "none", "mask_ratio": 0.5}, "options are: none"),
    ],
)
def test_a_wrong_method_config_lists_the_choices(config, words):
    with pytest.raises(ValueError, match=words):
        build_method(config)
