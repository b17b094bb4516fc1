"""A stage that starts from a file: whose classes it knows, and what it takes over where they are not the data's."""

import dataclasses
import json
import pickle
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

import kdjax
from kdjax.checkpoint import Checkpoints
from kdjax.config import base_config, tiny
from kdjax.errors import UserError
from kdjax.models import build_model
from kdjax.optim import make_optimizer
from kdjax.plan import resolve
from kdjax.run.build import initialize
from kdjax.run.floor import teacher_floor
from kdjax.run.start import (
    Teacher,
    _as_expected,
    _import,
    _inherited,
    _saved,
    class_order,
    import_detector,
    load_origins,
)
from kdjax.saved import STAGE_FILE, describe, describe_model, save_model
from kdjax.state import init_state
from kdjax.tasks import Detection
from kdjax.weights import COCO_NAMES, load_into
from tests.test_config import CONFIGS, load
from tests.weights.naming import mmdet_names, resnet_names, to_state_dict, torchvision_names
from tests.weights.pickles import op_text, op_texts, write_pth
from tests.weights.test_own_config import RETINANET

MGD = next(path for path in CONFIGS if path.stem == "mgd")
# With the background, and the places of COCO's numbering that are empty.
OUTPUTS = 91


def drawn(model, classes):
    detector = build_model(model, classes)
    like = jax.eval_shape(detector.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), like)


@pytest.fixture
def stage(tmp_path):
    """A stage that starts from a detector of COCO's classes in torchvision's format."""
    stage = load(MGD, "tiny").student
    arrays = flatten_dict(drawn(stage.model.to_dict(), OUTPUTS), sep="/")
    path = tmp_path / "coco.npz"
    np.savez(path, **to_state_dict(arrays, torchvision_names("retinanet", range(3, 7), norm=True)))
    stage.update(weights=str(path), source="torchvision")
    return stage


def planned(stage):
    """The stage alone, as a plan has it."""
    config = tiny(base_config())
    config.stages, config.student = ("student",), stage
    stage.update(teacher="", inherit=())
    stage.methods, stage.loss_weights = ConfigDict(), ConfigDict()
    return resolve(config, devices=1)["student"]


def test_a_file_of_the_datas_classes_is_taken_over(stage):
    assert _import(planned(stage), COCO_NAMES).class_names == COCO_NAMES


def test_a_file_of_the_classes_in_another_order_has_them_in_the_datas(stage):
    straight, turned = (_import(planned(stage), names) for names in (COCO_NAMES, COCO_NAMES[::-1]))
    assert "its classes are put in the order of the data's" in str(turned.report)
    assert "order" not in str(straight.report)
    before, after = (flatten_dict(x.variables, sep="/") for x in (straight, turned))
    for path, array in before.items():
        if "cls_logits" in path:
            # All classes of an anchor, anchor after anchor.
            array = array.reshape(*array.shape[:-1], 9, 80)[..., ::-1].reshape(array.shape)
        np.testing.assert_array_equal(after[path], array, err_msg=path)


def test_a_file_of_as_many_other_classes_is_refused_with_what_can_be_taken(stage):
    names = ("lynx", *COCO_NAMES[1:])
    with pytest.raises(UserError, match=r"weights: .*coco.npz has 80 .*'person' only in .*'lynx' only in.*init_strict"):
        _import(planned(stage), names)
    stage.init_strict = False
    imported = _import(planned(stage), names)
    assert not class_outputs(imported.variables)
    assert "which are not the data's, starts afresh" in str(imported.report)


def test_a_file_of_more_classes_is_refused_with_the_way_to_start_from_it(stage):
    with pytest.raises(
        UserError, match=r"tell 91 classes apart.* The data have 2 classes; .*student.init_strict=False"
    ):
        _import(planned(stage), ("cat", "dog"))


def class_outputs(tree):
    return {path for path in flatten_dict(tree, sep="/") if "cls_logits" in path}


def write(path, model, outputs, **meta):
    """A file of the detector in torchvision's names, with so many outputs for classes; its arrays."""
    variables = drawn(model, outputs)
    arrays = to_state_dict(flatten_dict(variables, sep="/"), torchvision_names("retinanet", range(3, 7), norm=True))
    write_pth(path, arrays, **meta)
    return variables


