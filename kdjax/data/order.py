"""Which example is in which batch: a pure function of (seed, step), computed without looking at earlier batches.

The examples form one endless stream in which every epoch holds each of them once, in a new order: position p belongs to
epoch ``p // N``. Examples belong to buckets (the shapes that their images are padded to), and a batch holds one bucket:
that bucket's examples are cut into batches in the order of the stream, and batches come in the order of their last
examples. What is left of a bucket at the end of an epoch begins its first batch of the next one, so that nothing is
dropped or repeated.
"""

import functools
from typing import NamedTuple

import grain
import numpy as np

# A batch of a rare bucket may be made of several epochs; of more than these, they are computed anew.
_EPOCHS_KEPT = 33


class _Epoch(NamedTuple):
    """One epoch of the stream."""

    positions: list[np.ndarray]
    """Of each bucket's examples, ascending."""
    completed: np.ndarray
    """(batches, 2) int: bucket, and number within the bucket, of the batches whose last example is in this epoch, in
    the order of those examples."""


class Order:
    """The endless stream of N examples, cut into batches of one bucket each."""

    def __init__(self, buckets: np.ndarray, batch_size: int, seed: int, numbers: int):
        """Computes nothing yet.

        Args:
            buckets: (N,) int: the bucket of each example, from 0.
            batch_size: examples in a batch.
            seed: in [0, 2**32).
            numbers: how many random numbers belong to each position.
        """
        self._buckets, self._batch_size = buckets, batch_size
        self._counts = np.bincount(buckets)
        self._shuffled = grain.MapDataset.range(len(buckets)).seed(seed).shuffle().repeat()
        self._drawn = self._shuffled.random_map(lambda index, rng: (index, rng.random(numbers)))
        self._epoch = functools.lru_cache(maxsize=_EPOCHS_KEPT)(self._compute_epoch)

    def batch(self, step: int) -> tuple[int, np.ndarray]:
        """The bucket of the batch of a step, and the positions of its examples in the stream, (batch_size,) int.

        Not to be called from several threads at once.
        """
        epoch = step * self._batch_size // len(self._buckets)
        while self._batches_before(epoch) > step:
            epoch -= 1
        while self._batches_before(epoch + 1) <= step:
            epoch += 1
        bucket, number = self._epoch(epoch).completed[step - self._batches_before(epoch)]
        ranks = number * self._batch_size + np.arange(self._batch_size)
        epochs, places = np.divmod(ranks, self._counts[bucket])
        parts = [self._epoch(int(e)).positions[bucket][places[epochs == e]] for e in np.unique(epochs)]
        return int(bucket), np.concatenate(parts)

    def example(self, position: int) -> tuple[int, np.ndarray]:
        """The example at a position of the stream, and the numbers drawn uniformly from [0, 1) that belong there."""
        return self._drawn[int(position)]

    def _batches_before(self, epoch: int) -> int:
        """Batches that are complete when an epoch begins."""
        return int(np.sum(epoch * self._counts // self._batch_size))

    def _compute_epoch(self, epoch: int) -> _Epoch:
        count = len(self._buckets)
        stream = np.arange(epoch * count, (epoch + 1) * count)
        several = np.count_nonzero(self._counts) > 1
        buckets = self._buckets[[self._shuffled[int(p)] for p in stream]] if several else self._buckets
        positions = [stream[buckets == bucket] for bucket in range(len(self._counts))]
        batches, last = [np.zeros((0, 2), int)], [np.zeros(0, int)]
        for bucket, members in enumerate(positions):
            ends = np.flatnonzero((epoch * len(members) + np.arange(len(members)) + 1) % self._batch_size == 0)
            numbers = (epoch * len(members) + ends) // self._batch_size
            batches.append(np.column_stack([np.full(len(ends), bucket), numbers]))
            last.append(members[ends])
        return _Epoch(positions, np.concatenate(batches)[np.argsort(np.concatenate(last))])
