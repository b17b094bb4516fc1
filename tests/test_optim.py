"""SGD is held to PyTorch's documented update, re-derived in NumPy; schedules to their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.optim import by_part, make_optimizer, make_schedule, trained_norm

PARAMS = {
    "student": {
        "backbone": {"conv1": {"kernel": jnp.array([1.0, -2.0])}, "bn1": {"scale": jnp.array([3.0])}},
        "head": {"kernel": jnp.array([0.5]), "bias": jnp.array([4.0])},
    },
    "method": {},
}
GRADIENT = jax.tree.map(lambda x: 0.5 * x + 1, PARAMS)


def run(steps: int, **options) -> dict:
    freeze = options.pop("freeze", ())
    optimizer = by_part(make_optimizer(lambda step: 0.1, **options), freeze=freeze)
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(steps):
        updates, state = optimizer.update(GRADIENT, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params


def torch_sgd(x: np.ndarray, gradient: np.ndarray, steps: int, momentum: float, decay: float) -> np.ndarray:
    buffer = np.zeros_like(x)
    for _ in range(steps):
        buffer = momentum * buffer + gradient + decay * x
        x = x - 0.1 * buffer
    return x


def test_sgd_is_pytorchs_and_spares_norm_and_bias_from_decay():
    params = run(3, momentum=0.9, weight_decay=0.2)["student"]
    start, gradient = PARAMS["student"], GRADIENT["student"]
    for path, decay in (
        (("backbone", "conv1", "kernel"), 0.2),
        (("backbone", "bn1", "scale"), 0.0),
        (("head", "bias"), 0.0),
    ):
        x, g, found = start, gradient, params
        for key in path:
            x, g, found = x[key], g[key], found[key]
        np.testing.assert_allclose(found, torch_sgd(np.asarray(x), np.asarray(g), 3, 0.9, decay), rtol=1e-6)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_takes_the_decay_into_its_gradient_and_adamw_beside_it(name):
    x, g = 0.5, 1.25
    m = v = 0.0
    for step in (1, 2):
        gradient = g + (0.2 * x if name == "adam" else 0)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        update = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        x -= 0.1 * (update + (0.2 * x if name == "adamw" else 0))
    np.testing.assert_allclose(run(2, name=name, weight_decay=0.2)["student"]["head"]["kernel"], [x], rtol=1e-5)


def test_an_unknown_optimiser_lists_the_choices():
    with pytest.raises(ValueError, match="sgd, adam, adamw"):
        make_optimizer(lambda step: 0.1, name="lion")


def test_decay_all_reaches_norm_and_bias():
    spared, decayed = (run(1, weight_decay=0.2, decay_all=flag)["student"]["head"]["bias"] for flag in (False, True))
    np.testing.assert_allclose(spared - decayed, 0.1 * 0.2 * 4.0, rtol=1e-5)


def test_biases_but_not_those_of_norms_have_a_rate_and_a_decay_of_their_own():
    norm = {"scale": jnp.array([2.0]), "bias": jnp.array([2.0])}
    params = {"student": {"conv": {"kernel": jnp.array([2.0]), "bias": jnp.array([2.0])}, "bn": norm}}
    optimizer = by_part(
        make_optimizer(
            lambda step: 0.1, weight_decay=0.5, decay_all=True, decay_bias=False, bias_rate=2.0, clip_norm=2.0
        )
    )
    gradient = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    # The common clip comes first: the four ones have norm 2, and stay.
    np.testing.assert_allclose(updates["student"]["conv"]["bias"], -0.1 * 2 * 1, rtol=1e-6)
    for leaf in (updates["student"]["conv"]["kernel"], *updates["student"]["bn"].values()):
        np.testing.assert_allclose(leaf, -0.1 * (1 + 0.5 * 2), rtol=1e-6)


def test_the_state_of_the_optimiser_keeps_its_tree_where_biases_are_as_all():
    trees = [
        jax.tree.structure(by_part(make_optimizer(lambda step: 0.1, weight_decay=0.1, **options)).init(PARAMS))
        for options in ({}, {"clip_norm": 1.0}, {"clip_value": 1.0}, {"decay_all": True, "decay_bias": False})
    ]
    assert len(set(trees)) == 1


def test_entries_are_clipped_after_the_norm():
    optimizer = make_optimizer(lambda step: 1.0, momentum=0.0, clip_value=0.5)
    updates, _ = optimizer.update(x := {"kernel": jnp.array([-3.0, 0.25])}, optimizer.init(x), x)
    np.testing.assert_allclose(updates["kernel"], [0.5, -0.25])
    optimizer = make_optimizer(lambda step: 1.0, momentum=0.0, clip_norm=1.0, clip_value=0.7)
    updates, _ = optimizer.update(x := {"kernel": jnp.array([3.0, 4.0])}, optimizer.init(x), x)
    np.testing.assert_allclose(updates["kernel"], [-0.6, -0.7], rtol=1e-6)


def test_frozen_paths_do_not_move_even_by_decay_and_do_not_count_in_the_clipped_norm():
    frozen = run(2, weight_decay=0.5, clip_norm=1.0, freeze=("student/backbone",))
    np.testing.assert_array_equal(
        frozen["student"]["backbone"]["conv1"]["kernel"], PARAMS["student"]["backbone"]["conv1"]["kernel"]
    )
    head = jnp.array([1.25, 3.0])
    np.testing.assert_allclose(trained_norm(GRADIENT, ("student/backbone",)), jnp.linalg.norm(head), rtol=1e-6)
    moved = run(1, clip_norm=1.0, freeze=("student/backbone",))["student"]["head"]
    step = jnp.array([0.5 - moved["kernel"][0], 4.0 - moved["bias"][0]])
    np.testing.assert_allclose(step, 0.1 * head / jnp.linalg.norm(head), rtol=1e-5)


def test_freezing_takes_whole_path_components():
    moved = run(1, freeze=("student/back",))["student"]["backbone"]["conv1"]["kernel"]
    assert not np.allclose(moved, PARAMS["student"]["backbone"]["conv1"]["kernel"])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("step", {0: 0.0, 5: 0.5, 10: 1.0, 66: 1.0, 68: 0.1, 91: 0.1, 93: 0.01}),
        ("cosine", {0: 0.0, 5: 0.5 * 0.5 * (1 + np.cos(np.pi * 0.05)), 50: 0.5, 100: 0.0}),
        ("constant", {5: 0.5, 50: 1.0, 100: 1.0}),
    ],
)
def test_schedules_warm_up_linearly_and_decay(kind, expected):
    schedule = make_schedule(kind, 1.0, 100, milestones=(8 / 12, 11 / 12), warmup_steps=10, warmup_factor=0.0)
    for step, value in expected.items():
        np.testing.assert_allclose(schedule(step), value, atol=1e-6)


def test_poly_falls_to_its_end_after_the_last_step_or_at_it():
    """mmcv 1.x divides by the steps, MMEngine by one less; the golden holds every number of the latter."""
    after, at = (make_schedule("poly", 0.01, 100, final_factor=0.01, end_at_last=flag) for flag in (False, True))
    np.testing.assert_allclose(after(50), (0.01 - 1e-4) * 0.5**0.9 + 1e-4, rtol=1e-5)
    np.testing.assert_allclose([at(99), after(100)], 1e-4, rtol=1e-5)
    assert after(99) > 1.1e-4


def test_an_unknown_schedule_lists_the_choices():
    with pytest.raises(ValueError, match="step, cosine, poly, constant"):
        make_schedule("linear", 1.0, 100)


def test_the_method_may_have_an_optimiser_and_a_clipped_norm_of_its_own():
    params = {"student": {"kernel": jnp.array([3.0, 4.0])}, "method": {"query": {"kernel": jnp.array([6.0, 8.0])}}}
    student = make_optimizer(lambda step: 0.1, momentum=0.0, clip_norm=1.0)
    method = make_optimizer(lambda step: 1.0, momentum=0.0, clip_norm=0.01)
    optimizer = by_part(student, own={"method": method})
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_allclose(updates["student"]["kernel"], [-0.06, -0.08], rtol=1e-5)
    np.testing.assert_allclose(updates["method"]["query"]["kernel"], [-0.006, -0.008], rtol=1e-5)
    together = by_part(student)
    updates, _ = together.update(params, together.init(params), params)
    np.testing.assert_allclose(updates["method"]["query"]["kernel"], -0.1 * jnp.array([6.0, 8.0]) / 125**0.5, rtol=1e-5)


def test_cosine_may_end_above_zero():
    schedule = make_schedule("cosine", 0.01, 100, final_factor=1e-4)
    np.testing.assert_allclose([schedule(0), schedule(100)], [0.01, 1e-6], rtol=1e-4)