@pytest.mark.parametrize("outputs", [OUTPUTS, 20, 3, 2, 1])
def test_what_does_not_depend_on_classes_starts_a_detector_of_others(stage, tmp_path, outputs):
    """Whatever their number: that they are as many as the data's says nothing."""
    stage.init_strict, stage.weights = False, str(tmp_path / "file.pth")
    source = write(stage.weights, stage.model.to_dict(), outputs)
    imported = _import(planned(stage), ("cat", "dog"))
    fresh = drawn(stage.model.to_dict(), 2)
    filled, report = load_into(fresh, imported.variables, origin="file.pth", strict=False)
    assert set(report.missing) == class_outputs(fresh)
    assert not report.mismatched
    assert not report.unexpected
    for path, array in flatten_dict(filled, sep="/").items():
        expected = fresh if "cls_logits" in path else source
        np.testing.assert_array_equal(array, flatten_dict(expected, sep="/")[path], err_msg=path)


def test_the_state_dict_that_a_config_names_is_taken_and_the_report_says_so(stage, tmp_path):
    """Of torchvision's checkpoints, the averaged weights, which have a prefix and a counter."""
    arrays, other = (drawn(stage.model.to_dict(), 2) for _ in range(2))
    arrays = jax.tree.map(lambda x: x + 1, arrays)
    names = torchvision_names("retinanet", range(3, 7), norm=True)
    averaged = {f"module.{name}": x for name, x in to_state_dict(flatten_dict(arrays, sep="/"), names).items()}
    content = {"model": to_state_dict(flatten_dict(other, sep="/"), names), "model_ema": averaged}
    content["model_ema"]["n_averaged"] = np.array(9)
    stage.weights = str(tmp_path / "model_25.pkl")
    (tmp_path / "model_25.pkl").write_bytes(pickle.dumps(content))
    for key, expected in (("", other), ("model_ema", arrays)):
        stage.weights_key = key
        imported = _import(planned(stage), ("cat", "dog"))
        jax.tree.map(np.testing.assert_array_equal, imported.variables, expected)
        assert imported.report.changes[0] == (
            "its entry model_ema is taken, not model" if key else "its entry model is taken, not model_ema"
        )
    assert any(words.startswith("module. was taken off") for words in imported.report.changes)
    stage.weights_key = "state_dict"
    with pytest.raises(UserError, match="it has no dict of tensors 'state_dict'; it has model, model_ema"):
        _import(planned(stage), ("cat", "dog"))


def test_a_backbone_inside_a_classifier_of_images_starts_a_student(stage, tmp_path):
    """As MMPretrain keeps it, with a prefix of its own."""
    variables = drawn(stage.model.to_dict(), 2)
    backbone = {path: x for path, x in flatten_dict(variables, sep="/").items() if "/backbone/" in path}
    state = to_state_dict(backbone, resnet_names("backbone.")) | {"head.fc.weight": np.zeros((10, 4), np.float32)}
    stage.update(weights=str(tmp_path / "resnet.pth"), source="mmdet")
    write_pth(stage.weights, state)
    imported = _import(planned(stage), ("cat", "dog"))
    filled, report = load_into(variables, imported.variables, origin="resnet.pth", strict=False)
    assert set(report.matched) == backbone.keys()
    jax.tree.map(np.testing.assert_array_equal, filled, variables)


def test_the_classes_that_a_file_names_decide_what_is_taken_over(stage, tmp_path):
    stage.weights = str(tmp_path / "file.pth")
    write(stage.weights, stage.model.to_dict(), 3, CLASSES=op_texts("washer", "bolt", "hex_nut"))
    names = ("washer", "bolt", "hex nut")
    others, path = ("bolt", "hex nut", "screw"), "params/head/cls_logits/bias"
    with pytest.raises(UserError, match=r"weights: .*file.pth has 3 classes, .*'washer' only in .*'screw' only in"):
        _import(planned(stage), others)
    for strict in (True, False):
        stage.init_strict = strict
        same, turned = (_import(planned(stage), order).variables for order in (names, (*names[1:], names[0])))
        bias = flatten_dict(same, sep="/")[path].reshape(9, 3)
        np.testing.assert_array_equal(flatten_dict(turned, sep="/")[path].reshape(9, 3), bias[:, [1, 2, 0]])
    assert not class_outputs(_import(planned(stage), others).variables)


def test_classes_that_a_file_does_not_name_are_said_to_be_taken_for_the_datas(stage, tmp_path):
    stage.weights = str(tmp_path / "file.pth")
    write(stage.weights, stage.model.to_dict(), 3)
    words = "it does not say what its classes are, which are taken for the data's"
    assert words in _import(planned(stage), ("washer", "bolt", "nut")).report.changes


