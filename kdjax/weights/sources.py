"""Where foreign weights come from: what their tensors are called, how they are laid out, what images they expect.

A source is a table: one line of it turns the name of a layer into the path of ours by a regular expression. The rest
of a tensor's name ("weight", "running_mean", ...) and the transposition from PyTorch's layout are the same for all and
stand in :mod:`kdjax.weights.state_dict`. The file is long because it is all tables, one for each program.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

RGB = tuple[float, float, float]

Sections = Mapping[str, Any]
"""Part of a model's config: fields, and sections of fields, by name."""

IMAGENET_MEAN: RGB = (123.675, 116.28, 103.53)
IMAGENET_STD: RGB = (58.395, 57.12, 57.375)


class Rule(NamedTuple):
    """One line of a table: layers whose name matches go to a path.

    Groups of the pattern fill the path. Some are counted differently by the two sides: ``level`` is the index of a
    level of the pyramid, 0 being the finest; ``fpn`` too, but of a layer that may be an output or an extra level;
    ``half`` and ``third`` count the modules of a sequence in which every second or third is a convolution; ``more``
    counts one more than we do; ``letter`` counts from "a". ``within`` is no part of the path, but what stands before
    the names of a backbone inside of a model, see :class:`Source`.

    A table is read backwards too, to write files: there the first rule that leads to a path gives its name, with all
    that its pattern says may be left out, and of several ways to say something the first.
    """

    pattern: str
    """Regular expression of the whole name of a layer: a tensor's name up to the last dot."""
    path: str
    """Path of ours below "params" or "batch_stats"."""
    layout: str = ""
    """What is unusual about the arrays, a key of ``kdjax.weights.state_dict.LAYOUTS``; "" for nothing."""


class Source(NamedTuple):
    """A family of files with the same names, layouts and preprocessing."""

    backbone: tuple[Rule, ...]
    """Of the backbone."""
    neck: tuple[Rule, ...] = ()
    heads: Mapping[str, tuple[Rule, ...]] = {}
    """By model, a key of ``kdjax.models.MODELS``."""
    within: Mapping[str, str] = {}
    """By model, the group ``within`` of the rules in a file of the whole model; "" where it has no entry."""
    counters: bool = True
    """Whether its batch norms count their batches, in tensors that inference does not use."""
    background: bool = False
    """Whether the class of index 0 of the detectors is a background, and classes are counted from 1."""
    bgr: bool = False
    """Whether the first convolution takes blue, green, red; it is turned around, for our images are RGB."""
    pixel_mean: RGB = IMAGENET_MEAN
    """Of red, green and blue, on the scale of 0 to 255."""
    pixel_std: RGB = IMAGENET_STD
    style: str = "pytorch"
    """Of the backbone, see ``kdjax.models.ResNet``."""
    epsilon: float = 1e-5
    """Of the backbone's batch norm."""
    convention: str = "mmdet"
    """Of the detectors: where their anchors are, how RoIs are pooled, and the like."""
    resize: str = "mmdet"
    """How images were scaled for the detectors, a key of ``kdjax.data.sizing.RESIZES``."""
    fixed: Mapping[str, Sections] = {}
    """What is so in every file of a detector of this source and no tensor shows, by detector."""
    usual: Mapping[str, Sections] = {}
    """What is so unless somebody trained with another config, by detector."""

    def expects(self, model: str, *, alone: bool = False) -> Sections:
        """What the config of a model must say for these weights, in the form of it; or for those of a backbone alone.

        Args:
            model: a key of ``kdjax.models.MODELS``.
            alone: whether they are those of its backbone.
        """
        expected = {
            "pixel_mean": self.pixel_mean,
            "pixel_std": self.pixel_std,
            "backbone": {} if model in _MOBILE else {"style": self.style, "epsilon": self.epsilon},
            "head": {"convention": self.convention} if model in _OF_SEVERAL and not alone else {},
        }
        return merged(expected, {} if alone else self.fixed.get(model, {}))

    def resize_of(self, model: str) -> str | None:
        """How images were scaled for a model; None where its data alone say so, as those of classifiers do."""
        return self.resize if model in DETECTORS else None


def merged(config: Sections, expected: Sections) -> dict[str, Any]:
    """``config`` with the values of ``expected``, section by section."""
    both = dict(config)
    for key, value in expected.items():
        both[key] = merged(both.get(key, {}), value) if isinstance(value, Mapping) else value
    return both


_TWO_STAGE = ("faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn")
_OF_SEVERAL = ("retinanet", "fcos", *_TWO_STAGE)
"""Detectors of several programs, whose conventions differ."""
DETECTORS = (*_OF_SEVERAL, "atss", "gfl", "reppoints", "solo")
"""Models whose files are about objects: they may count a background, and say how images were scaled."""
_MOBILE = ("mobilenet_v1", "mobilenet_v2", "deeplabv3_mobilenet_v2")
"""Models whose backbone has neither a style nor another epsilon than PyTorch's."""

