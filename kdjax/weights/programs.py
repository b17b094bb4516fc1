"""What programs in PyTorch can say of a model beside its weights, what they cannot, and the lines that say it.

Weights fit by names and shapes alone, and mean something else where the program that loads them computes otherwise. A
field of a model's config is here one that the program is told (``SAID``), one that must be as its weights have it
(``kdjax.weights.sources``) or as it always is (``ONLY``), or one of training, which no program in use asks for. The
file is long because each program has a text of its own.
"""

import math
from collections.abc import Callable, Mapping
from pprint import pformat
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict

from kdjax.weights.sources import CLASSIFIERS, DETECTORS, SEGMENTERS, SOURCES, Sections, merged

_PIXELS = ("pixel_mean", "pixel_std")
_TWO_STAGE = tuple(name for name in DETECTORS if "rcnn" in name)

SAID: dict[str, tuple[str, ...]] = {
    "torchvision": (*_PIXELS, "head.anchor_scale"),
    "mmdet": (*_PIXELS, "backbone.style", "backbone.epsilon", "neck.extra_relu", "head.anchor_scale"),
    "detectron2": (*_PIXELS, "backbone.style", "head.anchor_scale"),
    "mmpretrain": _PIXELS,
    "mmseg": (*_PIXELS, "backbone.output_stride", "head.align_corners", "head.dilations"),
    "cirkd": _PIXELS,
    "timm": _PIXELS,
}
"""By program, what its constructors and configs are told, though its published weights have one value of it."""

Limits = Mapping[str, Mapping[str, tuple[Any, ...]]]

_PLAIN: dict[str, tuple[Any, ...]] = {
    "backbone.depth": (18, 34, 50, 101),
    "backbone.stem": ("plain",),
    "backbone.deformable": (False,),
    "neck.norm": ("",),
}
_AS_BUILT: dict[str, tuple[Any, ...]] = {"backbone.width": (1.0,)}
_WHOLE: dict[str, tuple[Any, ...]] = {"backbone.output_stride": (32,)}
_P3_TO_P7: dict[str, tuple[Any, ...]] = {"neck.min_level": (3,), "neck.max_level": (7,)}
_P2_TO_P6: dict[str, tuple[Any, ...]] = {"neck.min_level": (2,), "neck.max_level": (6,), "neck.extra_from": ("pool",)}
_OF_C5_OR_P5: dict[str, tuple[Any, ...]] = {"neck.extra_from": ("c5", "p5")}
_GROUP_NORM: dict[str, tuple[Any, ...]] = {"head.norm": ("group",)}
_MOBILE = dict.fromkeys(("mobilenet_v1", "mobilenet_v2", "deeplabv3_mobilenet_v2"), _AS_BUILT)

_TORCHVISION_NECK: dict[str, tuple[Any, ...]] = {"neck.channels": (256,)}
_TORCHVISION_TWO_STAGE = {
    **_TORCHVISION_NECK,
    **_P2_TO_P6,
    "head.head_channels": (1024,),
    "head.class_agnostic": (False,),
}
_TORCHVISION: Limits = {
    "": {**_PLAIN, **_AS_BUILT},
    "retinanet": {**_TORCHVISION_NECK, **_P3_TO_P7, **_OF_C5_OR_P5, "head.convs": (4,)},
    "fcos": {**_TORCHVISION_NECK, **_P3_TO_P7, **_OF_C5_OR_P5, **_GROUP_NORM, "head.convs": (4,)},
    "faster_rcnn": _TORCHVISION_TWO_STAGE,
    "mask_rcnn": _TORCHVISION_TWO_STAGE,
    "resnet_classifier": _WHOLE,
    "deeplabv3": {
        "backbone.depth": (50, 101),
        "backbone.groups": (1,),
        "head.channels": (256,),
        "head.auxiliary_channels": (0, 256),
        "head.window": ((),),
    },
    **_MOBILE,
}
_DETECTRON2: Limits = {
    "": {**_PLAIN, **_AS_BUILT},
    "retinanet": {**_P3_TO_P7, "neck.extra_from": ("c5",), "head.norm": ("",)},
    "fcos": {**_P3_TO_P7, "neck.extra_from": ("p5",), **_GROUP_NORM},
    **dict.fromkeys(_TWO_STAGE, _P2_TO_P6),
}
_MMSEG: Limits = {
    "": {**_AS_BUILT, "backbone.depth": (18, 34, 50, 101), "backbone.stem": ("v1c",), "backbone.groups": (1,)},
    **{name: {"backbone.deformable": (False,)} for name in SEGMENTERS},
}
_RESNETS: Limits = {"": {**_PLAIN, **_AS_BUILT}, "resnet_classifier": _WHOLE, **_MOBILE}