@pytest.mark.parametrize("folder", ["model", "stage/checkpoints/7"])
def test_a_model_of_other_classes_gives_no_class_outputs(stage, tmp_path, folder):
    """Neither its folder nor a step of its checkpoints, though there are as many."""
    model, names = stage.model.to_dict(), ("cat", "dog")
    variables, description = drawn(model, 2), describe_model(stage.model.to_dict(), names, (64, 64))
    save_model(tmp_path / "model", variables, description)
    with Checkpoints(tmp_path / "stage" / "checkpoints", metric="AP") as checkpoints:
        checkpoints.save(init_state(variables, {}, make_optimizer(lambda step: 0.1)).replace(step=jnp.int32(7)))
    (tmp_path / "stage" / STAGE_FILE).write_text(json.dumps(description))
    folder = tmp_path / folder
    bias = variables["params"]["head"]["cls_logits"]["bias"]
    for strict in (True, False):
        saved, words = _saved(folder, model, names, strict=strict)
        jax.tree.map(np.testing.assert_array_equal, saved, variables)
        assert not words
        turned, words = _saved(folder, model, ("dog", "cat"), strict=strict)
        assert words == "its classes are put in the order of the data's"
        there = turned["params"]["head"]["cls_logits"]["bias"]
        np.testing.assert_array_equal(there.reshape(9, 2), bias.reshape(9, 2)[:, ::-1])
    for others in (("bolt", "nut"), ("cat", "dog", "cow")):
        with pytest.raises(UserError, match="both must have the same classes"):
            _saved(folder, model, others, strict=True)
        kept, _ = _saved(folder, model, others, strict=False)
        assert flatten_dict(variables, sep="/").keys() - flatten_dict(kept, sep="/").keys() == class_outputs(variables)
    if "checkpoints" in str(folder):
        shutil.copytree(tmp_path / "stage", tmp_path / "moved")
        assert describe(folder) == describe(tmp_path / "moved" / "checkpoints" / folder.name)
        jax.tree.map(np.testing.assert_array_equal, kdjax.load_student(folder)[1], variables)


def test_a_detector_is_imported_with_what_its_source_decides_whatever_the_config_says(tmp_path):
    """torchvision's FCOS has no scale for each level; a config of two stages need not say which levels there are."""
    backbone = {"depth": 10, "width": 0.125}
    fcos = {"name": "fcos", "backbone": backbone, "neck": {"channels": 32}, "head": {"convs": 1}}
    decided = {"convention": "torchvision", "norm_on_box": True, "centerness_on_box": True, "conv_bias": True}
    variables = drawn({**fcos, "head": {"convs": 1, **decided}}, 3)
    names = torchvision_names("fcos", range(3, 8), norm=True)
    write_pth(tmp_path / "fcos.pth", to_state_dict(flatten_dict(variables, sep="/"), names))
    imported = import_detector(fcos, str(tmp_path / "fcos.pth"), "torchvision", 3)
    jax.tree.map(np.testing.assert_array_equal, imported.variables, variables)
    assert imported.model["head"].items() >= decided.items()
    rcnn = {"name": "faster_rcnn", "backbone": backbone, "neck": {"channels": 4}, "head": {"head_channels": 8}}
    variables, names = drawn(rcnn, 3), mmdet_names("faster_rcnn", range(2, 7))
    write_pth(tmp_path / "rcnn.pth", to_state_dict(flatten_dict(variables, sep="/"), names))
    imported = import_detector(rcnn, str(tmp_path / "rcnn.pth"), "mmdet", 3)
    jax.tree.map(np.testing.assert_array_equal, imported.variables, variables)


def test_p7_of_an_imported_teacher_is_made_as_it_was_trained_though_its_pair_says_otherwise(tmp_path):
    """MMDetection's pairs leave the ReLU out that torchvision's RetinaNet has."""
    model = {
        "name": "retinanet",
        "backbone": {"depth": 10, "width": 0.125},
        "neck": {"channels": 16, "extra_from": "c5", "extra_relu": False},
        "head": {"convs": 1},
    }
    variables = drawn(model, 3)
    names = torchvision_names("retinanet", range(3, 8))
    write_pth(tmp_path / "file.pth", to_state_dict(flatten_dict(variables, sep="/"), names))
    imported = import_detector(model, str(tmp_path / "file.pth"), "torchvision", 3)
    assert "neck.extra_relu became True instead of False, as in every retinanet of torchvision" in str(imported.report)
    module = build_model(imported.model, 3)
    rng = np.random.default_rng(0)
    maps = {f"c{level}": rng.normal(size=(1, 128 >> level, 128 >> level, 64 >> (5 - level))) for level in range(2, 6)}
    pyramid = module.neck.apply({"params": variables["params"]["neck"]}, maps)
    extra = variables["params"]["neck"]["extra_p7"]
    positive, layout = jax.nn.relu(pyramid["p6"]), ("NHWC", "HWIO", "NHWC")
    p7 = jax.lax.conv_general_dilated(positive, extra["kernel"], (2, 2), [(1, 1)] * 2, dimension_numbers=layout)
    assert (np.asarray(pyramid["p6"]) < 0).any()
    np.testing.assert_allclose(pyramid["p7"], p7 + extra["bias"][None, None, None], rtol=1e-4)
    # What is trained on from the folder of such a teacher goes on with the ReLU.
    assert _as_expected(model, imported.model, whole=True)["neck"]["extra_relu"]


