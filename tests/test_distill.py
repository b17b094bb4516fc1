"""The step: N devices are one device, options wrap it without changing what it computes, frozen paths stay."""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.devices import AXIS, parallel, replicate, split
from kdjax.distill import Applied, distill_loss, distill_step, image_keys, own_keys, weighted_sum
from kdjax.methods import build_method
from kdjax.optim import by_part, make_optimizer, trained_norm
from kdjax.state import TrainState, init_state
from tests import tiny
from tests.methods.calls import view
from tests.slow import slow_but

IMAGES = 8
WEIGHTS = {"mgd": 1e-3}
KEY = jax.random.key(7)


class Ran(NamedTuple):
    """What :func:`run` saw."""

    curve: list[dict[str, Any]]
    """The metrics of each step."""
    first: TrainState
    last: TrainState


COMPILED: list[str] = []
"""What was compiled so far, the same avals for another sharding too, which nothing traces again."""


def listen(event: str, _: float, **__: Any) -> None:
    if event.endswith("backend_compile_duration"):
        COMPILED.append(event)


jax.monitoring.register_event_duration_secs_listener(listen)


class Made(NamedTuple):
    """A mapped step, and what it starts from."""

    step: Callable[..., Any]
    first: TrainState
    teacher_variables: Any
    compiled: list[int]
    """How many programs each call of the step compiled, in whichever tests."""


@functools.cache
def make(
    devices: int, *, accumulate: int = 1, ema: float = 0.0, freeze: tuple[str, ...] = (), share: float = 0.0
) -> Made:
    """MGD's step on ``devices`` devices, mapped as a run maps it."""
    student = tiny.detector(axis_name=AXIS)
    teacher = tiny.detector(width=16, channels=12)
    method = build_method({"name": "mgd"}, axis_name=AXIS)
    optimizer = by_part(make_optimizer(lambda step: 0.01, weight_decay=1e-4, clip_norm=10.0), freeze=freeze)
    images = jnp.zeros((1, tiny.SIZE, tiny.SIZE, 3))
    variables = _init(student, 7)
    teacher_variables = _init(teacher, 8)

    @jax.jit
    def init_method(variables, teacher_variables):
        features, taught = (
            module.apply(x, images, method="features")
            for module, x in ((student, variables), (teacher, teacher_variables))
        )
        plain, size = method.clone(axis_name=None), jnp.array([[tiny.SIZE, tiny.SIZE]])
        return plain.init(KEY, view(features), view(taught), size=size, keys=KEY[None])

    method_variables = init_method(variables, teacher_variables)
    step = parallel(
        functools.partial(
            distill_step,
            student=student,
            teacher=teacher,
            methods={"mgd": Applied(method)},
            optimizer=optimizer,
            loss_weights=WEIGHTS,
            axis_name=AXIS,
            accumulate=accumulate,
            ema_decay=ema,
            method_share=share,
            norm=functools.partial(trained_norm, freeze=freeze),
            whole_norm=functools.partial(trained_norm, freeze=freeze),
        ),
        in_axes=(None, None, 0, None),
        replicated=True,
        devices=jax.devices()[:devices],
    )
    first = init_state(variables, method_variables, optimizer, ema=ema > 0, scaled=share > 0)
    return Made(step, first, teacher_variables, [])


