"""The config in a checkpoint of MMDetection: read as text, and worth more than what a config of ours says."""

import re
import time

import numpy as np
import pytest

from kdjax.errors import DataError, UserError
from kdjax.models import complete
from kdjax.weights import SOURCES, expected_model, read_weights
from kdjax.weights.own_config import own_facts, read_config
from tests.weights.pickles import op_text, write_pth

# As MMDetection 2.28 and 3.3 write them, without sections that say nothing here.
RETINANET = """\
dataset_type = 'CocoDataset'
img_norm_cfg = dict(
    mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)
model = dict(
    type='RetinaNet',
    backbone=dict(
        type='ResNet',
        depth=50,
        out_indices=(0, 1, 2, 3),
        norm_cfg=dict(type='BN', requires_grad=False),
        style='caffe',
        init_cfg=dict(
            type='Pretrained',
            checkpoint='open-mmlab://detectron2/resnet50_caffe')),
    neck=dict(
        type='FPN',
        in_channels=[256, 512, 1024, 2048],
        out_channels=256,
        start_level=1,
        add_extra_convs='on_output',
        relu_before_extra_convs=True,
        num_outs=5),
    bbox_head=dict(
        type='RetinaHead',
        num_classes=80,
        anchor_generator=dict(
            type='AnchorGenerator',
            octave_base_scale=2.5,
            scales_per_octave=2,
            ratios=[0.5, 1.0],
            strides=[8, 16, 32, 64, 128]),
        bbox_coder=dict(
            type='DeltaXYWHBBoxCoder',
            target_means=[0.0, 0.0, 0.0, 0.0],
            target_stds=[1.0, 1.0, 1.0, 1.0])),
    test_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), limit=float('inf')))
optimizer = dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=0.0001)
"""
FCOS = """\
model = dict(
    backbone=dict(depth=50, style='pytorch', type='ResNet'),
    bbox_head=dict(
        center_sampling=True, centerness_on_reg=True, norm_on_bbox=True,
        regress_ranges=((-1, 32), (32, 64), (64, 100000000.0)),
        type='FCOSHead'),
    data_preprocessor=dict(
        bgr_to_rgb=True, mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375], type='DetDataPreprocessor'),
    neck=dict(
        add_extra_convs='on_output', num_outs=5,
        relu_before_extra_convs=True, type='FPN'),
    type='FCOS')
"""
FASTER = """\
model = dict(
    type='FasterRCNN',
    neck=dict(type='FPN', num_outs=5),
    rpn_head=dict(
        anchor_generator=dict(scales=[4], ratios=[0.5, 1.0, 2.0]),
        bbox_coder=dict(target_stds=[1.0, 1.0, 1.0, 1.0])),
    roi_head=dict(bbox_head=dict(bbox_coder=dict(target_stds=[0.1, 0.1, 0.2, 0.2]))))
"""
ATSS = """\
model = dict(
    type='ATSS',
    neck=dict(type='FPN', add_extra_convs='on_output', num_outs=5),
    bbox_head=dict(
        type='ATSSHead',
        anchor_generator=dict(
            type='AnchorGenerator', ratios=[1.0], octave_base_scale=6, scales_per_octave=1,
            strides=[8, 16, 32, 64, 128]),
        bbox_coder=dict(
            type='DeltaXYWHBBoxCoder',
            target_means=[0.0, 0.0, 0.0, 0.0],
            target_stds=[0.1, 0.1, 0.2, 0.2])))
"""
REPPOINTS = """\
model = dict(
    type='RepPointsDetector',
    neck=dict(
        type='FPN', add_extra_convs='on_input', num_outs=5,
        norm_cfg=dict(type='GN', num_groups=32, requires_grad=True)),
    bbox_head=dict(
        type='RepPointsHead', num_points=9, gradient_mul=0.1,
        point_base_scale=2, transform_method='moment'))
"""
STDS = "target_stds=[1.0, 1.0, 1.0, 1.0]"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('dict(b=[1, -2.5, 1e-05, (True, None,)], c="it\'s")', {"b": [1, -2.5, 1e-05, [True, None]], "c": "it's"}),
        ("{'f': dict(), 3: 'g'}  # and another", {"f": {}, "3": "g"}),
        ("dict({'a.b': 1}, c=[\n # and another\n ])", {"a.b": 1, "c": []}),
        ("[float('inf'), print('no'), name]", [None, None, None]),
    ],
)
def test_a_text_becomes_values(text, value):
    assert read_config(f"# A comment.\nlr = 1\n  model = 2\nmodel = {text}\nmodel = 3") == {"model": value}


