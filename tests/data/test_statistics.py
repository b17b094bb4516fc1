"""Class statistics against numbers worked out by hand."""

import numpy as np
import pytest

from kdjax.data.examples import Objects
from kdjax.data.sources import open_source
from kdjax.data.statistics import class_statistics, describe
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
        assert list(objects.segmentation) == list(example.segmentation)
        for name in ("boxes", "labels", "crowd", "area"):
            np.testing.assert_array_equal(getattr(objects, name), getattr(example, name))


def test_describing_counts_everything_once():
    """Images of 50 x 200 pixels; boxes of 40 x 20, 80 x 10 and 60 x 5 pixels, and a crowd."""
    source = Listed(
        ([[0, 0, 0.2, 0.4], [0.5, 0.5, 0.9, 0.7]], [0, 0], [False, False]),
        ([], [], []),
        ([[0, 0, 1, 1], [0.1, 0.1, 0.4, 0.2]], [0, 2], [True, False]),
    )
    assert describe(source) == [
        "images: 3, 1 of them without objects",
        "pixels: height 50 to 50, median 50; width 200 to 200, median 200",
        "width to height: below 1:2 0 (0.0 %), 1:2 to 1:1 0 (0.0 %), 1:1 0 (0.0 %), 1:1 to 2:1 0 (0.0 %), "
        "above 2:1 3 (100.0 %)",
        "objects: 3, besides 1 crowds; in an image 0 to 2, median 1",
        "COCO's size classes: small 3 (100.0 %), medium 0 (0.0 %), large 0 (0.0 %)",
        "pixels of boxes: shorter side 5 to 20, median 10; longer side 40 to 80, median 60",
        "class   objects       %    images",
        "cat           2   66.67         1",
        "dog           0    0.00         0",
        "emu           1   33.33         1",
    ]


def test_nothing_can_be_described():
    lines = describe(Listed(([], [], [])))
    assert lines[0] == "images: 1, 1 of them without objects"
    assert lines[5] == "pixels of boxes: shorter side none; longer side none"


@pytest.mark.parametrize(
    ("area", "group"), [(1023, "small"), (1024, "medium"), (9215, "medium"), (9216, "large"), (1e6, "large")]
)
def test_size_classes_are_cocos(area, group):
    source = Listed(([[0, 0, 0.2, 0.4]], [0], [False]))
    objects = source.objects(0)._replace(area=np.array([area], np.float32))
    source.objects = lambda _: objects
    assert f"{group} 1 (100.0 %)" in describe(source)[4]
