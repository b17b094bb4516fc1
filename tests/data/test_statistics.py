"""Class statistics against numbers worked out by hand."""

import numpy as np

from kdjax.data.sources import Objects, open_source
from kdjax.data.statistics import class_statistics
from kdjax.losses import uniform_statistics


class Listed:
    """A source of objects alone: whoever asks for an image fails."""

    class_names = ("cat", "dog", "emu")

    def __init__(self, *rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def objects(self, index):
        boxes, labels, crowd = self.rows[index]
        # Images of 50 x 200 pixels.
        boxes = np.array(boxes, np.float32).reshape(-1, 4) * np.array([200, 50, 200, 50], np.float32)
        area = np.zeros(len(boxes), np.float32)
        return Objects(index, (50, 200), boxes, np.array(labels, np.int32), np.array(crowd, bool), area)


def test_share_mean_and_deviation_of_each_class_without_crowds():
    source = Listed(
        ([[0, 0, 0.2, 0.4], [0.5, 0.5, 0.9, 0.7]], [0, 0], [False, False]),
        ([], [], []),
        ([[0, 0, 1, 1], [0.1, 0.1, 0.4, 0.2]], [0, 2], [True, False]),
    )
    found = class_statistics(source)
    np.testing.assert_allclose(found.frequency, [2 / 3, 0, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(found.mean, [[0.3, 0.3], [0.2, 0.2], [0.3, 0.1]], rtol=1e-6)
    np.testing.assert_allclose(found.deviation, [[0.1, 0.1], [0.2, 0.2], [0, 0]], atol=1e-7)


def test_without_boxes_nothing_is_known():
    for found, default in zip(class_statistics(Listed(([], [], []))), uniform_statistics(3), strict=True):
        np.testing.assert_array_equal(found, default)


def test_objects_are_those_of_the_examples(data_dir):
    source = open_source("shapes/tiny", "validation", data_dir)
    for index in range(4):
        example, objects = source[index], source.objects(index)
        assert objects.size == example.image.shape[:2]
        assert objects.image_id == example.image_id
        assert objects.segmentation is example.segmentation is None
        for name in ("boxes", "labels", "crowd", "area"):
            np.testing.assert_array_equal(getattr(objects, name), getattr(example, name))