@pytest.mark.parametrize("text", ["1 + 1", "dict(a=1, **b)", "'x' 'y'", "dict(m=1", "[1 2]", "{1}", "a.b", "'x", ""])
def test_anything_more_than_values_is_left_out(text):
    assert read_config(f"model = {text}\nimg_norm_cfg = 1") == {"img_norm_cfg": 1}


HOSTILE = {
    "deep": "model = " + "(" * 10**5,
    "deep and closed": "model = " + "[" * 10**5 + "]" * 10**5,
    "calls": "model = " + "dict(a=" * 10**5,
    "signs": "model = " + "-" * 10**6,
    "a long text": "model = '" + "\\" * 10**6,
    "assignments": "model = [\n" * 10**5,
    "spaces": "model = " + " " * 10**6 + "$",
    "too long": "model = dict()\n" + "#" * 2**20,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_text_says_nothing_and_takes_no_time(name):
    started = time.process_time()
    assert read_config(HOSTILE[name]) == {}
    assert time.process_time() - started < 20


def test_what_a_config_decides_is_in_our_fields():
    own = own_facts(read_config(RETINANET), "retinanet")
    assert own.bgr
    assert own.model == {
        "pixel_mean": (123.675, 116.28, 103.53),
        "pixel_std": (1.0, 1.0, 1.0),
        "backbone": {"style": "caffe"},
        "neck": {"extra_from": "p5", "extra_relu": True},
        "head": {"anchor_scale": 2.5, "anchor_ratios": (0.5, 1.0), "anchor_octaves": 2},
    }
    own = own_facts(read_config(FCOS), "fcos")
    assert own.bgr is False
    assert own.model["neck"] == {"extra_from": "p5", "extra_relu": True}
    assert own.model["head"] == {"norm_on_box": True, "centerness_on_box": True, "range_scale": 4.0}
    own = own_facts(read_config(FASTER), "faster_rcnn")
    assert (own.model["neck"], own.model["head"]) == (
        {"extra_from": "pool"},
        {"anchor_scale": 4.0, "anchor_ratios": (0.5, 1.0, 2.0)},
    )
    own = own_facts(read_config(ATSS), "atss")
    assert (own.model["neck"], own.model["head"]) == (
        {"extra_from": "p5", "extra_relu": False},
        {"anchor_scale": 6.0},
    )
    # Of GFL no coder is asked for.
    own = own_facts(read_config(ATSS.replace("ATSSHead", "GFLHead").replace("DeltaXYWH", "DistancePoint")), "gfl")
    assert own.model["head"] == {"anchor_scale": 6.0}
    own = own_facts(read_config(REPPOINTS), "reppoints")
    assert own.model == {"neck": {"extra_from": "c5", "extra_relu": False}, "head": {"point_scale": 2.0}}
    # MMDetection 2.0 had another key for the same.
    older = "model = dict(neck=dict(type='FPN', add_extra_convs=True, extra_convs_on_inputs={}))"
    for flag, extra in (("True", "c5"), ("False", "p5")):
        neck = own_facts(read_config(older.format(flag)), "retinanet").model["neck"]
        assert neck == {"extra_from": extra, "extra_relu": False}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model": 3},
        {"model": {"bbox_head": [], "neck": None, "backbone": {"style": [1]}}},
        {"model": {"rpn_head": {"anchor_generator": {"scales": ["a"], "ratios": {}, "scales_per_octave": 10**9}}}},
        {"model": {"roi_head": {"bbox_head": [[], None]}}, "img_norm_cfg": {"mean": [1, 2], "std": "x", "to_rgb": 1}},
    ],
)
@pytest.mark.parametrize("detector", ["retinanet", "fcos", "atss", "gfl", "reppoints", "cascade_mask_rcnn"])
def test_a_config_that_says_nothing_decides_nothing(config, detector):
    own = own_facts(config, detector)
    assert own.bgr is None
    assert own.model == {}


