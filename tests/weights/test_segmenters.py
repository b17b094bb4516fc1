"""What the importer says of segmenters' files: names and layouts are held by the goldens, whose names these are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from kdjax.errors import UserError
from kdjax.models import build_model, complete
from kdjax.weights import count_classes, expected_model, import_state_dict
from kdjax.weights.own_config import read_config
from tests.goldens.cases import find_cases, load_case

PSPNET = {"name": "pspnet", "backbone": {"depth": 18}, "head": {"channels": 128, "auxiliary_channels": 64}}
DEEPLAB = PSPNET | {"name": "deeplabv3"}
CIRKD_BACKBONE = {"depth": 18, "stem": "v1s"}


def tensors(case: str, only: str = "", off: str = "") -> dict[str, np.ndarray]:
    """Zeros by the names of a case, of those that begin so, and with that prefix taken off."""
    path = next(path for path in find_cases("segmentation") if path.stem == case)
    spec = load_case(path).spec
    return {name.removeprefix(off): np.zeros(spec[name], np.float32) for name in spec if name.startswith(only)}


def like(model, classes=19):
    return jax.eval_shape(build_model(model, classes).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))


def load(state, source, model, classes=19):
    model = expected_model(complete(model), source, state).model
    return import_state_dict(state, source, model=model, like=like(model, classes), num_classes=classes, origin="f.pth")


def test_what_no_tensor_shows_is_carried_and_said():
    state = tensors("maskd_deeplabv3_resnet18")
    model = complete(DEEPLAB | {"backbone": CIRKD_BACKBONE | {"output_stride": 32}})
    expected = expected_model(model, "cirkd", state)
    assert expected.model["backbone"] == model["backbone"] | {"output_stride": 8, "dilate_second": True}
    assert expected.model["head"] == model["head"] | {"align_corners": True, "projection": True}
    assert expected.model["pixel_mean"] == (122.67891, 116.66877, 104.00699)
    assert "head.align_corners became True instead of False, as in every deeplabv3 of cirkd" in expected.changes
    # In MMSegmentation's, somebody may have left the dilations out.
    doubtful = expected_model(
        complete(PSPNET | {"backbone": {"output_stride": 32}}), "mmseg", tensors("mmseg_pspnet_r18")
    )
    assert doubtful.model["backbone"]["output_stride"] == 32
    assert "backbone.output_stride is 32 by the config, and 8 in a pspnet of mmseg unless" in str(doubtful.changes)


@pytest.mark.parametrize(
    ("case", "source", "off", "backbone"),
    [
        ("mmseg_pspnet_r18", "mmseg", "backbone.", {"depth": 18, "stem": "v1c"}),
        ("maskd_pspnet_resnet18", "cirkd", "pretrained.", CIRKD_BACKBONE),
    ],
)
def test_backbones_with_deep_stems_are_imported_alone(case, source, off, backbone):
    state = tensors(case, off, off) | {"fc.weight": np.zeros((1000, 512)), "fc.bias": np.zeros(1000)}
    imported = load(state, source, PSPNET | {"backbone": backbone})
    assert set(imported.variables["params"]) == {"backbone"}
    assert len(imported.report.taken) == sum("num_batches" not in name for name in state) - 2
    assert imported.model["head"]["align_corners"] is False  # Which is about heads.


def test_a_segmenter_leaves_out_the_last_convolution_of_a_classifiers_backbone():
    state = tensors("maskd_deeplabv3_mobilenetv2", "pretrained.", "pretrained.net.")
    state |= {"features.18.0.weight": np.zeros((1280, 320, 1, 1)), "classifier.1.bias": np.zeros(1000)}
    state |= {f"features.18.1.{name}": np.zeros(1280) for name in ("weight", "bias", "running_mean", "running_var")}
    imported = load(state, "cirkd", {"name": "deeplabv3_mobilenet_v2"})
    assert set(imported.variables["params"]) == {"backbone"}
    assert "5 skipped: the last convolution, which classifiers alone have" in str(imported.report)


def test_the_first_convolution_of_a_deep_stem_is_turned_around():
    state = tensors("maskd_pspnet_resnet18")
    state["pretrained.conv1.weight"][:] = np.arange(3)[None, :, None, None]
    kernel = load(state, "cirkd", PSPNET | {"backbone": CIRKD_BACKBONE}).variables["params"]["backbone"]["conv1"]
    np.testing.assert_array_equal(kernel["kernel"][0, 0, :, 0], [2, 1, 0])


def test_the_pooled_map_that_mmsegmentation_puts_first_goes_last():
    state = tensors("mmseg_deeplabv3_r18")
    state["decode_head.bottleneck.conv.weight"][:] = np.arange(640)[None, :, None, None]
    head = load(state, "mmseg", DEEPLAB).variables["params"]["head"]
    inputs = head["decoder"]["bottleneck"]["conv"]["kernel"][1, 1, :, 0]
    np.testing.assert_array_equal(inputs, [*range(128, 640), *range(128)])


def test_classes_are_counted_and_a_background_is_one_of_them():
    state = tensors("torchvision_deeplabv3_resnet50")
    model = {"name": "deeplabv3", "backbone": {"stem": "plain"}, "head": {"channels": 256, "auxiliary_channels": 256}}
    expected = expected_model(complete(model), "torchvision", state).model
    assert count_classes(state, "torchvision", model=expected, like=like(expected, 1), num_classes=1) == 21
    imported = load(state, "torchvision", model, 21)
    assert flatten_dict(imported.variables, sep="/")["params/head/classifier/bias"].shape == (21,)
    assert "a background" not in str(imported.report)
    with pytest.raises(UserError, match="they tell 21 classes apart and the model 20"):
        load(state, "torchvision", model, 20)


@pytest.mark.parametrize(
    ("case", "source", "model", "words"),
    [
        ("mmseg_pspnet_r18", "mmseg", DEEPLAB, "they are of a pspnet and the model is a deeplabv3"),
        ("mmseg_pspnet_r18", "cirkd", PSPNET, "their names are those of mmseg"),
        (
            "mmseg_pspnet_r18",
            "mmseg",
            PSPNET | {"backbone": {"depth": 18, "stem": "plain"}},
            "their backbone is a ResNet-18 v1c and the model's a ResNet-18;",
        ),
        (
            "mmseg_pspnet_r18",
            "mmseg",
            PSPNET | {"backbone": {"depth": 50}},
            "is a ResNet-18 v1c and the model's a ResNet-50 v1c",
        ),
        ("mmseg_pspnet_r18", "mmseg", PSPNET | {"head": {}}, "have other shapes than the model"),
        (
            "mmseg_pspnet_r18",
            "mmseg",
            PSPNET | {"head": {"channels": 128, "auxiliary_channels": 0}},
            "without one: auxiliary_head.conv_seg.bias",
        ),
        ("mmseg_pspnet_r18", "mmseg", {"name": "retinanet"}, "cannot be those of a retinanet"),
    ],
)
def test_what_does_not_fit_is_said_in_words(case, source, model, words):
    with pytest.raises(UserError, match=words):
        load(tensors(case), source, model)


OWN = """\
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    backbone=dict(type='ResNetV1c', depth=18, dilations=(1, 1, 1, 2), strides=(1, 2, 2, 1), contract_dilation=True),
    decode_head=dict(type='ASPPHead', dilations=(1, 6, 12, 18), align_corners=True, norm_cfg=norm_cfg))
"""


def test_the_files_own_config_is_taken():
    state = tensors("mmseg_deeplabv3_r18")
    expected = expected_model(complete(DEEPLAB), "mmseg", state, "f.pth", read_config(OWN))
    assert expected.model["backbone"]["output_stride"] == 16
    assert expected.model["head"]["dilations"] == (6, 12, 18)
    assert expected.model["head"]["align_corners"] is True
    assert (
        "head.dilations became (6, 12, 18) instead of (12, 24, 36), as the file's own config says" in expected.changes
    )
    other = read_config(OWN.replace("contract_dilation=True", "contract_dilation=False"))
    with pytest.raises(UserError, match=r"of another model: .*contracted: False, which no model here has"):
        expected_model(complete(DEEPLAB), "mmseg", state, "f.pth", other)
