"""The importer against state dicts whose names and layouts are written out by hand, and against what it must refuse."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from kdjax.errors import UserError
from kdjax.models import build_model, complete
from kdjax.weights import COCO_NAMES, SOURCES, expected_model, import_state_dict
from kdjax.weights.coco import COCO_IDS
from tests.weights import naming
from tests.weights.naming import CLASSES, random_variables, to_state_dict

DENSE, ROI = range(3, 8), range(2, 6)

# Detectors of each source whose layouts need no knowledge but their names.
PLAIN = {
    "mmdet_retinanet": ("mmdet", "retinanet", DENSE, {}),
    "mmdet_fcos": ("mmdet", "fcos", DENSE, {"norm": True, "scales": True}),
    "mmdet_atss": ("mmdet", "atss", DENSE, {"norm": True, "scales": True}),
    "mmdet_gfl": ("mmdet", "gfl", DENSE, {"norm": True, "scales": True}),
    "mmdet_faster_rcnn": ("mmdet", "faster_rcnn", ROI, {}),
    "mmdet_mask_rcnn": ("mmdet", "mask_rcnn", ROI, {}),
    "mmdet_cascade_rcnn": ("mmdet", "cascade_rcnn", ROI, {"stages": 3}),
    "mmdet_cascade_mask_rcnn": ("mmdet", "cascade_mask_rcnn", ROI, {"stages": 3}),
    "torchvision_retinanet": ("torchvision", "retinanet", DENSE, {}),
    "torchvision_retinanet_v2": ("torchvision", "retinanet", DENSE, {"norm": True}),
    "torchvision_fcos": ("torchvision", "fcos", DENSE, {"norm": True}),
}
NAMES = {"mmdet": naming.mmdet_names, "torchvision": naming.torchvision_names}


def load(state, source, detector, levels, variables, num_classes=CLASSES, **sections):
    like = unflatten_dict({path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in variables.items()}, sep="/")
    model = naming.config(detector, levels, **sections)
    return import_state_dict(state, source, model=model, like=like, num_classes=num_classes, origin="file.pth")


def assert_variables(imported, expected):
    actual = flatten_dict(imported.variables, sep="/")
    assert actual.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(actual[path], array, err_msg=path, strict=True)


def retinanet(source="mmdet"):
    """A state dict with the variables that it should become."""
    variables = random_variables("retinanet", DENSE)
    return to_state_dict(variables, NAMES[source]("retinanet", DENSE)), variables


@pytest.mark.parametrize("case", PLAIN)
def test_a_state_dict_becomes_the_variables(case):
    source, detector, levels, options = PLAIN[case]
    variables = random_variables(detector, levels, **options)
    state = to_state_dict(variables, NAMES[source](detector, levels))
    imported = load(state, source, detector, levels, variables)
    assert_variables(imported, variables)
    assert len(imported.report.taken) == len(state)
    assert imported.report.untouched == imported.report.skipped == imported.report.changes == ()
    assert imported.class_names is None


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("detector", ["faster_rcnn", "mask_rcnn"])
def test_torchvisions_background_goes_from_first_to_last_or_away(detector, old):
    variables = random_variables(detector, ROI)
    state = to_state_dict(variables, naming.torchvision_names(detector, ROI, old=old))
    for leaf in ("weight", "bias"):
        classes = state[f"roi_heads.box_predictor.cls_score.{leaf}"]
        state[f"roi_heads.box_predictor.cls_score.{leaf}"] = np.concatenate([classes[-1:], classes[:-1]])
        for name, rows in (("box_predictor.bbox_pred", 4), ("mask_predictor.mask_fcn_logits", 1)):
            if f"roi_heads.{name}.{leaf}" in state:
                array = state[f"roi_heads.{name}.{leaf}"]
                state[f"roi_heads.{name}.{leaf}"] = np.concatenate([np.full_like(array[:rows], 7), array])
    imported = load(state, "torchvision", detector, ROI, variables)
    assert_variables(imported, variables)
    assert imported.report.changes == ("4 outputs, the first a background, became 3 classes",)


def test_torchvisions_old_names_of_retinanet_are_known():
    variables = random_variables("retinanet", DENSE)
    state = to_state_dict(variables, naming.torchvision_names("retinanet", DENSE, old=True))
    assert_variables(load(state, "torchvision", "retinanet", DENSE, variables), variables)


def spread(array, places, ids):
    """Rows (anchor, class) of 80 classes as rows (anchor, category id) of 91, junk in the other places."""
    anchors = len(array) // 80
    wide = np.full((anchors, places, *array.shape[1:]), 7, np.float32)
    for anchor in range(anchors):
        for row, category in enumerate(ids):
            wide[anchor, category] = array[80 * anchor + row]
    return wide.reshape(anchors * places, *array.shape[1:])


def test_torchvisions_places_for_category_ids_become_cocos_classes(monkeypatch):
    monkeypatch.setattr(naming, "CLASSES", 80)
    variables = random_variables("retinanet", DENSE)
    state = to_state_dict(variables, naming.torchvision_names("retinanet", DENSE))
    for leaf in ("weight", "bias"):
        name = f"head.classification_head.cls_logits.{leaf}"
        state[name] = spread(state[name], 91, COCO_IDS)
    imported = load(state, "torchvision", "retinanet", DENSE, variables, num_classes=80)
    assert_variables(imported, variables)
    assert imported.class_names == COCO_NAMES
    assert imported.report.changes == ("91 outputs, the first a background, became 80 classes",)


def test_the_ids_of_coco_are_those_of_its_annotations():
    # Ids of a few classes as they stand in COCO's instances_val2017.json.
    known = {"person": 1, "stop sign": 13, "bench": 15, "backpack": 27, "handbag": 31, "dining table": 67}
    known |= {"toilet": 70, "tv": 72, "book": 84, "toothbrush": 90}
    ids = dict(zip(COCO_NAMES, COCO_IDS, strict=True))
    assert {name: ids[name] for name in known} == known
    assert len(set(COCO_NAMES)) == 80


def test_a_dense_head_may_lose_its_unused_background():
    state, variables = retinanet("torchvision")
    for leaf in ("weight", "bias"):
        name = f"head.classification_head.cls_logits.{leaf}"
        rows = state[name].reshape(9, CLASSES, *state[name].shape[1:])
        state[name] = np.concatenate([np.full_like(rows[:, :1], 7), rows], axis=1).reshape(-1, *state[name].shape[1:])
    assert_variables(load(state, "torchvision", "retinanet", DENSE, variables), variables)


@pytest.mark.parametrize("detector", ["retinanet", "faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn"])
def test_detectron2_turns_to_rgb_and_to_our_order_of_anchors(detector):
    levels = DENSE if detector == "retinanet" else ROI
    variables = random_variables(detector, levels, stages=3 if detector.startswith("cascade") else 1)
    # One mask head, whatever the stages.
    variables = {path: x for path, x in variables.items() if "head/mask_1" not in path and "head/mask_2" not in path}
    state = to_state_dict(variables, naming.detectron2_names(detector, levels))
    stem = "backbone.bottom_up.stem.conv1.weight"
    state[stem] = np.stack([state[stem][:, channel] for channel in (2, 1, 0)], axis=1)
    if detector == "retinanet":
        for name, size in (("head.cls_score", CLASSES), ("head.bbox_pred", 4)):
            for leaf in ("weight", "bias"):
                ours = state[f"{name}.{leaf}"].copy()
                for ratio in range(3):
                    for octave in range(3):
                        there, here = size * (3 * octave + ratio), size * (3 * ratio + octave)
                        state[f"{name}.{leaf}"][there : there + size] = ours[here : here + size]
    state["pixel_mean"] = np.zeros((3, 1, 1), np.float32)
    state["proposal_generator.anchor_generator.cell_anchors.0"] = np.zeros((3, 4), np.float32)
    imported = load(state, "detectron2", detector, levels, variables)
    assert_variables(imported, variables)
    assert {name for name, _ in imported.report.skipped} == {
        "pixel_mean",
        "proposal_generator.anchor_generator.cell_anchors.0",
    }
    assert imported.model["pixel_mean"] == (123.675, 116.28, 103.53)
    assert imported.model["pixel_std"] == (1.0, 1.0, 1.0)
    assert imported.model["backbone"] == {"style": "caffe", "epsilon": 1e-5}
    assert imported.model["head"]["convention"] == ("detectron2" if detector.startswith("cascade") else "mmdet")


def test_a_transposed_convolution_computes_what_pytorchs_does():
    rng = np.random.default_rng(0)
    variables = random_variables("mask_rcnn", ROI)
    state = to_state_dict(variables, naming.mmdet_names("mask_rcnn", ROI))
    weight = state["roi_head.mask_head.upsample.weight"]
    imported = load(state, "mmdet", "mask_rcnn", ROI, variables)
    x = rng.normal(size=(1, 3, 2, naming.CHANNELS)).astype(np.float32)
    layer = nn.ConvTranspose(naming.CHANNELS, (2, 2), (2, 2))
    actual = layer.apply({"params": imported.variables["params"]["head"]["mask_0"]["upsample"]}, x)
    # ConvTranspose2d of stride 2 and size 2: each input pixel fills a block of its own.
    expected = np.einsum("nyxi,ioab->nyaxbo", x, weight).reshape(1, 6, 4, naming.CHANNELS)
    expected = expected + state["roi_head.mask_head.upsample.bias"]
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("source", ["torchvision", "timm", "mmdet"])
def test_a_backbone_alone_fills_the_backbone(source):
    variables = random_variables("retinanet", DENSE)
    backbone = {path: x for path, x in variables.items() if "/backbone/" in path}
    state = to_state_dict(backbone, naming.resnet_names(""))
    state |= {"fc.weight": np.zeros((10, 20), np.float32), "bn1.num_batches_tracked": np.int64(3)}
    imported = load(state, source, "retinanet", DENSE, variables)
    assert_variables(imported, backbone)
    assert set(imported.report.untouched) == variables.keys() - backbone.keys()
    assert dict(imported.report.skipped).keys() == {"fc.weight", "bn1.num_batches_tracked"}
    words = str(imported.report)
    assert f"{len(backbone)} tensors taken" in words
    assert "1 skipped: the classifier of ImageNet's classes" in words
    assert f"{len(variables) - len(backbone)} arrays of the model left as they are" in words
    assert imported.class_names is None


@pytest.mark.parametrize("source", SOURCES)
def test_a_config_takes_on_what_the_weights_expect_and_keeps_the_rest(source):
    variables = random_variables("retinanet", DENSE)
    family = source.split("_")[0]
    names = (NAMES | {"detectron2": naming.detectron2_names}).get(family)
    backbone = {path: x for path, x in variables.items() if "/backbone/" in path}
    state = (
        to_state_dict(variables, names("retinanet", DENSE))
        if names
        else to_state_dict(backbone, naming.resnet_names(""))
    )
    sections = {
        "frozen_norm": True,
        "backbone": {"depth": 50, "epsilon": 0.1},
        "pixel_std": (9.0, 9.0, 9.0),
        "head": {"convs": 4},
    }
    model = load(state, source, "retinanet", DENSE, variables, **sections).model
    caffe = source in ("mmdet_caffe", "mmdet_detectron", "detectron2")
    means = {"mmdet_detectron": (122.7717, 115.9465, 102.9801), "cirkd": (122.67891, 116.66877, 104.00699)}
    assert model == {
        **(plain := naming.config("retinanet", DENSE)),
        "frozen_norm": True,
        "neck": plain["neck"] | ({"extra_relu": True} if family in ("torchvision", "detectron2") else {}),
        "head": {"convs": 4} | ({"convention": "torchvision" if family == "torchvision" else "mmdet"} if names else {}),
        "pixel_mean": means.get(source, (123.675, 116.28, 103.53)),
        "pixel_std": (1.0, 1.0, 1.0) if caffe or source == "cirkd" else (58.395, 57.12, 57.375),
        "backbone": {
            "depth": 50,
            "style": "caffe" if caffe else "pytorch",
            "epsilon": 0.0 if source == "torchvision_coco_v1" else 1e-5,
        },
    }


@pytest.mark.parametrize(
    ("source", "detector", "section", "values"),
    [
        ("torchvision", "retinanet", "neck", {"extra_relu": True}),
        ("detectron2", "retinanet", "neck", {"extra_relu": True}),
        ("detectron2", "fcos", "neck", {"extra_relu": True}),
        ("detectron2", "fcos", "head", {"norm_on_box": True, "centerness_on_box": True, "conv_bias": True}),
        ("torchvision", "fcos", "head", {"norm_on_box": True, "centerness_on_box": True, "conv_bias": True}),
        ("torchvision", "fcos", "neck", {"extra_relu": True}),
    ],
)
def test_what_a_source_decides_and_no_tensor_shows_is_carried_and_said(source, detector, section, values):
    """Detectron2's and torchvision's P7 is made of P6 after a ReLU."""
    state = {"bbox_head.retina_cls.bias": np.zeros(1)}
    other = dict.fromkeys(values, False)
    expected = expected_model(complete({"name": detector, section: other}), source, state)
    assert {key: expected.model[section][key] for key in values} == values
    said = [change for change in expected.changes if change.startswith(section)]
    assert said == [
        f"{section}.{key} became True instead of False, as in every {detector} of {source}" for key in values
    ]
    # A backbone alone says nothing of necks and heads.
    assert (
        expected_model(complete({"name": detector, section: other}), source, {"conv1.weight": np.zeros(1)}).model[
            section
        ]
        == complete({"name": detector, section: other})[section]
    )


def test_what_is_unusual_for_a_source_is_said():
    state = {"bbox_head.retina_cls.bias": np.zeros(1)}
    small = complete({"name": "retinanet", "head": {"anchor_scale": 2.5}, "neck": {"extra_relu": True}})
    assert expected_model(small, "torchvision", state).changes == (
        "head.anchor_scale is 2.5 by the config, and 4.0 in a retinanet of torchvision unless it was trained otherwise",
    )
    changes = expected_model(small, "mmdet", state).changes
    assert [change.split()[0] for change in changes] == ["head.anchor_scale", "neck.extra_relu"]
    usual = complete({"name": "retinanet", "neck": {"extra_relu": False}})
    assert expected_model(usual, "mmdet", state).changes == ()
    with pytest.raises(UserError, match="no source of weights 'keras'"):
        expected_model(usual, "keras", state)


def test_only_weights_for_blue_green_red_are_turned():
    state, variables = retinanet()
    kernel = variables["params/backbone/conv1/kernel"]
    assert_variables(load(state, "mmdet", "retinanet", DENSE, variables), variables)
    imported = load(state, "mmdet_caffe", "retinanet", DENSE, variables)
    np.testing.assert_array_equal(imported.variables["params"]["backbone"]["conv1"]["kernel"], kernel[:, :, ::-1])
    assert imported.report.changes == ("the first convolution takes red, green, blue instead of blue, green, red",)


def test_eighty_classes_are_cocos_but_not_if_one_of_eighty_one_places_is_the_background(monkeypatch):
    monkeypatch.setattr(naming, "CLASSES", 80)
    variables = random_variables("faster_rcnn", ROI)
    state = to_state_dict(variables, naming.mmdet_names("faster_rcnn", ROI))
    assert load(state, "mmdet", "faster_rcnn", ROI, variables, num_classes=80).class_names == COCO_NAMES
    state = to_state_dict(variables, naming.torchvision_names("faster_rcnn", ROI))
    for leaf in ("weight", "bias"):
        boxes = state[f"roi_heads.box_predictor.bbox_pred.{leaf}"]
        state[f"roi_heads.box_predictor.bbox_pred.{leaf}"] = np.concatenate([boxes[:4], boxes])
    assert load(state, "torchvision", "faster_rcnn", ROI, variables, num_classes=80).class_names is None


def test_a_prefix_of_data_parallel_training_is_taken_off():
    state, variables = retinanet()
    state = {f"module.{name}": array for name, array in state.items()}
    assert_variables(load(state, "mmdet", "retinanet", DENSE, variables), variables)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64])
def test_other_floats_become_float32_and_that_is_said(dtype):
    state, variables = retinanet()
    imported = load({name: x.astype(dtype) for name, x in state.items()}, "mmdet", "retinanet", DENSE, variables)
    rounded = {path: x.astype(dtype).astype(np.float32) for path, x in variables.items()}
    assert_variables(imported, rounded)
    assert imported.report.changes == (f"{np.dtype(dtype).name} became float32",)


def changed(**arrays):
    def change(state):
        for name, make in arrays.items():
            key = name.replace("__", ".")
            state[key] = make(state[key])

    return change


def with_value(value):
    def put(array):
        array = array.astype(np.float64)
        array.flat[3] = value
        return array

    return put


MISTAKES = {
    "missing": (lambda state: state.pop("backbone.bn1.running_var"), r"without a tensor: batch_stats/backbone/bn1/var"),
    "extra": (lambda state: state.update({"head.x.weight": np.zeros(1)}), r"without one: head\.x\.weight"),
    "renamed": (
        lambda state: state.update({"backbone.conv_1.weight": state.pop("backbone.conv1.weight")}),
        r"without one: backbone\.conv_1\.weight; .*: params/backbone/conv1/kernel",
    ),
    "flax's layout": (
        changed(backbone__conv1__weight=lambda x: x.transpose(2, 3, 1, 0)),
        r"backbone\.conv1\.weight \[7, 7, 3, 8\], which params/backbone/conv1/kernel \[7, 7, 3, 8\] cannot take",
    ),
    "wrong rank": (changed(backbone__bn1__weight=lambda x: x[:, None]), r"backbone\.bn1\.weight \[8, 1\]"),
    "nan": (
        changed(bbox_head__retina_reg__bias=with_value(np.nan)),
        r"NaN or infinity in the tensor bbox_head\.retina_",
    ),
    "infinity": (
        changed(backbone__bn1__bias=with_value(-np.inf)),
        r"NaN or infinity in the tensor backbone\.bn1\.bias",
    ),
    "too large": (changed(backbone__bn1__bias=with_value(1e300)), r"NaN or infinity in the tensor backbone\.bn1\.bias"),
    "integers": (
        changed(backbone__bn1__bias=lambda x: x.astype(np.int32)),
        r"backbone\.bn1\.bias of int32; it must be",
    ),
    "objects": (changed(backbone__bn1__bias=lambda x: x.astype(object)), r"backbone\.bn1\.bias of object; it must be"),
    "empty": (lambda state: state.clear(), r"0 of 0 tensors have a place"),
    "twice": (
        lambda state: state.update({"neck.fpn_convs.01.conv.bias": state["neck.fpn_convs.1.conv.bias"]}),
        r"without one: neck\.fpn_convs\.01\.conv\.bias",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_whatever_does_not_fit_is_refused_in_one_sentence(mistake):
    state, variables = retinanet()
    change, words = MISTAKES[mistake]
    change(state)
    with pytest.raises(UserError, match="^The mmdet weights of file.pth .*" + words) as raised:
        load(state, "mmdet", "retinanet", DENSE, variables)
    assert "\n" not in str(raised.value)


def test_a_student_is_not_taken_for_its_teacher():
    state, variables = retinanet()
    wider = {path: np.zeros([2 * n for n in x.shape]) for path, x in variables.items()}
    with pytest.raises(UserError, match=r"have other shapes than the model: backbone\.bn1.* and \d+ more"):
        load(state, "mmdet", "retinanet", DENSE, wider)


def test_the_number_of_classes_must_fit():
    variables = random_variables("faster_rcnn", ROI)
    state = to_state_dict(variables, naming.torchvision_names("faster_rcnn", ROI))
    with pytest.raises(UserError, match="tell 4 classes apart, the background included; the model has 20"):
        load(state, "torchvision", "faster_rcnn", ROI, variables, num_classes=20)


def test_unknown_sources_and_detectors_are_refused_with_what_there_is():
    state, variables = retinanet()
    with pytest.raises(UserError, match="no source of weights 'keras'; choose one of torchvision, "):
        load(state, "keras", "retinanet", DENSE, variables)
    with pytest.raises(ValueError, match="cannot be those of a pspnet; this source has: retinanet, fcos"):
        load(state, "detectron2", "pspnet", DENSE, variables)
    with pytest.raises(UserError, match="this source has: resnet_classifier"):
        load(state, "timm", "retinanet", DENSE, variables)


@pytest.mark.slow
@pytest.mark.parametrize("old", [False, True])
def test_mmdets_deformable_resnext_fills_every_array(monkeypatch, old):
    """``old``: as files of MMDetection's version 1 have them, which MMCV still reads."""
    model = naming.config(
        "cascade_mask_rcnn",
        ROI,
        backbone={"depth": 50, "width": 0.125, "groups": 4, "base_width": 16, "deformable": True},
    )
    model["neck"] |= {"channels": naming.CHANNELS, "extra_from": "pool"}
    detector = build_model(model, CLASSES)
    like = jax.eval_shape(detector.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    rng = np.random.default_rng(0)
    shapes = {path: x.shape for path, x in flatten_dict(like, sep="/").items()}
    variables = {path: np.asarray(rng.normal(size=shape), np.float32) for path, shape in shapes.items()}
    monkeypatch.setattr(naming, "BLOCKS", (3, 4, 6, 3))
    names = naming.mmdet_names("cascade_mask_rcnn", ROI)
    offset = "conv2_offset" if old else "conv2.conv_offset"
    for layer, blocks in enumerate(naming.BLOCKS, start=1):
        for block in range(blocks):
            names[f"backbone/layer{layer}_{block}/conv2/conv_offset"] = f"backbone.layer{layer}.{block}.{offset}"
    state = to_state_dict(variables, names)
    assert state[f"backbone.layer2.0.{offset}.weight"].shape == (18, 16, 3, 3)
    assert state["backbone.layer2.0.conv2.weight"].shape == (16, 4, 3, 3)
    imported = import_state_dict(state, "mmdet", model=model, like=like, num_classes=CLASSES, origin="file.pth")
    assert_variables(imported, variables)
    assert len(imported.report.taken) == len(state)
    assert imported.report.untouched == imported.report.skipped == imported.report.changes == ()
    assert imported.model["backbone"]["deformable"]


def test_a_deformable_backbone_is_not_taken_for_a_plain_one():
    state, variables = retinanet()
    state["backbone.layer2.0.conv2.conv_offset.weight"] = np.zeros((18, 5, 3, 3), np.float32)
    with pytest.raises(UserError, match=r"without one: backbone\.layer2\.0\.conv2\.conv_offset\.weight"):
        load(state, "mmdet", "retinanet", DENSE, variables)


def test_mmdets_old_names_of_fcos_are_known():
    variables = random_variables("fcos", DENSE, norm=True, scales=True)
    state = to_state_dict(variables, naming.mmdet_names("fcos", DENSE))
    state = {name.replace("bbox_head.conv_", "bbox_head.fcos_"): array for name, array in state.items()}
    assert "bbox_head.fcos_centerness.bias" in state
    assert_variables(load(state, "mmdet", "fcos", DENSE, variables), variables)


def test_what_old_files_of_gfl_have_beside_its_weights_is_skipped():
    variables = random_variables("gfl", DENSE, norm=True, scales=True)
    state = to_state_dict(variables, naming.mmdet_names("gfl", DENSE))
    state["bbox_head.integral.project"] = np.arange(17, dtype=np.float32)
    imported = load(state, "mmdet", "gfl", DENSE, variables)
    assert_variables(imported, variables)
    assert imported.report.skipped == (("bbox_head.integral.project", "the numbers 0 to 16, which are computed here"),)
