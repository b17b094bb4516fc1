"""One tiny prepared data set and one synthetic source for all tests of kdjax.data."""

import numpy as np
import pytest

from kdjax.data.examples import Example
from kdjax.data.sources import open_source
from tests.sources import OfExamples


class Marks(OfExamples):
    """A source of n images of different sizes; a bright rectangle stands for every object, its value for its label.

    Image i has i % 4 objects; the red channel of its whole first row is i, so that an image can be recognised.
    """

    class_names = ("a", "b", "c", "d")

    def __init__(self, length: int, crowd: bool = False):
        self.length, self.crowd = length, crowd

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        rng = np.random.default_rng(index)
        height, width = 8 * int(rng.integers(3, 5)), 8 * int(rng.integers(3, 5))
        image = np.zeros((height, width, 3), np.uint8)
        image[0, :, 0] = index
        count = index % 4
        low = rng.integers(1, 10, (count, 2))
        boxes = np.concatenate([low, low + rng.integers(2, 12, (count, 2))], axis=1)
        labels = np.arange(count)
        for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
            image[y1:y2, x1:x2, 1] = 50 * (label + 1)
        crowd = np.zeros(count, bool)
        crowd[: self.crowd] = True
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        return Example(
            image, 1000 + index, boxes.astype(np.float32), labels.astype(np.int32), crowd, area.astype(np.float32)
        )


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    open_source("shapes/tiny", "train", path)
    return path
