"""DMKD and DFMSD, which have no public code, against the independent implementation in reference.py."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses
from kdjax.losses.dmkd import highest
from kdjax.types import Targets

from . import reference
from .reference import Options

N, H, W, C = 3, 6, 7, 6
SIZES = ((6, 7), (4, 5), (2, 3))
WHERE = losses.valid_positions(jnp.array(SIZES), (H, W), 1)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


STUDENT, TEACHER = draw(0, N, H, W, C), draw(1, N, H, W, C) * draw(2, 1, H, W, 1)
BLOCKS = tuple(reference.Block(0.2 * draw(seed, 3, 3, C, C), 0.2 * draw(seed + 1, 3, 3, C, C)) for seed in (3, 5))
FUSION = np.array([0.3, -0.4], np.float32)


def crop(features: np.ndarray) -> list[np.ndarray]:
    return [image[:height, :width] for image, (height, width) in zip(features, SIZES, strict=True)]


def convolve(features: jax.Array, kernel: np.ndarray) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(features, kernel, (1, 1), "SAME", dimension_numbers=layout)


def as_function(block: reference.Block) -> Callable[[jax.Array], jax.Array]:
    return lambda features: convolve(jax.nn.relu(convolve(features, block.first)), block.second)


GENERATE = tuple(as_function(block) for block in BLOCKS)


def assert_masks(actual: tuple[jax.Array, jax.Array], expected: list[tuple[np.ndarray, np.ndarray]]) -> None:
    for n, (height, width) in enumerate(SIZES):
        spatial = np.ones((H, W))
        spatial[:height, :width] = expected[n][0]
        np.testing.assert_array_equal(actual[0][n, :, :, 0], spatial)
        np.testing.assert_array_equal(actual[1][n, 0, 0], expected[n][1])


def finite_difference(loss: Callable[..., jax.Array], *arguments: np.ndarray) -> None:
    """The loss climbs as its gradient says, for each argument: along the gradient itself and random directions."""
    gradients = jax.grad(loss, argnums=tuple(range(len(arguments))))(*arguments)
    for index, (argument, gradient) in enumerate(zip(arguments, gradients, strict=True)):
        length = float(jnp.linalg.norm(gradient))
        assert length > 0
        for direction in (np.asarray(gradient), *(draw(seed, *argument.shape) for seed in range(100, 104))):
            step = 1e-2 * direction / np.linalg.norm(direction)
            up, down = (loss(*arguments[:index], argument + s, *arguments[index + 1 :]) for s in (step, -step))
            slope = (float(up) - float(down)) / 2e-2
            assert 1e2 * float(jnp.sum(gradient * step)) == pytest.approx(slope, abs=3e-3 * length)


@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(spatial_ratio=0.45, channel_ratio=0.3, tau=0.8),
        Options(hide="low"),
        Options(select="threshold"),
        Options(select="threshold", hide="low", threshold=0.9),
        Options(spatial_ratio=0.0, channel_ratio=1.0),
        Options(spatial_ratio=1.0, channel_ratio=0.0),
    ],
    ids=str,
)
def test_dmkd(options: Options) -> None:
    expected_masks = [reference.masks(teacher, options) for teacher in crop(TEACHER)]
    keep = losses.dual_keep(jnp.asarray(TEACHER), where=WHERE, **options._asdict())
    assert_masks(keep, expected_masks)
    assert_masks(losses.stage_keep(jnp.asarray(TEACHER), stage=1, where=WHERE, **options._asdict()), expected_masks)

    expected = 0.0
    for student, teacher, masks in zip(crop(STUDENT), crop(TEACHER), expected_masks, strict=True):
        reconstruction = reference.reconstruct(student, masks, BLOCKS, FUSION, (H, W))
        expected += np.sum((reconstruction - teacher) ** 2) / N
    actual = losses.dmkd_loss(
        jnp.asarray(STUDENT),
        jnp.asarray(TEACHER),
        keep=keep,
        generate=GENERATE,
        fusion=jnp.asarray(FUSION),
        where=WHERE,
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_dmkd_gradient() -> None:
    keep = losses.dual_keep(jnp.asarray(TEACHER), where=WHERE)

    @jax.jit
    def loss(student: jax.Array, fusion: jax.Array) -> jax.Array:
        return losses.dmkd_loss(student, jnp.asarray(TEACHER), keep=keep, generate=GENERATE, fusion=fusion, where=WHERE)

    finite_difference(loss, STUDENT, FUSION)


def test_attention_is_one_on_average_and_follows_its_temperature() -> None:
    attention = losses.spatial_attention(jnp.asarray(TEACHER), tau=0.8, where=WHERE)
    channels = losses.channel_attention(jnp.asarray(TEACHER), tau=0.8, where=WHERE)
    for n, teacher in enumerate(crop(TEACHER)):
        height, width, _ = teacher.shape
        strengths = np.abs(teacher).mean(axis=-1).ravel().tolist()
        expected = np.reshape(reference.attention(strengths, 0.8), (height, width))
        np.testing.assert_allclose(attention[n, :height, :width, 0], expected, rtol=1e-5)
        np.testing.assert_allclose(jnp.sum(attention[n]), height * width, rtol=1e-5)
        expected = reference.attention(np.abs(teacher).mean(axis=(0, 1)).tolist(), 0.8)
        np.testing.assert_allclose(channels[n, 0, 0], expected, rtol=1e-5)


def test_keep_probability_hides_that_share_of_the_selected_and_nothing_else() -> None:
    attention = jnp.abs(jnp.asarray(draw(0, 64, 400)))
    selected = ~losses.attention_keep(attention, ratio=0.5)
    keys = jax.random.split(jax.random.key(0), 64)
    hidden = ~losses.attention_keep(attention, ratio=0.5, keep_probability=0.7, keys=keys)
    assert not np.any(hidden & ~selected)
    assert abs(float(jnp.sum(hidden) / jnp.sum(selected)) - 0.7) < 4 * np.sqrt(0.7 * 0.3 / (64 * 200))
    again = ~losses.attention_keep(attention[5:6], ratio=0.5, keep_probability=0.7, keys=keys[5:6])
    np.testing.assert_array_equal(again[0], hidden[5])
    assert not np.any(~losses.attention_keep(attention, keep_probability=0, keys=keys))


def test_the_two_masks_are_thinned_by_draws_of_their_own() -> None:
    keys = jax.random.split(jax.random.key(0), N)
    keep = losses.dual_keep(jnp.ones((N, 1, 64, 64)), spatial_ratio=1, channel_ratio=1, keep_probability=0.5, keys=keys)
    assert np.any(keep[0].ravel() != keep[1].ravel())
    assert len(np.unique(keep[0].reshape(N, -1), axis=0)) == N


def test_the_highest_are_those_of_a_stable_sort() -> None:
    # Whole numbers: many ties, of which the first are selected.
    values = np.random.default_rng(0).integers(0, 5, (6, 40)).astype(np.float32)
    counts = np.array([0, 1, 7, 20, 39, 40])
    actual = highest(jnp.asarray(values), jnp.asarray(counts), most=40)
    for row, count, selected in zip(values, counts.tolist(), actual, strict=True):
        expected = np.zeros(40, bool)
        expected[np.argsort(-row, kind="stable")[:count]] = True
        np.testing.assert_array_equal(selected, expected)


@pytest.mark.parametrize("hide", ["high", "low"])
def test_equal_attention_is_selected_in_order_of_the_valid_places(hide: str) -> None:
    where = jnp.array([[False, True, True, False, True, True]])
    keep = losses.attention_keep(jnp.ones((1, 6)), ratio=0.5, hide=hide, where=where)
    np.testing.assert_array_equal(keep, [[True, False, False, True, True, True]])


def test_equal_attention_selects_the_first_places() -> None:
    keep = losses.attention_keep(jnp.ones((1, 5)), ratio=0.4)
    np.testing.assert_array_equal(keep, [[False, False, True, True, True]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": "best"}, 'select is "best"'),
        ({"hide": "middle"}, 'hide is "middle"'),
        ({"keep_probability": 0.5}, "needs keys"),
        ({"keep_probability": -0.5}, "keep_probability is -0.5; it must be from 0 to 1"),
        ({"ratio": 2.0}, "ratio is 2.0; it must be from 0 to 1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        losses.attention_keep(jnp.ones((1, 4)), **options)


BOXES = np.array([[[1, 1, 4, 3], [5, 4, 6.5, 6]], [[0, 0, 2, 2], [0, 0, 7, 6]], [[0, 0, 7, 6]] * 2], np.float32)
TARGETS = Targets(
    jnp.asarray(BOXES),
    jnp.zeros((N, 2), jnp.int32),
    jnp.array([[True, True], [True, False], [False, False]]),
)


def inside(n: int) -> np.ndarray:
    """Cells that overlap one of image n's boxes, in whole steps of a tenth of a pixel."""
    cells = np.zeros((H * 10, W * 10), bool)
    for box, valid in zip(BOXES[n], np.asarray(TARGETS.valid[n]), strict=True):
        left, top, right, bottom = (int(10 * side) for side in box)
        cells[top:bottom, left:right] |= bool(valid)
    return cells.reshape(H, 10, W, 10).any(axis=(1, 3))


