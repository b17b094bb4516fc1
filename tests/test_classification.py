"""The task of classification: its judge, its words and pictures, and its configs from the command line's names."""

import contextlib
import io
import json
import re

import jax
import numpy as np
import pytest
from PIL import Image

import kdjax
from kdjax import imagenet
from kdjax.config import load_config
from kdjax.data.examples import ClassifiedImage
from kdjax.data.sizing import Augmentation, Sizing
from kdjax.data.sources import open_source
from kdjax.devices import replicate, split
from kdjax.errors import UserError
from kdjax.evaluate import tables
from kdjax.models import build_model
from kdjax.papers import ON_IMAGENET
from kdjax.plan import resolve
from kdjax.run import pipeline
from kdjax.run.build import Facts, build, first_state
from kdjax.run.floor import teacher_floor
from kdjax.tasks import Classification
from kdjax.tasks.confusion import metrics
from kdjax.types import Batch, Column, Labels
from tests.classification import Stripes


class Seen:
    """A batch as far as a judge looks at it."""

    def __init__(self, index):
        self.index = np.array(index)


def judged(source, said):
    judge = Classification().judge(source)
    judge.add(said, Seen(range(len(said))))
    return judge


def test_metrics_are_those_of_the_matrix_of_counts():
    counts = np.array([[6, 2, 0, 0, 0], [1, 3, 0, 0, 0], [0, 0, 8, 0, 0], [0, 4, 0, 0, 0], [0, 0, 0, 0, 0]])
    found = metrics(counts, 20, ("a", "b", "c", "d", "e"))
    assert found["top1"] == pytest.approx(100 * 17 / 24)
    assert found["top5"] == pytest.approx(100 * 20 / 24)
    assert found["recall"] == pytest.approx({"a": 75.0, "b": 75.0, "c": 100.0, "d": 0.0, "e": np.nan}, nan_ok=True)
    assert found["precision"] == pytest.approx(
        {"a": 600 / 7, "b": 100 / 3, "c": 100.0, "d": np.nan, "e": np.nan}, nan_ok=True
    )
    assert found["confusion"]["a"] == {"a": 75.0, "b": 25.0}
    assert found["confusion"]["e"] == {}
    assert "top5" not in metrics(np.eye(4, dtype=int), 4, "abcd")
    assert "confusion" not in metrics(np.eye(21, dtype=int), 21, [str(k) for k in range(21)])


class Six(Stripes):
    class_names = tuple("abcdef")

    def label(self, index):
        return index % 6


def test_the_five_most_probable_classes_are_right_and_what_is_not_a_number_is_not():
    said = np.tile(np.linspace(0.0, 0.5, 6), (12, 1))
    found = judged(Six("validation"), said)
    assert found.merge([found.state()])["top5"] == pytest.approx(100 * 5 / 6)  # But for "a", the least probable.
    assert found.merge([found.state()])["top1"] == pytest.approx(100 / 6)
    lost = judged(Six("validation"), np.full((12, 6), np.nan))
    assert lost.merge([lost.state()])["top5"] == 0.0
    assert found.kept(2)[1] == {"label": 5, "probability": 0.5}


def test_all_numbers_are_printed_with_those_by_two_classes():
    text = tables(metrics(np.array([[3, 1], [0, 4]]), 8, ("cat", "dog")))
    assert re.search(r"^top1 +87.5$", text, re.MULTILINE)
    assert re.search(r"^class +recall +precision$", text, re.MULTILINE)
    assert re.search(r"^cat +75.0 +100.0$", text, re.MULTILINE)
    assert re.search(r"^confusion +cat +dog\ncat +75.0 +25.0\ndog +100.0$", text, re.MULTILINE)