SEGMENTERS = ("pspnet", "deeplabv3", "deeplabv3_mobilenet_v2")
CLASSIFIERS = ("resnet_classifier", "mobilenet_v1", "mobilenet_v2")
CLASSIFIER = r"((stem\.)?fc|head\.fc|classifier(\.1)?)\.(weight|bias)|fc1000_[wb]"
"""Regular expression of the last layer of classifiers: what a file has beside a backbone without being more."""

SKIPPED = {
    r"(.*\.)?num_batches_tracked": "a counter that inference does not use",
    CLASSIFIER: "the classifier of ImageNet's classes",
    r"\w+_momentum": "what an optimiser remembers",
    r"bbox_head\.integral\.project": "the numbers 0 to 16, which are computed here",
    r"conv1_b": "a bias that Detectron2 does not use either",
    r"(proposal_generator\.)?anchor_generator\.cell_anchors\.\d": "anchors, which are computed here",
    r"pixel_(mean|std)": "preprocessing, which is the model's config here",
}
"""Regular expressions of tensors that a model does not need, and why."""


def _resnet(prefix: str) -> tuple[Rule, ...]:
    """A ResNet with the names that torchvision gave it, and timm, MMDetection and many others kept."""
    return (
        Rule(prefix + r"conv1", "backbone/conv1", "stem"),
        Rule(prefix + r"bn1", "backbone/bn1"),
        Rule(
            prefix + r"layer(?P<layer>\d)\.(?P<block>\d+)\.(?P<part>(conv|bn)\d)",
            "backbone/layer{layer}_{block}/{part}",
        ),
        Rule(
            prefix + r"layer(?P<layer>\d)\.(?P<block>\d+)\.downsample\.0",
            "backbone/layer{layer}_{block}/downsample_conv",
        ),
        Rule(
            prefix + r"layer(?P<layer>\d)\.(?P<block>\d+)\.downsample\.1", "backbone/layer{layer}_{block}/downsample_bn"
        ),
    )


def _v2_blocks() -> Iterator[tuple[int, int, str, tuple[str, ...]]]:
    """The blocks of MobileNetV2: number of the stage, number in the stage, path of ours, and names of its layers."""
    number = 0
    for stage, blocks in enumerate((1, 2, 3, 4, 3, 3, 1)):
        for index in range(blocks):
            number += 1
            layers = ("expand", "depthwise", "project") if stage else ("depthwise", "project")
            yield stage, index, f"backbone/block_{number}", layers


def _layer(prefix: str, path: str, conv: str = "0", norm: str = "1") -> tuple[Rule, Rule]:
    """A convolution and its batch norm in the head of a segmenter, by the last parts of their names."""
    return Rule(prefix + conv, f"head/{path}/conv"), Rule(prefix + norm, f"head/{path}/bn")


# --- torchvision. Files published before its version 0.13 have the shorter names that the optional groups allow.

_TORCHVISION_RPN = (
    Rule(r"rpn\.head\.conv(\.0\.0)?", "head/rpn/conv"),
    Rule(r"rpn\.head\.cls_logits", "head/rpn/objectness"),
    Rule(r"rpn\.head\.bbox_pred", "head/rpn/deltas"),
)
_TORCHVISION_BOXES = (
    Rule(r"roi_heads\.box_head\.fc6", "head/box_0/fc1", "flattened"),
    Rule(r"roi_heads\.box_head\.fc7", "head/box_0/fc2"),
    Rule(r"roi_heads\.box_predictor\.cls_score", "head/box_0/classes", "classes"),
    Rule(r"roi_heads\.box_predictor\.bbox_pred", "head/box_0/deltas", "class_boxes"),
)
_TORCHVISION_MASKS = (
    Rule(r"roi_heads\.mask_head\.(?P<index>\d)\.0", "head/mask_0/conv_{index}"),
    Rule(r"roi_heads\.mask_head\.mask_fcn(?P<more>\d)", "head/mask_0/conv_{more}"),
    Rule(r"roi_heads\.mask_predictor\.conv5_mask", "head/mask_0/upsample", "transposed"),
    Rule(r"roi_heads\.mask_predictor\.mask_fcn_logits", "head/mask_0/logits", "class_masks"),
)
_ANCHORS_OF_4 = {"head": {"anchor_scale": 4.0}}
_ANCHORS_OF_8 = {"head": {"anchor_scale": 8.0}}
_ANCHORS: dict[str, Sections] = {"retinanet": _ANCHORS_OF_4, **dict.fromkeys(_TWO_STAGE, _ANCHORS_OF_8)}
# P7 is made of P6 after a ReLU; of MMDetection's detectors FCOS alone has it.
_RELU: Sections = {"neck": {"extra_relu": True}}
_NO_RELU: Sections = {"neck": {"extra_relu": False}}

