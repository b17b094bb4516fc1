"""Shows what a config trains on: ``python -m kdjax.inspect --config=configs/mgd.py``.

Prints what was wrong with the data and what became of it, counts and sizes of both splits, and saves a picture of
training images as the last stage sees them, augmented, with their boxes.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from absl import app, flags, logging

from kdjax.devices import device_count
from kdjax.errors import UserError
from kdjax.files import writing
from kdjax.main import CONFIG, parse, refuse
from kdjax.paths import absolute, as_path
from kdjax.plan import Plan, resolve
from kdjax.run.data import open_batches
from kdjax.run.fit import opened
from kdjax.types import Source
from kdjax.visualize import Mark, save_contact_sheet

_PICTURE = flags.DEFINE_string("picture", "training_images.png", "Where the picture of training images goes.")
_IMAGES = flags.DEFINE_integer("images", 16, "Images in the picture.", lower_bound=1)


def main(_: Sequence[str]) -> int:
    """Prints and draws; returns the exit code."""
    logging.set_verbosity(logging.FATAL)
    try:
        plan, splits = opened(CONFIG.value, resolve(CONFIG.value, devices=device_count()))
        for name, source in zip((plan.data.train_split, plan.data.eval_split), splits, strict=True):
            print("\n".join(["", f"{plan.data.name}, {name}", *plan.task.describe(source)]))
        pictures = list(itertools.islice(training_images(plan, splits.train), _IMAGES.value))
        with writing("picture", _PICTURE.value):
            save_contact_sheet(as_path(_PICTURE.value), pictures)
    except UserError as error:
        return refuse(error)
    print(f"\nTraining images are in {absolute(as_path(_PICTURE.value))}.")
    return 0


def training_images(plan: Plan, source: Source) -> Iterator[tuple[str, np.ndarray, list[Mark]]]:
    """The images of the last stage's first batches without their padding, with captions and what to draw, endlessly."""
    for step, batch in enumerate(open_batches(plan, plan[plan.student], source, first_step=0)):
        for row, (height, width) in enumerate(batch.size.tolist()):
            marks = plan.task.marks(batch, row, source.class_names)
            pixels = np.asarray(batch.images[row])[:height, :width]
            yield f"step {step}, image {row}: {height} x {width}", pixels, marks


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