ONLY: dict[str, Limits] = {
    "torchvision": _TORCHVISION,
    "mmdet": {
        "": {"backbone.depth": _PLAIN["backbone.depth"], "backbone.stem": ("plain",)},
        **dict.fromkeys(("retinanet", "fcos", "atss", "gfl", "reppoints"), _OF_C5_OR_P5),
        **dict.fromkeys((*_TWO_STAGE, "solo"), _P2_TO_P6),
    },
    "detectron2": _DETECTRON2,
    "mmpretrain": _RESNETS,
    "mmseg": _MMSEG,
    "cirkd": {"": {**_AS_BUILT, "backbone.stem": ("v1s",)}, **_MOBILE},
    "timm": _RESNETS,
}
"""By program and model, "" standing for all, the only values of a field that it builds. Fields that a model has not are
passed over."""


_DETECTORS_ALONE = "torchvision_coco_v1"
"""Only detectors have its epsilon."""


class Serving(NamedTuple):
    """What a program is told of a model besides its config."""

    num_classes: int
    """Without a background."""
    file: str
    """Name of the file of weights."""
    short_side: int
    """Pixels that the shorter side of an image is scaled to."""
    long_side: int
    """Pixels that the longer side has at most."""


def program_of(source: str) -> str:
    """The program that a source's files are for: sources are variants of it, called after it.

    >>> program_of("mmdet_caffe")
    'mmdet'
    """
    return source.split("_")[0]


def contradictions(model: Sections, source: str) -> list[str]:
    """Why weights of a model would be those of another one in the program of a source, a sentence for each field.

    Args:
        model: a whole config, as :func:`kdjax.models.complete` makes it.
        source: a key of ``SOURCES`` that has a table for the model.
    """
    table, program, name = SOURCES[source], program_of(source), model["name"]
    if source == _DETECTORS_ALONE and name not in DETECTORS:
        return [f"weights of {source} are those of detectors; take torchvision"]
    fields = _flat(model)
    meant = _flat(merged(table.usual.get(name, {}), table.expects(name)))
    found = [
        f"{path} is {fields[path]!r}, and weights of {source} mean {value!r}"
        for path, value in meant.items()
        if path not in SAID[program] and path in fields and fields[path] != value
    ]
    only = {**ONLY[program].get("", {}), **ONLY[program].get(name, {})}
    found += [
        f"{path} is {fields[path]!r}, and {program} builds {' or '.join(map(repr, values))} alone"
        for path, values in only.items()
        if path in fields and fields[path] not in values and path not in meant
    ]
    if (width := fields.get("backbone.width", 1.0)) * 8 % 1 and "backbone.width" not in only:
        # Of others, channels that are rounded do not double from stage to stage.
        found.append(f"backbone.width is {width!r}, and {program} builds multiples of 1/8 alone")
    return found


def lines_to_load(model: Sections, source: str, serving: Serving) -> list[str]:
    """The lines that build the model in the program of a source and load a file of its weights: Python.

    Args:
        model: a whole config without :func:`contradictions`.
        source: a key of ``SOURCES``.
        serving: what else it takes.
    """
    return _LINES[program_of(source)](model, source, serving)


def _flat(sections: Sections) -> dict[str, Any]:
    flat = flatten_dict(dict(sections), sep=".")
    return {path: tuple(x) if isinstance(x, list) else x for path, x in flat.items()}


def _c5(backbone: Sections) -> list[int]:
    """Channels of C2 to C5 of a ResNet."""
    expansion = 4 if backbone["depth"] >= 50 else 1
    return [int(64 * backbone["width"]) * expansion * 2**layer for layer in range(4)]