_DILATED: Sections = {"backbone": {"output_stride": 8}}
_ASPP = {"dilations": (12, 24, 36)}

_IMPROVED_FCOS: Sections = {"head": {"norm_on_box": True, "centerness_on_box": True, "conv_bias": True}}

_TORCHVISION_MOBILENET_V2 = (
    Rule(r"features\.0\.0", "backbone/stem/conv", "stem"),
    Rule(r"features\.0\.1", "backbone/stem/bn"),
    # The first block expands nothing.
    Rule(r"features\.1\.conv\.0\.0", "backbone/block_1/depthwise/conv"),
    Rule(r"features\.1\.conv\.0\.1", "backbone/block_1/depthwise/bn"),
    Rule(r"features\.1\.conv\.1", "backbone/block_1/project/conv"),
    Rule(r"features\.1\.conv\.2", "backbone/block_1/project/bn"),
    Rule(r"features\.(?P<block>\d+)\.conv\.0\.0", "backbone/block_{block}/expand/conv"),
    Rule(r"features\.(?P<block>\d+)\.conv\.0\.1", "backbone/block_{block}/expand/bn"),
    Rule(r"features\.(?P<block>\d+)\.conv\.1\.0", "backbone/block_{block}/depthwise/conv"),
    Rule(r"features\.(?P<block>\d+)\.conv\.1\.1", "backbone/block_{block}/depthwise/bn"),
    Rule(r"features\.(?P<block>\d+)\.conv\.2", "backbone/block_{block}/project/conv"),
    Rule(r"features\.(?P<block>\d+)\.conv\.3", "backbone/block_{block}/project/bn"),
    Rule(r"features\.18\.0", "backbone/last/conv"),
    Rule(r"features\.18\.1", "backbone/last/bn"),
)
_TORCHVISION = Source(
    backbone=(*_resnet(r"(?P<within>|backbone\.|backbone\.body\.)"), *_TORCHVISION_MOBILENET_V2),
    neck=(
        Rule(r"backbone\.fpn\.inner_blocks\.(?P<level>\d)(\.0)?", "neck/lateral_c{level}"),
        Rule(r"backbone\.fpn\.layer_blocks\.(?P<level>\d)(\.0)?", "neck/output_p{level}"),
        Rule(r"backbone\.fpn\.extra_blocks\.p(?P<index>\d)", "neck/extra_p{index}"),
    ),
    heads={
        "retinanet": (
            Rule(r"head\.classification_head\.conv\.(?P<index>\d)\.0", "head/cls_conv_{index}"),
            Rule(r"head\.classification_head\.conv\.(?P<index>\d)\.1", "head/cls_norm_{index}"),
            Rule(r"head\.classification_head\.conv\.(?P<half>\d)", "head/cls_conv_{half}"),
            Rule(r"head\.classification_head\.cls_logits", "head/cls_logits", "anchor_classes"),
            Rule(r"head\.regression_head\.conv\.(?P<index>\d)\.0", "head/box_conv_{index}"),
            Rule(r"head\.regression_head\.conv\.(?P<index>\d)\.1", "head/box_norm_{index}"),
            Rule(r"head\.regression_head\.conv\.(?P<half>\d)", "head/box_conv_{half}"),
            Rule(r"head\.regression_head\.bbox_reg", "head/box_deltas"),
        ),
        "fcos": (
            Rule(r"head\.classification_head\.conv\.(?P<third>0|3|6|9)", "head/cls_conv_{third}"),
            Rule(r"head\.classification_head\.conv\.(?P<third>1|4|7|10)", "head/cls_norm_{third}"),
            Rule(r"head\.classification_head\.cls_logits", "head/cls_logits", "anchor_classes"),
            Rule(r"head\.regression_head\.conv\.(?P<third>0|3|6|9)", "head/box_conv_{third}"),
            Rule(r"head\.regression_head\.conv\.(?P<third>1|4|7|10)", "head/box_norm_{third}"),
            Rule(r"head\.regression_head\.bbox_reg", "head/box_distances"),
            Rule(r"head\.regression_head\.bbox_ctrness", "head/centerness"),
        ),
        "faster_rcnn": _TORCHVISION_RPN + _TORCHVISION_BOXES,
        "mask_rcnn": _TORCHVISION_RPN + _TORCHVISION_BOXES + _TORCHVISION_MASKS,
        "resnet_classifier": (Rule(r"fc", "head"),),
        "mobilenet_v2": (Rule(r"classifier\.1", "head"),),
        "deeplabv3": (
            *_layer(r"classifier\.0\.convs\.0\.", "decoder/aspp_0"),
            *_layer(r"classifier\.0\.convs\.(?P<index>[123])\.", "decoder/aspp_{index}"),
            *_layer(r"classifier\.0\.convs\.4\.", "decoder/pool", "1", "2"),
            *_layer(r"classifier\.0\.project\.", "decoder/projection"),
            *_layer(r"classifier\.", "decoder/bottleneck", "1", "2"),
            Rule(r"classifier\.4", "head/classifier"),
            *_layer(r"aux_classifier\.", "auxiliary"),
            Rule(r"aux_classifier\.4", "head/auxiliary_classifier"),
        ),
    },
    within={**dict.fromkeys(DETECTORS, "backbone.body."), "deeplabv3": "backbone."},
    background=True,
    convention="torchvision",
    resize="torchvision",
    fixed={
        "retinanet": _RELU,
        "fcos": merged(_RELU, _IMPROVED_FCOS),
        "deeplabv3": merged(_DILATED, {"head": {"align_corners": False, "projection": True, **_ASPP}}),
    },
    usual=_ANCHORS,
)