def test_pictures_show_images_with_what_each_model_said_and_what_is_taken_for_what(tmp_path):
    source = Stripes("validation")
    said = np.eye(4)[[0, 1, 2, 0, 0, 1, 2, 3]]
    judge = judged(source, said)
    kept = [said for _, said in sorted(judge.kept(8).items())]
    columns = {name: Column(kept, judge.merge([judge.state()])) for name in ("teacher", "student")}
    Classification().draw(tmp_path / "predictions.png", source, columns)
    for name in ("predictions.png", "confusion.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 300
            colours = {colour for _, colour in picture.convert("RGB").getcolors(2**24)}
        assert (60, 205, 95) in colours, name  # What is right.


class Other:
    """A source of something else."""

    origin = "a source of boxes"


def test_data_without_classes_of_images_are_refused_in_words():
    for ask in (Classification().check_source, Classification().judge):
        with pytest.raises(
            UserError, match="a source of boxes does not say of which class an image is: take class_fold"
        ):
            ask(Other())


class Uneven(Stripes):
    def label(self, index):
        return max(0, index - 36)


def test_a_person_is_told_what_a_model_that_knows_nothing_reaches_and_what_is_rare():
    source, task = Stripes("validation"), Classification()
    assert task.remarks(source, Sizing(((64, 64),))) == []
    assert task.remarks(Uneven("validation"), Sizing(((64, 64),))) == [
        "'rows' is 92 % of the training images: a model that always says so reaches that top1 on images like them.",
        "columns, diagonals, checks: fewer than 10 training images each, of which little can be learnt.",
    ]
    assert "enlarged more than twice" in task.remarks(source, Sizing(((160, 160),)))[-1]
    assert task.suggest(source).data["image_size"] == (64, 64)
    assert task.describe(source)[2] == "rows       10 images, 25.0 %"


def test_rows_of_targets_are_classes_and_those_of_mixed_images_two():
    example = ClassifiedImage(np.zeros((4, 4, 3), np.uint8), 0, label=2, other=1, share=0.25)
    for mixed, rest in ((False, (None, None)), (True, ([0, 1], [0.0, 0.25]))):
        task = Classification(mixed=mixed)
        targets = task.targets(2, (64, 64))
        task.fill(targets, 1, example, Augmentation())
        assert [None if x is None else x.tolist() for x in targets] == [[0, 2], *rest]


@pytest.mark.parametrize("method", ["mgd", "mimic", "none", "dmkd", "kd"])
@pytest.mark.parametrize("variant", [*imagenet.VARIANTS, *(f"{name}:tiny" for name in imagenet.VARIANTS)])
def test_every_config_is_valid(method, variant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = resolve(load_config(f"{method}:{variant}"), devices=8)
    assert plan.task.name == "classification"
    if variant in imagenet.PAIRS:
        student = plan["student"]
        assert (student.steps, student.options.batch_size, student.optimizer.learning_rate) == (500_500, 256, 0.1)
        assert (student.options.dtype, plan.data.sizing.centre_crop) == ("bfloat16", True)


@pytest.mark.parametrize(("method", "name"), ON_IMAGENET)
def test_pairs_have_the_authors_settings(method, name):
    """MGD's configs, and those of MMClassification that they go on from."""
    config = load_config(f"{method}:{name}")
    student, report = config.student, ON_IMAGENET[method, name]
    assert (student.loss_weights.mgd, student.methods.mgd.mask_ratio, student.methods.mgd.mask) == (
        7e-5,
        0.15,
        "channel",
    )
    assert student.methods.mgd.levels == ("c5",)
    assert student.optimizer.clip_norm == (5.0 if name == "resnet50_mobilenetv1" else 0.0)
    assert (student.optimizer.weight_decay, student.optimizer.decay_norm_and_bias) == (1e-4, True)
    assert config.teacher.published == report.teacher
    plan = resolve(config, devices=8)
    wordnet = tuple(f"n{k:08}" for k in range(1000))
    assert teacher_floor(plan, plan["student"], wordnet) == report.teacher - 1
    assert teacher_floor(plan, plan["student"], ("cat", "dog")) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet34_resnet18", "resnet50_mobilenetv1"])
def test_a_pair_takes_two_steps(name):
    config = load_config(f"mgd:{name}:tiny")
    classes, rng = 6, np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 64, 64, 3), np.uint8)
    size, index = np.full((8, 2), 64, np.int32), np.arange(8, dtype=np.int32)
    batch = Batch(images, size, index, Labels((index % classes).astype(np.int32)))
    module = build_model(config.teacher.model.to_dict(), num_classes=classes)
    shapes = jax.eval_shape(module.init, jax.random.key(1), images[:1].astype(np.float32))
    variables = jax.tree.map(
        lambda x: rng.uniform(0, 1 / max(1, np.prod(x.shape[:-1])), x.shape).astype(x.dtype), shapes
    )
    plan = resolve(config, devices=8)
    built = build(plan["student"], Facts(plan.task, classes, (64, 64), teacher=module))
    state = first_state(plan["student"], built, jax.random.key(0), start=lambda variables: variables, given={})
    before = jax.device_get(state.params["student"])
    for _ in range(2):
        state, found = built.step(state, replicate(variables), split(batch), replicate(jax.random.key(0)))
    assert all(np.isfinite(value) for value in jax.tree.leaves(jax.device_get(found)))
    assert {"raw/cls", "raw/mgd/c5"} <= found.keys()
    after = jax.device_get(state.params["student"])
    assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


@pytest.mark.slow
def test_the_embedded_crops_run_from_a_name_to_a_student(tmp_path, data_dir):
    config = load_config("mgd:classification:tiny")
    config.data.data_dir = str(data_dir)
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        pipeline.run(config, tmp_path)
    assert "[student] mgd distils c5." in shown.getvalue()
    assert re.search(r"^model +top-1 +top-5 +params$", shown.getvalue(), re.MULTILINE)
    assert json.loads((tmp_path / "summary.json").read_text())["primary"] == "top1"
    for name in ("predictions.png", "confusion.png"):
        assert (tmp_path / name).is_file()
    module, variables = kdjax.load_student(tmp_path / "student")
    source = open_source("shapes/crops/tiny", "validation", data_dir)
    height, width = source.size(0)
    image = source[0].image[None]
    said = module.apply(variables, image, np.array([[height, width]]), method="predict")
    assert said.shape == (1, 6)
