"""The other side of the importer, written out layer by layer: tiny detectors as their originals would save them."""

from typing import Any

import numpy as np

CLASSES = 3
CHANNELS = 4
BLOCKS = (1, 2, 1, 1)
WIDTHS = (8, 12, 16, 20)
FEATURES = 6
"""Of the dense layers of box heads."""

BOXES = {"retinanet": "box_deltas", "fcos": "box_distances", "atss": "box_deltas", "gfl": "box_distributions"}
"""Of dense detectors, the layer that boxes come from."""

Names = dict[str, str]


def random_variables(
    detector: str, levels: range, norm: bool = False, scales: bool = False, stages: int = 1
) -> dict[str, np.ndarray]:
    """Path to random array, for a ResNet of a few bottlenecks, a pyramid and a head."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(path: str, size: int, inputs: int, outputs: int, bias: bool = True) -> None:
        shapes[f"params/{path}/kernel"] = (size, size, inputs, outputs)
        if bias:
            shapes[f"params/{path}/bias"] = (outputs,)

    def dense(path: str, inputs: int, outputs: int) -> None:
        shapes[f"params/{path}/kernel"] = (inputs, outputs)
        shapes[f"params/{path}/bias"] = (outputs,)

    def scale_and_bias(path: str, size: int) -> None:
        shapes[f"params/{path}/scale"] = shapes[f"params/{path}/bias"] = (size,)

    def batch_norm(path: str, size: int) -> None:
        scale_and_bias(path, size)
        shapes[f"batch_stats/{path}/mean"] = shapes[f"batch_stats/{path}/var"] = (size,)

    conv("backbone/conv1", 7, 3, 8, bias=False)
    batch_norm("backbone/bn1", 8)
    inputs = 8
    for layer, (blocks, width) in enumerate(zip(BLOCKS, WIDTHS, strict=True), start=1):
        for block in range(blocks):
            path = f"backbone/layer{layer}_{block}"
            conv(f"{path}/conv1", 1, inputs, 5, bias=False)
            conv(f"{path}/conv2", 3, 5, 5, bias=False)
            conv(f"{path}/conv3", 1, 5, width, bias=False)
            for index, size in enumerate((5, 5, width), start=1):
                batch_norm(f"{path}/bn{index}", size)
            if block == 0:
                conv(f"{path}/downsample_conv", 1, inputs, width, bias=False)
                batch_norm(f"{path}/downsample_bn", width)
            inputs = width
    for level in range(levels.start, 6):
        conv(f"neck/lateral_c{level}", 1, WIDTHS[level - 2], CHANNELS)
        conv(f"neck/output_p{level}", 3, CHANNELS, CHANNELS)
    if detector in BOXES:
        for level in range(6, levels.stop):
            conv(f"neck/extra_p{level}", 3, CHANNELS, CHANNELS)
        for kind in ("cls", "box"):
            for index in range(4):
                conv(f"head/{kind}_conv_{index}", 3, CHANNELS, CHANNELS, bias=not norm)
                if norm:
                    scale_and_bias(f"head/{kind}_norm_{index}", CHANNELS)
        anchors = 9 if detector == "retinanet" else 1
        conv("head/cls_logits", 3, CHANNELS, anchors * CLASSES)
        conv(f"head/{BOXES[detector]}", 3, CHANNELS, anchors * (68 if detector == "gfl" else 4))
        if detector in ("fcos", "atss"):
            conv("head/centerness", 3, CHANNELS, 1)
        for level in levels if scales else ():
            shapes[f"params/head/scale_p{level}"] = ()
    else:
        conv("head/rpn/conv", 3, CHANNELS, CHANNELS)
        conv("head/rpn/objectness", 1, CHANNELS, 3)
        conv("head/rpn/deltas", 1, CHANNELS, 12)
        for stage in range(stages):
            dense(f"head/box_{stage}/fc1", 49 * CHANNELS, FEATURES)
            dense(f"head/box_{stage}/fc2", FEATURES, FEATURES)
            dense(f"head/box_{stage}/classes", FEATURES, CLASSES + 1)
            dense(f"head/box_{stage}/deltas", FEATURES, 4 if stages > 1 else 4 * CLASSES)
            if "mask" in detector:
                for index in range(4):
                    conv(f"head/mask_{stage}/conv_{index}", 3, CHANNELS, CHANNELS)
                conv(f"head/mask_{stage}/upsample", 2, CHANNELS, CHANNELS)
                conv(f"head/mask_{stage}/logits", 1, CHANNELS, CLASSES)
    rng = np.random.default_rng(0)
    return {path: np.asarray(rng.normal(size=shape), np.float32) for path, shape in shapes.items()}


def resnet_names(prefix: str) -> Names:
    names = {"backbone/conv1": f"{prefix}conv1", "backbone/bn1": f"{prefix}bn1"}
    for layer, blocks in enumerate(BLOCKS, start=1):
        for block in range(blocks):
            ours, theirs = f"backbone/layer{layer}_{block}", f"{prefix}layer{layer}.{block}"
            for index in (1, 2, 3):
                names[f"{ours}/conv{index}"] = f"{theirs}.conv{index}"
                names[f"{ours}/bn{index}"] = f"{theirs}.bn{index}"
        names[f"backbone/layer{layer}_0/downsample_conv"] = f"{prefix}layer{layer}.0.downsample.0"
        names[f"backbone/layer{layer}_0/downsample_bn"] = f"{prefix}layer{layer}.0.downsample.1"
    return names


def torchvision_names(detector: str, levels: range, norm: bool = False, old: bool = False) -> Names:
    """``old``: as files published before torchvision 0.13 have them."""
    middle = "" if old else ".0"
    names = resnet_names("backbone.body.")
    for index, level in enumerate(range(levels.start, 6)):
        names[f"neck/lateral_c{level}"] = f"backbone.fpn.inner_blocks.{index}{middle}"
        names[f"neck/output_p{level}"] = f"backbone.fpn.layer_blocks.{index}{middle}"
    for level in range(6, levels.stop):
        names[f"neck/extra_p{level}"] = f"backbone.fpn.extra_blocks.p{level}"
    for kind, theirs in (("cls", "head.classification_head"), ("box", "head.regression_head")):
        for index in range(4):
            name = f"{theirs}.conv.{2 * index}" if old else f"{theirs}.conv.{index}.0"
            names[f"head/{kind}_conv_{index}"] = f"{theirs}.conv.{3 * index}" if detector == "fcos" else name
            name = f"{theirs}.conv.{3 * index + 1}" if detector == "fcos" else f"{theirs}.conv.{index}.1"
            names[f"head/{kind}_norm_{index}"] = name
    names["head/cls_logits"] = "head.classification_head.cls_logits"
    names["head/box_deltas"] = names["head/box_distances"] = "head.regression_head.bbox_reg"
    names["head/centerness"] = "head.regression_head.bbox_ctrness"
    names["head/rpn/conv"] = "rpn.head.conv" if old else "rpn.head.conv.0.0"
    names["head/rpn/objectness"] = "rpn.head.cls_logits"
    names["head/rpn/deltas"] = "rpn.head.bbox_pred"
    names["head/box_0/fc1"] = "roi_heads.box_head.fc6"
    names["head/box_0/fc2"] = "roi_heads.box_head.fc7"
    names["head/box_0/classes"] = "roi_heads.box_predictor.cls_score"
    names["head/box_0/deltas"] = "roi_heads.box_predictor.bbox_pred"
    for index in range(4):
        new = f"roi_heads.mask_head.{index}.0"
        names[f"head/mask_0/conv_{index}"] = f"roi_heads.mask_head.mask_fcn{index + 1}" if old else new
    names["head/mask_0/upsample"] = "roi_heads.mask_predictor.conv5_mask"
    names["head/mask_0/logits"] = "roi_heads.mask_predictor.mask_fcn_logits"
    return names


def mmdet_names(detector: str, levels: range) -> Names:
    names = resnet_names("backbone.")
    for index, level in enumerate(levels):
        names[f"neck/lateral_c{level}"] = f"neck.lateral_convs.{index}.conv"
        names[f"neck/{'output' if level < 6 else 'extra'}_p{level}"] = f"neck.fpn_convs.{index}.conv"
        names[f"head/scale_p{level}"] = f"bbox_head.scales.{index}"
    for index in range(4):
        for kind, theirs in (("cls", "cls"), ("box", "reg")):
            names[f"head/{kind}_conv_{index}"] = f"bbox_head.{theirs}_convs.{index}.conv"
            names[f"head/{kind}_norm_{index}"] = f"bbox_head.{theirs}_convs.{index}.gn"
    dense = {"retinanet": "retina", "fcos": "conv"}.get(detector, detector)
    names["head/cls_logits"] = f"bbox_head.{dense}_cls"
    for path in BOXES.values():
        names[f"head/{path}"] = f"bbox_head.{dense}_reg"
    names["head/centerness"] = f"bbox_head.{dense}_centerness"
    names["head/rpn/conv"] = "rpn_head.rpn_conv"
    names["head/rpn/objectness"] = "rpn_head.rpn_cls"
    names["head/rpn/deltas"] = "rpn_head.rpn_reg"
    for stage in range(3):
        suffix = f".{stage}" if detector.startswith("cascade") else ""
        box, mask = f"roi_head.bbox_head{suffix}", f"roi_head.mask_head{suffix}"
        names[f"head/box_{stage}/fc1"] = f"{box}.shared_fcs.0"
        names[f"head/box_{stage}/fc2"] = f"{box}.shared_fcs.1"
        names[f"head/box_{stage}/classes"] = f"{box}.fc_cls"
        names[f"head/box_{stage}/deltas"] = f"{box}.fc_reg"
        for index in range(4):
            names[f"head/mask_{stage}/conv_{index}"] = f"{mask}.convs.{index}.conv"
        names[f"head/mask_{stage}/upsample"] = f"{mask}.upsample"
        names[f"head/mask_{stage}/logits"] = f"{mask}.conv_logits"
    return names


def detectron2_names(detector: str, levels: range) -> Names:
    names = {"backbone/conv1": "backbone.bottom_up.stem.conv1", "backbone/bn1": "backbone.bottom_up.stem.conv1.norm"}
    for layer, blocks in enumerate(BLOCKS, start=1):
        for block in range(blocks):
            ours, theirs = f"backbone/layer{layer}_{block}", f"backbone.bottom_up.res{layer + 1}.{block}"
            for index in (1, 2, 3):
                names[f"{ours}/conv{index}"] = f"{theirs}.conv{index}"
                names[f"{ours}/bn{index}"] = f"{theirs}.conv{index}.norm"
            names[f"{ours}/downsample_conv"] = f"{theirs}.shortcut"
            names[f"{ours}/downsample_bn"] = f"{theirs}.shortcut.norm"
    for level in levels:
        names[f"neck/lateral_c{level}"] = f"backbone.fpn_lateral{level}"
        names[f"neck/output_p{level}"] = f"backbone.fpn_output{level}"
        names[f"neck/extra_p{level}"] = f"backbone.top_block.p{level}"
    for index in range(4):
        names[f"head/cls_conv_{index}"] = f"head.cls_subnet.{2 * index}"
        names[f"head/box_conv_{index}"] = f"head.bbox_subnet.{2 * index}"
    names["head/cls_logits"] = "head.cls_score"
    names["head/box_deltas"] = "head.bbox_pred"
    names["head/rpn/conv"] = "proposal_generator.rpn_head.conv"
    names["head/rpn/objectness"] = "proposal_generator.rpn_head.objectness_logits"
    names["head/rpn/deltas"] = "proposal_generator.rpn_head.anchor_deltas"
    for stage in range(3):
        suffix = f".{stage}" if detector.startswith("cascade") else ""
        names[f"head/box_{stage}/fc1"] = f"roi_heads.box_head{suffix}.fc1"
        names[f"head/box_{stage}/fc2"] = f"roi_heads.box_head{suffix}.fc2"
        names[f"head/box_{stage}/classes"] = f"roi_heads.box_predictor{suffix}.cls_score"
        names[f"head/box_{stage}/deltas"] = f"roi_heads.box_predictor{suffix}.bbox_pred"
    for index in range(4):
        names[f"head/mask_0/conv_{index}"] = f"roi_heads.mask_head.mask_fcn{index + 1}"
    names["head/mask_0/upsample"] = "roi_heads.mask_head.deconv"
    names["head/mask_0/logits"] = "roi_heads.mask_head.predictor"
    return names


LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def to_state_dict(variables: dict[str, np.ndarray], names: Names) -> dict[str, np.ndarray]:
    """Our variables by path as a state dict with those names, in PyTorch's layout."""
    state = {}
    for path, array in variables.items():
        layer, leaf = path.split("/", 1)[1].rsplit("/", 1)
        if leaf.startswith("scale_p"):
            state[names[f"{layer}/{leaf}"] + ".scale"] = array
            continue
        if layer.endswith("fc1") and leaf == "kernel":
            foreign = np.empty((array.shape[1], array.shape[0]), np.float32)
            for y, x, channel in np.ndindex(7, 7, CHANNELS):
                foreign[:, channel * 49 + y * 7 + x] = array[(y * 7 + x) * CHANNELS + channel]
        elif layer.endswith("upsample") and leaf == "kernel":
            foreign = np.empty((array.shape[2], array.shape[3], 2, 2), np.float32)
            for y, x in np.ndindex(2, 2):
                foreign[:, :, y, x] = array[1 - y, 1 - x]
        else:
            foreign = np.transpose(array, (3, 2, 0, 1)) if array.ndim == 4 else array.T
        state[f"{names[layer]}.{LEAVES[leaf]}"] = foreign.copy()
    return state


def config(detector: str, levels: range, **sections: Any) -> dict[str, Any]:
    """The detector's config, as far as an import depends on it."""
    return {"name": detector, "neck": {"min_level": levels.start, "max_level": levels.stop - 1}, **sections}
