"""ICD's queries, and what the goldens do not show: sampling, empty images, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses
from kdjax.types import Targets

K = 4
SIZE = 64, 96
STATISTICS = losses.ClassStatistics(
    frequency=jnp.array([0.5, 0.3, 0.2, 0.0]),
    mean=jnp.array([[0.1, 0.2], [0.3, 0.1], [0.2, 0.4], [0.5, 0.5]]),
    deviation=jnp.array([[0.01, 0.02], [0.02, 0.01], [0.0, 0.01], [0.1, 0.1]]),
)


def some_targets(counts: tuple[int, ...], room: int, shuffle: bool = False) -> Targets:
    generator = np.random.default_rng(0)
    images = len(counts)
    corner = generator.uniform(0, 40, (images, room, 2))
    boxes = np.concatenate([corner, corner + generator.uniform(4, 20, (images, room, 2))], axis=-1).astype(np.float32)
    valid = np.arange(room)[None] < np.array(counts)[:, None]
    if shuffle:
        valid = generator.permuted(valid, axis=1)
    labels = generator.integers(0, K, (images, room))
    arrays = (boxes * valid[..., None], labels.astype(np.int32) * valid, valid)
    return Targets(*map(jnp.asarray, arrays))


def sample(targets: Targets, limit: int = 300, seed: int = 0) -> losses.Queries:
    images = len(targets.boxes)
    size, keys = jnp.tile(jnp.array(SIZE), (images, 1)), jax.random.split(jax.random.key(seed), images)
    return losses.sample_queries(targets, image_size=size, keys=keys, statistics=STATISTICS, limit=limit)


@pytest.mark.parametrize("limit", [1, 10, 300])
def test_how_many_queries(limit: int) -> None:
    counts, room = (0, 1, 2, 5, 8), 8
    queries = sample(some_targets(counts, room), limit)
    assert queries.labels.shape == (5, max(min(max(limit, n), max(1, 6 * n)) for n in range(room + 1)))
    np.testing.assert_array_equal(queries.real.sum(axis=1), counts)
    np.testing.assert_array_equal(queries.valid.sum(axis=1), [min(max(1, 6 * n), max(limit, n)) for n in counts])


def test_real_boxes_come_first_wherever_they_stood() -> None:
    targets = some_targets((3, 0, 6), 6, shuffle=True)
    queries = sample(targets)
    size = np.array([96, 64, 96, 64], np.float32)
    for n, count in enumerate((3, 0, 6)):
        valid = np.asarray(targets.valid[n])
        np.testing.assert_array_equal(queries.real[n], np.arange(36) < count)
        np.testing.assert_allclose(queries.boxes[n, :count], np.asarray(targets.boxes[n])[valid] / size, rtol=1e-6)
        np.testing.assert_array_equal(queries.labels[n, :count], np.asarray(targets.labels[n])[valid])


def test_fakes_follow_the_statistics() -> None:
    queries = sample(some_targets((50,) * 40, 50))
    fake = np.asarray(queries.valid & ~queries.real)
    labels, boxes = np.asarray(queries.labels)[fake], np.asarray(queries.boxes)[fake]
    assert len(labels) == 40 * 250
    share = np.bincount(labels, minlength=K) / len(labels)
    np.testing.assert_allclose(share, STATISTICS.frequency, atol=4 * np.sqrt(0.25 / len(labels)))
    assert boxes.min() >= 0
    assert boxes.max() <= 1
    whole = np.all((boxes > 0) & (boxes < 1), axis=1)  # not clipped to the image
    for label in range(3):
        size = (boxes[:, 2:] - boxes[:, :2])[whole & (labels == label)]
        mean, deviation = np.asarray(STATISTICS.mean[label]), np.asarray(STATISTICS.deviation[label])
        # A normal clipped to two deviations has a deviation of 0.96 of the normal's.
        np.testing.assert_allclose(size.mean(axis=0), mean, atol=0.005)
        np.testing.assert_allclose(size.std(axis=0), 0.96 * deviation, rtol=0.1, atol=1e-5)
        assert np.all(np.abs(size - mean) <= 2 * deviation + 1e-6)


def test_points_lie_within_three_tenths_of_the_centre() -> None:
    queries = sample(some_targets((20,) * 4, 20))
    size = queries.boxes[..., 2:] - queries.boxes[..., :2]
    offset = (queries.points - (queries.boxes[..., :2] + queries.boxes[..., 2:]) / 2) / size
    assert float(jnp.max(jnp.abs(offset))) <= 0.3 + 1e-4
    assert float(jnp.min(jnp.max(jnp.abs(offset), axis=(0, 1)))) > 0.28
    assert abs(float(jnp.mean(offset))) < 0.02


def test_an_image_draws_from_its_own_key() -> None:
    targets = some_targets((3, 2, 4), 6)
    size, keys = jnp.tile(jnp.array(SIZE), (3, 1)), jax.random.split(jax.random.key(0), 3)
    together = losses.sample_queries(targets, image_size=size, keys=keys, statistics=STATISTICS)
    one_image = jax.tree.map(lambda array: array[1:2], targets)
    alone = losses.sample_queries(one_image, image_size=size[1:2], keys=keys[1:2], statistics=STATISTICS)
    jax.tree.map(lambda one, all_of_them: np.testing.assert_allclose(one[0], all_of_them[1]), alone, together)


def test_scale_indicator_uses_each_images_own_size() -> None:
    box, yes = jnp.array([[[0.0, 0.0, 0.5, 0.25]]] * 2), jnp.ones((2, 1), bool)
    queries = losses.Queries(jnp.zeros((2, 1), jnp.int32), box, jnp.zeros((2, 1, 2)), yes, yes)
    described = losses.instance_descriptors(queries, image_size=jnp.array([[64, 64], [1024, 1024]]), num_classes=K)
    scales = np.argmax(np.asarray(described)[:, 0, -10:].reshape(2, 2, 5), axis=-1)
    by_hand = [[int(np.clip(1.44 * np.log(pixels) - 5, 0, 4)) for pixels in pair] for pair in ((32, 16), (512, 256))]
    np.testing.assert_array_equal(scales, by_hand)
    assert by_hand == [[0, 0], [3, 2]]


def attention_inputs(images: int = 2) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((images, 4, 5, 8), (images, 4, 30, 8), (images, 4, 30, 8))
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_attention_head_by_head_is_attention(temperature: float) -> None:
    query, key, value = attention_inputs()
    real = jnp.array([[True, True, False, False, False], [True, False, False, False, False]])
    where = jnp.arange(30)[None] < jnp.array([[30], [17]])
    attended, mask = losses.instance_attention(query, key, value, real=real, where=where, temperature=temperature)
    for n, count in enumerate((30, 17)):
        logits = np.einsum("hqd,hsd->hqs", query[n], key[n, :, :count]).astype(np.float64) / np.sqrt(8)
        weights = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(attended[n], np.einsum("hqs,hsd->hqd", weights, value[n, :, :count]), atol=1e-5)
        weights = np.exp(logits / temperature) / np.exp(logits / temperature).sum(axis=-1, keepdims=True)
        expected = weights[:, np.asarray(real[n])].sum(axis=1)
        np.testing.assert_allclose(mask[n, :, :count], expected, rtol=1e-4)
        assert not np.any(mask[n, :, count:])


def test_images_without_boxes_and_without_pixels_contribute_nothing_and_no_nan() -> None:
    query, key, value = attention_inputs()
    none, nowhere = jnp.zeros((2, 5), bool), jnp.array([[True] * 30, [False] * 30])

    def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        attended, mask = losses.instance_attention(query, key, value, real=none, where=nowhere)
        return losses.icd_loss(value, key, instance_mask=mask) + jnp.sum(attended**2), mask

    gradients, mask = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(query, key, value)
    assert all(bool(jnp.all(jnp.isfinite(gradient))) for gradient in gradients)
    assert not any(np.any(gradient[1]) for gradient in gradients)
    assert not np.any(mask)

    targets = some_targets((0, 0), 3)
    queries = sample(targets)
    assert float(losses.instance_localization_loss(jnp.ones((2, 18, 4)), queries)) == 0
    # One fake per image is asked for; a logit of 0 costs ln 2.
    assert float(losses.instance_confidence_loss(jnp.zeros((2, 18)), queries)) == pytest.approx(np.log(2))


def test_auxiliary_losses_average_over_the_queries_of_all_devices() -> None:
    targets = some_targets((0, 5, 1, 2), 5)
    queries = sample(targets)
    outputs = jax.random.normal(jax.random.key(3), (4, 30, 5))

    def both(outputs: jax.Array, queries: losses.Queries, axis_name: str | None) -> jax.Array:
        confidence = losses.instance_confidence_loss(outputs[..., 0], queries, axis_name=axis_name)
        localization = losses.instance_localization_loss(outputs[..., 1:], queries, axis_name=axis_name)
        return jnp.stack([confidence, localization])

    by_device = jax.tree.map(lambda array: array[:, None], (outputs, queries))
    parts = jax.pmap(lambda outputs, queries: both(outputs, queries, "devices"), axis_name="devices")(*by_device)
    np.testing.assert_allclose(parts.mean(axis=0), both(outputs, queries, None), rtol=1e-5)


def test_less_than_one_attention_tensor_is_alive() -> None:
    query, key = jnp.ones((1, 8, 600, 4)), jnp.ones((1, 8, 1000, 4))

    def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        attended, mask = losses.instance_attention(query, key, value, real=jnp.ones((1, 600), bool))
        return jnp.sum(attended**2), mask

    gradient = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
    memory = jax.jit(gradient).lower(query, key, key).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 8 * 600 * 1000
