"""Batches of padded images whose content is a pure function of (seed, step), whatever the number of processes."""

import functools
import itertools
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from absl import logging

from kdjax.data.examples import Example, Segmentation, Source
from kdjax.data.masks import mask_grid, rasterize
from kdjax.data.order import Order
from kdjax.data.sizing import Augmentation, Size, Sizing, sizing
from kdjax.data.transforms import NUMBERS, augment, fit
from kdjax.errors import UserError
from kdjax.types import Batch, Masks, Targets

T = TypeVar("T")
Task = Callable[[], None]

_NO_AUGMENTATION = Augmentation()


class _Memory:
    """Memory for the images of batches, given out again once nothing refers to it any more.

    The first touch of fresh memory costs more than the copy of an image, and freed blocks of this size go back to the
    system.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[bytearray]] = defaultdict(list)

    def images(self, count: int, shape: Size) -> np.ndarray:
        """(count, H, W, 3) uint8, whatever it held before."""
        size = count * shape[0] * shape[1] * 3
        free = self._free[size]
        block = free.pop() if free else bytearray(size)
        flat = np.frombuffer(block, np.uint8)
        # NumPy and JAX refer to this array from whatever they make of its memory.
        weakref.finalize(flat, free.append, block).atexit = False
        return flat.reshape(count, *shape, 3)


class _Targets(NamedTuple):
    """The arrays of :class:`kdjax.types.Targets`, to be filled image by image."""

    boxes: np.ndarray
    labels: np.ndarray
    valid: np.ndarray
    crowd: np.ndarray
    masks: Masks | None

    @classmethod
    def empty(cls, images: int, max_objects: int, mask_size: int) -> "_Targets":
        """Without an object; masks have ``mask_size`` cells, or are None if that is 0."""
        slots = images, max_objects
        grid, frame = np.zeros((*slots, mask_size, mask_size), np.bool_), np.zeros((*slots, 4), np.float32)
        return cls(
            boxes=np.zeros((*slots, 4), np.float32),
            labels=np.zeros(slots, np.int32),
            valid=np.zeros(slots, np.bool_),
            crowd=np.zeros(slots, np.bool_),
            masks=Masks._make((grid, frame)) if mask_size else None,
        )


def train_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: Size | Sizing,
    max_objects: int,
    seed: int,
    first_step: int = 0,
    augmentation: Augmentation = _NO_AUGMENTATION,
    mask_size: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
    log: Callable[[str], None] = logging.info,
) -> Iterator[Batch]:
    """Endless training batches; the one of step s depends on ``seed`` and s alone.

    :mod:`kdjax.data.order` says which examples it holds; how they are augmented depends on the seed and their position
    in that order. Every process yields its contiguous slice of the same global batch, whose images are all padded to
    one shape.

    Args:
        source: at least ``batch_size`` examples.
        batch_size: images in the global batch, a multiple of ``process_count``.
        image_size: height and width of the padded images, into which every image is scaled to fit; or a sizing, with
            several shapes and with other scales.
        max_objects: room for objects M; of more, those with the largest boxes are kept. Crowds take what they leave.
        seed: in [0, 2**32).
        first_step: the step of the first batch; earlier ones are not computed.
        augmentation: what is changed at random.
        mask_size: S of ``Targets.masks``; 0 for batches without masks.
        process_index: which slice of the global batch to yield.
        process_count: how many slices there are.
        num_threads: threads that prepare images ahead of the consumer; they change nothing but the speed.
        log: is told how many images have which shape, if there are several.

    Returns:
        An iterator of :class:`kdjax.types.Batch`, made of NumPy arrays, with ``batch_size / process_count`` images.

    Raises:
        UserError: fewer examples than a batch.
        ValueError: a batch that cannot be divided among the processes, or masks of a source without outlines.
    """
    local_size = _local_size(batch_size, process_index, process_count)
    if len(source) < batch_size:
        raise UserError(f"the source has {len(source)} examples, fewer than the batch of {batch_size}")
    if mask_size and source.objects(0).segmentation is None:
        raise ValueError("the source has no outlines of its objects, of which masks are made")
    sizes = sizing(image_size)
    order = Order(_choose_shapes(source, sizes, log), batch_size, seed, NUMBERS)
    index = np.arange(local_size, dtype=np.int32) + process_index * local_size
    memory = _Memory()

    def batch(step: int) -> tuple[Batch, Sequence[Task]]:
        bucket, positions = order.batch(step)
        shape = sizes.shapes[bucket]
        images = memory.images(local_size, shape)
        size, targets = np.zeros((local_size, 2), np.int32), _Targets.empty(local_size, max_objects, mask_size)

        def fill(row: int, position: int) -> None:
            number, numbers = order.example(position)
            example = source[number]
            if not mask_size:
                example = example._replace(segmentation=None)
            example = augment(example, numbers, shape, sizes, augmentation)
            size[row] = _put(example.image, images[row])
            _put_objects(example, targets, row)

        tasks = [functools.partial(fill, *task) for task in enumerate(positions[index].tolist())]
        # NumPy arrays stand in for JAX's until they reach a device.
        return cast(Any, Batch)(images, size, index, Targets._make(targets)), tasks

    return _prepared(map(batch, itertools.count(first_step)), local_size, num_threads)


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: Size | Sizing,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
) -> Iterator[Batch]:
    """Every example once: those of the first shape in the source's order, then those of the second, and so on.

    The last batch of a shape is filled with blank images. An image whose place the source gives to another one, because
    it cannot be decoded, is black: a metric over the others would be another metric.

    Args:
        source: at least one example.
        batch_size: images in the global batch, a multiple of ``process_count``.
        image_size: height and width of the padded images, into which every image is scaled to fit; or a sizing.
        process_index: which contiguous slice of every global batch to yield.
        process_count: how many slices there are; every process yields equally many batches.
        num_threads: threads that prepare images ahead of the consumer.

    Returns:
        An iterator of :class:`kdjax.types.Batch`, made of NumPy arrays, with
        ``batch_size / process_count`` images each.

    Raises:
        ValueError: no examples, or a batch that cannot be divided among the processes.
    """
    local_size = _local_size(batch_size, process_index, process_count)
    if not len(source):
        raise ValueError("the source has no examples")
    sizes = sizing(image_size)
    buckets = _choose_shapes(source, sizes, logging.info)
    memory = _Memory()

    def batch(part: tuple[Size, np.ndarray]) -> tuple[Batch, Sequence[Task]]:
        shape, index = part
        images, size = memory.images(local_size, shape), np.tile(np.array(shape, np.int32), (local_size, 1))
        real = np.flatnonzero(index >= 0)

        def fill(row: int) -> None:
            number = int(index[row])
            example, objects = source[number], source.objects(number)
            if example.image_id != objects.image_id:
                example = objects.in_image(np.zeros((*objects.size, 3), np.uint8))
            size[row] = _put(fit(example, shape, sizes).image, images[row])

        images[index < 0] = 0
        batch = cast(Any, Batch)(images, size, index)
        return batch, [functools.partial(fill, row) for row in real.tolist()]

    def parts() -> Iterator[tuple[Size, np.ndarray]]:
        """Shape and positions in the source of this process's part of each batch; -1 for blank images."""
        for bucket, shape in enumerate(sizes.shapes):
            members = np.flatnonzero(buckets == bucket)
            filled = np.concatenate([members, np.full(-len(members) % batch_size, -1)])
            for part in filled.reshape(-1, process_count, local_size)[:, process_index]:
                yield shape, part

    return _prepared(map(batch, parts()), local_size, num_threads)