# --- MMDetection 2 and 3. Files of FCOS that were made with its version 1 say "fcos" for "conv".

_MMDET_TOWERS = (
    Rule(r"bbox_head\.cls_convs\.(?P<index>\d)\.conv", "head/cls_conv_{index}"),
    Rule(r"bbox_head\.cls_convs\.(?P<index>\d)\.gn", "head/cls_norm_{index}"),
    Rule(r"bbox_head\.reg_convs\.(?P<index>\d)\.conv", "head/box_conv_{index}"),
    Rule(r"bbox_head\.reg_convs\.(?P<index>\d)\.gn", "head/box_norm_{index}"),
)
_MMDET_SCALES = (Rule(r"bbox_head\.scales\.(?P<level>\d)", "head/scale_p{level}"),)
_MMDET_RPN = (
    Rule(r"rpn_head\.rpn_conv", "head/rpn/conv"),
    Rule(r"rpn_head\.rpn_cls", "head/rpn/objectness"),
    Rule(r"rpn_head\.rpn_reg", "head/rpn/deltas"),
)


def _mmdet_boxes(prefix: str, stage: str) -> tuple[Rule, ...]:
    return (
        Rule(prefix + r"shared_fcs\.0", f"head/box_{stage}/fc1", "flattened"),
        Rule(prefix + r"shared_fcs\.1", f"head/box_{stage}/fc2"),
        Rule(prefix + r"fc_cls", f"head/box_{stage}/classes"),
        Rule(prefix + r"fc_reg", f"head/box_{stage}/deltas"),
    )


def _mmdet_masks(prefix: str, stage: str) -> tuple[Rule, ...]:
    return (
        Rule(prefix + r"convs\.(?P<index>\d)\.conv", f"head/mask_{stage}/conv_{{index}}"),
        Rule(prefix + r"upsample", f"head/mask_{stage}/upsample", "transposed"),
        Rule(prefix + r"conv_logits", f"head/mask_{stage}/logits"),
    )


