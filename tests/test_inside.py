"""What is shown of a method's inside is what it does: its masks, its gradients, its levels."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.distill import Applied
from kdjax.heat import masked, over, strip
from kdjax.losses import kd_loss, keep_mask, uniform_statistics
from kdjax.methods import build_method
from kdjax.methods.levels import SHOWN, keys_of
from kdjax.plan import resolve
from kdjax.run import pipeline
from kdjax.run.balance import idle_levels
from kdjax.run.data import open_split
from kdjax.run.inside import Inside, Level, Point, Pull, look_inside, pulling
from kdjax.run.inside_page import inside_page, suggested
from kdjax.types import Batch, Logits, Targets, View
from tests.runs import tiny, with_teacher
from tests.test_html_report import ROOT, parsed

STRIDES = {"p3": 8, "p4": 16}
GIVEN = {
    "size": jnp.array([[32, 48], [64, 64]]),
    "keys": jax.random.split(jax.random.key(1), 2),
    "step": jnp.int32(0),
    "targets": Targets(jnp.zeros((2, 1, 4)), jnp.zeros((2, 1), int), jnp.zeros((2, 1), bool)),
}


def view(seed: int, channels: int = 4) -> View:
    rng = np.random.default_rng(seed)
    maps = {level: rng.normal(size=(2, 64 // stride, 64 // stride, channels)) for level, stride in STRIDES.items()}
    return View({level: jnp.asarray(x, jnp.float32) for level, x in maps.items()}, STRIDES)


DUAL = {"kept": (8, 8, 1), "attention": (8, 8, 1), "kept_channels": (4,), "attention_to_channels": (4,)}
SEEN = {"mgd": {"kept": (8, 8, 1)}, "dmkd": DUAL, "dfmsd": DUAL, "maskd": {"tokens": (8, 8, 6)}}


@pytest.mark.parametrize("name", SEEN)
def test_a_method_shows_what_it_hides_to_whoever_asks_and_learns_nothing_of_it(name):
    method = build_method({"name": name})
    needed = {need: GIVEN[need] for need in method.needs}
    variables = jax.eval_shape(method.init, jax.random.key(0), view(0), view(1), **needed)
    assert SHOWN not in variables

    def seen(variables):
        return method.apply(variables, view(0), view(1), **needed, mutable=[SHOWN])[1][SHOWN]

    shapes = {key: x.shape for key, x in jax.eval_shape(seen, variables).items()}
    assert {key: shape for key, shape in shapes.items() if key.endswith("/p3")} == {
        f"{what}/p3": (2, *shape) for what, shape in SEEN[name].items()
    }
    assert {key.split("/")[1] for key in shapes} == {"p3", "p4"}


def test_what_mgd_shows_is_the_mask_that_it_draws():
    method = build_method({"name": "mgd"})
    needed = {need: GIVEN[need] for need in method.needs}
    variables = method.init(jax.random.key(0), view(0), view(1), **needed)
    shown = method.apply(variables, view(0), view(1), **needed, mutable=[SHOWN])[1][SHOWN]
    for number, level in enumerate(STRIDES):
        drawn = keep_mask(view(0).features[level].shape, keys=keys_of(GIVEN["keys"], 2, number), mask_ratio=0.65)
        np.testing.assert_array_equal(shown[f"kept/{level}"], drawn)


class Judge(nn.Module):
    """A student of two maps whose own loss looks at the fine one alone, with logits of its mean."""

    strides = STRIDES
    terms = ("own",)

    def heads(self, features, image_size=None, sampling=None):
        return Logits(jnp.mean(features["p3"], axis=(1, 2)))

    def heads_at(self, features, predictions, image_size=None):
        return self.heads(features)

    def loss(self, predictions, targets, image_size):
        return {"own": jnp.sum(predictions.main)}


def pulled(methods, params, weights):
    student, teacher = view(0), view(1)
    pull = pulling(Judge(), Judge(), {}, methods, weights, uniform_statistics(3))
    batch = Batch(jnp.zeros((2, 64, 64, 3), jnp.uint8), jnp.array([[64, 64], [64, 64]]), jnp.arange(2))
    batch = dataclasses.replace(batch, targets=Targets(*BOXES))
    return pull(Point({}, params, jnp.int32(5)), student.features, teacher.features, batch, GIVEN["keys"])


BOXES = jnp.array([[[8.0, 8, 40, 40]]] * 2), jnp.ones((2, 1), int), jnp.array([[True], [False]])


def test_what_pulls_is_the_gradient_by_the_students_features_with_its_weight():
    """Plain imitation is a mean of squares: its gradient is known; what the own loss does not see does not feel it."""
    pulls, shown = pulled({"mimic": Applied(build_method({"name": "mimic"}), ("p4",))}, {}, {"mimic": 0.5})
    assert shown == {}
    assert list(pulls) == ["own", "mimic", "mimic/p4"]
    difference = np.asarray(view(0).features["p4"] - view(1).features["p4"])
    found = pulls["mimic/p4"]
    assert found.weighted == pytest.approx(0.5 * found.value)
    assert found.norm == pytest.approx(2 * found.weighted / np.sqrt(np.sum(difference**2)), rel=1e-4)
    assert pulls["mimic"].gradient == found.gradient
    assert found.gradient["p3"] == pulls["own"].gradient["p4"] == 0 < pulls["own"].gradient["p3"]


def test_what_compares_predictions_pulls_through_the_heads_of_both():
    pulls, _ = pulled({"kd": Applied(build_method({"name": "kd"}))}, {}, {})
    ours, theirs = (jnp.mean(x.features["p3"], axis=(1, 2)) for x in (view(0), view(1)))
    assert pulls["kd"].value == pytest.approx(float(kd_loss(ours, theirs, temperature=4.0)), rel=1e-5)
    assert pulls["kd"].gradient["p3"] > 0 == pulls["kd"].gradient["p4"]


def test_icd_shows_where_each_real_instance_looks_over_all_levels():
    method = build_method({"name": "icd", "heads": 2, "queries": 6, "warmup_steps": 0})
    given = {**GIVEN, "targets": Targets(*BOXES), "statistics": uniform_statistics(3)}
    params = method.init(jax.random.key(0), view(0), view(1), **given)["params"]
    pulls, shown = pulled({"icd": Applied(method)}, params, {})
    looks = [shown["attention/p3"], shown["attention/p4"]]
    assert [x.shape for x in looks] == [(2, 8, 8, 4), (2, 4, 4, 4)]
    whole = sum(np.sum(x, axis=(1, 2)) for x in looks)
    np.testing.assert_allclose(whole, [[1, 0, 0, 0], [0, 0, 0, 0]], atol=1e-5)
    assert pulls["icd"].gradient["p3"] > 0 < pulls["icd"].gradient["p4"]


def test_levels_of_no_objects_are_left_out_where_they_have_taken_a_term_over_and_others_are_not():
    """The shares of gradients of 205 blood smears, as experiments/2026-11-27-show.md has them."""
    levels = ("p3", "p4", "p5", "p6", "p7")
    own = dict(zip(levels, (0.69, 0.2, 0.11, 1e-5, 1e-6), strict=True))
    mimic = dict(zip(levels, (0.038, 0.058, 0.089, 0.375, 0.44), strict=True))
    found = idle_levels("student", [own], {"mimic": mimic}, {"mimic": "mimic"})
    assert found.flags == ["--config.student.methods.mimic.levels=\"('p3', 'p4', 'p5')\""]
    assert found.sentences[0].startswith("82% of the gradient of mimic is at p6, p7")
    assert idle_levels("student", [own, mimic], {"mimic": mimic}, {"mimic": "mimic"}).sentences == []
    assert idle_levels("student", [own], {"mgd": own}, {"mgd": "mgd"}).sentences == []
    few = own | {"p6": 0.015}  # As the cells' P5 has where they are not enlarged: a few objects, no constant.
    assert idle_levels("student", [few], {"x": {"p3": 0.1, "p6": 1.0}}, {"x": "x"}).sentences == []
    unread = own | {"p6": 0.0, "p7": 0.0}
    assert idle_levels("student", [unread], {"mimic": mimic}, {"mimic": "mimic"}).sentences == []


def test_a_map_is_brightest_where_it_is_strongest_and_a_mask_is_dark_where_it_hides():
    image = np.full((6, 8, 3), 200, np.uint8)
    values = np.array([[0.0, 1.0], [0.5, 0.0]])
    drawn = over(image, values, 4, 1.0).sum(axis=-1, dtype=int)
    assert drawn.shape == (6, 8)
    assert drawn[0, 4] == drawn.max() > drawn[4, 0] > drawn[0, 0] == drawn[5, 7]
    hidden = masked(image, values > 0, 4)
    assert (hidden[0, 7] == 200).all()
    assert (hidden[0, 0] == 30).all()
    assert strip(np.array([True, False])).shape == (16, 256, 3)


def test_the_page_of_a_run_shows_no_padding_and_all_levels():
    batch = Batch(np.zeros((1, 64, 64, 3), np.uint8), np.array([[32, 48]]), np.zeros(1, int))
    one = np.ones((1, 8, 8), np.float32)
    one[:, 4:] = 9.0  # Padding.
    shown = {"kept": {"before": one[..., None] > 0}, "kept_channels": {"before": one[:, 0]}}
    level = Level(8, one, {"before": one}, {"before": one}, shown)
    pull = {"before": Pull(1.0, 1.0, {"p3": 1.0})}
    found = Inside(batch, {"p3": level}, {"own<": pull, "mgd": pull, "mgd/p3": pull}, ("own<",), 1)
    plan = resolve(tiny(ROOT / "configs" / "mgd.py", "x"), devices=1)
    page = parsed(inside_page(plan, "student", "below", found))
    words = " ".join(page.texts)
    assert "own< 1 1 1 mgd 1 1 1 mgd, p3 1 1 1" in words
    assert "teacher: 1 student, before: 1 difference, before: 1 kept: 100%" in words
    assert "script" not in page.tags


def test_what_teaches_a_method_alone_is_no_part_of_what_weighs_on_the_student():
    pulls = {"cls": 1.0, "icd": 3.0, "icd_confidence": 1.0, "icd_localization": 20.0}
    pulls = {term: {"before": Pull(x, x, {"p3": x})} for term, x in pulls.items()}
    plan = resolve(tiny(ROOT / "configs" / "icd.py", "x"), devices=1)
    assert suggested(plan, "student", Inside(None, {}, pulls, ("cls",), 1)).flags == []
    pulls["icd"] = {"before": Pull(30.0, 30.0, {"p3": 30.0})}
    found = suggested(plan, "student", Inside(None, {}, pulls, ("cls",), 1))
    assert found.flags == ["--config.student.method_share=3"]


@pytest.mark.slow
def test_a_run_is_looked_into_before_and_after(teacher, data_dir, tmp_path):
    config = tiny(ROOT / "configs" / "mgd.py", data_dir)
    workdir = with_teacher(teacher, tmp_path)
    pipeline.run(config, workdir)
    plan = resolve(config, devices=1)
    source = open_split(plan.data, plan.task, training=True)
    found = look_inside(plan, workdir, "student", source, 2)
    assert list(found.levels) == ["p3", "p4", "p5", "p6"]
    for level in found.levels.values():
        assert list(level.student) == list(level.difference) == ["before", "after"]
        assert level.shown["kept"]["after"].dtype == bool
        assert not np.array_equal(level.student["before"], level.student["after"])
    assert sorted(found.pulls) == sorted([*found.own, "mgd", *(f"mgd/{level}" for level in found.levels)])
    assert found.pulls["mgd"]["before"].norm > 0