@functools.cache
def run(devices: int, steps: int, *, accumulate: int = 1, twice: bool = False, **options: Any) -> Ran:
    """``steps`` steps of :func:`make`."""
    chosen = jax.devices()[:devices]
    step, first, teacher_variables, compiled = make(devices, accumulate=accumulate, **options)
    state = replicate(jax.tree.map(jnp.copy, first), chosen)
    teacher_variables = replicate(teacher_variables, chosen)
    curve = []
    for i in range(steps):
        batch = tiny.batch(IMAGES, seed=i)
        if twice:
            batch = jax.tree.map(lambda x: np.concatenate([x[: IMAGES // 2]] * 2), batch)
        batch = split(batch, chosen, parts=accumulate)
        before = len(COMPILED)
        state, metrics = step(state, teacher_variables, batch, KEY)
        compiled.append(len(COMPILED) - before)
        curve.append(jax.device_get(metrics))
    return Ran(curve, first, jax.device_get(state))


@functools.cache
def _init(module, seed):
    images = jnp.zeros((1, tiny.SIZE, tiny.SIZE, 3))
    return jax.jit(module.clone(axis_name=None).init)(jax.random.key(seed), images)


@pytest.mark.parametrize("devices", slow_but([8], [2, 4, 8]))
def test_several_devices_give_one_devices_loss_curve_random_masks_included(devices):
    """Before 0.10.2 JAX sums roughly on CPUs, and the variances of batch norm are sums in another order here."""
    tolerance = 1e-5 if jax.__version_info__ >= (0, 10, 2) else 1e-3
    one, several = run(1, 20).curve, run(devices, 20).curve
    for name in one[0]:
        np.testing.assert_allclose([x[name] for x in several], [x[name] for x in one], rtol=tolerance, err_msg=name)


@pytest.mark.parametrize("devices", slow_but([1], [1, 2]))
def test_the_terms_of_methods_start_as_a_multiple_of_the_students_own_loss(devices):
    ran, plain = run(devices, 3, share=4.0), run(devices, 20).curve
    first = ran.curve[0]
    assert make(devices, accumulate=1, share=4.0).compiled[1:] == [0, 0]
    np.testing.assert_allclose(first["loss/mgd"], 4 * (first["loss/cls"] + first["loss/box"]), rtol=1e-5)
    np.testing.assert_allclose(first["raw/mgd"], plain[0]["raw/mgd"], rtol=1e-6)
    scale = first["method_scale"]
    assert "method_scale" not in plain[0]
    for row in ran.curve[1:]:
        np.testing.assert_array_equal(row["method_scale"], scale)
        np.testing.assert_allclose(row["loss/mgd"], scale * WEIGHTS["mgd"] * row["raw/mgd"], rtol=1e-5)
        np.testing.assert_allclose(row["loss"], row["loss/mgd"] + row["loss/cls"] + row["loss/box"], rtol=1e-5)
    np.testing.assert_array_equal(ran.last.scale, scale)


@pytest.mark.parametrize("devices", slow_but([1, 8], [1, 2, 8]))
def test_the_step_is_compiled_once(devices):
    """Its own output, and a batch of other images, go in again without another program."""
    run(devices, 20)
    first, *later = make(devices, accumulate=1).compiled
    assert first > 0
    assert len(later) >= 19
    assert not any(later)


def test_gradients_are_summed_over_devices_in_float32_and_what_is_frozen_is_not():
    step, state, teacher_variables, _ = make(2, freeze=("student/backbone",))
    lowered = step.lower(state, teacher_variables, split(tiny.batch(4), jax.devices()[:2]), KEY)
    text = lowered.as_text()
    learnt = jax.tree.leaves((state.params["student"]["neck"], state.params["student"]["head"], state.params["method"]))
    # Of bfloat16, XLA converts sums instead of what is summed, unless that is kept apart.
    summed = re.findall(r'all_reduce"\((%\w+)\).*?\}\) : \(tensor<(\S*)>\)', text, re.DOTALL)
    assert all(kind.split("x")[-1] == "f32" for _, kind in summed)
    # Some versions of JAX still have the sums here of what is frozen.
    apart = set(re.findall(r"(%\w+) = stablehlo.optimization_barrier", text))
    assert sum(name in apart for name, _ in summed) >= len(learnt)
    # The elements of all sums: besides those of gradients, batch norm's and scalars.
    reduced = re.findall(r"= (\(.*?\)|\S+) all-reduce\(", lowered.compile().as_text())
    shapes = re.findall(r"(\w+)\[([\d,]*)\]", " ".join(reduced))
    assert {dtype for dtype, _ in shapes} == {"f32"}
    count = sum(int(np.prod([int(x) for x in shape.split(",") if x])) for _, shape in shapes)
    assert 0 <= count - sum(x.size for x in learnt) < 200


def test_the_loss_is_the_weighted_sum_of_named_terms_and_falls():
    curve = run(1, 20).curve
    first = curve[0]
    levels = [f"raw/mgd/p{level}" for level in range(3, 7)]
    terms = ("raw/cls", "raw/box", "raw/mgd", "loss/cls", "loss/box", "loss/mgd", "loss", "grad_norm", "skipped")
    assert {*terms, *levels} == first.keys()
    np.testing.assert_allclose(first["raw/mgd"], sum(first[level] for level in levels), rtol=1e-6)
    np.testing.assert_allclose(first["loss/mgd"], WEIGHTS["mgd"] * first["raw/mgd"], rtol=1e-6)
    np.testing.assert_allclose(first["loss"], sum(first[f"loss/{x}"] for x in ("cls", "box", "mgd")), rtol=1e-6)
    assert np.mean([x["loss"] for x in curve[-5:]]) < np.mean([x["loss"] for x in curve[:5]])


def test_masks_change_from_step_to_step_and_image_to_image_but_not_with_the_batch_split():
    key, index = jax.random.key(0), jnp.arange(4)
    keys = jax.random.key_data(image_keys(key, jnp.int32(3), index))
    assert len(np.unique(keys, axis=0)) == 4
    assert not (keys == jax.random.key_data(image_keys(key, jnp.int32(4), index))).all(axis=-1).any()
    np.testing.assert_array_equal(jax.random.key_data(image_keys(key, jnp.int32(3), index[2:])), keys[2:])


def test_two_equal_parts_one_after_another_are_the_part_alone():
    whole, parts = run(1, 2, twice=True), run(1, 2, accumulate=2, twice=True)
    for name in whole.curve[0]:
        expected = [x[name] for x in whole.curve]
        np.testing.assert_allclose([x[name] for x in parts.curve], expected, rtol=1e-5, err_msg=name)
    assert parts.last.step == whole.last.step == 2


def test_parts_hold_the_same_images_on_any_number_of_devices():
    one, two = run(1, 2, accumulate=2).curve, run(2, 2, accumulate=2).curve
    for name in one[0]:
        np.testing.assert_allclose([x[name] for x in two], [x[name] for x in one], rtol=1e-5, err_msg=name)


def test_accumulation_is_the_mean_of_value_metrics_and_gradient_over_the_parts():
    from kdjax.distill import accumulated

    def value_and_grad(params, stats, teacher, batch, keys, step):
        value = jnp.mean(params * batch)
        return (value, ({"x": value}, stats + 1)), jnp.mean(batch)

    batch = jnp.arange(8.0)
    (value, (metrics, stats)), gradient = accumulated(value_and_grad, 4)(
        jnp.float32(2), jnp.float32(0), None, batch, batch, jnp.int32(0)
    )
    np.testing.assert_allclose([value, metrics["x"], stats, gradient], [7.0, 7.0, 4.0, 3.5])


def test_frozen_paths_stay_while_the_rest_moves_and_the_statistics_follow():
    _, first, last = run(1, 2, freeze=("student/backbone", "method"))
    for part, frozen in (("backbone", True), ("neck", False), ("head", False)):
        before, after = (jax.tree.leaves(x.params["student"][part]) for x in (first, last))
        same = [np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
        assert all(same) if frozen else not any(same), part
    assert all(map(np.array_equal, *(jax.tree.leaves(x.params["method"]) for x in (first, last))))
    assert not np.array_equal(*(jax.tree.leaves(x.batch_stats)[0] for x in (first, last)))


def test_the_moving_average_follows_parameters_and_statistics():
    decay = 0.75
    _, first, last = run(1, 1, ema=decay)
    expected = jax.tree.map(
        lambda a, b: decay * a + (1 - decay) * b,
        {"params": first.params["student"], "batch_stats": first.batch_stats},
        {"params": last.params["student"], "batch_stats": last.batch_stats},
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), last.student(), expected)


def test_a_term_without_a_weight_counts_once():
    total, weighted = weighted_sum({"a": jnp.float32(2), "b": jnp.float32(3)}, {"b": 0.5})
    assert (total, weighted["a"], weighted["b"]) == (3.5, 2, 1.5)


def test_nothing_is_differentiated_for_a_term_of_weight_zero():
    def total(x):
        return weighted_sum({"a": 2 * x, "b": jnp.sqrt(x)}, {"b": 0.0})[0]

    # The square root's gradient is infinite at zero, and 0 times that is not a number.
    assert jax.grad(total)(0.0) == 2


def test_tokens_that_are_learnt_move_no_parameter_of_the_detector_even_where_none_is_frozen():
    """What the detector says of the masked features, its head included, teaches the tokens alone."""
    student = tiny.detector()
    method = build_method({"name": "maskd_tokens", "tokens": 2})
    variables = _init(tiny.detector(axis_name=AXIS), 7)
    batch = jax.tree.map(jnp.asarray, tiny.batch(2, seed=1))
    arguments = dict(keys=jax.random.split(jax.random.key(0), 2), step=jnp.int32(0))

    def init():
        features = student.apply(variables, jnp.zeros(batch.images.shape), method="features")
        return method.init(jax.random.key(0), view(features), None, size=batch.size, own_loss=lambda _: {})

    rng = np.random.default_rng(0)
    learnt = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), jax.eval_shape(init))

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradients(params):
        return distill_loss(
            params,
            variables["batch_stats"],
            None,
            batch,
            **arguments,
            student=student,
            teacher=None,
            methods={"maskd_tokens": Applied(method)},
            loss_weights={"cls": 0.0, "box": 0.0},
        )

    gradient, (metrics, _) = gradients({"student": variables["params"], "method": learnt["params"]})
    for term in ("masked_cls", "masked_box", "dice"):
        assert metrics[f"loss/{term}"] > 0
    for x in jax.tree.leaves(gradient["student"]):
        np.testing.assert_array_equal(x, 0)
    for x in jax.tree.leaves(gradient["method"]):
        assert np.abs(x).max() > 0


def test_only_methods_that_draw_beside_others_have_keys_of_their_own():
    keys = jax.random.split(jax.random.key(0), 3)
    assert own_keys(keys, "mgd", ["mgd"]) is keys
    one, other = (jax.random.key_data(own_keys(keys, name, ["dmkd", "mgd"])) for name in ("dmkd", "mgd"))
    assert not (one == other).all(axis=-1).any()
