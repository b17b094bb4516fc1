"""Batches of padded images whose content is a pure function of (seed, step), whatever the number of processes."""

import dataclasses
import functools
import itertools
import weakref
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, cast

import numpy as np
from absl import logging
from scipy import special

from kdjax.data.order import Order
from kdjax.data.sizing import Augmentation, Size, Sizing, sizing
from kdjax.data.transforms import MIXUP, NUMBERS, Geometry, augment, fit, largest_share, mixed, move
from kdjax.data.workers import Work, from_processes, from_threads
from kdjax.errors import UserError
from kdjax.types import Batch, ImageSource, Source, Task

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


def train_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: Size | Sizing,
    task: Task,
    seed: int,
    first_step: int = 0,
    augmentation: Augmentation = _NO_AUGMENTATION,
    parts: int = 1,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
    num_workers: int = 0,
    log: Callable[[str], None] = logging.info,
) -> Generator[Batch, None, None]:
    """Endless training batches; the one of step s depends on ``seed`` and s alone.

    :mod:`kdjax.data.order` says which examples it holds; how they are augmented depends on the seed and their position
    in that order. Every process yields its share of the same global batch, whose images are all padded to one shape
    (``augmentation.crop``, or that of evaluation): its contiguous slice of each of the batch's ``parts``.

    Args:
        source: at least ``batch_size`` examples.
        batch_size: images in the global batch, a multiple of ``parts`` times ``process_count``.
        image_size: height and width of the padded images, into which every image is scaled to fit; or a sizing, with
            several shapes and with other scales.
        task: how the truth of an example becomes a row of targets.
        seed: in [0, 2**32).
        first_step: the step of the first batch; earlier ones are not computed.
        augmentation: what is changed at random.
        parts: in how many parts a step works through the batch: whatever the number of processes, a part holds the
            same images.
        process_index: whose share of the global batch to yield.
        process_count: how many processes there are.
        num_threads: threads that prepare images ahead of the consumer; they change nothing but the speed.
        num_workers: processes that prepare whole batches instead, where threads are too slow together.
        log: is told how many images have which shape, if there are several.

    Returns:
        An iterator of :class:`kdjax.types.Batch`, made of NumPy arrays, with ``batch_size / process_count`` images.

    Raises:
        UserError: fewer examples than a batch, or an option of augmentation that is not for such examples.
        ValueError: a batch that cannot be divided among the processes.
    """
    local_size = _local_size(batch_size, process_index, process_count, parts)
    if len(source) < batch_size:
        raise UserError(f"the source has {len(source)} examples, fewer than the batch of {batch_size}")
    _check_augmentation(source, augmentation)
    sizes = sizing(image_size)
    batches = _TrainBatches(
        source=source,
        task=task,
        sizes=sizes,
        augmentation=augmentation,
        buckets=_choose_shapes(source, sizes, log),
        batch_size=batch_size,
        seed=seed,
        index=np.arange(batch_size, dtype=np.int32).reshape(parts, process_count, -1)[:, process_index].ravel(),
    )
    if num_workers:
        return from_processes(batches, first_step=first_step, processes=num_workers)
    memory = _Memory()
    begun = (batches.begun(step, memory.images) for step in itertools.count(first_step))
    return from_threads(begun, local_size, num_threads)


