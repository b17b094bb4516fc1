"""The embedded scenes as label maps and as crops, against how they were drawn."""

import numpy as np
import pytest

from kdjax.data import shapes
from kdjax.data.sources import open_source


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_pixel_has_the_class_of_its_owner(data_dir, split):
    source = open_source("shapes/maps/tiny", split, data_dir)
    assert source.class_names == ("background", *shapes.CLASS_NAMES)
    for index in (0, len(source) - 1):
        scene = shapes.scene(split, index)
        expected = np.append(scene.labels + 1, 0)[scene.owner]
        np.testing.assert_array_equal(source.classes(index), expected)
        example = source[index]
        # Objects are tinted, what is around them is as it was drawn.
        behind = expected == 0
        np.testing.assert_array_equal(example.image[behind], scene.image[behind])
        assert (example.image[~behind] != scene.image[~behind]).mean() > 0.5
        np.testing.assert_array_equal(example.image, source[index].image)
        np.testing.assert_array_equal(example.classes, expected)
        assert example.classes.dtype == np.uint8
    counts = source.report_dict()
    assert sum(counts["pixels_of_class"].values()) == sum(np.prod(source.size(k)) for k in range(len(source)))
    assert counts["flaws"] == []
    assert ";" not in source.fingerprint


def test_a_crop_shows_one_object_and_is_a_window_of_its_scene(data_dir):
    scenes, source = (open_source(name, "train", data_dir) for name in ("shapes/tiny", "shapes/crops/tiny"))
    assert source.class_names == shapes.CLASS_NAMES
    assert len(source) > len(scenes)
    of_object = {identity: row for row, identity in enumerate(scenes.annotations.identity.tolist())}
    for index in range(0, len(source), 4):
        example, row = source[index], of_object[source.image_id(index)]
        objects = scenes.annotations
        scene = scenes[int(objects.image[row])]
        height, width = example.image.shape[:2]
        views = np.lib.stride_tricks.sliding_window_view(scene.image, (height, width, 3))[:, :, 0]
        ((top, left),) = np.argwhere((views == example.image).all(axis=(2, 3, 4)))
        middle = (scene.boxes[:, :2] + scene.boxes[:, 2:]) / 2 - [left, top]
        inside = ((middle >= 0) & (middle <= [width, height])).all(axis=1)
        assert np.count_nonzero(inside) == 1
        assert scene.labels[inside].tolist() == [example.label] == [source.label(index)]
        assert source.size(index) == (height, width)
    assert ";" not in source.fingerprint


def test_parts_of_a_split_have_the_same_crops(data_dir):
    whole = open_source("shapes/crops/tiny", "train", data_dir)
    part = open_source("shapes/crops/tiny", "train[5:9]", data_dir)
    rows = {whole.image_id(k): k for k in range(len(whole))}
    assert 0 < len(part) < len(whole)
    for index in range(len(part)):
        np.testing.assert_array_equal(part[index].image, whole[rows[part.image_id(index)]].image)
