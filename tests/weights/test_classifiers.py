"""Files of classifiers: names of every source, as a classifier, as another model's backbone, and what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from kdjax.errors import UserError
from kdjax.models import build_model
from kdjax.weights import import_state_dict
from kdjax.weights.own_config import own_facts, read_config
from kdjax.weights.state_dict import count_classes, expected_model

CLASSES = 5
RESNET = {"name": "resnet_classifier", "backbone": {"depth": 10, "width": 0.125}}
V1 = {"name": "mobilenet_v1", "backbone": {"width": 0.125}}
V2 = {"name": "mobilenet_v2", "backbone": {"width": 0.125}}
RETINANET = {"name": "retinanet", "backbone": RESNET["backbone"], "neck": {"channels": 8}}
PARTS = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def like(model, classes=CLASSES):
    return jax.eval_shape(build_model(model, classes).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))


def drawn(model):
    """Path to random array."""
    rng = np.random.default_rng(0)
    paths = flatten_dict(like(model), sep="/")
    return {path: rng.uniform(0.1, 1, x.shape).astype(np.float32) for path, x in paths.items()}


def saved(arrays, called):
    """The same as PyTorch saves it, each layer under the name that a function of its path gives."""
    state = {}
    for path, x in arrays.items():
        *layer, leaf = path.split("/")[1:]
        order = (3, 2, 0, 1) if x.ndim == 4 else (1, 0) if x.ndim == 2 else None
        state[f"{called('/'.join(layer))}.{PARTS[leaf]}"] = x.transpose(order) if order else x
    return state | {f"{called('backbone/bn1')}.num_batches_tracked": np.int64(1)} if "layer1" in str(arrays) else state


def of_resnet(prefix, head):
    def called(layer):
        if layer == "head":
            return head
        _, first, *rest = layer.split("/")
        block = first.replace("_", ".") if first.startswith("layer") else first
        part = {"downsample_conv": "downsample.0", "downsample_bn": "downsample.1"}.get("".join(rest), "".join(rest))
        return prefix + ".".join(filter(None, (block, part)))

    return called


def of_mobilenet_v1(layer):
    if layer == "head":
        return "head.fc"
    _, block, *rest = layer.split("/")
    places = {"conv": 0, "bn": 1, "depthwise/conv": 0, "depthwise/bn": 1, "pointwise/conv": 3, "pointwise/bn": 4}
    return f"backbone.model.{block.removeprefix('block_') if '_' in block else 0}.{places['/'.join(rest)]}"


STAGE = [(stage, index) for stage, blocks in enumerate((1, 2, 3, 4, 3, 3, 1)) for index in range(blocks)]
ORDER = ("expand", "depthwise", "project")


def in_block(layer):
    """Number of a block from 1, stage, place in the stage, place of the layer in the block, and "conv" or "bn"."""
    _, block, name, part = layer.split("/")
    number = int(block.removeprefix("block_"))
    return number, *STAGE[number - 1], ORDER.index(name) - (number == 1), name, part


def of_torchvision_v2(layer):
    plain = {"head": "classifier.1", "backbone/stem/conv": "features.0.0", "backbone/stem/bn": "features.0.1"}
    plain |= {"backbone/last/conv": "features.18.0", "backbone/last/bn": "features.18.1"}
    if layer in plain:
        return plain[layer]
    number, _, _, place, name, part = in_block(layer)
    bn = int(part == "bn")
    return f"features.{number}.conv.{place + bn if name == 'project' else f'{place}.{bn}'}"


def of_mmpretrain_v2(layer):
    if layer == "head":
        return "head.fc"
    if "block" not in layer:
        _, name, part = layer.split("/")
        return f"backbone.{'conv1' if name == 'stem' else 'conv2'}.{part}"
    _, stage, index, place, _, part = in_block(layer)
    return f"backbone.layer{stage + 1}.{index}.conv.{place}.{part}"


def of_timm_v2(layer):
    plain = {"head": "classifier", "backbone/stem/conv": "conv_stem", "backbone/stem/bn": "bn1"}
    plain |= {"backbone/last/conv": "conv_head", "backbone/last/bn": "bn2"}
    if layer in plain:
        return plain[layer]
    number, stage, index, place, name, part = in_block(layer)
    kinds = {"expand": "conv_pw", "depthwise": "conv_dw", "project": "conv_pw" if number == 1 else "conv_pwl"}
    return f"blocks.{stage}.{index}.{kinds[name] if part == 'conv' else f'bn{place + 1}'}"


FILES = {
    ("torchvision", "resnet"): (RESNET, of_resnet("", "fc")),
    ("timm", "resnet"): (RESNET, of_resnet("", "fc")),
    ("mmpretrain", "resnet"): (RESNET, of_resnet("backbone.", "head.fc")),
    ("mmpretrain", "mobilenet_v1"): (V1, of_mobilenet_v1),
    ("torchvision", "mobilenet_v2"): (V2, of_torchvision_v2),
    ("mmpretrain", "mobilenet_v2"): (V2, of_mmpretrain_v2),
    ("timm", "mobilenet_v2"): (V2, of_timm_v2),
}


def load(state, source, model, classes=CLASSES):
    shapes = like(model, classes)
    return import_state_dict(state, source, model=model, like=shapes, num_classes=classes)


@pytest.mark.parametrize(("source", "kind"), FILES, ids="-".join)
def test_every_array_comes_from_the_tensor_of_its_layer(source, kind):
    model, called = FILES[source, kind]
    arrays = drawn(model)
    state = saved(arrays, called)
    imported = load(state, source, model)
    assert not imported.report.untouched
    for path, x in flatten_dict(imported.variables, sep="/").items():
        np.testing.assert_array_equal(x, arrays[path], err_msg=path)
    assert build_model(imported.model, CLASSES).task == "classification"
    assert count_classes(state, source, model=model, like=like(model, 1), num_classes=1) == CLASSES


@pytest.mark.parametrize("source", ["torchvision", "timm", "mmpretrain", "mmdet"])
def test_a_classifiers_file_is_a_detectors_backbone(source):
    prefix, head = ("backbone.", "head.fc") if source.startswith("mm") else ("", "fc")
    imported = load(saved(drawn(RESNET), of_resnet(prefix, head)), source, RETINANET)
    assert set(imported.variables["params"]) == {"backbone"}
    assert {name for name, _ in imported.report.skipped} >= {f"{head}.weight", f"{head}.bias"}


def test_a_backbone_alone_leaves_a_classifiers_last_layer():
    state = {name: x for name, x in saved(drawn(RESNET), of_resnet("", "fc")).items() if not name.startswith("fc.")}
    assert load(state, "torchvision", RESNET).report.untouched == ("params/head/bias", "params/head/kernel")


def test_what_does_not_fit_is_said():
    resnet, v2 = saved(drawn(RESNET), of_resnet("", "fc")), saved(drawn(V2), of_torchvision_v2)
    for state, source, model, classes, words in (
        (resnet, "torchvision", RESNET, 7, "they tell 5 classes apart and the model 7"),
        (v2, "torchvision", RESNET, 5, "their backbone is a MobileNetV2 and the model's a ResNet"),
        (resnet, "torchvision", RESNET | {"backbone": {"depth": 18, "width": 0.125}}, 5, "a ResNet of"),
        (resnet | {"extra.weight": np.zeros(3, np.float32)}, "torchvision", RESNET, 5, "without one: extra.weight"),
        (
            saved(drawn(V1), of_mobilenet_v1),
            "timm",
            V1,
            5,
            "0 of 135 tensors have a place in it",
        ),
    ):
        with pytest.raises(UserError, match=words):
            load(state, source, model, classes)


def test_pixels_are_those_that_the_files_own_config_says():
    """MMPretrain has them beside the model."""
    text = "model = dict(type='ImageClassifier', backbone=dict(type='ResNet', style='pytorch'))\n"
    text += "data_preprocessor = dict(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], to_rgb=False)\n"
    own = own_facts(read_config(text), "resnet_classifier")
    assert (own.model["pixel_mean"], own.model["pixel_std"], own.bgr) == ((3.0, 2.0, 1.0), (6.0, 5.0, 4.0), True)
    state = saved(drawn(RESNET), of_resnet("backbone.", "head.fc"))
    expected = expected_model(RESNET, "mmpretrain", state, config=read_config(text))
    assert expected.model["pixel_mean"] == (3.0, 2.0, 1.0)
    assert "blue, green, red" in " ".join(expected.changes)
