"""The task of segmentation: its judge, words and pictures, and its configs from the command line's names."""

import contextlib
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

import kdjax
from kdjax.config import load_config
from kdjax.data.sources import open_source
from kdjax.errors import UserError
from kdjax.evaluate import tables
from kdjax.run import pipeline
from kdjax.tasks import Segmentation
from kdjax.tasks.iou import IntersectionOverUnion, confusion, decoded, metrics
from kdjax.types import IGNORED, Column


class Seen:
    """A batch as far as a judge looks at it."""

    def __init__(self, index, size):
        self.index, self.size = np.array(index), np.array(size)


class Maps:
    """Two images of 4 x 6 pixels."""

    class_names, origin = ("sky", "tree", "car"), "two maps"

    def size(self, index):
        return 4, 6

    def classes(self, index):
        found = np.full((4, 6), index, np.uint8)
        found[0] = IGNORED
        return found


def test_a_class_that_is_nowhere_counts_nowhere():
    said = np.array([[0, 0, 1, 1]], np.uint8)
    found = metrics(confusion(np.array([[0, 1, 1, IGNORED]], np.uint8), said, 3), ("sky", "tree", "car"))
    assert found["IoU"] == pytest.approx({"sky": 50.0, "tree": 50.0, "car": np.nan}, nan_ok=True)
    assert (found["mIoU"], found["mAcc"]) == pytest.approx((50.0, 75.0))
    assert found["aAcc"] == pytest.approx(200 / 3)
    assert all(np.isnan(value) for value in list(metrics(np.zeros((2, 2), int), ("a", "b")).values())[:3])


def test_what_is_said_of_a_scaled_image_is_judged_in_its_own_pixels_and_padding_is_left_out():
    judge = IntersectionOverUnion(Maps())
    said = np.full((3, 8, 16), 2, np.uint8)
    said[0, :2, :3], said[1, :8, :12] = 0, 1
    judge.add(said, Seen([0, 1, -1], [[2, 3], [8, 12], [8, 16]]))
    found = judge.merge([judge.state()])
    assert (found["mIoU"], found["aAcc"]) == (100.0, 100.0)
    np.testing.assert_array_equal(decoded(judge.kept(2)[1]), np.ones((4, 6)))


def test_several_processes_make_one_matrix():
    parts = []
    for index in (0, 1):
        judge = IntersectionOverUnion(Maps())
        judge.add(np.zeros((1, 4, 6), np.uint8), Seen([index], [[4, 6]]))
        parts.append(judge.state())
    assert judge.merge(parts)["aAcc"] == 50.0
    assert judge.merge(parts[::-1])["IoU"]["sky"] == 50.0


def test_all_numbers_are_printed_with_those_by_class():
    text = tables(metrics(np.array([[3, 1], [0, 4]]), ("cat", "dog")))
    assert re.search(r"^mIoU +77.5$", text, re.MULTILINE)
    assert re.search(r"^cat +75.0$", text, re.MULTILINE)


def test_data_without_maps_are_refused_in_words(data_dir):
    for ask in (Segmentation().check_source, Segmentation().judge):
        with pytest.raises(UserError, match="has no index maps, of which a segmenter learns: take index_maps:<folder>"):
            ask(open_source("shapes/tiny", "train", data_dir))


def test_pictures_show_the_truth_beside_what_each_model_said(tmp_path, data_dir):
    source, task = open_source("shapes/maps/tiny", "validation", data_dir), Segmentation()
    judge = task.judge(source)
    for index in range(3):
        size = source.size(index)
        judge.add(source.classes(index)[None], Seen([index], [size]))
    kept = [said for _, said in sorted(judge.kept(3).items())]
    task.draw(tmp_path / "a.png", source, {"student": Column(kept, judge.merge([judge.state()]))})
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 3 * 448
        assert picture.height > 3 * 300


def test_a_person_is_told_what_share_each_class_has(data_dir):
    source = open_source("shapes/maps/tiny", "train", data_dir)
    lines = Segmentation().describe(source)
    assert lines[0].startswith("images: 32, ")
    assert re.fullmatch(r"background +\d\d\.\d\d +32", lines[2])
    suggested = Segmentation().suggest(source)
    assert suggested.data["image_size"] == (128, 128)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kd", "mgd", "maskd", "dmkd", "mimic"])
def test_the_embedded_maps_run_from_a_name_to_a_student(method, tmp_path, data_dir):
    config = load_config(f"{method}:segmentation:tiny")
    config.data.data_dir = str(data_dir)
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        pipeline.run(config, tmp_path)
    assert re.search(r"^model +mIoU +mAcc +aAcc +params$", shown.getvalue(), re.MULTILINE)
    assert json.loads((tmp_path / "summary.json").read_text())["primary"] == "mIoU"
    assert (tmp_path / "predictions.png").is_file()
    rows = (tmp_path / "stages" / "student" / "metrics.jsonl").read_text()
    terms = {"mgd": ("mgd", "cwd"), "maskd": ("maskd_logits", "maskd_auxiliary")}.get(method, (method,))
    assert all(f'"raw/{term}' in rows for term in terms)
    module, variables = kdjax.load_student(tmp_path / "student")
    source = open_source("shapes/maps/tiny", "validation", data_dir)
    height, width = source.size(0)
    said = module.apply(variables, source[0].image[None], np.array([[height, width]]), method="predict")
    assert said.shape == (1, height, width)
    assert said.dtype == np.uint8
