"""How batches reach the devices: which part goes where, and one ahead of the consumer."""

import threading

import jax
import numpy as np
import pytest

from kdjax.devices import Prefetch, split


def test_each_device_holds_its_part_of_every_part_of_the_batch():
    batch = {"x": np.arange(32), "y": np.arange(64).reshape(32, 2)}
    placed = split(batch, jax.devices()[:4], parts=2)
    assert [shard.device for shard in placed["x"].addressable_shards] == jax.devices()[:4]
    for d, shard in enumerate(placed["x"].addressable_shards):
        # Device d has positions d * 4 to d * 4 + 3 of each half of the batch.
        assert np.asarray(shard.data).ravel().tolist() == [*range(4 * d, 4 * d + 4), *range(16 + 4 * d, 20 + 4 * d)]
    np.testing.assert_array_equal(placed["y"], 2 * np.asarray(placed["x"])[..., None] + [0, 1])


def test_a_mapped_step_takes_placed_batches_as_they_are():
    placed = split(np.arange(16.0))
    step = jax.pmap(lambda x: x + 1)
    with jax.transfer_guard("disallow"):
        np.testing.assert_array_equal(jax.device_get(step(placed)), np.arange(1.0, 17).reshape(8, 2))


def test_batches_are_placed_one_ahead_in_order_and_the_thread_ends():
    asked = []

    def batches():
        for i in range(5):
            asked.append(i)
            yield np.full(8, i)

    before = threading.active_count()
    with Prefetch(batches()) as placed:
        assert int(next(placed)[0, 0]) == 0
        second = placed._upcoming
        second.result()
        assert placed.ready()
        assert asked == [0, 1]
        assert [int(batch[0, 0]) for batch in placed] == [1, 2, 3, 4]
    assert threading.active_count() == before


def test_nobody_is_ready_while_a_batch_is_made():
    gate = threading.Event()

    def batches():
        yield np.zeros(8)
        gate.wait(10)
        yield np.ones(8)

    with Prefetch(batches()) as placed:
        next(placed)
        assert not placed.ready()
        gate.set()
        assert int(next(placed)[0, 0]) == 1


def test_an_error_reaches_the_consumer():
    def batches():
        yield np.zeros(8)
        raise ValueError("image 3 cannot be read")

    with Prefetch(batches()) as placed:
        next(placed)
        with pytest.raises(ValueError, match="image 3 cannot be read"):
            next(placed)
