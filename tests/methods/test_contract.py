"""What every method promises, on the dict of methods: a new one is tested by being there."""

import functools
import inspect
from fnmatch import fnmatch
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.devices import AXIS
from kdjax.errors import UserError
from kdjax.losses import uniform_statistics, valid_positions
from kdjax.methods import METHODS, NEEDED, build_method, method_options, term_names
from kdjax.options import declared, whole
from kdjax.types import Targets
from tests import tiny
from tests.methods import calls

NAMES = sorted(name for name in METHODS if not {"teacher_heads", "prediction_loss"} & set(METHODS[name].needs))
"""Those that see features alone; what heads say is in test_boxes and test_logits."""
TAUGHT = [name for name in NAMES if "teacher" in METHODS[name].requires]
STUDENT, TEACHER = 4, 8
"""Channels."""
OPTIONS = {"icd": {"heads": 2, "queries": 12}}
"""What a method needs to run on pyramids this narrow."""
DETERMINISTIC = {"mgd": {"mask_ratio": 0.0}}
"""Options without random numbers by position: another crop would draw others."""
RATIOS = {
    "mgd": ({"mask_ratio": 0.0}, {"mask_ratio": 1.0}),
    "dmkd": ({"spatial_ratio": 0.0, "channel_ratio": 1.0}, {"spatial_ratio": 1.0, "channel_ratio": 0.0}),
    "dfmsd": ({"spatial_ratio": 0.0, "channel_ratio": 1.0}, {"spatial_ratio": 1.0, "channel_ratio": 0.0}),
}
"""Nothing hidden, and everything."""
STATISTICS = uniform_statistics(tiny.CLASSES)
SIZE = jnp.asarray(tiny.batch(2, seed=3).size)
STEP = jnp.asarray(100_000, jnp.int32)
"""After every warm-up."""


def build(name: str, **options):
    config = {"name": name} | OPTIONS.get(name, {}) | options.pop("options", {})
    return build_method(config, **options)


def keys(images: int) -> jax.Array:
    return jax.random.split(jax.random.key(1), images)


def targets(images: int = 2) -> Targets:
    found = jax.tree.map(jnp.asarray, tiny.batch(images, seed=3).targets)
    return found._replace(valid=found.valid.at[0, 0].set(True))


def pyramids(name: str, images: int = 2):
    """Two levels of the student's features and of the teacher's, or {} for methods without one."""

    def two(features):
        return {level: features[level] for level in ("p4", "p5")}

    taught = two(tiny.pyramid(TEACHER, images=images, seed=1)) if name in TAUGHT else {}
    return two(tiny.pyramid(STUDENT, images=images)), taught


def own_loss(features):
    """Stands in for a detector's heads and loss."""
    return {
        "cls": sum(jnp.mean(jnp.square(x.astype(jnp.float32))) for x in features.values()),
        "box": sum(jnp.mean(jnp.abs(x.astype(jnp.float32))) for x in features.values()),
    }


def given(**other):
    """What methods may need, of the two images here."""
    known = {"size": SIZE, "targets": targets(), "keys": keys(2), "step": STEP, "own_loss": own_loss}
    return known | {"statistics": STATISTICS} | other


def of(method):
    """A method's terms as a function of arrays alone."""

    def terms(params, student, teacher, size, targets, keys, step):
        known = given(size=size, targets=targets, keys=keys, step=step)
        return calls.terms(method, params, student, teacher, **known)

    return terms


def stride(level: str) -> int:
    return 2 ** int(level[1:])


@functools.cache
def setup(name: str):
    """The method's parameters, its terms jitted, the gradients of each term jitted, its terms not jitted."""
    method = build(name)
    init = jax.jit(lambda *pyramids: calls.init(method, *pyramids, **given()))
    terms = of(method)

    def gradients(params, student, teacher, size, targets, keys, step):
        found, pull = jax.vjp(lambda *x: terms(*x, size, targets, keys, step), params, student, teacher)
        zeros = jax.tree.map(jnp.zeros_like, found)
        return {
            term: dict(zip(("method", "student", "teacher"), pull(zeros | {term: 1.0}), strict=True)) for term in found
        }

    return init(*pyramids(name)), jax.jit(terms), jax.jit(gradients), terms


@pytest.mark.parametrize("name", NAMES)
def test_terms_are_the_declared_ones_float32_and_finite(name):
    params, terms, _, _ = setup(name)
    found = terms(params, *pyramids(name), SIZE, targets(), keys(2), STEP)
    assert found.keys() == set(term_names(build(name), ("cls", "box")))
    for value in found.values():
        assert value.dtype == jnp.float32
        assert value.shape == ()
        assert np.isfinite(value)