def _local_size(batch_size: int, process_index: int, process_count: int) -> int:
    """Images in one process's slice of a global batch."""
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"a batch of {batch_size} images cannot be divided among {process_count} processes")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index is {process_index}, it must be in [0, {process_count})")
    return batch_size // process_count


def _choose_shapes(source: Source, sizes: Sizing, log: Callable[[str], None]) -> np.ndarray:
    """Which of the shapes each example is padded to, (N,) int; only a choice of several needs the images' sizes."""
    if len(sizes.shapes) == 1:
        return np.zeros(len(source), int)
    chosen = sizes.choose(np.array([source.objects(index).size for index in range(len(source))]))
    counts = np.bincount(chosen, minlength=len(sizes.shapes))
    shares = ", ".join(f"{h}x{w}: {count}" for (h, w), count in zip(sizes.shapes, counts, strict=True))
    log(f"Padded images have one of {len(sizes.shapes)} shapes, height x width ({shares}).")
    return chosen


def _prepared(batches: Iterable[tuple[T, Sequence[Task]]], local_size: int, num_threads: int) -> Iterator[T]:
    """Batches whose tasks are done, in order, from threads that work on some more meanwhile.

    Threads share the images of a batch, and few batches are under way, so that memory does not grow with threads.
    """
    ahead = max(2, -(-2 * num_threads // local_size))
    pool = ThreadPoolExecutor(num_threads)
    under_way: deque[tuple[T, list[Future[None]]]] = deque()
    try:
        for batch, tasks in batches:
            under_way.append((batch, [pool.submit(task) for task in tasks]))
            if len(under_way) > ahead:
                yield _finished(*under_way.popleft())
        while under_way:
            yield _finished(*under_way.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(batch: T, tasks: Iterable[Future[None]]) -> T:
    """The batch, once its tasks are done; the first error of one of them is raised."""
    for task in tasks:
        task.result()
    return batch


def _put(image: np.ndarray, row: np.ndarray) -> tuple[int, int]:
    """Copies an image (h, w, 3) to the upper left of (H, W, 3), zeros elsewhere; returns its height and width."""
    height, width = image.shape[:2]
    row[:height, :width], row[:height, width:], row[height:] = image, 0, 0
    return height, width


def _put_objects(example: Example, targets: _Targets, row: int) -> None:
    """Fills the slots of one image: objects in their given order, then crowds; boxes without area are left out."""
    width, height = (example.boxes[:, 2:] - example.boxes[:, :2]).T
    area = np.where((width > 0) & (height > 0), width * height, 0)
    room = targets.valid.shape[1]
    objects = _largest(np.flatnonzero((area > 0) & ~example.crowd), area, room)
    crowds = _largest(np.flatnonzero((area > 0) & example.crowd), area, room - len(objects))
    filled = np.concatenate([objects, crowds])
    targets.boxes[row, : len(filled)] = example.boxes[filled]
    targets.labels[row, : len(objects)] = example.labels[objects]
    targets.valid[row, : len(objects)] = True
    targets.crowd[row, len(objects) : len(filled)] = True
    if targets.masks and example.segmentation:
        for slot, number in enumerate(objects.tolist()):
            grid, frame = _mask(example.segmentation[number], example.image.shape[:2], targets.masks.grid.shape[-1])
            targets.masks.grid[row, slot], targets.masks.frame[row, slot] = grid, frame


def _mask(outline: Segmentation, size: Size, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """The grid and the frame of an object; of polygons, only the window around them is made pixels."""
    low, high = np.zeros(2, int), np.array(size[::-1])
    if outline and not isinstance(outline, dict):
        points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in outline])
        # COCO's code rounds to fifths of a pixel: with a pixel more on each side, the window's edge changes nothing.
        low = np.clip(np.floor(points.min(axis=0)).astype(int) - 1, 0, high - 1)
        high = np.clip(np.ceil(points.max(axis=0)).astype(int) + 1, low + 1, high)
        outline = [(np.reshape(polygon, (-1, 2)) - low).ravel().tolist() for polygon in outline]
    width, height = (high - low).tolist()
    grid, frame = mask_grid(rasterize(outline, (height, width)), cells)
    return grid, frame + np.tile(low, 2)


def _largest(indices: np.ndarray, area: np.ndarray, room: int) -> np.ndarray:
    """The ``room`` of ``indices`` with the largest area, in their given order; of equal ones the first."""
    return np.sort(indices[np.argsort(-area[indices], kind="stable")[:room]])
