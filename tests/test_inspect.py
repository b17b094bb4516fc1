"""What a config trains on, before any training: both splits, their flaws, and pictures of augmented images."""

import itertools
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdjax import inspect
from kdjax.errors import Exit, UserError
from kdjax.plan import resolve
from kdjax.run.data import open_batches, open_split, open_splits
from tests.data.folders import content, encoded, write
from tests.test_config import CONFIGS, load

MGD = next(path for path in CONFIGS if path.stem == "mgd")

ROOT = Path(__file__).parents[1]


def planned(config):
    return resolve(config, devices=1)


def split_of(config, training):
    plan = planned(config)
    return open_split(plan.data, plan.task, training=training)


def plan_of(folder):
    """The plan of such a config, and its training split."""
    plan = resolve(config_of(folder), devices=1)
    return plan, open_split(plan.data, plan.task, training=True)


def config_of(folder):
    """A config that trains on annotations_train.json and is evaluated on annotations_val.json."""
    config = load(MGD, "tiny")
    config.data.update(name=f"coco_json:{folder}", image_size=(32, 64), max_objects=4, flip=0.0)
    config.student.batch_size = 2
    return config


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, content())
    return write(tmp_path, content(), "annotations_val.json", "val")


def changed(folder, edit, file="annotations_train.json"):
    tree = json.loads((folder / file).read_text())
    edit(tree)
    (folder / file).write_text(json.dumps(tree))


def test_the_keys_of_a_config_decide_what_is_kept(folder):
    """Image 9 has no objects; then annotation 12 has no area, and annotation 11 an unknown image."""

    def opened(training=True, **keys):
        config = config_of(folder)
        config.data.update(keys)
        return split_of(config, training=training)

    def flawed(source):
        return [flaw["ids"] for flaw in source.report_dict()["flaws"]]

    assert [len(opened(training)) for training in (True, False)] == [3, 3]
    assert [len(opened(training, skip_empty=True)) for training in (True, False)] == [2, 3]
    assert [flawed(opened(training, max_objects=1)) for training in (True, False)] == [[[5]], []]
    changed(folder, lambda tree: tree["annotations"][1].update(bbox=[1, 1, 0, 5]))
    assert flawed(opened(max_objects=5)) == [[12]]
    with pytest.raises(UserError, match=r"boxes without area: annotation 12 of 5.png"):
        opened(strict=True)
    changed(folder, lambda tree: tree["annotations"][0].update(image_id=77))
    with pytest.raises(UserError, match=r"annotation 11 has image_id 77; config.data.lenient=True leaves them out"):
        opened(max_objects=6)
    assert flawed(opened(lenient=True)) == [[11], [12]]


def test_both_splits_must_have_the_same_classes(folder):
    changed(folder, lambda tree: tree["categories"][0].update(id=3), "annotations_val.json")
    changed(folder, lambda tree: tree["annotations"][0].update(category_id=3), "annotations_val.json")
    with pytest.raises(UserError, match=r"'train' and the split 'validation' have the same classes in another order"):
        open_splits(planned(config_of(folder)))


def test_masks_need_outlines(folder):
    """Refused when the data are opened; without masks to learn, and to be evaluated on, they may have none."""
    config = config_of(folder)
    config.data.masks = True
    assert len(split_of(config, training=False)) == 3
    with pytest.raises(UserError, match=r"data.masks is True, but .*annotations_train.json has no outlines"):
        open_splits(planned(config))
    changed(folder, lambda tree: tree["annotations"][0].update(segmentation=[[2, 3, 12, 3, 12, 23]]))
    config.data.max_objects = 5
    assert split_of(config, training=True).objects(0).segmentation is not None


