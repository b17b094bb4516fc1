"""Shows what a config trains on: ``python -m kdjax.inspect --config=configs/mgd.py``.

Prints what was wrong with the data and what became of it, counts and sizes of both splits, and saves a picture of
training images as the last stage sees them, augmented, with what they show.
"""

import itertools
from collections.abc import Iterator, Sequence

from absl import app, flags, logging

from kdjax.devices import device_count
from kdjax.errors import Exit
from kdjax.files import writing
from kdjax.main import CONFIG, ended, parse
from kdjax.paths import absolute, as_path
from kdjax.plan import Plan, resolve
from kdjax.run.data import open_batches
from kdjax.run.fit import opened
from kdjax.types import Source
from kdjax.visualize import Drawing, save_contact_sheet

_PICTURE = flags.DEFINE_string("picture", "training_images.png", "Where the picture of training images goes.")
_IMAGES = flags.DEFINE_integer("images", 16, "Images in the picture.", lower_bound=1)


def main(_: Sequence[str]) -> int:
    """Prints and draws; returns the exit code."""
    logging.set_verbosity(logging.FATAL)

    def work() -> int:
        plan, splits = opened(CONFIG.value, resolve(CONFIG.value, devices=device_count()))
        for name, source in zip((plan.data.train_split, plan.data.eval_split), splits, strict=True):
            print("\n".join(["", f"{plan.data.name}, {name}", *plan.task.describe(source)]))
        pictures = list(itertools.islice(training_images(plan, splits.train), _IMAGES.value))
        with writing("picture", _PICTURE.value):
            save_contact_sheet(as_path(_PICTURE.value), pictures)
        print(f"\nTraining images are in {absolute(as_path(_PICTURE.value))}.")
        return Exit.FINISHED

    return ended(work, "there may be no picture")


def training_images(plan: Plan, source: Source) -> Iterator[Drawing]:
    """The images of the last stage's first batches without their padding, and what they show, endlessly."""
    for step, batch in enumerate(open_batches(plan, plan[plan.student], source, first_step=0)):
        for row, (height, width) in enumerate(batch.size.tolist()):
            drawing = plan.task.drawn(batch, row, source.class_names)
            where = f"step {step}, image {row}: {height} x {width}"
            yield drawing._replace(text=", ".join(filter(None, (where, drawing.text))))


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