_MMDET_CASCADE = _MMDET_RPN + _mmdet_boxes(r"roi_head\.bbox_head\.(?P<stage>\d)\.", "{stage}")
_MMDET_FASTER = _MMDET_RPN + _mmdet_boxes(r"roi_head\.bbox_head\.", "0")
_MMDET_TOWERS = (
    Rule(r"bbox_head\.cls_convs\.(?P<index>\d)\.conv", "head/cls_conv_{index}"),
    Rule(r"bbox_head\.cls_convs\.(?P<index>\d)\.gn", "head/cls_norm_{index}"),
    Rule(r"bbox_head\.reg_convs\.(?P<index>\d)\.conv", "head/box_conv_{index}"),
    Rule(r"bbox_head\.reg_convs\.(?P<index>\d)\.gn", "head/box_norm_{index}"),
)
_MMDET = Source(
    backbone=(
        *_resnet(r"(backbone\.)?"),
        # Of deformable convolutions; files that were made with its version 1 say "conv2_offset".
        Rule(
            r"(backbone\.)?layer(?P<layer>\d)\.(?P<block>\d+)\.conv2(\.conv)?_offset",
            "backbone/layer{layer}_{block}/conv2/conv_offset",
        ),
    ),
    neck=(
        Rule(r"neck\.lateral_convs\.(?P<level>\d)\.conv", "neck/lateral_c{level}"),
        Rule(r"neck\.lateral_convs\.(?P<level>\d)\.gn", "neck/lateral_norm_c{level}"),
        Rule(r"neck\.fpn_convs\.(?P<fpn>\d)\.conv", "neck/{fpn}"),
        Rule(r"neck\.fpn_convs\.(?P<level>\d)\.gn", "neck/output_norm_p{level}"),
    ),
    heads={
        "retinanet": (
            *_MMDET_TOWERS,
            Rule(r"bbox_head\.retina_cls", "head/cls_logits"),
            Rule(r"bbox_head\.retina_reg", "head/box_deltas"),
        ),
        "fcos": (
            *_MMDET_TOWERS,
            Rule(r"bbox_head\.(conv|fcos)_cls", "head/cls_logits"),
            Rule(r"bbox_head\.(conv|fcos)_reg", "head/box_distances"),
            Rule(r"bbox_head\.(conv|fcos)_centerness", "head/centerness"),
            *_MMDET_SCALES,
        ),
        "atss": (
            *_MMDET_TOWERS,
            Rule(r"bbox_head\.atss_cls", "head/cls_logits"),
            Rule(r"bbox_head\.atss_reg", "head/box_deltas"),
            Rule(r"bbox_head\.atss_centerness", "head/centerness"),
            *_MMDET_SCALES,
        ),
        "gfl": (
            *_MMDET_TOWERS,
            Rule(r"bbox_head\.gfl_cls", "head/cls_logits"),
            Rule(r"bbox_head\.gfl_reg", "head/box_distributions"),
            *_MMDET_SCALES,
        ),
        "reppoints": (
            *_MMDET_TOWERS,
            Rule(r"bbox_head\.reppoints_cls_conv", "head/logits_conv"),
            Rule(r"bbox_head\.reppoints_cls_out", "head/cls_logits"),
            Rule(r"bbox_head\.reppoints_pts_init_conv", "head/points_conv"),
            Rule(r"bbox_head\.reppoints_pts_init_out", "head/points"),
            Rule(r"bbox_head\.reppoints_pts_refine_conv", "head/moves_conv"),
            Rule(r"bbox_head\.reppoints_pts_refine_out", "head/moves"),
            Rule(r"bbox_head", "head"),
        ),
        "solo": (
            Rule(r"mask_head\.cls_convs\.(?P<index>\d)\.conv", "head/cls_conv_{index}"),
            Rule(r"mask_head\.cls_convs\.(?P<index>\d)\.gn", "head/cls_norm_{index}"),
            Rule(r"mask_head\.mask_convs\.(?P<index>\d)\.conv", "head/mask_conv_{index}"),
            Rule(r"mask_head\.mask_convs\.(?P<index>\d)\.gn", "head/mask_norm_{index}"),
            Rule(r"mask_head\.conv_mask_list\.(?P<level>\d)", "head/masks_p{level}"),
            Rule(r"mask_head\.conv_cls", "head/cls_logits"),
        ),
        "faster_rcnn": _MMDET_FASTER,
        "mask_rcnn": _MMDET_FASTER + _mmdet_masks(r"roi_head\.mask_head\.", "0"),
        "cascade_rcnn": _MMDET_CASCADE,
        "cascade_mask_rcnn": _MMDET_CASCADE + _mmdet_masks(r"roi_head\.mask_head\.(?P<stage>\d)\.", "{stage}"),
    },
    usual={
        **_ANCHORS,
        "retinanet": merged(_ANCHORS_OF_4, _NO_RELU),
        "fcos": _RELU,
        "reppoints": _NO_RELU,
        **dict.fromkeys(("atss", "gfl"), merged(_ANCHORS_OF_8, _NO_RELU)),
    },
)

# --- Detectron2.

_BOTTOM_UP = r"(backbone\.bottom_up\.)?"
_BLOCK = _BOTTOM_UP + r"res(?P<more>\d)\.(?P<block>\d+)\."
_FCOS = r"proposal_generator\.fcos_head\."
_CAFFE2_BLOCK = r"res(?P<more>\d)_(?P<block>\d+)_branch"
_DETECTRON2_RPN = (
    Rule(r"proposal_generator\.rpn_head\.conv", "head/rpn/conv"),
    Rule(r"proposal_generator\.rpn_head\.objectness_logits", "head/rpn/objectness"),
    Rule(r"proposal_generator\.rpn_head\.anchor_deltas", "head/rpn/deltas"),
)

# Its backbones from Caffe2, whose names have dots for the last underscore here.
_CAFFE2 = (
    Rule(r"conv1", "backbone/conv1", "stem"),
    Rule(r"res_conv1_bn", "backbone/bn1"),
    Rule(_CAFFE2_BLOCK + "1", "backbone/layer{more}_{block}/downsample_conv"),
    Rule(_CAFFE2_BLOCK + "1_bn", "backbone/layer{more}_{block}/downsample_bn"),
    Rule(_CAFFE2_BLOCK + "2(?P<letter>[abc])", "backbone/layer{more}_{block}/conv{letter}"),
    Rule(_CAFFE2_BLOCK + "2(?P<letter>[abc])_bn", "backbone/layer{more}_{block}/bn{letter}"),
)


