"""What the methods that teach by logits promise: KD, CWD, and MasKD of segmentation with its tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.methods import build_method
from kdjax.types import Logits, View

CLASSES, SIZE = 5, jnp.array([[32, 24], [16, 32]])
TAUGHT = ["kd", "cwd", "maskd_logits"]


def logits(seed: int, *shape: int, auxiliary: bool = True) -> Logits:
    main, second = jax.random.normal(jax.random.key(seed), (2, *shape))
    return Logits(main, second if auxiliary else None)


def view(predictions: Logits | None) -> View:
    return View({"c2": jnp.ones((2, 8, 8, 3)), "c5": jnp.ones((2, 4, 4, 3))}, {"c2": 4, "c5": 8}, predictions)


OURS, THEIRS = logits(0, 2, 4, 4, CLASSES), logits(1, 2, 4, 4, CLASSES)


@functools.cache
def setup(name: str):
    """A method's terms as a jitted function of what both say, and its parameters."""
    method = build_method({"name": name})

    def given(theirs):
        if name == "maskd_logit_tokens":
            return {"size": SIZE, "prediction_loss": lambda masked: {"seg": jnp.mean(jnp.square(masked.main))}}
        return {"size": SIZE, "teacher_heads": lambda _: theirs}

    def terms(params, ours, theirs):
        return method.apply({"params": params}, view(ours), view(None), **given(theirs))

    params = method.init(jax.random.key(2), view(OURS), view(None), **given(THEIRS)).get("params", {})
    return params, jax.jit(terms)


@pytest.mark.parametrize("name", [*TAUGHT, "maskd_logit_tokens"])
def test_terms_are_the_declared_ones_and_move_what_they_declare(name):
    params, terms = setup(name)
    declared = {term.replace("*", "seg"): parts for term, parts in build_method({"name": name}).terms.items()}
    found = terms(params, OURS, THEIRS)
    assert found.keys() == declared.keys()
    assert all(value.shape == () and value.dtype == jnp.float32 for value in found.values())
    for term, parts in declared.items():
        of = jax.grad(lambda *x, term=term: terms(*x)[term], argnums=(0, 1, 2))
        moved = [any(bool(jnp.any(x != 0)) for x in jax.tree.leaves(tree)) for tree in of(params, OURS, THEIRS)]
        learns = "method" in parts and not getattr(build_method({"name": name}), "still", {}).get(term)
        assert moved == [learns, "student" in parts, False], term


@pytest.mark.parametrize("name", [*TAUGHT, "maskd_logit_tokens"])
def test_the_padding_has_no_influence(name):
    params, terms = setup(name)

    def disturbed(x):
        inside = jnp.stack([(jnp.arange(4)[:, None] < h // 8) & (jnp.arange(4)[None] < w // 8) for h, w in SIZE])
        return jnp.where(inside[..., None], x, 50.0)

    noisy = (jax.tree.map(disturbed, OURS), jax.tree.map(disturbed, THEIRS))
    clean = terms(params, OURS, THEIRS)
    for term, value in terms(params, *noisy).items():
        if term != "masked_seg":  # The loss of the model itself decides what it counts.
            np.testing.assert_allclose(value, clean[term], rtol=1e-5)


@pytest.mark.parametrize("name", TAUGHT)
def test_a_student_that_says_the_same_has_nothing_to_learn(name):
    params, terms = setup(name)
    np.testing.assert_allclose(list(terms(params, THEIRS, THEIRS).values()), 0, atol=1e-6)


def test_images_are_compared_without_places():
    method, ours, theirs = build_method({"name": "kd"}), logits(0, 2, CLASSES), logits(1, 2, CLASSES)
    seen = View({"c5": jnp.ones((2, 1, 1, 3))}, {"c5": 32}, ours)
    assert method.apply({}, seen, seen, size=SIZE, teacher_heads=lambda _: theirs)["kd"] > 0


def test_without_an_auxiliary_head_its_term_is_zero():
    params, terms = setup("maskd_logits")
    alone = terms(params, OURS._replace(auxiliary=None), THEIRS)
    assert alone["maskd_auxiliary"] == 0
    np.testing.assert_allclose(alone["maskd_logits"], terms(params, OURS, THEIRS)["maskd_logits"], rtol=1e-6)


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        (logits(1, 2, 4, 4, CLASSES + 1), r"\(4, 4, 5\) and the teacher's \(4, 4, 6\)"),
        (jnp.ones((2, 4)), "predicts no logits"),
    ],
    ids=["classes", "kind"],
)
def test_what_cannot_be_compared_is_refused_in_words(theirs, words):
    with pytest.raises(UserError, match=words):
        setup("cwd")[1]({}, OURS, theirs)