def test_object_positions() -> None:
    actual = losses.object_positions(TARGETS, (H, W), 1)
    for n in range(N):
        np.testing.assert_array_equal(actual[n, :, :, 0], inside(n))


@pytest.mark.parametrize("eta", [None, 0.5], ids=["no objects", "objects"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_dfmsd(stage: int, eta: float | None) -> None:
    options = Options(spatial_ratio=0.45 + 0.1 * (stage - 1))
    expected_masks = []
    for n, teacher in enumerate(crop(TEACHER)):
        height, width, _ = teacher.shape
        emphasis = None if eta is None else 1 + eta * stage * inside(n)[:height, :width]
        expected_masks.append(reference.masks(teacher, options, emphasis))

    objects = {} if eta is None else {"objects": losses.object_positions(TARGETS, (H, W), 1), "eta": eta}
    keep = losses.stage_keep(jnp.asarray(TEACHER), stage=stage, where=WHERE, **objects)
    assert_masks(keep, expected_masks)

    errors = [
        (reference.reconstruct(student, masks, BLOCKS, FUSION, (H, W)) - teacher) ** 2
        for student, teacher, masks in zip(
            reference.norm(crop(STUDENT)), reference.norm(crop(TEACHER)), expected_masks, strict=True
        )
    ]
    expected = 0.5 * np.mean(np.concatenate([error.ravel() for error in errors]))
    actual = losses.dfmsd_loss(
        jnp.asarray(STUDENT),
        jnp.asarray(TEACHER),
        keep=keep,
        generate=GENERATE,
        fusion=jnp.asarray(FUSION),
        where=WHERE,
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_dfmsd_gradient() -> None:
    keep = losses.stage_keep(jnp.asarray(TEACHER), stage=2, where=WHERE)

    @jax.jit
    def loss(student: jax.Array, fusion: jax.Array) -> jax.Array:
        return losses.dfmsd_loss(
            student, jnp.asarray(TEACHER), keep=keep, generate=GENERATE, fusion=fusion, where=WHERE
        )

    finite_difference(loss, STUDENT, FUSION)


def test_pearson_is_the_correlation_of_each_channel() -> None:
    loss = jax.jit(lambda student: losses.pearson_loss(student, jnp.asarray(TEACHER), where=WHERE))
    expected = reference.pearson(crop(STUDENT), crop(TEACHER))
    np.testing.assert_allclose(loss(STUDENT), expected, rtol=1e-5)
    finite_difference(loss, STUDENT)


def test_channel_norm_is_the_reference() -> None:
    actual = losses.channel_norm(jnp.asarray(5 * STUDENT + 2), where=WHERE)
    for n, expected in enumerate(reference.norm(crop(5 * STUDENT + 2))):
        height, width, _ = expected.shape
        np.testing.assert_allclose(actual[n, :height, :width], expected, atol=1e-5)
        assert float(jnp.sum(jnp.abs(actual[n]))) == pytest.approx(float(np.sum(np.abs(expected))), rel=1e-4)


@pytest.mark.parametrize("value", [3.1, -100.1, 0.0])
def test_a_constant_channel_is_zero_after_the_norm_and_gets_no_gradient(value: float) -> None:
    """Rounding makes the mean differ from it, which must not become deviation 1."""
    features = jnp.stack(
        [jnp.full((2, 50, 84), value), jnp.asarray(np.random.default_rng(0).normal(size=(2, 50, 84)))], -1
    )
    normal, pull = jax.vjp(losses.channel_norm, features.astype(jnp.float32))
    np.testing.assert_array_equal(normal[..., 0], 0)
    np.testing.assert_allclose(jnp.std(normal[..., 1]), 1, rtol=1e-4)
    (gradient,) = pull(jnp.arange(normal.size, dtype=jnp.float32).reshape(normal.shape))
    np.testing.assert_array_equal(gradient[..., 0], 0)


def test_a_stage_below_the_first_is_refused() -> None:
    with pytest.raises(ValueError, match="stages count from 1"):
        losses.stage_keep(jnp.asarray(TEACHER), stage=0)


def test_each_stage_hides_more_of_the_objects_and_shows_none_of_them_again() -> None:
    """Whatever else the teacher attends to; with the factor more than without it, until all of them are hidden."""
    teacher, objects = jnp.asarray(TEACHER), losses.object_positions(TARGETS, (H, W), 1)

    def hidden(stage: int, **options: Any) -> jax.Array:
        return ~losses.stage_keep(teacher, stage=stage, where=WHERE, **options)[0][0] & objects[0]

    strengthened = [hidden(stage, objects=objects) for stage in (1, 2, 3)]
    counts = [int(x.sum()) for x in strengthened]
    assert all(np.all(later[now]) for now, later in itertools.pairwise(strengthened))
    assert counts[0] < counts[1] <= counts[2] <= int(objects[0].sum())
    assert counts[0] > int(hidden(1).sum())


def test_stages_hide_ever_more_but_never_more_than_everything() -> None:
    ratios = [losses.stage_ratio(stage) for stage in range(1, 9)]
    np.testing.assert_allclose(ratios, [0.45, 0.55, 0.65, 0.75, 0.85, 0.95, 1.0, 1.0])