def _scaled(values: Any, divisor: float = 255.0) -> list[float]:
    return [round(x / divisor, 6) for x in values]


# --- torchvision.


def _resnet_builder(backbone: Sections) -> str:
    """The name of torchvision's function for a ResNet, with what else it takes."""
    groups, width = backbone["groups"], backbone["base_width"]
    return f"resnet{backbone['depth']}" + f", groups={groups}, width_per_group={width}" * (groups > 1)


def _torchvision(model: Sections, source: str, serving: Serving) -> list[str]:
    name, backbone = model["name"], model["backbone"]
    load = [
        "from safetensors.torch import load_file",
        f"model.load_state_dict(load_file({serving.file!r}))",
        "model.eval()",
    ]
    if name == "mobilenet_v2":
        return [
            "from torchvision.models import mobilenet_v2",
            f"model = mobilenet_v2(num_classes={serving.num_classes})",
            *load,
        ]
    function, _, others = _resnet_builder(backbone).partition(", ")
    if name == "resnet_classifier":
        call = f"model = {function}(num_classes={serving.num_classes}{', ' * bool(others)}{others})"
        return [f"from torchvision.models import {function}", call, *load]
    if name == "deeplabv3":
        auxiliary = model["head"]["auxiliary_channels"] > 0
        call = f"deeplabv3_{function}(weights=None, weights_backbone=None, num_classes={serving.num_classes}"
        return [
            f"from torchvision.models.segmentation import deeplabv3_{function}",
            f"model = {call}, aux_loss={auxiliary})",
            *load,
        ]
    return [*_TORCHVISION_DETECTORS[name](model, serving, function, others), *load]


def _torchvision_backbone(model: Sections, function: str, others: str) -> list[str]:
    neck, widths = model["neck"], _c5(model["backbone"])
    first = neck["min_level"] - 1
    layers = {f"layer{layer}": str(layer - first) for layer in range(first, 5)}
    taken = widths[-1] if neck["extra_from"] == "c5" else neck["channels"]
    # Of those, torchvision's published detectors have an epsilon of 0.
    frozen = model["backbone"]["epsilon"] == 0
    norm = "lambda channels: FrozenBatchNorm2d(channels, eps=0.0)" if frozen else "nn.BatchNorm2d"
    extra = "" if neck["extra_from"] == "pool" else f", LastLevelP6P7({taken}, {neck['channels']})"
    return [
        "from torch import nn",
        f"from torchvision.models import {function}",
        "from torchvision.models.detection import anchor_utils, backbone_utils",
        *["from torchvision.ops.feature_pyramid_network import LastLevelP6P7"] * bool(extra),
        *["from torchvision.ops import FrozenBatchNorm2d"] * frozen,
        f"body = {function}(norm_layer={norm}{', ' * bool(others)}{others})",
        f"backbone = backbone_utils.BackboneWithFPN(body, {layers}, {widths[first - 1 :]}, {neck['channels']}{extra})",
    ]


def _torchvision_images(model: Sections, serving: Serving) -> str:
    return (
        f"num_classes={serving.num_classes + 1}, min_size={serving.short_side}, max_size={serving.long_side}, "
        f"image_mean={_scaled(model['pixel_mean'])}, image_std={_scaled(model['pixel_std'])}"
    )


def _torchvision_anchors(model: Sections, octaves: int, scale: float, ratios: tuple[float, ...]) -> str:
    levels = range(model["neck"]["min_level"], model["neck"]["max_level"] + 1)
    sizes = tuple(tuple(int(2**level * scale * 2 ** (k / octaves)) for k in range(octaves)) for level in levels)
    return f"anchors = anchor_utils.AnchorGenerator({sizes}, ({tuple(ratios)},) * {len(sizes)})"


def _torchvision_dense(model: Sections) -> str:
    head = model["head"]
    return (
        f"score_thresh={head['score_threshold']}, nms_thresh={head['iou_threshold']}, "
        f"detections_per_img={head['max_detections']}, topk_candidates={head['candidates']}"
    )


