"""The schema: every shipped config obeys it, every mistake is one sentence with key, value and what is allowed."""

import copy
import dataclasses
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from kdjax.config import base_config, load_config, method_config
from kdjax.config.schema import Data, Optimizer, Run, Stage
from kdjax.errors import UserError
from kdjax.models import build_model
from kdjax.options import declared
from kdjax.plan import resolve
from kdjax.run.record import differences

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


def load(path: Path, *variant: str):
    return load_config(":".join([str(path), *variant]))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("variant", [(), ("tiny",)], ids=["shapes", "tiny"])
def test_every_config_is_valid_and_documented(path, variant):
    config = load(path, *variant)
    resolve(config, devices=8)
    for stage in config.stages:
        # A copy of a stage must not forget the types of keys that are None.
        config[stage].teacher_floor = 5
        assert isinstance(config[stage].teacher_floor, float)
    assert f"python -m kdjax.main --config=configs/{path.name}" in path.read_text()


@pytest.mark.parametrize("kind", [Data, Optimizer, Run, Stage])
def test_every_default_obeys_its_rule_and_every_option_has_words(kind):
    options = declared(kind)
    assert len(options) >= 5
    for name, option in options.items():
        assert option.rule.holds(option.default), name
        assert option.rule.words, name
        assert option.meaning.endswith("."), name


def test_what_a_config_says_is_what_the_plan_has():
    config = base_config()
    plan = resolve(config, devices=1)
    assert [stage.name for stage in plan.stages] == ["teacher", "student"]
    for stage in plan.stages:
        section = config[stage.name].to_dict()
        assert stage.section == section
        parsed = dataclasses.asdict(stage.options)
        assert parsed == section
    assert dataclasses.asdict(plan.data) == config.data.to_dict()


def test_keys_that_are_absent_have_their_defaults():
    config = base_config()
    with config.unlocked():
        del config.student.published, config.data.threads, config.student.optimizer.beta2, config.teacher.methods
        config.student.methods.mgd = ConfigDict()
    plan = resolve(config, devices=1)
    assert plan["student"].methods["mgd"].config == {"name": "mgd", "mask_ratio": 0.65, "mask": "spatial"}
    # What a stage is known by is whole, so that a run goes on with the same config.
    assert plan["student"].section["methods"] == {"mgd": method_config("mgd").to_dict()}
    assert plan["teacher"].section["methods"] == {}
    assert plan.content["data"]["threads"] == 2
    assert (plan["student"].options.published, plan.data.threads, plan["student"].optimizer.beta2) == (0, 2, 0.99)


MISTAKES = [
    ("student.optimizer.learning_rate", float("nan"), "a number above 0"),
    ("student.optimizer.learning_rate", -1.0, "a number above 0"),
    ("student.steps", 0, "give config.student.weights or init"),
    ("student.steps", -1, "a whole number of at least 0"),
    ("student.weights", "no/such.pth", "config.student.source is empty"),
    ("student.source", "keras", "mmpretrain, mmseg, cirkd, timm"),
    ("student.steps", True, "a whole number of at least 0"),
    ("student.methods.mgd.mask_ratio", 1.5, "at least 0 and at most 1"),
    ("student.methods.mgd.name", "mdg", "one of mimic, mgd"),
    ("student.optimizer.schedule", "linear", "one of step, cosine, poly, constant"),
    ("student.optimizer.milestones", (0.5, 1.5), "between 0 and 1"),
    ("student.dtype", "float16", "one of float32, bfloat16"),
    ("student.ema_decay", 1.0, "at least 0 and below 1"),
    ("student.loss_weights.mgd", -1.0, "at least 0"),
    ("student.inherit", ("neck", 3), "a tuple of texts"),
    ("data.image_size", (128,), "a pair of multiples of 32"),
    ("data.image_size", ((128, 128), (128, 100)), "or a tuple of such pairs"),
    ("data.short_sides", (800.5,), "a tuple of whole numbers"),
    ("data.jitter", (2.0, 0.1), "the smaller one first"),
    ("student.teacher_floor", 101.0, "at most 100"),
    ("student.batch_size", 12, "must be a multiple of 8"),
    ("eval_batch_size", 9, "must be a multiple of 8"),
    ("student.teacher", "nobody", "an earlier stage (teacher)"),
    ("student.teacher", "", "needs config.student.teacher"),
    ("teacher.inherit", ("neck",), "needs config.teacher.teacher"),
    ("student.model.backbone.depth", 19, "depth"),
    ("student.model.backbone.width", "wide", "ResNet's width is 'wide'; it must be a number above 0"),
    ("student.model.head.convs", 1.5, "RetinaNet's convs is 1.5; it must be a whole number of at least 0"),
    ("student.model.pixel_std", (1.0, "2", 3.0), "pixel_std is (1.0, '2', 3.0); it must be three numbers above 0"),
    (
        "student.model.pixel_std",
        (58.0, 0.0, 57.0),
        "pixel_std is (58.0, 0.0, 57.0); it must be three",
    ),
    ("student.model.pixel_mean", (58.0, 57.0), "pixel_mean is (58.0, 57.0); it must be three numbers, of red"),
    ("student.methods", "mgd", "config.student.methods is 'mgd'; it must be a section"),
    ("student.methods.mgd", 3, "config.student.methods.mgd is 3; it must be a section"),
    ("student.methods.mgd.optimizer", 3, "config.student.methods.mgd.optimizer is 3; it must be a section"),
    ("student.methods.mgd.levels", "p3", "config.student.methods.mgd.levels is 'p3'; it must be a tuple of levels"),
    ("student.methods.mgd.init", "tokens", "config.student.methods.mgd.init is 'tokens'; it must be empty, the path"),
    ("student.methods.again", method_config("mgd"), "methods.mgd has the term 'mgd', which another part of"),
    ("student.loss_weights", 3, "config.student.loss_weights is 3; it must be a section"),
    ("student.model.backbone", 3, "The model's backbone is 3; it must be a section"),
    ("student.model", "retinanet", "no stage config.student"),
    ("student.model.name", "math:sqrt", "config.student.model: 'math:sqrt' is no model"),
    ("student.methods.mgd.name", "math:sqrt", "config.student.methods.mgd.name: 'math:sqrt' is no method"),
    ("student.methods.mgd.name", ":x", "':x' names no method; one of yours is named package.module:Name"),
    ("data", "shapes", "config.data is 'shapes'; it must be a section"),
    ("stages", ("teacher", "pupil"), "no stage config.pupil"),
    ("stages", ("data",), "no stage config.data"),
    ("stages", ("teacher", "teacher"), "once"),
    ("student.inherit", ("nek",), "backbone, neck, head"),
    ("student.teacher", "/no/such/folder", "that exists"),
    ("seed", 2**40, "2**32"),
    ("stages", (), "at least one stage"),
    ("student.loss_weights.mdg", 1.0, "cls, box, mgd"),
    ("student.methods.mgd.ratio", 0.5, "not a key"),
    ("sede", 1, "not a key"),
]