@dataclasses.dataclass
class _TrainBatches:
    """How the batch of each step is made; before the first is, it can be pickled."""

    source: Source
    task: Task
    sizes: Sizing
    augmentation: Augmentation
    buckets: np.ndarray
    """(N,) int: which of the shapes each example is padded to."""
    batch_size: int
    seed: int
    index: np.ndarray
    """(local batch size,) int32: which images of the global batch are this process's."""

    @functools.cached_property
    def _order(self) -> Order:
        return Order(self.buckets, self.batch_size, self.seed, NUMBERS)

    @property
    def most_bytes(self) -> int:
        """Of the images of a batch."""
        shapes = [self.augmentation.crop] if self.augmentation.crop else self.sizes.shapes
        return 3 * len(self.index) * max(height * width for height, width in shapes)

    def begun(self, step: int, memory: Callable[[int, Size], np.ndarray]) -> tuple[Batch, Sequence[Work]]:
        """The batch of a step, and what fills it: a task for each image, in any order. One step at a time begins.

        Args:
            step: counted from 0.
            memory: from a number and a shape to so many images (N, H, W, 3) uint8, whatever they show.
        """
        source, sizes, augmentation, order = self.source, self.sizes, self.augmentation, self._order
        bucket, positions = order.batch(step)
        shape, count = augmentation.crop or sizes.shapes[bucket], len(self.index)
        images = memory(count, shape)
        size, targets = np.zeros((count, 2), np.int32), self.task.targets(count, shape)

        def fill(row: int, position: int) -> None:
            number, numbers = order.example(position)
            example, image, geometry = _changed(source, number, numbers, sizes.shapes[bucket], sizes, augmentation)
            if augmentation.mixup:
                example, image = _mixed(
                    example, image, numbers[MIXUP], source, sizes.shapes[bucket], sizes, augmentation
                )
            size[row] = _put(image, images[row])
            self.task.fill(targets, row, example, geometry)

        work = [functools.partial(fill, row, position) for row, position in enumerate(positions[self.index].tolist())]
        # NumPy arrays stand in for JAX's until they reach a device.
        return cast(Any, Batch)(images, size, self.index, targets), work

    def __call__(self, step: int, memory: Callable[[int, Size], np.ndarray]) -> Batch:
        """As :meth:`begun`, filled."""
        batch, work = self.begun(step, memory)
        for fill in work:
            fill()
        return batch


def _check_augmentation(source: Source, augmentation: Augmentation) -> None:
    """Refuses what the examples of a source have no truth for."""
    for option, on, needed, what in (
        ("cat_max_ratio", augmentation.cat_max_ratio < 1, "classes", "label maps"),
        ("mixup", augmentation.mixup > 0, "label", "images of one class each"),
    ):
        if on and not hasattr(source, needed):
            raise UserError(f"config.data.{option} is for {what}, which {source.origin} has not: leave it as it was.")


def _changed(
    source: Source, number: int, numbers: np.ndarray, shape: Size, sizes: Sizing, augmentation: Augmentation
) -> tuple[Any, np.ndarray, Geometry]:
    """An example, its image changed at random, and the geometry that it followed."""
    example, most = source[number], augmentation.cat_max_ratio
    accepts = (lambda geometry: largest_share(example.classes, geometry) <= most) if most < 1 else (lambda _: True)
    return example, *augment(example.image, numbers, shape, sizes, augmentation, accepts)


def _mixed(
    example: Any,
    image: np.ndarray,
    numbers: np.ndarray,
    source: Source,
    shape: Size,
    sizes: Sizing,
    augmentation: Augmentation,
) -> tuple[Any, np.ndarray]:
    """An example and its image with another one of the source over it, all drawn by three numbers in [0, 1)."""
    which, how, much = numbers.tolist()
    others = np.random.default_rng(int(how * 2**53)).random(NUMBERS)
    other, other_image, _ = _changed(source, int(which * len(source)), others, shape, sizes, augmentation)
    share = float(special.betaincinv(augmentation.mixup, augmentation.mixup, much))
    return example._replace(other=other.label, share=share), mixed(image, other_image, share)


def batch_positions(source: Source, *, batch_size: int, image_size: Size | Sizing, seed: int, step: int) -> list[int]:
    """Where in the source the images of a step's global batch of :func:`train_batches` are.

    Those of all processes: the one at place k of the list is at ``Batch.index`` k.
    """
    order = Order(_choose_shapes(source, sizing(image_size), logging.debug), batch_size, seed, NUMBERS)
    return [int(order.example(position)[0]) for position in order.batch(step)[1].tolist()]