def _detectron2_boxes(index: str, stage: str) -> tuple[Rule, ...]:
    return (
        Rule(rf"roi_heads\.box_head\.{index}fc1", f"head/box_{stage}/fc1", "flattened"),
        Rule(rf"roi_heads\.box_head\.{index}fc2", f"head/box_{stage}/fc2"),
        Rule(rf"roi_heads\.box_predictor\.{index}cls_score", f"head/box_{stage}/classes"),
        Rule(rf"roi_heads\.box_predictor\.{index}bbox_pred", f"head/box_{stage}/deltas"),
    )


_DETECTRON2_MASKS = (
    Rule(r"roi_heads\.mask_head\.mask_fcn(?P<more>\d)", "head/mask_0/conv_{more}"),
    Rule(r"roi_heads\.mask_head\.deconv", "head/mask_0/upsample", "transposed"),
    Rule(r"roi_heads\.mask_head\.predictor", "head/mask_0/logits"),
)
_DETECTRON2_CASCADE = _DETECTRON2_RPN + _detectron2_boxes(r"(?P<stage>\d)\.", "{stage}")
_OWN_CASCADE: Sections = {"head": {"convention": "detectron2"}}

_DETECTRON2 = Source(
    backbone=(
        Rule(_BOTTOM_UP + r"stem\.conv1", "backbone/conv1", "stem"),
        Rule(_BOTTOM_UP + r"stem\.conv1\.norm", "backbone/bn1"),
        Rule(_BLOCK + r"conv(?P<index>\d)", "backbone/layer{more}_{block}/conv{index}"),
        Rule(_BLOCK + r"conv(?P<index>\d)\.norm", "backbone/layer{more}_{block}/bn{index}"),
        Rule(_BLOCK + r"shortcut", "backbone/layer{more}_{block}/downsample_conv"),
        Rule(_BLOCK + r"shortcut\.norm", "backbone/layer{more}_{block}/downsample_bn"),
        *_CAFFE2,
    ),
    neck=(
        Rule(r"backbone\.fpn_lateral(?P<index>\d)", "neck/lateral_c{index}"),
        Rule(r"backbone\.fpn_output(?P<index>\d)", "neck/output_p{index}"),
        Rule(r"backbone\.top_block\.p(?P<index>\d)", "neck/extra_p{index}"),
    ),
    heads={
        "retinanet": (
            Rule(r"head\.cls_subnet\.(?P<half>\d)", "head/cls_conv_{half}"),
            Rule(r"head\.bbox_subnet\.(?P<half>\d)", "head/box_conv_{half}"),
            Rule(r"head\.cls_score", "head/cls_logits", "sizes_first"),
            Rule(r"head\.bbox_pred", "head/box_deltas", "sizes_first"),
        ),
        # AdelaiDet's, which is built on Detectron2.
        "fcos": (
            Rule(_FCOS + r"cls_tower\.(?P<third>0|3|6|9)", "head/cls_conv_{third}"),
            Rule(_FCOS + r"cls_tower\.(?P<third>1|4|7|10)", "head/cls_norm_{third}"),
            Rule(_FCOS + r"bbox_tower\.(?P<third>0|3|6|9)", "head/box_conv_{third}"),
            Rule(_FCOS + r"bbox_tower\.(?P<third>1|4|7|10)", "head/box_norm_{third}"),
            Rule(_FCOS + r"cls_logits", "head/cls_logits"),
            Rule(_FCOS + r"bbox_pred", "head/box_distances"),
            Rule(_FCOS + r"ctrness", "head/centerness"),
            Rule(_FCOS + r"scales\.(?P<level>\d)", "head/scale_p{level}", "single"),
        ),
        "faster_rcnn": _DETECTRON2_RPN + _detectron2_boxes("", "0"),
        "mask_rcnn": (
            *_DETECTRON2_RPN,
            *_detectron2_boxes("", "0"),
            *_DETECTRON2_MASKS,
        ),
        "cascade_rcnn": _DETECTRON2_CASCADE,
        "cascade_mask_rcnn": _DETECTRON2_CASCADE + _DETECTRON2_MASKS,
    },
    # Published files have frozen batch norms, which count nothing.
    counters=False,
    bgr=True,
    pixel_std=(1.0, 1.0, 1.0),
    style="caffe",
    resize="detectron2",
    fixed={
        "retinanet": _RELU,
        "fcos": merged(_RELU, _IMPROVED_FCOS),
        "cascade_rcnn": _OWN_CASCADE,
        "cascade_mask_rcnn": _OWN_CASCADE,
    },
    usual=_ANCHORS,
)

# --- MMPretrain, MMClassification as it was called before, and what is trained with either: MGD's MobileNetV1.

