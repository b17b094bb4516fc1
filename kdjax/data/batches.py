"""Batches of padded images whose content is a pure function of (seed, step), whatever the number of processes."""

from collections.abc import Iterator, Sequence
from typing import TypedDict, cast

import grain
import numpy as np

from kdjax.data import transforms
from kdjax.data.sources import Example, Source
from kdjax.types import Batch, Targets


class EvalBatch(TypedDict):
    """Images of one batch of an evaluation, or one process's part of it, and what their detections are scored by.

    A detection box in pixels of the padded image is one of the original image after multiplying its x by
    ``original_size[:, 1] / image_size[:, 1]`` and its y by ``original_size[:, 0] / image_size[:, 0]``.
    """

    images: np.ndarray
    """(N, H, W, 3) uint8, RGB, padded at the bottom and right with zeros."""
    image_size: np.ndarray
    """(N, 2) int32: height and width of the image inside the padded array, in pixels."""
    original_size: np.ndarray
    """(N, 2) int32: height and width of the image in its source, in pixels."""
    image_id: np.ndarray
    """(N,) int64: ``Example.image_id``; -1 for blank images."""
    real: np.ndarray
    """(N,) bool: False for the blank images that fill the last batch."""


def train_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: tuple[int, int],
    max_objects: int,
    seed: int,
    first_step: int = 0,
    flip: float = 0.5,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
) -> Iterator[Batch]:
    """Endless training batches; the one of step s depends on ``seed`` and s alone.

    The examples form one endless stream in which every epoch holds each of them once, in a new order; batch s is
    positions [s * batch_size, (s + 1) * batch_size) of it and may span two epochs. Augmentation depends on the seed
    and the position in the stream. Every process yields its contiguous slice of the same global batch.

    Args:
        source: at least ``batch_size`` examples.
        batch_size: images in the global batch, a multiple of ``process_count``.
        image_size: height and width of the padded images; every image is scaled, keeping its ratio, to fit.
        max_objects: room for objects M; of more, those with the largest boxes are kept. Crowds are left out.
        seed: in [0, 2**32).
        first_step: the step of the first batch; earlier ones are not computed.
        flip: probability of mirroring an image left to right.
        process_index: which slice of the global batch to yield.
        process_count: how many slices there are.
        num_threads: threads that prepare batches ahead of the consumer; they change nothing but the speed.

    Returns:
        An iterator of :class:`kdjax.types.Batch`, made of NumPy arrays, with ``batch_size / process_count`` images.

    Raises:
        ValueError: too few examples, or a batch that cannot be divided among the processes.
    """
    local_size = _local_size(batch_size, process_index, process_count)
    if len(source) < batch_size:
        raise ValueError(f"the source has {len(source)} examples, fewer than the batch of {batch_size}")

    def augment(example: Example, rng: np.random.Generator) -> Example:
        return transforms.random_flip(transforms.resize_to_fit(example, *image_size), rng, flip)

    index = np.arange(local_size, dtype=np.int32) + process_index * local_size

    def collate(examples: Sequence[Example]) -> Batch:
        images, sizes = _pad_images([example.image for example in examples], image_size)
        boxes, labels, valid = zip(*(_pad_objects(example, max_objects) for example in examples), strict=True)
        # NumPy arrays stand in for JAX's until they reach a device.
        targets = Targets._make((np.stack(boxes), np.stack(labels), np.stack(valid), sizes))
        return cast(Batch, {"images": images, "targets": targets, "index": index})

    stream = grain.MapDataset.source(source).seed(seed).shuffle().repeat().random_map(augment)
    slices = stream.batch(local_size, batch_fn=collate)[first_step * process_count + process_index :: process_count]
    return iter(slices.to_iter_dataset(_read_options(num_threads)))


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: tuple[int, int],
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
) -> Iterator[EvalBatch]:
    """Every example once, in order; the last batch is filled with blank images.

    Args:
        source: at least one example.
        batch_size: images in the global batch, a multiple of ``process_count``.
        image_size: height and width of the padded images; every image is scaled, keeping its ratio, to fit.
        process_index: which contiguous slice of every global batch to yield.
        process_count: how many slices there are; every process yields equally many batches.
        num_threads: threads that prepare batches ahead of the consumer.

    Returns:
        An iterator of :class:`EvalBatch` with ``batch_size / process_count`` images each.

    Raises:
        ValueError: no examples, or a batch that cannot be divided among the processes.
    """
    local_size = _local_size(batch_size, process_index, process_count)
    if not len(source):
        raise ValueError("the source has no examples")

    def load(position: int) -> tuple[np.ndarray, tuple[int, ...], int, bool]:
        if position >= len(source):
            return np.zeros((*image_size, 3), np.uint8), image_size, -1, False
        example = source[position]
        return transforms.resize_to_fit(example, *image_size).image, example.image.shape[:2], example.image_id, True

    def collate(loaded: Sequence[tuple[np.ndarray, tuple[int, ...], int, bool]]) -> EvalBatch:
        images, original_sizes, image_ids, real = zip(*loaded, strict=True)
        padded, sizes = _pad_images(images, image_size)
        return EvalBatch(
            images=padded,
            image_size=sizes,
            original_size=np.array(original_sizes, np.int32),
            image_id=np.array(image_ids, np.int64),
            real=np.array(real),
        )

    batches = -(-len(source) // batch_size)
    positions = grain.MapDataset.range(batches * batch_size).map(load)
    slices = positions.batch(local_size, batch_fn=collate)[process_index::process_count]
    return iter(slices.to_iter_dataset(_read_options(num_threads)))


def _local_size(batch_size: int, process_index: int, process_count: int) -> int:
    """Images in one process's slice of a global batch."""
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"a batch of {batch_size} images cannot be divided among {process_count} processes")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index is {process_index}, it must be in [0, {process_count})")
    return batch_size // process_count


def _read_options(num_threads: int) -> grain.ReadOptions:
    """Each thread prepares whole batches, and one finished batch waits for each of them."""
    return grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)


def _pad_images(images: Sequence[np.ndarray], image_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W, 3) uint8 padded to ``image_size``, and their sizes (N, 2) int32 without the padding."""
    padded = np.zeros((len(images), *image_size, 3), np.uint8)
    for row, image in zip(padded, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    return padded, np.array([image.shape[:2] for image in images], np.int32)


def _pad_objects(example: Example, max_objects: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes (M, 4) float32, labels (M,) int32 and validity (M,) bool of the largest objects, in their given order."""
    kept = np.flatnonzero(~example.crowd)
    if len(kept) > max_objects:
        width, height = (example.boxes[kept, 2:] - example.boxes[kept, :2]).T
        kept = np.sort(kept[np.argsort(-width * height, kind="stable")[:max_objects]])
    boxes, labels = np.zeros((max_objects, 4), np.float32), np.zeros(max_objects, np.int32)
    boxes[: len(kept)], labels[: len(kept)] = example.boxes[kept], example.labels[kept]
    return boxes, labels, np.arange(max_objects) < len(kept)
