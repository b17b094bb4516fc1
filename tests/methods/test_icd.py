"""ICD beyond the contract: who learns from which term, when, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.losses import instance_descriptors, sample_queries, uniform_statistics
from kdjax.methods import build_method
from kdjax.methods.icd import DecoderLayer
from tests.methods import calls, reference
from tests.methods.test_contract import SIZE, STEP, build, given, keys, pyramids, setup, targets
from tests.tiny import CLASSES


def moved(tree) -> set[str]:
    """Top-level names below which anything has a gradient."""
    return {name for name, part in tree.items() if any(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(part))}


@pytest.mark.parametrize("step", [0, 999, 1000])
def test_before_the_warm_up_ends_only_the_value_projection_imitates(step):
    params, _, gradients, _ = setup("icd")
    found = gradients(params, *pyramids("icd"), SIZE, targets(), keys(2), jnp.int32(step))["icd"]
    assert moved(found["student"]) == (set() if step < 1000 else {"p4", "p5"})
    assert moved(found["method"]) == {"student_layer_0", "align_p4", "align_p5"}
    assert params["student_layer_0"].keys() == {"value"}


def test_the_auxiliary_task_teaches_the_teachers_side_alone():
    params, _, gradients, _ = setup("icd")
    found = gradients(params, *pyramids("icd"), SIZE, targets(), keys(2), STEP)
    for term in ("icd_confidence", "icd_localization"):
        assert moved(found[term]["method"]) == {"encoder", "teacher_layer_0", "predictor"}


def test_images_without_boxes_are_not_imitated_but_their_fakes_are_told_apart():
    params, terms, _, _ = setup("icd")
    empty = targets()._replace(valid=jnp.zeros((2, 4), bool))
    found = terms(params, *pyramids("icd"), SIZE, empty, keys(2), STEP)
    assert found["icd"] == 0
    assert found["icd_localization"] == 0
    assert found["icd_confidence"] > 0


def test_queries_differ_with_the_keys():
    params, terms, _, _ = setup("icd")
    one, other = (
        terms(params, *pyramids("icd"), SIZE, targets(), jax.random.split(jax.random.key(seed), 2), STEP)
        for seed in (1, 2)
    )
    assert one["icd_confidence"] != other["icd_confidence"]


def test_the_class_is_described_by_as_many_numbers_as_there_are_classes():
    assert setup("icd")[0]["encoder"]["layer_0"]["kernel"].shape == (3 + 266, 8)


def test_the_aligned_student_is_compared_in_the_teachers_width():
    _, teacher = pyramids("icd")
    shapes = jax.eval_shape(lambda: calls.init(build("icd"), teacher, teacher, **given()))
    assert not [name for name in shapes if name.startswith("align")]


def test_heads_that_do_not_divide_the_channels_are_refused_in_words():
    method = build("icd", options={"heads": 3})
    with pytest.raises(UserError, match="8 channels, which ICD's 3 heads"):
        jax.eval_shape(lambda: calls.init(method, *pyramids("icd"), **given()))


def test_two_layers_are_averaged_where_the_student_imitates_and_summed_where_queries_learn():
    statistics, options = uniform_statistics(CLASSES), {"layers": 2, "heads": 2, "temperature": 2.0}
    method = build_method({"name": "icd", "queries": 12, "warmup_steps": 0} | options)
    params = reference.random_params(method)
    assert {name for name in params if "layer" in name} == {
        f"{side}_layer_{index}" for side in ("teacher", "student") for index in range(2)
    }

    @jax.jit
    def asked():
        size = jnp.array(reference.SIZES)
        drawn = {"keys": reference.KEYS, "statistics": statistics, "limit": 12}
        queries = sample_queries(reference.targets(), image_size=size, **drawn)
        return queries, instance_descriptors(queries, image_size=size, num_classes=CLASSES)

    expected = reference.icd(params, *asked(), **options)
    terms = jax.jit(functools.partial(reference.apply, method))(params)
    assert terms.keys() == expected.keys()
    for term, value in expected.items():
        np.testing.assert_allclose(terms[term], value, rtol=1e-4, err_msg=term)


def test_attention_starts_as_pytorchs_does():
    """Xavier over a packed projection of three times the width has a deviation of 0.0442 at 256 channels; no bias."""
    features = jnp.ones((1, 4, 256))
    masks = {"real": jnp.ones((1, 2), bool), "where": jnp.ones((1, 4), bool)}
    params = DecoderLayer().init(jax.random.key(0), jnp.ones((1, 2, 256)), features, features, **masks)["params"]
    for name in ("query", "key", "value"):
        np.testing.assert_allclose(params[name]["kernel"].std(), 0.0442, rtol=0.01)
        assert np.abs(params[name]["kernel"]).max() <= (6 / 1024) ** 0.5
    assert not any(np.any(params[name]["bias"]) for name in ("query", "key", "value", "out"))
    np.testing.assert_allclose(params["out"]["kernel"].std(), 256**-0.5 / 3**0.5, rtol=0.01)