@pytest.mark.parametrize(
    ("text", "detector", "words"),
    [
        (RETINANET.replace("'on_output'", "'on_lateral'"), "retinanet", "add_extra_convs 'on_lateral', which no model"),
        (RETINANET.replace("'on_output'", "[1]"), "retinanet", r"add_extra_convs \[1\], which no model"),
        (RETINANET.replace("DeltaXYWHBBoxCoder", "TBLRBBoxCoder"), "retinanet", "codes boxes by TBLRBBoxCoder"),
        (RETINANET.replace(STDS, "target_stds=[0.1, 0.1, 0.2, 0.2]"), "retinanet", r"target_stds \[0.1, 0.1, 0.2, 0.2"),
        (ATSS.replace("[0.1, 0.1", "[0.2, 0.2"), "atss", r"target_stds \[0.2, 0.2, 0.2, 0.2"),
        (ATSS.replace("octave=1", "octave=3"), "gfl", r"has anchors of 3 sizes and the ratios \[1.0\]"),
        (ATSS.replace("ratios=[1.0]", "ratios=[2.0]"), "atss", r"has anchors of 1 sizes and the ratios \[2.0\]"),
        (REPPOINTS.replace("'moment'", "'minmax'"), "reppoints", "the head's transform_method 'minmax', which no"),
        (FASTER.replace("[0.1, 0.1, 0.2", "[0.05, 0.05, 0.2"), "faster_rcnn", r"target_stds \[0.05, 0.05, 0.2, 0.2\]"),
    ],
)
def test_a_detector_that_is_none_of_ours_is_refused_though_its_arrays_fit(text, detector, words):
    state = {"bbox_head.retina_cls.bias": np.zeros(1)}
    with pytest.raises(UserError, match=f"The mmdet weights of file.pth are of another model: .*{words}"):
        expected_model(complete({"name": detector}), "mmdet", state, "file.pth", read_config(text))


def test_the_files_own_config_is_taken_and_what_it_changes_is_said():
    state, model = {"bbox_head.retina_cls.bias": np.zeros(1)}, complete({"name": "retinanet"})
    expected = expected_model(model, "mmdet", state, config=read_config(RETINANET))
    for section, fields in own_facts(read_config(RETINANET), "retinanet").model.items():
        there = expected.model[section]
        assert there == fields if isinstance(fields, tuple) else there.items() >= fields.items()
    assert [change for change in expected.changes if "as the file's own config says" in change] == list(
        expected.changes
    )
    for path in ("head.anchor_scale", "head.anchor_octaves", "pixel_std", "backbone.style", "blue, green, red"):
        assert any(path in change for change in expected.changes), path
    # Where config and source agree already, there is nothing to say.
    agreeing = expected_model(expected.model, "mmdet_caffe", state, config=read_config(RETINANET))
    assert agreeing.changes == ()
    assert agreeing.model == expected.model
    # A backbone alone is part of any detector.
    alone = expected_model(model, "mmdet", {"conv1.weight": np.zeros(1)}, config=read_config(RETINANET))
    assert alone.model["neck"] == model["neck"]


@pytest.mark.parametrize("key", ["config", "cfg"])
@pytest.mark.parametrize("longer", [0, 10**5])
def test_the_text_is_found_where_mmdetection_leaves_it(tmp_path, key, longer):
    """Long texts stay in the file until they are asked for."""
    text = RETINANET + "#" * longer
    write_pth(tmp_path / "file.pth", {"weight": np.ones(2, np.float32)}, **{key: op_text(text)})
    assert read_weights(tmp_path / "file.pth").config == read_config(RETINANET)
    write_pth(tmp_path / "file.pth", {"weight": np.ones(2, np.float32)}, **{key: b"]"})
    assert read_weights(tmp_path / "file.pth").config == {}


def test_every_source_of_mmdetections_can_be_any_other_by_its_config():
    """The source says what tensors are called; how images are comes from the file."""
    state = {"bbox_head.retina_cls.bias": np.zeros(1)}
    found = [
        expected_model(complete({"name": "retinanet"}), source, state, config=read_config(RETINANET)).model
        for source in SOURCES
        if re.match("mmdet", source)
    ]
    assert len(found) == 3
    assert all(model == found[0] for model in found)


@pytest.mark.parametrize("std", ["[0.0, 1.0, 1.0]", "[1.0, -1.0, 1.0]", "[1e999, 1.0, 1.0]", "[1.0, 1.0, 1e-999]"])
@pytest.mark.parametrize("text", [RETINANET, FCOS], ids=["2.28", "3.3"])
def test_a_spread_of_pixels_that_nothing_can_be_divided_by_is_refused_with_the_file(text, std):
    spoilt = re.sub(r"std=\[[^]]*\]", f"std={std}", text)
    assert spoilt != text
    detector = "retinanet" if text == RETINANET else "fcos"
    words = r"weights of x\.pth cannot be used: its own config has the pixel_std .*; it must be three numbers above 0"
    with pytest.raises(DataError, match=words):
        expected_model(
            complete({"name": detector}),
            "mmdet",
            {"bbox_head.retina_cls.bias": np.zeros(1)},
            "x.pth",
            read_config(spoilt),
        )


def test_numbers_of_many_digits_are_no_numbers():
    assert read_config(f"model = dict(x={'9' * 10**5})") == {}