def _torchvision_retinanet(model: Sections, serving: Serving, function: str, others: str) -> list[str]:
    head, channels = model["head"], model["neck"]["channels"]
    octaves, ratios = head["anchor_octaves"], head["anchor_ratios"]
    number = f"{channels}, {octaves * len(ratios)}, {serving.num_classes + 1}"
    norm = ", norm_layer=lambda channels: nn.GroupNorm(32, channels)" * (head["norm"] == "group")
    return [
        *_torchvision_backbone(model, function, others),
        "from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead",
        _torchvision_anchors(model, octaves, head["anchor_scale"], ratios),
        f"head = RetinaNetHead({number}{norm})",
        f"model = RetinaNet(backbone, {_torchvision_images(model, serving)}, anchor_generator=anchors, head=head, "
        f"{_torchvision_dense(model)})",
    ]


def _torchvision_fcos(model: Sections, serving: Serving, function: str, others: str) -> list[str]:
    return [
        *_torchvision_backbone(model, function, others),
        "from torchvision.models.detection import FCOS",
        f"model = FCOS(backbone, {_torchvision_images(model, serving)}, {_torchvision_dense(model)})",
    ]


def _torchvision_two_stage(model: Sections, serving: Serving, function: str, others: str) -> list[str]:
    head, kind = model["head"], {"faster_rcnn": "FasterRCNN", "mask_rcnn": "MaskRCNN"}[model["name"]]
    return [
        *_torchvision_backbone(model, function, others),
        f"from torchvision.models.detection import {kind}",
        _torchvision_anchors(model, 1, head["anchor_scale"], head["anchor_ratios"]),
        f"model = {kind}(backbone, {_torchvision_images(model, serving)}, rpn_anchor_generator=anchors, "
        f"rpn_pre_nms_top_n_test={head['candidates']}, rpn_post_nms_top_n_test={head['proposals']}, "
        f"box_score_thresh={head['score_threshold']}, box_nms_thresh={head['iou_threshold']}, "
        f"box_detections_per_img={head['max_detections']})",
    ]


_TORCHVISION_DETECTORS = {
    "retinanet": _torchvision_retinanet,
    "fcos": _torchvision_fcos,
    "faster_rcnn": _torchvision_two_stage,
    "mask_rcnn": _torchvision_two_stage,
}

# --- Of OpenMMLab: a config that goes on from a published one, and says what may be otherwise in this model.

_BASES = {
    "retinanet": "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py",
    "fcos": "mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py",
    "atss": "mmdet::atss/atss_r50_fpn_1x_coco.py",
    "gfl": "mmdet::gfl/gfl_r50_fpn_1x_coco.py",
    "reppoints": "mmdet::reppoints/reppoints-moment_r50_fpn-gn_head-gn_1x_coco.py",
    "solo": "mmdet::solo/solo_r50_fpn_1x_coco.py",
    "faster_rcnn": "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
    "mask_rcnn": "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
    "cascade_rcnn": "mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py",
    "cascade_mask_rcnn": "mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py",
    "pspnet": "mmseg::pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py",
    "deeplabv3": "mmseg::deeplabv3/deeplabv3_r50-d8_4xb2-40k_cityscapes-512x1024.py",
    "resnet_classifier": "mmpretrain::resnet/resnet50_8xb32_in1k.py",
    "mobilenet_v2": "mmpretrain::mobilenet_v2/mobilenet-v2_8xb32_in1k.py",
}


def _mm(model: Sections, source: str, serving: Serving) -> list[str]:
    name = model["name"]
    if name not in _BASES:
        return [f"The names are those of MGD's repository, which trains a {name} in MMClassification."]
    pixels = {key: tuple(model[key]) for key in _PIXELS}
    if SOURCES[source].bgr:
        pixels = {key: x[::-1] for key, x in pixels.items()}
    images = {"mean": list(pixels["pixel_mean"]), "std": list(pixels["pixel_std"])}
    preprocessor = images | {("to_rgb" if name in CLASSIFIERS else "bgr_to_rgb"): not SOURCES[source].bgr}
    parts = {} if name in CLASSIFIERS else {"data_preprocessor": preprocessor}
    parts |= {} if name == "mobilenet_v2" else {"backbone": _mm_backbone(model)}
    parts |= _MM_PARTS[name](model, serving.num_classes)
    return [
        f"_base_ = {_BASES[name]!r}",
        *([f"data_preprocessor = {preprocessor!r}"] if name in CLASSIFIERS else []),
        *f"model = {pformat(parts, width=110, sort_dicts=False, compact=True)}".splitlines(),
        *[f"# images: shorter side {serving.short_side}, longer side at most {serving.long_side} pixels"]
        * (name in DETECTORS),
        f"# its checkpoint: torch.save({{'state_dict': safetensors.torch.load_file({serving.file!r})}}, 'model.pth')",
    ]