_MGD_MOBILENET_V1 = (
    Rule(r"(backbone\.)?model\.0\.0", "backbone/stem/conv", "stem"),
    Rule(r"(backbone\.)?model\.0\.1", "backbone/stem/bn"),
    Rule(r"(backbone\.)?model\.(?P<block>\d+)\.0", "backbone/block_{block}/depthwise/conv"),
    Rule(r"(backbone\.)?model\.(?P<block>\d+)\.1", "backbone/block_{block}/depthwise/bn"),
    Rule(r"(backbone\.)?model\.(?P<block>\d+)\.3", "backbone/block_{block}/pointwise/conv"),
    Rule(r"(backbone\.)?model\.(?P<block>\d+)\.4", "backbone/block_{block}/pointwise/bn"),
)
_MMPRETRAIN_MOBILENET_V2 = (
    Rule(r"(backbone\.)?conv1\.(?P<part>conv|bn)", "backbone/stem/{part}", "stem"),
    *(
        Rule(rf"(backbone\.)?layer{stage + 1}\.{index}\.conv\.{place}\.(?P<part>conv|bn)", f"{block}/{layer}/{{part}}")
        for stage, index, block, layers in _v2_blocks()
        for place, layer in enumerate(layers)
    ),
    Rule(r"(backbone\.)?conv2\.(?P<part>conv|bn)", "backbone/last/{part}"),
)

# --- timm.

_TIMM_LAYERS = {"expand": "conv_pw", "depthwise": "conv_dw", "project": "conv_pwl"}
_TIMM_MOBILENET_V2 = (
    Rule(r"conv_stem", "backbone/stem/conv", "stem"),
    Rule(r"bn1", "backbone/stem/bn"),
    Rule(r"blocks\.0\.0\.conv_pw", "backbone/block_1/project/conv"),
    *(
        rule
        for stage, index, block, layers in _v2_blocks()
        for place, layer in enumerate(layers, start=1)
        for rule in (
            Rule(rf"blocks\.{stage}\.{index}\.{_TIMM_LAYERS[layer]}", f"{block}/{layer}/conv"),
            Rule(rf"blocks\.{stage}\.{index}\.bn{place}", f"{block}/{layer}/bn"),
        )
    ),
    Rule(r"conv_head", "backbone/last/conv"),
    Rule(r"bn2", "backbone/last/bn"),
)

# --- MMSegmentation. Its backbones called v1c have three convolutions in a sequence before the pooling.

_MMSEG_AUXILIARY = (
    *_layer(r"auxiliary_head\.convs\.0\.", "auxiliary", "conv", "bn"),
    Rule(r"auxiliary_head\.conv_seg", "head/auxiliary_classifier"),
    Rule(r"decode_head\.conv_seg", "head/classifier"),
)
_MMSEG = Source(
    backbone=(
        *(
            Rule(rf"(backbone\.)?stem\.{3 * index + place}", f"backbone/{part}{index + 1}", layout * (index == 0))
            for index in range(3)
            for place, part, layout in ((0, "conv", "stem"), (1, "bn", ""))
        ),
        *_resnet(r"(backbone\.)?"),
    ),
    heads={
        "pspnet": (
            *(
                rule
                for index, cells in enumerate((1, 2, 3, 6))
                for rule in _layer(rf"decode_head\.psp_modules\.{index}\.1\.", f"decoder/pool_{cells}", "conv", "bn")
            ),
            *_layer(r"decode_head\.bottleneck\.", "decoder/bottleneck", "conv", "bn"),
            *_MMSEG_AUXILIARY,
        ),
        "deeplabv3": (
            *_layer(r"decode_head\.image_pool\.1\.", "decoder/pool", "conv", "bn"),
            *_layer(r"decode_head\.aspp_modules\.(?P<index>\d)\.", "decoder/aspp_{index}", "conv", "bn"),
            Rule(r"decode_head\.bottleneck\.conv", "head/decoder/bottleneck/conv", "pool_first"),
            Rule(r"decode_head\.bottleneck\.bn", "head/decoder/bottleneck/bn"),
            *_MMSEG_AUXILIARY,
        ),
    },
    fixed={
        "pspnet": {"backbone": {"dilate_second": False}, "head": {"align_corners": False}},
        "deeplabv3": {"backbone": {"dilate_second": False}, "head": {"align_corners": False, "projection": False}},
    },
    usual={"pspnet": _DILATED, "deeplabv3": merged(_DILATED, {"head": _ASPP})},
)

# --- CIRKD, whose networks MasKD distils. Its backbones called v1s have three convolutions before the pooling.

