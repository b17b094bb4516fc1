"""What is chosen from data of somebody's own, what is left as it is, and what is said of it."""

import ast
import re

import numpy as np
import pytest

from kdjax.config import load_config
from kdjax.data.examples import Objects
from kdjax.data.folders import NoSplitError
from kdjax.data.sizing import Sizing
from kdjax.data.statistics import sizes_in_words, suggest
from kdjax.models import model_class
from kdjax.plan import resolve
from kdjax.run.fit import chosen, in_words, opened, with_keys
from kdjax.tasks import Detection
from tests.data.test_yolo import pair, put


class Boxes:
    """A source of images of one size with boxes of given sides."""

    origin, class_names = "boxes.json", ("thing",)

    def __init__(self, size, sides, images=10):
        self._size, self._sides, self._images = size, sides, images

    def __len__(self):
        return self._images

    def objects(self, index):
        sides = np.array(self._sides, np.float32)
        boxes = np.stack([sides * 0, sides * 0, sides, sides], axis=1)
        nothing = np.zeros(len(sides), np.int32)
        return Objects(index, self._size, boxes, nothing, nothing.astype(bool), sides**2)


PHOTOGRAPHS = Boxes((480, 640), range(40, 200, 8))


def config_of(name="coco_json:photographs", **changes):
    config = load_config("mgd")
    config.data.name = name
    return with_keys(config, changes)


def keys_of(config, source=PHOTOGRAPHS):
    return chosen(resolve(config, devices=1), source)


def test_photographs_have_their_own_shape_augmentation_room_and_anchors():
    keys = keys_of(config_of())
    assert keys["data.image_size"] == (128, 160)
    assert keys["data.jitter"] == (0.5, 1.5)
    assert keys["data.color"] == 0.3
    assert keys["data.max_objects"] == 20
    # Images are scaled by a quarter; a tenth of the boxes is below 55 / 4 pixels, 1.75 strides of P3.
    assert keys["teacher.model.head.anchor_scale"] == keys["student.model.head.anchor_scale"] == 1.75
    assert keys["teacher.steps"] == 1600
    assert (keys["teacher.eval_every"], keys["student.eval_every"]) == (320, 140)
    assert keys["teacher.export"] == keys["student.export"] == "best"


def test_the_printed_flags_say_the_same_as_what_was_chosen():
    keys = keys_of(config_of())
    flags = dict(re.findall(r'--config\.(\S+?)="([^"]*)"', in_words(keys)))
    read = {path: value if path.endswith("export") else ast.literal_eval(value) for path, value in flags.items()}
    assert read == keys
    said = resolve(config_of(**read, **{"data.fit": False}), devices=1)
    found = resolve(with_keys(config_of(), keys), devices=1)
    assert said.stages == found.stages
    assert (said.data.sizing, said.data.augmentation) == (found.data.sizing, found.data.augmentation)
    # A plan of what was chosen leaves nothing open: a run that goes on chooses nothing else.
    assert chosen(found, PHOTOGRAPHS) == {}


@pytest.mark.parametrize(
    "changes", [{"data.name": "shapes"}, {"data.fit": False}, {"data.image_size": (96, 96)}], ids=str
)
def test_the_embedded_data_and_what_somebody_said_are_left_alone(changes):
    assert keys_of(config_of(**changes)) == {}


def test_each_key_that_somebody_said_is_left_alone():
    said = {"data.color": 0.1, "student.eval_every": 50, "teacher.model.head.anchor_scale": 3.0}
    keys = keys_of(config_of(**said))
    assert "data.color" not in keys
    # A student that inherits a head looks for what its teacher looks for.
    assert not [key for key in keys if "anchor" in key]
    assert "student.eval_every" not in keys
    assert "data.jitter" in keys


def test_a_teacher_from_elsewhere_keeps_its_anchors_and_so_does_its_student(tmp_path):
    config = config_of(**{"student.teacher": str(tmp_path), "stages": ("student",)})
    assert not [key for key in keys_of(config) if "anchor" in key]


def test_without_a_validation_split_a_fifth_of_the_photographs_is_held_out(tmp_path, capsys):
    lines = {f"{stem}_jpg.rf.{copy}": "0 0.5 0.5 0.5 0.2\n" for stem in "abcdefghij" for copy in (1, 2)}
    folder = put(tmp_path, {"classes.txt": "cat\n"} | pair("images/", "labels/", lines))
    config = config_of(f"yolo:{folder}")
    plan, splits = opened(config, resolve(config, devices=1))
    parts = [{source.name(k)[7] for k in range(len(source))} for source in splits]
    assert [len(source) for source in splits] == [16, 4]
    assert not parts[0] & parts[1]
    assert (plan.data.train_split, plan.data.eval_split) == ("train[kept]", "train[held_out]")
    shown = capsys.readouterr().out
    assert "has no images for the split 'validation'" in shown
    assert "A fifth of the training images is held out instead, drawn by their names." in shown
    assert '--config.data.train_split="train[kept]" --config.data.eval_split="train[held_out]"' in shown
    assert "Boxes are " in shown
    for changes in ({"data.fit": False}, {"data.train_split": "train[:9]"}, {"data.eval_split": "holiday"}):
        config = config_of(f"yolo:{folder}", **changes)
        with pytest.raises(NoSplitError):
            opened(config, resolve(config, devices=1))


def test_a_backbone_that_knows_something_leaves_the_anchors_open(tmp_path):
    weights = tmp_path / "resnet18.pth"
    weights.touch()
    start = {"teacher.weights": str(weights), "teacher.source": "torchvision"}
    assert keys_of(config_of(**start))["teacher.model.head.anchor_scale"] == 1.75
    # As long as those of published detectors: the file may be one.
    longer = {"teacher.model.head.convs": 4, "teacher.model.head.norm": ""}
    assert not [key for key in keys_of(config_of(**start, **longer)) if "anchor" in key]


def test_small_objects_get_larger_images_up_to_twice_the_pixels():
    sizes = [np.prod(suggest(Boxes((640, 640), [side] * 5)).data["image_size"]) for side in (100, 41, 36, 20, 4)]
    assert sizes == sorted(sizes)
    assert sizes[0] < 1.6 * 128 * 128
    assert 2 * 128 * 128 <= sizes[-1] <= 3.2 * 128 * 128


@pytest.mark.parametrize("name", ["retinanet", "fcos", "atss", "gfl", "faster_rcnn"])
def test_detectors_look_for_larger_objects_where_there_are_larger_ones(name):
    (small,), (large,) = (model_class(name).suited([x, 2 * x, 3 * x]).values() for x in (8.0, 16.0))
    assert large > small
    assert model_class(name).suited([]) == {}


def test_nothing_is_suggested_where_there_are_no_boxes():
    assert suggest(Boxes((64, 64), [])) is None
    assert sizes_in_words(Boxes((64, 64), []), Sizing(((64, 64),))) == []


def test_the_start_says_how_large_boxes_are_and_warns_of_those_that_cannot_be_found():
    sizing = Sizing(((128, 128),))
    (line,) = Detection().remarks(PHOTOGRAPHS, sizing)
    assert line == "Boxes are 10 to 37 pixels large once images are scaled, half of them below 23."
    _, warning = Detection().remarks(Boxes((1280, 1280), [20, 300, 400, 500]), sizing)
    assert warning.startswith("WARNING: 25% of the boxes are below 4 pixels then, too small to be found: a larger")