def _mm_backbone(model: Sections) -> dict[str, Any]:
    backbone, name = model["backbone"], model["name"]
    said: dict[str, Any] = {
        "type": "ResNeXt" if backbone["groups"] > 1 else "ResNetV1c" if name in SEGMENTERS else "ResNet",
        "depth": backbone["depth"],
        "style": backbone["style"],
        "norm_cfg": {"type": "BN", "requires_grad": True, "eps": backbone["epsilon"]},
        "init_cfg": None,
    }
    if backbone["groups"] > 1:
        said |= {"groups": backbone["groups"], "base_width": backbone["base_width"]}
    if backbone["width"] != 1:
        said |= {"base_channels": int(64 * backbone["width"])}
    if backbone["deformable"]:
        said |= {"dcn": {"type": "DCN", "deform_groups": 1, "fallback_on_stride": False}}
        said |= {"stage_with_dcn": (False, True, True, True)}
    if name in SEGMENTERS:
        stride = backbone["output_stride"]
        dilations = {8: (1, 1, 2, 4), 16: (1, 1, 1, 2), 32: (1, 1, 1, 1)}[stride]
        said |= {"strides": _STRIDES[stride], "dilations": dilations}
        said |= {"contract_dilation": True}
    return said


_STRIDES = {8: (1, 2, 1, 1), 16: (1, 2, 2, 1), 32: (1, 2, 2, 2)}


def _mm_neck(model: Sections) -> dict[str, Any]:
    neck = model["neck"]
    extra = {"c5": "on_input", "p5": "on_output", "pool": False}[neck["extra_from"]]
    return {
        "type": "FPN",
        "in_channels": _c5(model["backbone"]),
        "out_channels": neck["channels"],
        "start_level": neck["min_level"] - 2,
        "add_extra_convs": extra,
        "relu_before_extra_convs": bool(extra) and neck["extra_relu"],
        "num_outs": neck["max_level"] - neck["min_level"] + 1,
        "norm_cfg": _mm_norm(neck["norm"], neck["channels"]),
    }


