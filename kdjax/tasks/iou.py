"""Mean intersection over union of index maps, from one confusion matrix of all pixels (Everingham et al., 2010)."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from PIL import Image

from kdjax.charts import Chart
from kdjax.data.examples import MapSource
from kdjax.data.sizing import Size
from kdjax.data.transforms import move_classes, whole
from kdjax.tasks.confusion import confusion_chart
from kdjax.types import IGNORED, MOST_PICTURES, Batch


class Metrics(TypedDict):
    """Numbers in percent, 0 to 100, of labelled pixels alone."""

    mIoU: float
    """Mean of ``IoU`` over the classes that are in the truth or in what was said."""
    aAcc: float
    """Share of the pixels whose class is right."""
    mAcc: float
    """Mean, over the classes that are in the truth, of the share of their pixels whose class is right."""
    IoU: dict[str, float]
    """Intersection over union of each class, in the source's order; NaN of a class that is nowhere."""


class IntersectionOverUnion:
    """A :class:`kdjax.types.Judge`: counts every labelled pixel of the original images by its class and the one said.

    What was said is brought to the original size by the nearest pixel; images that are not scaled are as they are.
    """

    def __init__(self, source: MapSource):
        """Knows nothing yet of what is said of the images of a source."""
        classes = len(source.class_names)
        self._source, self._matrix = source, np.zeros((classes, classes), np.int64)
        self._said: dict[int, np.ndarray] = {}

    def add(self, outputs: np.ndarray, batch: Batch) -> None:
        """Takes classes (N, H, W) uint8 of the pixels of the padded images; blank images are left out."""
        positions = np.asarray(batch.index)
        for row in np.flatnonzero(positions >= 0).tolist():
            position = int(positions[row])
            said = in_original(outputs, row, batch.size[row], self._source.size(position))
            self._matrix += confusion(self._source.classes(position), said, len(self._matrix))
            if position < MOST_PICTURES:
                self._said[position] = said

    def state(self) -> dict[str, np.ndarray]:
        """The confusion matrix (K, K): rows are the truth, columns what was said."""
        return {"confusion": self._matrix}

    def merge(self, states: Sequence[Mapping[str, np.ndarray]]) -> Metrics:
        """The metrics of all processes' pixels together."""
        return metrics(np.sum([state["confusion"] for state in states], axis=0), self._source.class_names)

    def charts(self, states: Sequence[Mapping[str, np.ndarray]]) -> list[Chart]:
        """What pixels are taken for what."""
        counts = np.sum([state["confusion"] for state in states], axis=0)
        return [confusion_chart(counts, self._source.class_names)]

    def kept(self, count: int) -> dict[int, Any]:
        """The maps of the source's first images, by position, as the base64 of PNG files."""
        return {position: encoded(said) for position, said in self._said.items() if position < count}


def in_original(outputs: np.ndarray, row: int, size: Any, original: Size) -> np.ndarray:
    """What was said of one image of a batch, as a map (H, W) uint8 of its own size.

    Args:
        outputs: (N, H, W) uint8 of the padded images of the batch.
        row: of the image.
        size: (2,) its height and width in the padded array.
        original: its own.
    """
    height, width = np.asarray(size).tolist()
    return move_classes(np.asarray(outputs[row])[:height, :width], whole((height, width), original))


def confusion(truth: np.ndarray, said: np.ndarray, classes: int) -> np.ndarray:
    """How many pixels of each class were said to be of which: (K, K) int64, rows the truth; ignored ones are left out.

    >>> confusion(np.array([[0, 1, 1, 255]], np.uint8), np.array([[0, 0, 1, 1]], np.uint8), 2).tolist()
    [[1, 0], [1, 1]]

    Args:
        truth: (H, W) uint8 in [0, classes) or ``IGNORED``.
        said: (H, W) uint8 in [0, classes).
        classes: K.
    """
    labelled = truth != IGNORED
    pairs = classes * truth[labelled].astype(np.int64) + said[labelled]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def metrics(matrix: np.ndarray, class_names: Sequence[str]) -> Metrics:
    """What a confusion matrix says, as MMSegmentation computes it [code].

    ``IoU_c = TP / (truth + said - TP)``, and the mean is over the classes whose denominator is not zero.

    >>> metrics(np.array([[1, 0], [1, 1]]), ("sky", "tree"))["mIoU"]
    50.0

    Args:
        matrix: (K, K), rows the truth.
        class_names: of the K classes.
    """
    right, truth, said = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: a class that is nowhere.
        iou, recall, accuracy = right / (truth + said - right), right / truth, right.sum() / matrix.sum()
    mean_iou, mean_recall = (float(x[~np.isnan(x)].mean()) if not np.isnan(x).all() else np.nan for x in (iou, recall))
    by_class = dict(zip(class_names, (100 * iou).tolist(), strict=True))
    return Metrics(mIoU=100 * mean_iou, aAcc=100 * float(accuracy), mAcc=100 * mean_recall, IoU=by_class)


def encoded(classes: np.ndarray) -> str:
    """A map (H, W) uint8 as the base64 of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(classes).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def decoded(text: str) -> np.ndarray:
    """What was :func:`encoded`.

    >>> decoded(encoded(np.array([[3, 7]], np.uint8))).tolist()
    [[3, 7]]
    """
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
