"""The order of examples against what it promises, counted out over several epochs.

There are some hundred examples: the library's shuffle takes a time that grows as their number shrinks below 2**16.
"""

import numpy as np
import pytest

from kdjax.data.order import Order

LANDSCAPE, PORTRAIT, SQUARE = range(3)
BUCKETS = np.repeat([LANDSCAPE, PORTRAIT, SQUARE], [190, 89, 21])[np.random.default_rng(0).permutation(300)]


def batches(count, buckets=BUCKETS, *, first=0, seed=0):
    """(bucket, examples, positions) of some steps, each computed as if it were the first."""
    order = Order(buckets, 8, seed, 2)
    found = []
    for step in range(first, first + count):
        bucket, positions = order.batch(step)
        found.append((bucket, [order.example(position)[0] for position in positions], positions.tolist()))
    return found


def test_one_bucket_is_the_stream_itself():
    for step, (bucket, _, positions) in enumerate(batches(30, np.zeros(100, int))):
        assert bucket == 0
        assert positions == list(range(8 * step, 8 * step + 8))


def test_a_batch_holds_one_bucket_in_the_order_of_the_stream():
    for bucket, examples, positions in batches(80):
        assert (BUCKETS[examples] == bucket).all()
        assert positions == sorted(positions)


@pytest.mark.parametrize(
    "buckets", [BUCKETS, np.zeros(300, int), np.repeat([0, 3], [297, 3])], ids=["three", "one", "one large, one rare"]
)
def test_every_epoch_has_each_example_exactly_once_whatever_the_batch_leaves_over(buckets):
    """The examples of each bucket, batch after batch, are a permutation of its members, then another one."""
    found, count = batches(160, buckets), len(buckets)
    for bucket in np.unique(buckets):
        members = np.flatnonzero(buckets == bucket)
        stream = [example for which, examples, _ in found if which == bucket for example in examples]
        places = [place for which, _, positions in found if which == bucket for place in positions]
        assert len(stream) > len(members)
        epochs = [stream[i : i + len(members)] for i in range(0, len(stream), len(members))]
        assert all(sorted(epoch) == members.tolist() for epoch in epochs[:-1])
        assert len({tuple(epoch) for epoch in epochs[:-1]}) == len(epochs[:-1]) or len(members) == 3
        # And position p of the stream belongs to epoch p // N.
        assert [place // count for place in places] == [i // len(members) for i in range(len(places))]
    places = [place for _, _, positions in found for place in positions]
    assert len(set(places)) == len(places)


def test_buckets_come_as_often_as_their_examples_and_batches_in_the_order_of_their_last():
    found = batches(200)
    last = [positions[-1] for _, _, positions in found]
    assert last == sorted(last)
    share = np.bincount([bucket for bucket, _, _ in found]) / 200
    np.testing.assert_allclose(share, np.bincount(BUCKETS) / 300, atol=0.02)


@pytest.mark.parametrize("first", [1, 36, 37, 38, 120])
def test_any_step_can_be_the_first(first):
    assert batches(5, first=first) == batches(first + 5)[first:]


def test_the_seed_decides():
    assert batches(9) == batches(9)
    assert batches(9) != batches(9, seed=1)


def test_numbers_belong_to_positions_and_are_spread_evenly():
    order = Order(BUCKETS, 8, 0, 5)
    numbers = np.array([order.example(position)[1] for position in range(2000)])
    assert numbers.shape == (2000, 5)
    np.testing.assert_array_equal(order.example(1234)[1], numbers[1234])
    assert len(np.unique(numbers)) == numbers.size
    np.testing.assert_allclose(np.histogram(numbers, 10, (0, 1))[0] / numbers.size, 0.1, atol=0.01)


def test_the_order_of_the_embedded_data_is_what_runs_began_with():
    """Examples and first numbers of 2400 by grain 0.2.18: a run goes on where another version of it began."""
    order = Order(np.zeros(2400, int), 8, 0, 8)
    found = [order.example(position) for position in (0, 1, 2, 3, 2400, 2401)]
    assert [example for example, _ in found] == [1203, 1811, 1398, 141, 473, 2331]
    first = [numbers[0] for _, numbers in found]
    np.testing.assert_allclose(first, [0.394087, 0.008566, 0.855306, 0.133272, 0.939202, 0.921896], atol=1e-6)