def _mm_norm(norm: str, channels: int) -> dict[str, Any] | None:
    groups = math.gcd(32, max(1, channels // 8))
    return {"type": "GN", "num_groups": groups, "requires_grad": True} if norm else None


def _mm_strides(model: Sections) -> list[int]:
    return [2**level for level in range(model["neck"]["min_level"], model["neck"]["max_level"] + 1)]


def _mm_test(head: Sections, candidates: bool = True) -> dict[str, Any]:
    said = {"nms_pre": head["candidates"], "min_bbox_size": 0} if candidates else {}
    nms = {"type": "nms", "iou_threshold": head["iou_threshold"]}
    return said | {"score_thr": head["score_threshold"], "nms": nms, "max_per_img": head["max_detections"]}


def _mm_dense(model: Sections, num_classes: int) -> dict[str, Any]:
    channels, head = model["neck"]["channels"], model["head"]
    said = {"num_classes": num_classes, "in_channels": channels, "feat_channels": channels}
    return {**said, "stacked_convs": head["convs"], "norm_cfg": _mm_norm(head["norm"], channels)}


def _mm_anchored(model: Sections, num_classes: int) -> dict[str, Any]:
    """RetinaNet, and those that have one square anchor at each location."""
    head = model["head"]
    anchors = {
        "type": "AnchorGenerator",
        "octave_base_scale": head["anchor_scale"],
        "scales_per_octave": head.get("anchor_octaves", 1),
        "ratios": list(head.get("anchor_ratios", (1.0,))),
        "strides": _mm_strides(model),
    }
    dense = _mm_dense(model, num_classes) | {"anchor_generator": anchors}
    return {"neck": _mm_neck(model), "bbox_head": dense, "test_cfg": _mm_test(head)}


def _mm_fcos(model: Sections, num_classes: int) -> dict[str, Any]:
    head, strides = model["head"], _mm_strides(model)
    farthest = [head["range_scale"] * stride for stride in strides[:-1]]
    dense = _mm_dense(model, num_classes) | {
        "strides": strides,
        "norm_on_bbox": head["norm_on_box"],
        "centerness_on_reg": head["centerness_on_box"],
        "conv_bias": True if head["conv_bias"] else "auto",
        "regress_ranges": [list(pair) for pair in zip([-1.0, *farthest], [*farthest, 1e8], strict=True)],
    }
    return {"neck": _mm_neck(model), "bbox_head": dense, "test_cfg": _mm_test(head)}


def _mm_reppoints(model: Sections, num_classes: int) -> dict[str, Any]:
    head = model["head"]
    dense = _mm_dense(model, num_classes) | {
        "point_feat_channels": model["neck"]["channels"],
        "point_strides": _mm_strides(model),
        "point_base_scale": head["point_scale"],
    }
    return {"neck": _mm_neck(model), "bbox_head": dense, "test_cfg": _mm_test(head)}


def _mm_solo(model: Sections, num_classes: int) -> dict[str, Any]:
    head, channels = model["head"], model["neck"]["channels"]
    last = len(head["grids"]) - 1
    ranges = [
        [head["range_scale"] * 2.0 ** (order - 2) if order else 1.0, head["range_scale"] * 2.0**order]
        for order in range(last + 1)
    ]
    ranges[last][1] = max(2048.0, ranges[last][1])
    masks = {
        "num_classes": num_classes,
        "in_channels": channels,
        "feat_channels": channels,
        "stacked_convs": head["convs"],
        "scale_ranges": ranges,
        "num_grids": list(head["grids"]),
        "norm_cfg": {"type": "GN", "num_groups": math.gcd(32, max(1, channels // 8)), "requires_grad": True},
    }
    test = {
        "nms_pre": head["candidates"],
        "score_thr": head["score_threshold"],
        "filter_thr": head["kept_score"],
        "sigma": head["sigma"],
        "max_per_img": head["max_detections"],
    }
    return {"neck": _mm_neck(model), "mask_head": masks, "test_cfg": test}


_STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
"""Of the boxes of each stage of a cascade."""


def _mm_two_stage(model: Sections, num_classes: int) -> dict[str, Any]:
    head, channels, name = model["head"], model["neck"]["channels"], model["name"]
    cascade = name.startswith("cascade")
    anchors = {
        "type": "AnchorGenerator",
        "scales": [head["anchor_scale"]],
        "ratios": list(head["anchor_ratios"]),
        "strides": _mm_strides(model),
    }
    boxes = {"in_channels": channels, "fc_out_channels": head["head_channels"], "num_classes": num_classes}
    stages = [
        {
            "type": "Shared2FCBBoxHead",
            **boxes,
            "roi_feat_size": 7,
            "reg_class_agnostic": True,
            "bbox_coder": {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": list(stds)},
            "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0},
            "loss_bbox": {"type": "SmoothL1Loss", "beta": 1.0, "loss_weight": 1.0},
        }
        for stds in _STDS
    ]
    rois: dict[str, Any] = {
        "bbox_roi_extractor": {"out_channels": channels},
        "bbox_head": stages if cascade else boxes | {"reg_class_agnostic": head["class_agnostic"]},
    }
    if "mask" in name:
        masks = {"in_channels": channels, "conv_out_channels": channels, "num_classes": num_classes}
        rois |= {"mask_roi_extractor": {"out_channels": channels}, "mask_head": masks}
    nms = {"type": "nms", "iou_threshold": 0.7}
    proposals = {"nms_pre": head["candidates"], "max_per_img": head["proposals"], "nms": nms, "min_bbox_size": 0}
    return {
        "neck": _mm_neck(model),
        "rpn_head": {"in_channels": channels, "feat_channels": channels, "anchor_generator": anchors},
        "roi_head": rois,
        "test_cfg": {"rpn": proposals, "rcnn": _mm_test(head, candidates=False)},
    }


def _mm_segmenter(model: Sections, num_classes: int) -> dict[str, Any]:
    head, (*_, c4, c5) = model["head"], _c5(model["backbone"])
    shared = {"num_classes": num_classes, "align_corners": head["align_corners"]}
    shared |= {"norm_cfg": {"type": "BN", "requires_grad": True}}
    main = {"in_channels": c5, "channels": head["channels"], **shared}
    if model["name"] == "deeplabv3":
        main |= {"dilations": (1, *head["dilations"])}
    auxiliary = {"in_channels": c4, "channels": head["auxiliary_channels"], **shared}
    window = head["window"]
    slide = {"mode": "slide", "crop_size": tuple(window), "stride": tuple(head["window_stride"] or window)}
    return {
        "decode_head": main,
        "auxiliary_head": auxiliary if head["auxiliary_channels"] else None,
        "test_cfg": slide if window else {"mode": "whole"},
    }


def _mm_classifier(model: Sections, num_classes: int) -> dict[str, Any]:
    mobile = model["name"] == "mobilenet_v2"
    return {"head": {"num_classes": num_classes, "in_channels": 1280 if mobile else _c5(model["backbone"])[-1]}}


_MM_PARTS: dict[str, Callable[[Sections, int], dict[str, Any]]] = {
    **dict.fromkeys(("retinanet", "atss", "gfl"), _mm_anchored),
    "fcos": _mm_fcos,
    "reppoints": _mm_reppoints,
    "solo": _mm_solo,
    **dict.fromkeys(_TWO_STAGE, _mm_two_stage),
    **dict.fromkeys(SEGMENTERS, _mm_segmenter),
    **dict.fromkeys(CLASSIFIERS, _mm_classifier),
}

# --- Detectron2.

_DETECTRON2_CASCADE = "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml"
_DETECTRON2_BASES = {
    "retinanet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "faster_rcnn": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "mask_rcnn": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "cascade_rcnn": _DETECTRON2_CASCADE,
    "cascade_mask_rcnn": _DETECTRON2_CASCADE,
}


_ADELAIDET = "cfg.merge_from_file('configs/FCOS-Detection/R_50_1x.yaml')"


def _detectron2(model: Sections, source: str, serving: Serving) -> list[str]:
    name, backbone, head = model["name"], model["backbone"], model["head"]
    adelai = name == "fcos"
    start = (
        [
            "from adet.config import get_cfg",
            "cfg = get_cfg()",
            _ADELAIDET,
        ]
        if adelai
        else [
            "from detectron2 import model_zoo",
            f"cfg = model_zoo.get_config({_DETECTRON2_BASES[name]!r})",
        ]
    )
    shallow = backbone["depth"] < 50
    said: dict[str, Any] = {
        "MODEL.WEIGHTS": serving.file,
        "INPUT.FORMAT": "BGR",
        "INPUT.MIN_SIZE_TEST": serving.short_side,
        "INPUT.MAX_SIZE_TEST": serving.long_side,
        "MODEL.PIXEL_MEAN": list(model["pixel_mean"])[::-1],
        "MODEL.PIXEL_STD": list(model["pixel_std"])[::-1],
        "MODEL.RESNETS.DEPTH": backbone["depth"],
        **({"MODEL.RESNETS.RES2_OUT_CHANNELS": 64} if shallow else {}),
        "MODEL.RESNETS.STRIDE_IN_1X1": backbone["style"] == "caffe",
        "MODEL.RESNETS.NUM_GROUPS": backbone["groups"],
        "MODEL.RESNETS.WIDTH_PER_GROUP": backbone["base_width"] if backbone["groups"] > 1 else 64,
        "MODEL.FPN.OUT_CHANNELS": model["neck"]["channels"],
        "TEST.DETECTIONS_PER_IMAGE": head["max_detections"],
        **_DETECTRON2_HEADS[name](model, serving.num_classes),
    }
    return [*start, *(f"cfg.{key} = {value!r}" for key, value in said.items())]


def _detectron2_anchors(model: Sections, octaves: int) -> dict[str, Any]:
    scale = model["head"]["anchor_scale"]
    sizes = [[stride * scale * 2 ** (k / octaves) for k in range(octaves)] for stride in _mm_strides(model)]
    return {
        "MODEL.ANCHOR_GENERATOR.SIZES": sizes,
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [list(model["head"]["anchor_ratios"])],
    }


def _detectron2_retinanet(model: Sections, num_classes: int) -> dict[str, Any]:
    head = model["head"]
    return {
        **_detectron2_anchors(model, head["anchor_octaves"]),
        "MODEL.RETINANET.NUM_CLASSES": num_classes,
        "MODEL.RETINANET.NUM_CONVS": head["convs"],
        "MODEL.RETINANET.SCORE_THRESH_TEST": head["score_threshold"],
        "MODEL.RETINANET.TOPK_CANDIDATES_TEST": head["candidates"],
        "MODEL.RETINANET.NMS_THRESH_TEST": head["iou_threshold"],
    }


def _detectron2_fcos(model: Sections, num_classes: int) -> dict[str, Any]:
    head = model["head"]
    return {
        "MODEL.FCOS.NUM_CLASSES": num_classes,
        "MODEL.FCOS.NUM_CLS_CONVS": head["convs"],
        "MODEL.FCOS.NUM_BOX_CONVS": head["convs"],
        "MODEL.FCOS.INFERENCE_TH_TEST": head["score_threshold"],
        "MODEL.FCOS.PRE_NMS_TOPK_TEST": head["candidates"],
        "MODEL.FCOS.NMS_TH": head["iou_threshold"],
        "MODEL.FCOS.POST_NMS_TOPK_TEST": head["max_detections"],
    }


def _detectron2_two_stage(model: Sections, num_classes: int) -> dict[str, Any]:
    head, cascade = model["head"], model["name"].startswith("cascade")
    return {
        **_detectron2_anchors(model, 1),
        "MODEL.RPN.PRE_NMS_TOPK_TEST": head["candidates"],
        "MODEL.RPN.POST_NMS_TOPK_TEST": head["proposals"],
        "MODEL.ROI_HEADS.NUM_CLASSES": num_classes,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": head["score_threshold"],
        "MODEL.ROI_HEADS.NMS_THRESH_TEST": head["iou_threshold"],
        "MODEL.ROI_BOX_HEAD.FC_DIM": head["head_channels"],
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": head["class_agnostic"] or cascade,
        "MODEL.ROI_MASK_HEAD.CONV_DIM": model["neck"]["channels"],
        "MODEL.MASK_ON": "mask" in model["name"],
    }


_DETECTRON2_HEADS = {
    "retinanet": _detectron2_retinanet,
    "fcos": _detectron2_fcos,
    **dict.fromkeys(_TWO_STAGE, _detectron2_two_stage),
}

# --- timm, CIRKD.


def _timm(model: Sections, source: str, serving: Serving) -> list[str]:
    backbone = model["backbone"]
    if model["name"] == "mobilenet_v2":
        call = f"timm.create_model('mobilenetv2_100', num_classes={serving.num_classes})"
    else:
        groups = backbone["groups"]
        others = f", cardinality={groups}, base_width={backbone['base_width']}" * (groups > 1)
        call = f"timm.create_model('resnet{backbone['depth']}', num_classes={serving.num_classes}{others})"
    return [
        "import timm",
        "from safetensors.torch import load_file",
        f"model = {call}",
        f"model.load_state_dict(load_file({serving.file!r}))",
        "model.eval()",
    ]


def _cirkd(model: Sections, source: str, serving: Serving) -> list[str]:
    name = {"pspnet": "psp"}.get(model["name"], "deeplabv3")
    return [f"The names are those of CIRKD's get_{name}, for {serving.num_classes} classes; images are BGR."]


_LINES: dict[str, Callable[[Sections, str, Serving], list[str]]] = {
    "torchvision": _torchvision,
    "mmdet": _mm,
    "detectron2": _detectron2,
    "mmpretrain": _mm,
    "mmseg": _mm,
    "cirkd": _cirkd,
    "timm": _timm,
}