def test_a_pair_with_masks_has_them_in_its_tiny_variant(data_dir):
    """Images of 64 pixels are half as large as in the data: of an object's box, no more is lost than thin points."""
    config = load(MGD, "cascade_mask_rcnn_x101_mask_rcnn_r50:tiny")
    config.data.data_dir = str(data_dir)
    plan = resolve(config, devices=8)
    source = open_split(plan.data, plan.task, training=True)
    targets = next(open_batches(plan, plan["student"], source, 0)).targets
    assert targets.valid.any()
    for box, grid, frame in zip(*(x[targets.valid] for x in (targets.boxes, *targets.masks)), strict=True):
        rows, columns = (np.flatnonzero(grid.any(axis=axis)) for axis in (1, 0))
        seen = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) + np.tile(frame[:2], 2)
        np.testing.assert_allclose(seen, box, atol=2)
    assert not targets.masks.grid[~targets.valid].any()


def test_pictures_show_the_objects_of_a_batch(folder):
    """At flip 0 an image of 40 x 30 becomes one of 43 x 32, and its boxes with it; crowds are named so."""
    changed(folder, lambda tree: tree["annotations"][1].update(iscrowd=1))
    pictures = list(itertools.islice(inspect.training_images(*plan_of(folder)), 6))
    assert len({picture.text for picture in pictures}) == 6
    for image, marks, caption, _ in pictures:
        assert image.shape == (32, 43, 3)
        assert image.any()
        assert caption.endswith(": 32 x 43")
        if len(marks) == 2:
            assert [mark.text for mark in marks] == ["cat", "crowd"]
            scale = np.tile([43 / 40, 32 / 30], 2)
            np.testing.assert_allclose(marks[0].box, np.array([2, 3, 12, 23]) * scale, rtol=1e-5)
            np.testing.assert_allclose(marks[1].box, np.array([20.5, 3, 28.75, 9]) * scale, rtol=1e-5)
    assert sorted({len(picture.marks) for picture in pictures}) == [0, 1, 2]


def test_what_breaks_in_the_middle_is_one_sentence(folder):
    plan, source = plan_of(folder)
    batches = open_batches(plan, plan["student"], source, 0)
    for name in ("5.png", "7.png", "9.png"):
        (folder / "train" / name).write_bytes(encoded(31, 40))
    with pytest.raises(UserError, match=r"\d.png .image \d. has changed since its size was read"):
        list(itertools.islice(batches, 30))


def test_the_command_prints_and_draws(folder):
    """Eight images, as many as there are devices, for a batch; annotation 12 has no area."""
    for file in ("annotations_train.json", "annotations_val.json"):
        changed(folder, lambda tree: tree["annotations"][1].update(bbox=[1, 1, 0, 5]), file)
        more = [{"id": k, "file_name": f"{k}.png", "width": 20 + k, "height": 30} for k in range(20, 25)]
        for k in range(20, 25):
            (folder / ("val" if "val" in file else "train") / f"{k}.png").write_bytes(encoded(30, 20 + k))
        changed(folder, lambda tree, more=more: tree["images"].extend(more), file)
    arguments = f"--config.data.name=coco_json:{folder}", f"--picture={folder}/sheet.png", "--images=6"
    command = [sys.executable, "-m", "kdjax.inspect", "--config=configs/none.py:tiny", *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for line in (
        f"{folder}/annotations_train.json: 8 images, 6 of them without objects; 2 objects of 2 classes, 0 of them "
        "crowds.",
        "  left out: 1 boxes without area (annotation 12 of 5.png)",
        f"coco_json:{folder}, validation",
        "dog           1   50.00         1",
        f"Training images are in {folder}/sheet.png.",
    ):
        assert line in run.stdout.splitlines(), run.stdout
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.width > 4 * 448
        assert len(sheet.convert("RGB").getcolors(1 << 24)) > 1000


def test_a_mistake_is_one_sentence_and_an_exit_code(folder, monkeypatch, capsys):
    (folder / "train" / "7.png").unlink()
    config = load(MGD, "tiny")
    config.data.name = f"coco_json:{folder}"
    monkeypatch.setattr(inspect, "CONFIG", types.SimpleNamespace(value=config))
    assert inspect.main([]) == Exit.DATA
    assert capsys.readouterr().err == (
        f"kdjax: {folder}/annotations_train.json has images that cannot be used: 7.png (image 7) is missing; "
        "config.data.lenient=True leaves them out.\n"
    )