_CIRKD_BLOCK = r"(pretrained\.)?(net\.)?features\.(?P<block>\d+)\.conv\."
_CIRKD_FIRST = r"(pretrained\.)?(net\.)?features\.1\.conv\."
_CIRKD_AUXILIARY = (
    *_layer(r"auxlayer\.block\.", "auxiliary"),
    Rule(r"auxlayer\.block\.4", "head/auxiliary_classifier"),
)
_CIRKD_DEEPLABV3 = (
    *_layer(r"head\.aspp\.b0\.", "decoder/aspp_0"),
    *_layer(r"head\.aspp\.b(?P<index>[123])\.block\.", "decoder/aspp_{index}"),
    *_layer(r"head\.aspp\.b4\.gap\.", "decoder/pool", "1", "2"),
    *_layer(r"head\.aspp\.project\.", "decoder/projection"),
    *_layer(r"head\.block\.", "decoder/bottleneck"),
    Rule(r"head\.block\.4", "head/classifier"),
)
_ALIGNED: Sections = {"head": {"align_corners": True}}
_BOTH_DILATED: Sections = {"backbone": {"output_stride": 8, "dilate_second": True}}
_CIRKD = Source(
    backbone=(
        *_resnet(r"(pretrained\.)?"),
        Rule(r"(pretrained\.)?(?P<part>(conv|bn)[23])", "backbone/{part}"),
        Rule(r"(pretrained\.)?(net\.)?features\.0\.0", "backbone/stem/conv", "stem"),
        Rule(r"(pretrained\.)?(net\.)?features\.0\.1", "backbone/stem/bn"),
        Rule(r"(pretrained\.)?(net\.)?features\.18\.0", "backbone/last/conv"),
        Rule(r"(pretrained\.)?(net\.)?features\.18\.1", "backbone/last/bn"),
        # Convolutions, norms and activations in one sequence; the first block expands nothing.
        *(
            Rule(f"{prefix}{3 * index + place}", f"backbone/{block}/{layer}/{part}")
            for prefix, block, layers in (
                (_CIRKD_FIRST, "block_1", ("depthwise", "project")),
                (_CIRKD_BLOCK, "block_{block}", ("expand", "depthwise", "project")),
            )
            for index, layer in enumerate(layers)
            for place, part in enumerate(("conv", "bn"))
        ),
    ),
    heads={
        "pspnet": (
            *(
                rule
                for index, cells in enumerate((1, 2, 3, 6), start=1)
                for rule in _layer(rf"head\.psp\.conv{index}\.", f"decoder/pool_{cells}")
            ),
            *_layer(r"head\.block\.", "decoder/bottleneck"),
            Rule(r"head\.classifier", "head/classifier"),
            *_CIRKD_AUXILIARY,
        ),
        "deeplabv3": (*_CIRKD_DEEPLABV3, *_CIRKD_AUXILIARY),
        "deeplabv3_mobilenet_v2": _CIRKD_DEEPLABV3,
    },
    bgr=True,
    pixel_mean=(122.67891, 116.66877, 104.00699),
    pixel_std=(1.0, 1.0, 1.0),
    fixed={
        "pspnet": merged(_ALIGNED, _BOTH_DILATED),
        "deeplabv3": merged(merged(_ALIGNED, _BOTH_DILATED), {"head": {"projection": True, **_ASPP}}),
        "deeplabv3_mobilenet_v2": merged(
            merged(_ALIGNED, _DILATED), {"head": {"projection": True, "auxiliary_channels": 0, **_ASPP}}
        ),
    },
)

SOURCES: dict[str, Source] = {
    "torchvision": _TORCHVISION,
    # The published COCO_V1 files of RetinaNet, Faster R-CNN and Mask R-CNN with ResNet-50.
    "torchvision_coco_v1": _TORCHVISION._replace(epsilon=0.0),
    "mmdet": _MMDET,
    # Configs named "caffe", whose backbone came from Detectron2, and those, FCOS above all, for which it came from
    # Detectron.
    "mmdet_caffe": _MMDET._replace(bgr=True, pixel_std=(1.0, 1.0, 1.0), style="caffe"),
    "mmdet_detectron": _MMDET._replace(
        bgr=True, pixel_mean=(122.7717, 115.9465, 102.9801), pixel_std=(1.0, 1.0, 1.0), style="caffe"
    ),
    "detectron2": _DETECTRON2,
    # What was trained from torchvision's backbones, and those backbones under its names.
    "detectron2_rgb": _DETECTRON2._replace(bgr=False, pixel_std=IMAGENET_STD, style="pytorch"),
    # ResNeXt-101 32x8d, which came from PyTorch by way of Caffe2.
    "detectron2_x101": _DETECTRON2._replace(pixel_std=IMAGENET_STD, style="pytorch"),
    "mmpretrain": Source(
        backbone=(*_resnet(r"(backbone\.)?"), *_MGD_MOBILENET_V1, *_MMPRETRAIN_MOBILENET_V2),
        heads=dict.fromkeys(CLASSIFIERS, (Rule(r"head\.fc", "head"),)),
    ),
    "mmseg": _MMSEG,
    "cirkd": _CIRKD,
    "timm": Source(
        backbone=(*_resnet(""), *_TIMM_MOBILENET_V2),
        heads={"resnet_classifier": (Rule(r"fc", "head"),), "mobilenet_v2": (Rule(r"classifier", "head"),)},
    ),
}
"""By the name that a config calls them."""
