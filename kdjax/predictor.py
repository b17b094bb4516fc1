"""A trained model on photographs, from files or arrays to what a person wants to know: all of it from its folder."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

from kdjax.config.schema import Data
from kdjax.data.batches import eval_batches
from kdjax.data.photographs import Photograph, Photographs
from kdjax.data.sizing import Reading, Sizing
from kdjax.devices import device_count, replicate
from kdjax.errors import DataError, UsageError, UserError
from kdjax.evaluation import Predict, make_predict, outputs
from kdjax.options import number, whole
from kdjax.saved import describe, known_sizing, load_student, reading_of, task_of
from kdjax.tasks import build_task
from kdjax.types import Results

BATCH_SIZE = 8
"""Where nobody says otherwise; of more devices, as many."""


@dataclasses.dataclass(frozen=True)
class Predictor:
    """Says what a model finds in photographs: made by :func:`load_predictor`, called with a list of them."""

    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    """What files of results call each class."""
    sizing: Sizing
    """How photographs are scaled."""
    reading: Reading
    """How their files are read."""
    results: Results
    """What becomes of the model's outputs."""
    batch_size: int
    """Photographs that all devices see at once."""
    _predict: Predict
    _variables: Any

    def __call__(self, photographs: Sequence[Photograph]) -> list[Any]:
        """What the model says of each photograph, in their order.

        Of detectors each is :class:`kdjax.tasks.found_objects.FoundObjects`: ``boxes`` (n, 4) float32, xyxy in pixels
        of the photograph, ``scores``, ``labels``, ``names`` and ``masks``. Of classifiers it is
        :class:`kdjax.tasks.found_classes.FoundClasses`, the five most probable ones, and of segmenters
        :class:`kdjax.tasks.found_maps.FoundMap`, whose ``classes`` (H, W) uint8 are as large as the photograph.

        Args:
            photographs: each (H, W, 3) uint8, RGB, of any size; or the path of an image file.

        Raises:
            DataError: one of them is no photograph, or a file cannot be read.
        """
        source = Photographs(photographs, self.reading)
        found = {}
        if not source.left_out:
            found = dict(self.each(source))
        for name, why in source.left_out.items():
            raise DataError(f"{name} {why}.")
        return [found[position] for position in range(len(source))]

    def each(self, source: Photographs) -> Iterator[tuple[int, Any]]:
        """Positions of photographs and what the model says of them, batch by batch: those of a like shape together.

        Those that turn out not to be readable are left out, and named in ``source.left_out``. Threads decode while the
        devices compute, and the memory that is taken does not depend on how many photographs there are.
        """
        if not len(source):
            return
        batches = eval_batches(source, batch_size=self.batch_size, image_size=self.sizing)
        for batch, output in outputs(self._predict, self._variables, batches):
            for row, position in enumerate(batch.index.tolist()):
                if position >= 0 and source.name(position) not in source.left_out:
                    size = tuple(batch.size[row].tolist())
                    yield position, self.results.of(output, row, size, source.size(position))


def load_predictor(
    folder: str | os.PathLike[str], *, threshold: float | None = None, batch_size: int | None = None
) -> Predictor:
    """Loads a trained model to ask it about photographs: ``kdjax.load_predictor("runs/mgd/student")(photographs)``.

    Args:
        folder: a model folder, as a finished run leaves it in its workdir; or one step of a run's checkpoints.
        threshold: score from which on something counts, in [0, 1]; None for that in the folder's ``model.json`` if it
            has one, and otherwise 0.3 for detectors and 0 for classifiers.
        batch_size: photographs that all devices see at once; None for 8, or one for each of more devices. One batch is
            always filled: where photographs come one by one, 1 is the fastest.

    Raises:
        DataError: the folder holds no model, is damaged, or does not say how its images were scaled.
        UsageError: a threshold or a batch that cannot be.
        UserError: its task does not say what its outputs mean.
    """
    if threshold is not None and not number(0, 1).holds(threshold):
        raise UsageError(f"threshold is {threshold!r}; it must be {number(0, 1).words}.")
    devices = device_count()
    batch_size = usual_batch() if batch_size is None else batch_size
    if not whole(1).holds(batch_size) or batch_size % devices:
        raise UsageError(f"batch_size is {batch_size!r}; it must be a multiple of {devices}, the number of devices.")
    module, variables = load_student(folder)
    described, sizing = describe(folder), known_sizing(folder)
    names = tuple(described["class_names"])
    ids = tuple(described.get("category_ids", ())) or tuple(range(1, len(names) + 1))
    threshold = described.get("threshold") if threshold is None else threshold
    return Predictor(
        class_names=names,
        category_ids=ids,
        sizing=sizing,
        reading=reading_of(folder),
        results=_results(task_of(folder), names, ids, threshold),
        batch_size=batch_size,
        _predict=make_predict(module),
        _variables=replicate(variables),
    )


def usual_batch(photographs: int = BATCH_SIZE) -> int:
    """The usual batch, or a smaller one that has room for all: what is padded costs as much as what is not."""
    devices = device_count()
    return -(-min(photographs, BATCH_SIZE) // devices) * devices


def _results(name: str, class_names: Sequence[str], ids: Sequence[int], threshold: float | None) -> Results:
    """How the task of a name makes results of outputs."""
    task = build_task(name, Data())
    if not hasattr(task, "results"):
        raise UserError(f"The task {name} does not say what its models' outputs mean: it has no method `results`.")
    return task.results(class_names, ids, threshold)