def test_what_the_config_in_a_file_decides_is_taken_over_a_configs(tmp_path):
    """Two octaves of two ratios, a ReLU before P7, and images of blue, green, red, though the source says otherwise."""
    model = {"name": "retinanet", "backbone": {"depth": 10, "width": 0.125}, "neck": {"channels": 16}}
    model["head"] = {"convs": 1}
    theirs = {**model, "neck": {"channels": 16, "extra_relu": True}}
    theirs["head"] = {"convs": 1, "anchor_octaves": 2, "anchor_ratios": (0.5, 1.0)}
    variables = drawn(theirs, 3)
    state = to_state_dict(flatten_dict(variables, sep="/"), mmdet_names("retinanet", range(3, 8)))
    write_pth(tmp_path / "file.pth", state, config=op_text(RETINANET.replace("'caffe'", "'pytorch'")))
    imported = import_detector(
        {**model, "neck": {"channels": 16, "extra_relu": False}}, str(tmp_path / "file.pth"), "mmdet", 3
    )
    assert imported.model["neck"]["extra_relu"]
    assert "head.anchor_octaves became 2 instead of 3, as the file's own config says" in imported.report.changes
    stem = variables["params"]["backbone"]["conv1"]["kernel"]
    np.testing.assert_array_equal(imported.variables["params"]["backbone"]["conv1"]["kernel"], stem[:, :, ::-1])
    assert imported.model["pixel_std"] == (1.0, 1.0, 1.0)
    head = imported.variables["params"]["head"]
    jax.tree.map(np.testing.assert_array_equal, head, variables["params"]["head"])


@pytest.mark.parametrize(
    ("name", "classes", "steps", "given", "floor"),
    [
        ("shapes", ("circle", "square"), 800, None, Detection.floors["shapes"]),
        ("shapes/tiny", ("circle", "square"), 2, None, None),
        # Own data, with a teacher of their own or one that goes on learning.
        ("coco_json:photos", ("cat",), 800, None, None),
        ("coco_json:photos", COCO_NAMES, 800, None, None),
        ("coco_json:photos", ("cat",), 0, None, None),
        # COCO, wherever it lies, and weights as their model zoo has them.
        ("tfds:coco/2017", COCO_NAMES, 0, None, 40.0),
        ("coco_json:coco", COCO_NAMES, 0, None, 40.0),
        ("coco_json:photos", ("cat",), 800, 20.0, 20.0),
        ("shapes", ("circle", "square"), 800, 0.0, None),
    ],
)
def test_a_floor_binds_where_something_is_known_of_the_teacher(name, classes, steps, given, floor, tmp_path):
    config = base_config()
    config.data.name = name
    config.teacher.update(steps=steps, published=41.0, init=str(tmp_path))
    config.student.teacher_floor = given
    plan = resolve(config, devices=1)
    assert teacher_floor(plan, plan["student"], classes) == floor


def test_a_teacher_from_a_folder_has_no_floor_on_own_data(tmp_path):
    config = base_config()
    config.stages, config.data.name, config.student.teacher = ("student",), "coco_json:photos", str(tmp_path)
    plan = resolve(config, devices=1)
    assert teacher_floor(plan, plan["student"], COCO_NAMES) is None


