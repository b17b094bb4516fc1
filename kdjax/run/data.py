"""The splits of a run, and the batches of its stages."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from kdjax.config.schema import Data
from kdjax.data.batches import train_batches
from kdjax.data.check import Checks, compare_classes
from kdjax.data.indexed import IndexedSource
from kdjax.data.sources import open_source
from kdjax.errors import UserError
from kdjax.plan import Plan, StagePlan
from kdjax.types import Batch


class Splits(NamedTuple):
    """The data of a run, opened once and checked."""

    train: IndexedSource
    evaluation: IndexedSource


def open_split(data: Data, *, training: bool) -> IndexedSource:
    """The split that a run trains on, or the one that it is evaluated on.

    Raises:
        UserError: one sentence about the data or their name, or masks to train on that the split cannot give.
    """
    checks = Checks(strict=data.strict, lenient=data.lenient)
    if training:
        checks = checks._replace(skip_empty=data.skip_empty, max_objects=data.max_objects)
    split = data.train_split if training else data.eval_split
    source = open_source(data.name, split, data.data_dir or None, checks=checks, download=data.download)
    if training and data.masks and source.outlines is None:
        raise UserError(
            f"config.data.masks is True, but config.data.name is {data.name!r}, whose split {split!r} has no "
            "outlines of its objects, of which masks are made: take coco_json:<folder> with segmentations, or shapes; "
            "where no stage learns masks, set config.data.masks=False."
        )
    return source


def open_splits(data: Data) -> Splits:
    """Opens both splits, and prints what was found.

    Raises:
        UserError: a split cannot be used, or they differ in their classes.
    """
    splits = Splits(open_split(data, training=True), open_split(data, training=False))
    if difference := compare_classes(
        f"the split {data.train_split!r}",
        splits.train.class_names,
        f"the split {data.eval_split!r}",
        splits.evaluation.class_names,
    ):
        raise UserError(f"{data.name}: {difference}; both must have the same classes in the same order.")
    for source in splits:
        print("\n".join(source.report_lines()), flush=True)
    return splits


def open_batches(plan: Plan, stage: StagePlan, source: IndexedSource, first_step: int) -> Iterator[Batch]:
    """The training batches of a stage from a step on, on the host; a pure function of the seed, the stage and the step.

    Raises:
        UserError: there can be none; or, in the middle, an image that was there at the start cannot be read any more.
    """
    data = plan.data
    return train_batches(
        source,
        batch_size=stage.options.batch_size,
        image_size=data.sizing,
        max_objects=data.max_objects,
        seed=int(np.random.SeedSequence((plan.run.seed, stage.number)).generate_state(1)[0]),
        first_step=first_step,
        augmentation=data.augmentation,
        mask_size=data.mask_size if data.masks else 0,
        num_threads=data.threads,
        log=lambda text: print(f"[{stage.name}] {text}", flush=True),
    )