@pytest.mark.parametrize(("key", "value", "words"), MISTAKES, ids=[f"{key}={value}" for key, value, _ in MISTAKES])
def test_a_mistake_is_one_sentence_with_key_value_and_what_is_allowed(key, value, words):
    config = load(next(path for path in CONFIGS if path.stem == "mgd"))
    section, *rest = key.split(".")
    with config.unlocked():
        target = config
        for part in (section, *rest)[:-1]:
            target = target[part]
        with target.ignore_type():
            target[key.rsplit(".", 1)[-1]] = value
    with pytest.raises(UserError) as error:
        resolve(config, devices=8)
    message = str(error.value)
    assert words in message
    assert key.split(".")[0] in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["retinanet", "faster_rcnn"])
def test_one_key_raises_what_is_judged_and_what_models_return(name):
    config = load(next(path for path in CONFIGS if path.stem == "none"))
    stage = config[config.stages[-1]]
    stage.model = ConfigDict(dict(name=name, backbone=dict(depth=18), head={}))
    stage.loss_weights = ConfigDict()
    config.data.max_detections = 300
    model = resolve(config, devices=8)[config.stages[-1]].options.model
    assert build_model(model, num_classes=3).max_detections == 300
    stage.model.head.max_detections = 200
    with pytest.raises(UserError, match=r"max_detections is 300, but config.student.model is .*, which returns 200"):
        resolve(config, devices=8)


def test_only_a_stage_that_takes_steps_must_share_its_batch_evenly(tmp_path):
    config = load(next(path for path in CONFIGS if path.stem == "none"))
    stage, config.eval_batch_size = config[config.stages[-1]], 24
    for name in config.stages[:-1]:
        config[name].batch_size = 24
    stage.batch_size, stage.init = 8, str(tmp_path)
    with pytest.raises(UserError, match=r"batch_size is 8, which 24 devices in 1 part\(s\) each cannot share evenly"):
        resolve(config, devices=24)
    stage.steps = 0
    resolve(config, devices=24)


@pytest.mark.parametrize("name", ["mask_rcnn", "cascade_mask_rcnn", "solo"])
def test_a_detector_that_learns_masks_needs_data_with_masks(name, tmp_path):
    """Weights that are only taken over learn nothing."""
    config = load(next(path for path in CONFIGS if path.stem == "none"))
    stage = config[config.stages[-1]]
    stage.model = ConfigDict(dict(name=name, backbone=dict(depth=18), neck=dict(extra_from="pool"), head={}))
    stage.loss_weights = ConfigDict()
    message = rf"config.data.masks is False, but config.{config.stages[-1]}.model is '{name}', which learns masks: set"
    with pytest.raises(UserError, match=message):
        resolve(config, devices=8)
    config.data.masks = True
    resolve(config, devices=8)
    config.data.masks, stage.steps, stage.init = False, 0, str(tmp_path)
    resolve(config, devices=8)


def test_a_config_file_that_fails_says_how(tmp_path):
    (tmp_path / "broken.py").write_text("def get_config():\n    return 1 / 0\n")
    with pytest.raises(UserError, match=r"broken.py fails with ZeroDivisionError: division by zero"):
        load_config(str(tmp_path / "broken.py"))


def test_learning_rate_scales_with_the_batch_and_steps_inversely():
    config = base_config()
    config.student.batch_size = 4 * config.student.base_batch
    config.student.methods.icd = method_config("icd", warmup_steps=40, heads=4)
    config.student.methods.icd.optimizer = copy.deepcopy(config.student.optimizer)
    stage, quoted = resolve(config, devices=1)["student"], base_config().student
    for scaled in (stage.optimizer, stage.methods["icd"].optimizer):
        assert scaled.learning_rate == 4 * quoted.optimizer.learning_rate
        assert scaled.warmup_steps == quoted.optimizer.warmup_steps / 4
    assert stage.steps == quoted.steps / 4
    assert stage.methods["icd"].config["warmup_steps"] == 10
    assert stage.eval_every == round(quoted.eval_every / 4)
    config.student.eval_every = 0
    assert resolve(config, devices=1)["student"].eval_every == 0


def test_differences_name_key_old_and_new_value():
    assert differences({"a": {"b": 1, "c": [1, 2]}, "d": 0}, {"a": {"b": 2, "c": (1, 2)}, "e": 0}) == [
        "a.b: 1 -> 2",
        "d: 0 -> 'absent'",
        "e: 'absent' -> 0",
    ]