def eval_batches(
    source: ImageSource,
    *,
    batch_size: int,
    image_size: Size | Sizing,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
) -> Iterator[Batch]:
    """Every example once: those of the first shape in the source's order, then those of the second, and so on.

    Shapes are those of the sizing, or (``eval_padding``) the next multiples of the scaled images' sides. The last batch
    of a shape is filled with blank images. An image whose place the source gives to another one, because it cannot be
    decoded, is black: a metric over the others would be another metric.

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
    padded_to = [sizes.shapes[bucket] for bucket in buckets.tolist()]
    shapes = sizes.shapes
    if sizes.eval_padding:
        padded_to = [sizes.padded(fit(source.size(k), shape, sizes).size) for k, shape in enumerate(padded_to)]
        shapes = tuple(sorted(set(padded_to)))
    memory = _Memory()

    def batch(part: tuple[Size, np.ndarray]) -> tuple[Batch, Sequence[Work]]:
        shape, index = part
        images, size = memory.images(local_size, shape), np.tile(np.array(shape, np.int32), (local_size, 1))
        real = np.flatnonzero(index >= 0)

        def fill(row: int) -> None:
            number = int(index[row])
            example = source[number]
            image = example.image
            if example.image_id != source.image_id(number):
                image = np.zeros((*source.size(number), 3), np.uint8)
            height, width = image.shape[:2]
            size[row] = _put(move(image, fit((height, width), sizes.shapes[buckets[number]], sizes)), images[row])

        images[index < 0] = 0
        batch = cast(Any, Batch)(images, size, index)
        return batch, [functools.partial(fill, row) for row in real.tolist()]

    def parts() -> Iterator[tuple[Size, np.ndarray]]:
        """Shape and positions in the source of this process's part of each batch; -1 for blank images."""
        place = np.array([shapes.index(shape) for shape in padded_to])
        for number, shape in enumerate(shapes):
            members = np.flatnonzero(place == number)
            filled = np.concatenate([members, np.full(-len(members) % batch_size, -1)])
            for part in filled.reshape(-1, process_count, local_size)[:, process_index]:
                yield shape, part

    return from_threads(map(batch, parts()), local_size, num_threads)


def padded(images: Sequence[np.ndarray], image_size: Size | Sizing) -> tuple[np.ndarray, np.ndarray]:
    """Images as an evaluation would see them, all in one array.

    Args:
        images: each (H, W, 3) uint8, RGB, of any size.
        image_size: height and width of the padded images, into which every image is scaled to fit; or a sizing.

    Returns:
        the images, (N, H, W, 3) uint8, and their heights and widths without the padding, (N, 2) int32. The boxes of an
        image are in pixels of the scaled one: of the original times its size by the scaled one's.
    """
    sizes = sizing(image_size)
    chosen = sizes.choose(np.array([image.shape[:2] for image in images]))
    shapes = [sizes.shapes[bucket] for bucket in chosen.tolist()]
    moved = [move(x, fit((x.shape[0], x.shape[1]), shape, sizes)) for x, shape in zip(images, shapes, strict=True)]
    if sizes.eval_padding:
        shapes = [sizes.padded((x.shape[0], x.shape[1])) for x in moved]
    array = np.zeros((len(images), *np.max(shapes, axis=0), 3), np.uint8)
    size = [_put(image, row) for image, row in zip(moved, array, strict=True)]
    return array, np.array(size, np.int32)


def _local_size(batch_size: int, process_index: int, process_count: int, parts: int = 1) -> int:
    """Images in one process's share of a global batch."""
    if batch_size < 1 or batch_size % (process_count * parts):
        in_parts = f" in {parts} parts" if parts > 1 else ""
        raise ValueError(f"a batch of {batch_size} images cannot be divided among {process_count} processes{in_parts}")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index is {process_index}, it must be in [0, {process_count})")
    return batch_size // process_count


def _choose_shapes(source: ImageSource, sizes: Sizing, log: Callable[[str], None]) -> np.ndarray:
    """Which of the shapes each example is padded to, (N,) int; only a choice of several needs the images' sizes."""
    if len(sizes.shapes) == 1:
        return np.zeros(len(source), int)
    chosen = sizes.choose(np.array([source.size(index) for index in range(len(source))]))
    counts = np.bincount(chosen, minlength=len(sizes.shapes))
    shares = ", ".join(f"{h}x{w}: {count}" for (h, w), count in zip(sizes.shapes, counts, strict=True))
    log(f"Padded images have one of {len(sizes.shapes)} shapes, height x width ({shares}).")
    return chosen


def _put(image: np.ndarray, row: np.ndarray) -> tuple[int, int]:
    """Copies an image (h, w, 3) to the upper left of (H, W, 3), zeros elsewhere; returns its height and width."""
    height, width = image.shape[:2]
    row[:height, :width], row[:height, width:], row[height:] = image, 0, 0
    return height, width
