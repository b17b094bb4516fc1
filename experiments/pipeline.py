"""Images a second of the input pipeline beside a bare loop: ``python -m experiments.pipeline``, 640x480 to 800x1088.

The bare loop decodes and resizes to an array with Pillow, in as many threads; both run in turn in one process.
The images are made here from a seed, or come from a data set.
"""

import contextlib
import functools
import io
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags
from PIL import Image

from kdjax.data.batches import train_batches
from kdjax.data.examples import Example, Objects
from kdjax.data.images import decode
from kdjax.data.sizing import Augmentation, Sizing
from kdjax.data.sources import open_source
from kdjax.data.transforms import fit
from kdjax.tasks import Detection

SIZING = Sizing(((800, 1088),), (800,), 1333)
ROWS = {
    "scale and flip": Augmentation(flip=0.5),
    "and change colours": Augmentation(flip=0.5, color=0.5),
    "large-scale jitter, 0.1 to 2": Augmentation(flip=0.5, jitter=(0.1, 2.0)),
}

_DATA = flags.DEFINE_string("data", "", "Images of a data set, such as coco_json:<folder>; made from a seed if empty.")
_SPLIT = flags.DEFINE_string("split", "train", "Split of --data.")
_IMAGES = flags.DEFINE_integer(
    "images", 256, "Images of each timed run; with many processes there are more.", lower_bound=1
)
_BATCH = flags.DEFINE_integer("batch", 8, "Images of a batch.", lower_bound=1)
_THREADS = flags.DEFINE_integer("threads", 2, "Threads of both.", lower_bound=1)
_PROCESSES = flags.DEFINE_integer("processes", 0, "Processes of the pipeline, as config.data.processes.", lower_bound=0)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed runs of each.", lower_bound=1)


class Made:
    """640x480 photographs of nothing: soft shapes with fine grain, about 100 kB each, with seven boxes.

    There are few of them, again and again, in as many places as a data set has.
    """

    class_names = ("thing",)

    def __init__(self, count: int = 64):
        rng = np.random.default_rng(0)
        self.files = [self._file(rng) for _ in range(count)]
        low = rng.uniform(0, [500, 340], (count, 7, 2))
        self.boxes = np.concatenate([low, low + rng.uniform(8, 140, (count, 7, 2))], axis=2).astype(np.float32)

    def _file(self, rng: np.random.Generator) -> bytes:
        soft = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((640, 480))
        grainy = np.asarray(soft).astype(int) + rng.integers(-12, 13, (480, 640, 3))
        file = io.BytesIO()
        Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
        return file.getvalue()

    def __len__(self) -> int:
        return 100_000

    def size(self, index: int) -> tuple[int, int]:
        """Height and width."""
        return 480, 640

    def image_id(self, index: int) -> int:
        """The index."""
        return index

    def read(self, index: int) -> bytes:
        """The file."""
        return self.files[index % len(self.files)]

    def objects(self, index: int) -> Objects:
        """Seven boxes."""
        return Objects(
            image_id=index,
            size=(480, 640),
            boxes=self.boxes[index % len(self.files)],
            labels=np.zeros(7, np.int32),
            crowd=np.zeros(7, bool),
            area=np.ones(7, np.float32),
        )

    def __getitem__(self, index: int) -> Example:
        return self.objects(index).in_image(decode(self.read(index)))


def amounts() -> tuple[int, int]:
    """Of a timed run: how many counts come first, to start and of what is made ahead, and how many images are timed."""
    ahead = 2 * _PROCESSES.value
    return 1 + ahead, max(_IMAGES.value, 3 * ahead * _BATCH.value)


def bare_loop(source: Any) -> Iterator[int]:
    """Decodes and resizes, and nothing else; yields 1 for each image."""

    def one(index: int) -> int:
        data = source.read(index % len(source))
        with Image.open(io.BytesIO(data)) as file:
            image = file.convert("RGB")
        scale = float(SIZING.scale(np.array(image.size[::-1]), np.array(SIZING.shapes[0])))
        size = round(image.width * scale), round(image.height * scale)
        np.asarray(image.resize(size, Image.Resampling.BILINEAR))
        return 1

    with ThreadPoolExecutor(_THREADS.value) as pool:
        yield from pool.map(one, range(sum(amounts())))


def pipeline(source: Any, augmentation: Augmentation) -> Iterator[int]:
    """Takes batches from the pipeline; yields their sizes."""
    batches = train_batches(
        source,
        batch_size=_BATCH.value,
        image_size=SIZING,
        task=Detection(max_objects=100),
        seed=0,
        augmentation=augmentation,
        num_threads=_THREADS.value,
        num_workers=_PROCESSES.value,
    )
    with contextlib.closing(batches):
        yield from (len(batch.images) for batch in batches)


class Speed(NamedTuple):
    """Of one timed run."""

    rate: float
    """Images a second."""
    cpu_ms: float
    """Milliseconds of processor time for an image, in all threads of this process together: what a busy machine changes
    least."""


def speed(counts: Iterator[int]) -> Speed:
    """Measures without the first of ``counts``."""
    first, wanted = amounts()
    for _ in range(first):
        next(counts)
    start, start_cpu, images = time.perf_counter(), time.process_time(), 0
    while images < wanted:
        images += next(counts)
    return Speed(images / (time.perf_counter() - start), 1e3 * (time.process_time() - start_cpu) / images)


def main(_: Sequence[str]) -> None:
    """Prints the table."""
    source: Any = open_source(_DATA.value, _SPLIT.value) if _DATA.value else Made()
    sizes = {fit(source.size(i), SIZING.shapes[0], SIZING).size for i in range(min(len(source), 8))}
    runs: dict[str, Callable[[], Iterator[int]]] = {"bare loop": functools.partial(bare_loop, source)}
    for name, augmentation in ROWS.items():
        runs[f"pipeline: {name}"] = functools.partial(pipeline, source, augmentation)
    speeds: dict[str, list[Speed]] = {name: [] for name in runs}
    for _round in range(_ROUNDS.value):
        for name, run in runs.items():
            speeds[name].append(speed(run()))
    shown = ", ".join(f"{height}x{width}" for height, width in sorted(sizes))
    print(
        f"{_DATA.value or 'Images made from a seed'}, scaled to {shown} in 800x1088; {_THREADS.value} threads, batches "
        f"of {_BATCH.value}, {_ROUNDS.value} rounds of {amounts()[1]} images\n"
    )
    print("| | images/s, median (lowest to highest) | of the bare loop | CPU ms an image | of the bare loop |")
    print("|---|---|---|---|---|")
    bare: Speed | None = None
    for name, found in speeds.items():
        rates = [x.rate for x in found]
        median = Speed(statistics.median(rates), statistics.median(x.cpu_ms for x in found))
        bare = bare or median
        # Of other processes the time is not known.
        unknown = _PROCESSES.value and name != "bare loop"
        cpu = " | " if unknown else f"{median.cpu_ms:.1f} | {median.cpu_ms / bare.cpu_ms:.0%}"
        print(
            f"| {name} | {median.rate:.0f} ({min(rates):.0f} to {max(rates):.0f}) | {median.rate / bare.rate:.0%} "
            f"| {cpu} |"
        )


if __name__ == "__main__":
    app.run(main)
