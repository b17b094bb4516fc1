"""What is shown of a method's inside is what it does: its masks, its gradients, its levels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.distill import Applied
from kdjax.heat import masked, over, strip
from kdjax.losses import keep_mask
from kdjax.methods import build_method
from kdjax.methods.levels import SHOWN, keys_of
from kdjax.plan import resolve
from kdjax.run import pipeline
from kdjax.run.data import open_split
from kdjax.run.inside import Inside, Level, _pulls, look_inside
from kdjax.run.inside_page import inside_page
from kdjax.types import Batch, Targets, View
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


def test_what_pulls_is_the_gradient_by_the_students_features():
    """Plain imitation is a mean of squares: its gradient is known."""
    ours, theirs = view(0), view(1)
    whole = {"size": jnp.array([[64, 64], [64, 64]])}
    pulls, shown = _pulls(Applied(build_method({"name": "mimic"}), ("p4",)), None, ours, theirs, whole)
    assert shown == {}
    assert list(pulls) == ["mimic/p4"]
    difference = np.asarray(ours.features["p4"] - theirs.features["p4"])
    found = pulls["mimic/p4"]
    scale = found.value / np.sum(difference**2)
    assert found.gradient == pytest.approx(2 * scale * np.sqrt(np.sum(difference**2)), rel=1e-4)


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
    level = Level(8, one, {"before": one}, {"before": one}, {"kept": one[..., None] > 0, "kept_channels": one[:, 0]})
    found = Inside(batch, {"p3": level}, {}, ["kd<"])
    plan = resolve(tiny(ROOT / "configs" / "mgd.py", "x"), devices=1)
    page = parsed(inside_page(plan, "student", found))
    words = " ".join(page.texts)
    assert "kd< is not here" in words
    assert "teacher: 1 student, before: 1 difference, before: 1 kept: 100%" in words
    assert "script" not in page.tags


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
        assert level.shown["kept"].dtype == bool
        assert not np.array_equal(level.student["before"], level.student["after"])
    assert [*found.pulls] == [f"mgd/{level}" for level in found.levels]