def largest(tree) -> dict[str, float]:
    """The largest absolute value of each leaf, by its path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): float(jnp.max(jnp.abs(x))) for path, x in leaves}


def check_gradients(method, gradients):
    """Each term moves all of what its method declares, and nothing else.

    What it leaves still has a gradient of zero, but for rounding where it takes part in the computation.
    """
    declared = {
        term: parts
        for pattern, parts in method.terms.items()
        for term in ([pattern[:-1] + x for x in ("cls", "box")] if pattern.endswith("*") else [pattern])
    }
    for term, moved in gradients.items():
        patterns = getattr(method, "still", {}).get(term, ())
        for part, gradient in moved.items():
            for path, size in largest(gradient).items():
                still = part == "method" and any(fnmatch(f"/{path}/", f"*/{pattern}/*") for pattern in patterns)
                if part not in declared[term]:
                    assert size == 0, (term, part, path)
                else:
                    assert (size < 1e-6) == still, (term, part, path, size)


@pytest.mark.parametrize("name", NAMES)
def test_each_term_moves_all_of_what_it_declares_and_nothing_else(name):
    params, _, gradients, _ = setup(name)
    check_gradients(build(name), gradients(params, *pyramids(name), SIZE, targets(), keys(2), STEP))


@pytest.mark.parametrize(
    "planted", [{"dice": ()}, {"dice": ("kernel_*", "bias_*", "tokens")}], ids=["one less", "one more"]
)
def test_what_is_declared_still_wrongly_is_seen(planted, monkeypatch):
    params, _, gradients, _ = setup("maskd_tokens")
    monkeypatch.setattr(METHODS["maskd_tokens"], "still", planted)
    with pytest.raises(AssertionError, match="dice"):
        check_gradients(
            build("maskd_tokens"), gradients(params, *pyramids("maskd_tokens"), SIZE, targets(), keys(2), STEP)
        )


@pytest.mark.parametrize("name", NAMES)
def test_padding_has_no_influence(name):
    params, terms, _, _ = setup(name)
    small = jnp.array([[40, 24], [16, 64]])

    def disturbed(features):
        return {
            level: jnp.where(valid_positions(small, x.shape[1:3], stride(level))[..., None], x, 1e3)
            for level, x in features.items()
        }

    clean = terms(params, *pyramids(name), small, targets(), keys(2), STEP)
    noisy = terms(params, *map(disturbed, pyramids(name)), small, targets(), keys(2), STEP)
    for term in clean:
        np.testing.assert_allclose(noisy[term], clean[term], rtol=1e-5)


@pytest.mark.parametrize("name", TAUGHT)
def test_a_padded_image_counts_as_the_image_without_its_padding(name):
    height, width = 40, 24
    method, params = build(name, options=DETERMINISTIC.get(name, {})), setup(name)[0]
    same = jnp.array([[height, width]] * 2)

    def cropped(features):
        return {
            level: x[:, : -(-height // stride(level)), : -(-width // stride(level))] for level, x in features.items()
        }

    terms, rest = jax.jit(of(method)), (same, targets(), keys(2), STEP)
    padded, without = terms(params, *pyramids(name), *rest), terms(params, *map(cropped, pyramids(name)), *rest)
    for term in padded:
        np.testing.assert_allclose(padded[term], without[term], rtol=1e-5)


@pytest.mark.parametrize("name", TAUGHT)
def test_pyramids_without_a_common_stride_are_distilled_through_their_neighbours(name):
    method = build(name)
    student = {"p3": tiny.pyramid(STUDENT)["p3"]}
    teacher = {level: tiny.pyramid(TEACHER, seed=1)[level] for level in ("p4", "p6")}
    small = jnp.array([[40, 24], [16, 64]])
    noisy = {"p3": jnp.where(valid_positions(small, (8, 8), 8)[..., None], student["p3"], 1e3)}

    @jax.jit
    def loss(student):
        params = calls.init(method, student, teacher, **given(size=small))
        total = lambda x: sum(of(method)(params, x, teacher, small, targets(), keys(2), STEP).values())  # noqa: E731
        return jax.value_and_grad(total)(student)

    (value, gradient), (disturbed, _) = loss(student), loss(noisy)
    assert np.isfinite(value)
    assert jnp.abs(gradient["p3"]).max() > 0
    np.testing.assert_allclose(disturbed, value, rtol=1e-5)


@pytest.mark.parametrize("name", TAUGHT)
def test_pyramids_that_cannot_meet_are_refused_by_every_method(name):
    student, teacher = ({level: tiny.pyramid(4)[level]} for level in ("p3", "p6"))
    with pytest.raises(ValueError, match="the student has p3, the teacher p6"):
        jax.eval_shape(lambda: calls.init(build(name), student, teacher, **given()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ["no boxes", "constant features", "all padding"])
def test_extremes_stay_finite_with_their_gradients(name, case):
    params, terms, gradients, _ = setup(name)
    (student, teacher), size, truth = pyramids(name), SIZE, targets()
    if case == "no boxes":
        truth = truth._replace(valid=jnp.zeros_like(truth.valid))
    elif case == "constant features":
        student, teacher = (jax.tree.map(jnp.ones_like, x) for x in (student, teacher))
    else:
        size, truth = jnp.zeros_like(size), truth._replace(valid=jnp.zeros_like(truth.valid))
    arguments = (params, student, teacher, size, truth, keys(2), STEP)
    for x in jax.tree.leaves((terms(*arguments), gradients(*arguments))):
        assert np.isfinite(x).all()


def odd_boxes(rng: np.random.Generator, size: np.ndarray) -> np.ndarray:
    """Of four objects: their boxes (4, 4), some of no area, tiny, all of the image, outside of it, or the same."""
    height, width = size.tolist()
    corner = rng.uniform(0, [width, height], (4, 2))
    ordinary = np.concatenate([corner, corner + rng.uniform(1, 32, (4, 2))], axis=1)
    kinds = {
        "ordinary": ordinary,
        "no area": np.concatenate([corner, corner], axis=1),
        "no width": np.concatenate([corner, corner + np.array([0, 9])], axis=1),
        "tiny": np.concatenate([corner, corner + 1e-4], axis=1),
        "all": np.tile([0.0, 0, width, height], (4, 1)),
        "in the padding": np.tile([60.0, 60, 64, 64], (4, 1)),
        "outside": ordinary + 1e4,
        "the same": np.tile(ordinary[:1], (4, 1)),
    }
    return np.stack([kinds[kind][k] for k, kind in enumerate(rng.choice(list(kinds), 4))])


def odd_features(rng: np.random.Generator, features):
    """The same features, or others that break naive code."""
    kind = rng.integers(6)

    def change(x):
        if kind == 0:
            return jnp.zeros_like(x)
        if kind == 1:
            return jnp.full_like(x, rng.normal())
        if kind == 2:
            return jnp.broadcast_to(x[:, :1, :1], x.shape)
        if kind == 3:
            return jnp.broadcast_to(x[..., :1], x.shape)
        return x * (1e6 if kind == 4 else 1.0)

    return jax.tree.map(change, features)


@pytest.mark.parametrize("name", NAMES)
def test_odd_objects_and_features_stay_finite_with_their_gradients(name):
    params, terms, gradients, _ = setup(name)
    rng = np.random.default_rng(0)
    for _ in range(40):
        student, teacher = (odd_features(rng, x) for x in pyramids(name))
        size = rng.choice([0, 1, 5, 33, 64], (2, 2))
        boxes = np.stack([odd_boxes(rng, x) for x in size])
        valid = rng.random((2, 4)) < rng.choice([0, 0.5, 1])
        truth = targets()._replace(boxes=jnp.asarray(boxes, jnp.float32), valid=jnp.asarray(valid))
        step = jnp.asarray(rng.choice([0, 1, 100_000]), jnp.int32)
        arguments = (params, student, teacher, jnp.asarray(size), truth, keys(2), step)
        for x in jax.tree.leaves((terms(*arguments), gradients(*arguments))):
            assert np.isfinite(x).all()


@pytest.mark.parametrize(("name", "options"), [(name, options) for name in RATIOS for options in RATIOS[name]], ids=str)
def test_hiding_nothing_or_everything_is_finite_with_its_gradients(name, options):
    method, params = build(name, options=options), setup(name)[0]

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def loss(params, student):
        return of(method)(params, student, pyramids(name)[1], SIZE, targets(), keys(2), STEP)[name]

    value, gradients = loss(params, pyramids(name)[0])
    assert value > 0
    for x in jax.tree.leaves((value, gradients)):
        assert np.isfinite(x).all()
    # The branch that hides nothing teaches the student.
    everything = 1.0 in options.values() and 0.0 not in options.values()
    assert all((size == 0) == everything for size in largest(gradients[1]).values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16_features_give_float32_terms_close_to_float32s(name, dtype):
    """Whether the method computes in float32, which loses nothing, or, as a stage of that dtype has it, in bfloat16."""
    params, terms, _, _ = setup(name)
    method = build(name, dtype=dtype)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), pyramids(name))
    rest = (SIZE, targets(), keys(2), STEP)
    exact = terms(params, *jax.tree.map(lambda x: x.astype(jnp.float32), rounded), *rest)
    found = jax.jit(of(method))(params, *rounded, *rest)
    for term in exact:
        assert found[term].dtype == jnp.float32
        # The detector's head gets masked features of the dtype that the features have.
        lossless = dtype == jnp.float32 and not term.startswith("masked_")
        np.testing.assert_allclose(found[term], exact[term], rtol=1e-5 if lossless else 0.02)


@pytest.mark.parametrize("name", NAMES)
def test_jit_changes_nothing(name):
    params, terms, _, plain = setup(name)
    arguments = (params, *pyramids(name), SIZE, targets(), keys(2), STEP)
    jitted, eager = terms(*arguments), plain(*arguments)
    for term in jitted:
        np.testing.assert_allclose(jitted[term], eager[term], rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_several_devices_compute_what_one_does_gradients_included(name):
    params, terms, gradients, _ = setup(name)
    method = build(name, axis_name=AXIS)
    arguments = (*pyramids(name), SIZE, targets(), keys(2))
    one = terms(params, *arguments, STEP)

    def per_device(params, student, teacher, size, targets, keys):
        def total(params, student):
            terms = of(method)(params, student, teacher, size, targets, keys, STEP)
            return sum(terms.values(), jnp.zeros(())), terms

        (learnt, features), found = jax.grad(total, argnums=(0, 1), has_aux=True)(params, student)
        # A device's features move the mean over devices by their share of what they move the devices' terms by.
        features = jax.tree.map(lambda x: x / jax.lax.psum(1, AXIS), features)
        return jax.lax.pmean((found, learnt), AXIS), features

    parts = jax.tree.map(lambda x: x.reshape(2, 1, *x.shape[1:]), arguments)
    several = jax.pmap(per_device, AXIS, in_axes=(None, 0, 0, 0, 0, 0), devices=jax.devices()[:2])(params, *parts)
    (found, learnt), features = several
    for term in one:
        np.testing.assert_allclose(found[term][0], one[term], rtol=1e-5)

    def assert_close(actual, *expected):
        total = sum(expected)
        np.testing.assert_allclose(actual.reshape(total.shape), total, rtol=0, atol=1e-4 * jnp.abs(total).max() + 1e-7)

    by_term = gradients(params, *arguments, STEP).values()
    nothing = jax.tree.map(jnp.zeros_like, {"method": params, "student": arguments[0]})
    actual = {"method": jax.tree.map(lambda x: x[0], learnt), "student": features}
    jax.tree.map(assert_close, actual, nothing, *({part: x[part] for part in nothing} for x in by_term))


@pytest.mark.parametrize("name", NAMES)
def test_every_option_has_a_rule_which_its_default_obeys(name):
    options = declared(METHODS[name])
    for key, option in options.items():
        assert option.rule.holds(option.default), key
        assert option.meaning.endswith("."), key
    assert method_options(name) == {key: option.default for key, option in options.items()}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"name": "mdg"}, "no method 'mdg'; choose one of mimic, mgd"),
        ({"name": "mgd", "ratio": 0.5}, "no option 'ratio'.*mask_ratio"),
        ({"name": "mimic", "mask_ratio": 0.5}, "options are: none"),
    ],
)
def test_a_wrong_method_config_lists_the_choices(config, words):
    with pytest.raises(ValueError, match=words):
        build_method(config)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_what_it_says_that_it_needs_and_no_more(name):
    keywords = inspect.signature(METHODS[name].__call__).parameters.values()
    assert [x.name for x in keywords if x.kind is x.KEYWORD_ONLY] == list(METHODS[name].needs)
    assert set(METHODS[name].needs) <= set(NEEDED)
    assert set(METHODS[name].requires) <= {"teacher", "init"}


PLANTED = {
    "no terms": ("terms = None", "it has no 'terms'"),
    "an unknown need": ("needs = ('size', 'boxes')", "needs 'boxes'; methods may need size, targets, keys"),
    "another signature": (
        "needs = ('size', 'keys')",
        r"must be called with \(student, teacher, \*, size, keys\).*it takes",
    ),
    "a key of every method": (
        "levels: Annotated[int, whole(0), 'How many.'] = 3",
        "has an option 'levels', which is a",
    ),
}


@pytest.mark.parametrize(("line", "words"), PLANTED.values(), ids=PLANTED)
def test_a_method_that_breaks_the_contract_is_refused_before_anything_is_built(line, words, monkeypatch):
    scope = {"nn": nn, "Annotated": Annotated, "whole": whole}
    body = "needs, requires, terms = ('size',), (), {'x': ('student',)}"
    code = f"class Planted(nn.Module):\n    {body}\n    {line}\n    def __call__(self, student, teacher, *, size): ..."
    exec(code, scope)
    planted = scope["Planted"]
    if line == "terms = None":
        del planted.terms
    monkeypatch.setitem(METHODS, "planted", planted)
    with pytest.raises(UserError, match=words):
        build_method({"name": "planted"})
