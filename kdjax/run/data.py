"""The splits of a run, and the batches of its stages."""

from collections.abc import Generator
from typing import NamedTuple

import jax
import numpy as np

from kdjax.config.presets import IMAGE_SIZES
from kdjax.config.schema import Data
from kdjax.data.batches import batch_positions, train_batches
from kdjax.data.check import compare_classes
from kdjax.data.flaws import Checks
from kdjax.data.indexed import IndexedSource, check_shared
from kdjax.data.sources import open_source
from kdjax.data.statistics import MOST_OBJECTS
from kdjax.errors import DataError
from kdjax.options import defaults
from kdjax.plan import Plan, StagePlan
from kdjax.processes import are_several
from kdjax.types import Batch, Source, Task


class Splits(NamedTuple):
    """The data of a run, opened once and checked."""

    train: Source
    evaluation: Source


def open_split(data: Data, task: Task, *, training: bool, together: bool = False) -> Source:
    """The split that a run trains on, or the one that it is evaluated on.

    Args:
        data: of a config.
        task: what is learnt from them.
        training: which split.
        together: all processes open it at once, and share the work of reading a bucket.

    Raises:
        UserError: one sentence about the data or their name, or what the task lacks to train on them.
    """
    checks = Checks(
        strict=data.strict,
        lenient=data.lenient,
        sizing=None if is_open(data, task) else data.sizing,
        reading=data.reading,
        follow_links=data.follow_links,
        most_json_bytes=data.max_json_bytes,
        together=together,
    )
    if training:
        room = MOST_OBJECTS if is_open(data, task) else data.max_objects
        checks = checks._replace(skip_empty=data.skip_empty, max_objects=room)
    else:
        checks = checks._replace(max_detections=data.max_detections)
    split = data.train_split if training else data.eval_split
    source = open_source(data.name, split, data.data_dir or None, checks=checks, download=data.download)
    if training:
        task.check_source(source)
    return source


def is_own(data: Data) -> bool:
    """Whether they are somebody's own, or published, and not the embedded ones."""
    return not data.name.startswith("shapes")


def is_open(data: Data, task: Task) -> bool:
    """Whether keys are chosen from the data: they are somebody's own, and nobody said how large images are."""
    return is_own(data) and data.fit and data.image_size == IMAGE_SIZES.get(task.name, defaults(Data)["image_size"])


def open_splits(plan: Plan) -> Splits:
    """Opens both splits, and prints what was found. The processes of a run do it at once.

    Raises:
        UserError: a split cannot be used.
        DataError: it is damaged, or they differ in their classes; or strict data share images.
    """
    data, task = plan.data, plan.task
    # A split that is not there is known at once, the other one perhaps after a minute.
    together = are_several()
    evaluation = open_split(data, task, training=False, together=together)
    splits = Splits(open_split(data, task, training=True, together=together), evaluation)
    if difference := compare_classes(
        f"the split {data.train_split!r}",
        splits.train.class_names,
        f"the split {data.eval_split!r}",
        splits.evaluation.class_names,
    ):
        raise DataError(f"{data.name}: {difference}; both must have the same classes in the same order.")
    if isinstance(splits.train, IndexedSource) and isinstance(splits.evaluation, IndexedSource):
        check_shared(splits.train, splits.evaluation)
    for source in splits:
        print("\n".join(source.report_lines()), flush=True)
    return splits


def open_batches(
    plan: Plan, stage: StagePlan, source: Source, first_step: int, *, processes: int = 0
) -> Generator[Batch, None, None]:
    """This process's share of the training batches of a stage from a step on, on the host.

    A pure function of the seed, the stage and the step.

    Args:
        plan: of the run.
        stage: of it.
        source: what the stage is trained on.
        first_step: counted from 0.
        processes: that prepare images, besides this one, as the config says where many batches are taken.

    Raises:
        UserError: there can be none; or, in the middle, an image that was there at the start cannot be read any more.
    """
    data = plan.data
    return train_batches(
        source,
        batch_size=stage.options.batch_size,
        image_size=data.sizing,
        task=plan.task,
        seed=_batches_seed(plan, stage),
        first_step=first_step,
        augmentation=data.augmentation,
        parts=stage.options.accumulate,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=data.threads,
        num_workers=processes,
        log=lambda text: print(f"[{stage.name}] {text}", flush=True),
    )


def images_of_step(plan: Plan, stage: StagePlan, source: Source, step: int) -> list[int]:
    """The positions in the source of all images that :func:`open_batches` gives the processes for a step, together."""
    return batch_positions(
        source,
        batch_size=stage.options.batch_size,
        image_size=plan.data.sizing,
        seed=_batches_seed(plan, stage),
        step=step,
    )


def _batches_seed(plan: Plan, stage: StagePlan) -> int:
    return int(np.random.SeedSequence((plan.run.seed, stage.number)).generate_state(1)[0])