@pytest.mark.parametrize(
    ("name", "head", "words"),
    [
        ("retinanet", {}, ""),
        ("retinanet", {"anchor_scale": 2.0}, "; not its head, which means something else: anchor_scale is 4.0 there"),
        ("fcos", {}, "; not its head, which means something else: a retinanet is no fcos"),
    ],
)
def test_a_head_is_only_inherited_where_it_means_the_same(tmp_path, name, head, words):
    sections = {"backbone": {"depth": 10, "width": 0.125}, "neck": {"channels": 16}}
    theirs, ours = {"name": "retinanet", **sections}, {"name": name, "head": head, **sections}
    save_model(tmp_path, variables := drawn(theirs, 2), describe_model(theirs, ("cat", "dog"), (64, 64)))
    fresh = jax.tree.map(np.negative, drawn(ours, 2))
    taken, told = _inherited(fresh, Teacher(build_model(theirs, 2), variables), ("neck", "head"), ours, tmp_path)
    assert words in told if words else "means" not in told
    assert told.startswith("neck from the teacher" if words else "neck, head from the teacher")
    same = fresh if words else variables
    assert jax.tree.all(jax.tree.map(np.array_equal, taken["params"]["head"], same["params"]["head"]))
    _, told = _inherited(fresh, Teacher(build_model(theirs, 2), variables), ("head",), ours, tmp_path)
    assert told.startswith("nothing from the teacher; not its head" if words else "head from the teacher")


def test_a_teacher_in_bfloat16_has_such_kernels_and_hands_on_float32(tmp_path):
    stage = load(MGD, "tiny").student
    stage.dtype = "bfloat16"
    model, plan = stage.model.to_dict(), planned(stage)
    save_model(tmp_path, variables := drawn(model, 2), describe_model(model, ("cat", "dog"), (64, 64)))
    options = dataclasses.replace(plan.options, teacher=str(tmp_path), inherit=("neck", "head"))
    origins = load_origins(dataclasses.replace(plan, options=options), ("cat", "dog"), {}, "kdjax")
    by_dtype = jax.tree.map(lambda x: x.dtype.name, origins.teacher.variables["params"]["backbone"]["layer1_0"])
    assert by_dtype["conv1"] == {"kernel": "bfloat16"}
    assert by_dtype["bn1"] == {"bias": "float32", "scale": "float32"}
    assert not any(isinstance(x, jax.Array) for x in jax.tree.leaves(origins.teacher.variables))
    own = jax.tree.map(np.negative, variables)
    taken = origins.start(own)
    for part, theirs in (("neck", variables), ("head", variables), ("backbone", own)):
        jax.tree.map(np.testing.assert_array_equal, taken["params"][part], theirs["params"][part])


def test_classes_are_told_apart_by_their_own_names_where_files_write_two_alike():
    assert class_order(["b", "a_c", "a c"], ["a c", "a_c", "b"]) == [2, 1, 0]
    assert class_order(["A c"], ["a_c"]) == [0]
    assert class_order(["a", "a"], ["a", "b"]) is None
    assert class_order(["a"], ["a", "b"]) is None


def test_a_head_that_means_something_else_in_what_a_stage_starts_from_is_said(tmp_path, capsys):
    theirs = {"name": "retinanet", "backbone": {"depth": 10, "width": 0.125}, "neck": {"channels": 16}}
    save_model(tmp_path / "model", drawn(theirs, 2), describe_model(theirs, ("cat", "dog"), (64, 64)))
    stage = load(MGD, "tiny").student
    for scale, words in ((4.0, ""), (2.0, "a head that means something else: anchor_scale is 4.0 there and 2.0 here")):
        stage.model = ConfigDict({**theirs, "head": {"anchor_scale": scale}})
        stage.init = str(tmp_path / "model")
        load_origins(planned(stage), ("cat", "dog"), {}, "kdjax")
        told = capsys.readouterr().out
        assert words in told if words else not told


def test_a_detector_whose_images_were_scaled_otherwise_is_said(stage, capsys):
    for resize in ("torchvision", "kdjax"):
        load_origins(planned(stage), COCO_NAMES, {}, resize)
        assert ("config.data.resize=torchvision scales them so" in capsys.readouterr().out) == (resize == "kdjax")


def test_new_weights_are_drawn_on_the_host_where_it_can_be_asked(monkeypatch):
    """The last of this machine's devices stands for a host whose first ones are accelerators."""

    def init(key, size):
        return jax.random.normal(key, (3,)) * size

    arguments = jax.random.key(1), jnp.float32(2)
    expected = jax.jit(init)(*arguments)
    host = jax.devices()[-1]
    monkeypatch.setattr(jax, "local_devices", lambda backend: [host])
    drawn = initialize(init, *arguments)
    assert drawn.devices() == {host}
    assert (drawn + jax.device_put(expected, jax.devices()[1])).devices() == {jax.devices()[1]}
    np.testing.assert_allclose(drawn, expected, rtol=1e-6)

    def nowhere(backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", nowhere)
    np.testing.assert_array_equal(initialize(init, *arguments), expected)
    assert jax.eval_shape(lambda key: initialize(init, key, 2.0), jax.random.key(1)).shape == (3,)
