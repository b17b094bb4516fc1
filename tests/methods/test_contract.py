"""What every method promises, on the dict of methods: a new one is tested by being there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.devices import AXIS
from kdjax.methods import METHODS, build_method
from kdjax.types import Targets
from tests import tiny

NAMES = sorted(METHODS)
CHANNELS = {"student": 4, "teacher": 6}
STEP = jnp.zeros((), jnp.int32)


def keys(images: int) -> jax.Array:
    return jax.random.split(jax.random.key(1), images)


def targets(images: int = 2) -> Targets:
    found = jax.tree.map(jnp.asarray, tiny.batch(images, seed=3)["targets"])
    return found._replace(valid=found.valid.at[0, 0].set(True))


@functools.cache
def setup(name: str):
    """The method, its variables, and one jitted function for its terms and one for each term's gradients."""
    method = build_method({"name": name})
    student, teacher = tiny.pyramid(CHANNELS["student"]), tiny.pyramid(CHANNELS["teacher"], seed=1)
    variables = method.init(jax.random.key(0), student, teacher, targets(), keys=keys(2), step=STEP)

    def terms(params, student, teacher, targets, keys, step):
        return method.apply({"params": params}, student, teacher, targets, keys=keys, step=step)

    def gradients(params, student, teacher, targets, keys, step):
        def total(params, student, teacher):
            return sum(terms(params, student, teacher, targets, keys, step).values(), jnp.zeros(()))

        return jax.grad(total, (0, 1, 2))(params, student, teacher)

    return variables.get("params", {}), jax.jit(terms), jax.jit(gradients), terms


@pytest.mark.parametrize("name", NAMES)
def test_terms_are_the_declared_ones_float32_and_finite(name):
    params, terms, _, _ = setup(name)
    found = terms(params, tiny.pyramid(4), tiny.pyramid(6, seed=1), targets(), keys(2), STEP)
    assert found.keys() == METHODS[name].terms.keys()
    for value in found.values():
        assert value.dtype == jnp.float32
        assert value.shape == ()
        assert np.isfinite(value)


@pytest.mark.parametrize("name", NAMES)
def test_each_term_moves_what_it_declares_and_nothing_else(name):
    params, _, gradients, _ = setup(name)
    moved = gradients(params, tiny.pyramid(4), tiny.pyramid(6, seed=1), targets(), keys(2), STEP)
    declared = {part for parts in METHODS[name].terms.values() for part in parts} | set()
    for part, gradient in zip(("method", "student", "teacher"), moved, strict=True):
        biggest = max([float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(gradient)], default=0.0)
        assert (biggest > 0) == (part in declared), part


@pytest.mark.parametrize("name", NAMES)
def test_padding_has_no_influence(name):
    params, terms, _, _ = setup(name)
    small = targets()._replace(image_size=jnp.array([[40, 24], [16, 64]]))

    def disturbed(features):
        from kdjax.losses import valid_positions
        from kdjax.types import stride

        return {
            level: jnp.where(valid_positions(small.image_size, x.shape[1:3], stride(level))[..., None], x, 1e3)
            for level, x in features.items()
        }

    student, teacher = tiny.pyramid(4), tiny.pyramid(6, seed=1)
    clean = terms(params, student, teacher, small, keys(2), STEP)
    noisy = terms(params, disturbed(student), disturbed(teacher), small, keys(2), STEP)
    for term in clean:
        np.testing.assert_allclose(noisy[term], clean[term], rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ["no boxes", "constant features", "all padding"])
def test_extremes_stay_finite_with_their_gradients(name, case):
    params, terms, gradients, _ = setup(name)
    student, teacher, truth = tiny.pyramid(4), tiny.pyramid(6, seed=1), targets()
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
    student, teacher = tiny.pyramid(4), tiny.pyramid(6, seed=1)
    exact = terms(params, student, teacher, targets(), keys(2), STEP)
    rounded = terms(
        params,
        jax.tree.map(lambda x: x.astype(jnp.bfloat16), student),
        jax.tree.map(lambda x: x.astype(jnp.bfloat16), teacher),
        targets(),
        keys(2),
        STEP,
    )
    for term in exact:
        assert rounded[term].dtype == jnp.float32
        np.testing.assert_allclose(rounded[term], exact[term], rtol=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_jit_changes_nothing_and_another_step_does_not_retrace(name):
    params, terms, _, plain = setup(name)
    arguments = (params, tiny.pyramid(4), tiny.pyramid(6, seed=1), targets(), keys(2))
    jitted, eager = terms(*arguments, STEP), plain(*arguments, STEP)
    for term in jitted:
        np.testing.assert_allclose(jitted[term], eager[term], rtol=1e-5)
    traced = terms._cache_size()
    terms(*arguments, STEP + 100_000)
    assert terms._cache_size() == traced


@pytest.mark.parametrize("name", NAMES)
def test_several_devices_compute_what_one_does(name):
    params, terms, _, _ = setup(name)
    method = build_method({"name": name}, axis_name=AXIS)
    student, teacher = tiny.pyramid(4, images=4), tiny.pyramid(6, images=4, seed=1)
    arguments = (student, teacher, targets(4), keys(4))
    one = terms(params, *arguments, STEP)

    def per_device(params, student, teacher, targets, keys):
        return jax.lax.pmean(method.apply({"params": params}, student, teacher, targets, keys=keys, step=STEP), AXIS)

    parts = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), arguments)
    several = jax.pmap(per_device, AXIS, in_axes=(None, 0, 0, 0, 0), devices=jax.devices()[:2])(params, *parts)
    for term in one:
        np.testing.assert_allclose(several[term][0], one[term], rtol=1e-5)


def test_pyramids_without_a_common_level_are_refused_by_name():
    method = build_method({"name": "mimic"})
    student = {"p3": jnp.zeros((1, 8, 8, 4))}
    teacher = {"p4": jnp.zeros((1, 4, 4, 4))}
    with pytest.raises(ValueError, match="student has p3, the teacher p4"):
        method.init(jax.random.key(0), student, teacher, targets(1), keys=keys(1), step=STEP)


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


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_mgd_generates_from_everything_or_nothing(ratio):
    method = build_method({"name": "mgd", "mask_ratio": ratio})
    student, teacher = tiny.pyramid(6), tiny.pyramid(6, seed=1)
    arguments = {"keys": keys(2), "step": STEP}
    variables = method.init(jax.random.key(0), student, teacher, targets(), **arguments)

    def loss(student):
        return method.apply(variables, student, teacher, targets(), **arguments)["mgd"]

    value, gradient = jax.value_and_grad(loss)(student)
    assert np.isfinite(value)
    assert (sum(jnp.abs(x).sum() for x in gradient.values()) > 0) == (ratio == 0)
