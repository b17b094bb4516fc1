"""Files that people hold, by the structure that their programs document, down to the arrays of our models."""

import json
import pickle

import numpy as np
import pytest
from safetensors.numpy import save_file

from kdjax.errors import UserError
from kdjax.weights import misfit, read_weights
from tests.weights import naming
from tests.weights.naming import random_variables, resnet_names, to_state_dict
from tests.weights.pickles import op_dict, op_int, op_name, op_state, op_text, write_pth, write_zip
from tests.weights.test_state_dict import DENSE, ROI, assert_variables, load

DETECTORS = {"retinanet": DENSE, "faster_rcnn": ROI}
STEM = "backbone.bottom_up.stem.conv1.weight"


@pytest.fixture
def retinanet():
    """Names of MMDetection to arrays, and the variables that they are."""
    variables = random_variables("retinanet", DENSE)
    return to_state_dict(variables, naming.mmdet_names("retinanet", DENSE)), variables


def turned(image_kernel):
    """Blue, green, red for red, green, blue."""
    return np.stack([image_kernel[:, channel] for channel in (2, 1, 0)], axis=1)


def op_history(numbers):
    """A HistoryBuffer of MMEngine: two arrays, and its own methods by name."""
    owner = op_name("mmengine.logging.history_buffer", "HistoryBuffer")
    method = op_name("builtins", "getattr") + owner + op_text("min") + b"\x86R"
    array = pickle.dumps(numbers, 2)[2:-1]
    # Arrays are written with numbers of memo of their own; those of the next one take their place.
    state = op_dict(_log_history=array, _count_history=array, _statistics_methods=op_dict(min=method))
    return owner + b")\x81" + state + b"b"


def test_a_checkpoint_of_mmdetection_3_with_its_histories(tmp_path, retinanet):
    state, variables = retinanet
    tensors, data = op_state(state)
    path = tmp_path / "best_coco_bbox_mAP_epoch_12.pth"
    history = op_history(np.arange(10**5, dtype=np.float64))
    hub = op_dict(
        log_scalars=op_dict(**{"train/loss": history, "train/lr": history}), runtime_info=op_dict(iter=op_int(9))
    )
    content = op_dict(meta=op_dict(epoch=op_int(12)), state_dict=tensors, message_hub=hub, param_schedulers=b"]")
    write_zip(path, content, data)
    assert_variables(load(read_weights(path).tensors, "mmdet", "retinanet", DENSE, variables), variables)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_detector_of_detectron2s_model_zoo(tmp_path, protocol):
    variables = random_variables("faster_rcnn", ROI)
    state = to_state_dict(variables, naming.detectron2_names("faster_rcnn", ROI))
    state[STEM] = turned(state[STEM])
    path = tmp_path / "model_final_280758.pkl"
    content = {"model": state, "__author__": "Detectron2 Model Zoo", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content, protocol))
    assert_variables(load(read_weights(path).tensors, "detectron2", "faster_rcnn", ROI, variables), variables)


def adelaidet_names():
    names, head = naming.detectron2_names("fcos", DENSE), "proposal_generator.fcos_head"
    for ours, theirs in (("cls", "cls_tower"), ("box", "bbox_tower")):
        for index in range(4):
            names[f"head/{ours}_conv_{index}"] = f"{head}.{theirs}.{3 * index}"
            names[f"head/{ours}_norm_{index}"] = f"{head}.{theirs}.{3 * index + 1}"
    names |= {"head/cls_logits": f"{head}.cls_logits", "head/box_distances": f"{head}.bbox_pred"}
    names["head/centerness"] = f"{head}.ctrness"
    return names | {f"head/scale_p{level}": f"{head}.scales.{level - 3}" for level in DENSE}


def test_an_fcos_of_adelaidet(tmp_path):
    """Its convolutions have a bias beside the normalisation, and its scales are lists of one number."""
    variables = random_variables("fcos", DENSE, norm=True, scales=True)
    for path in [path for path in variables if "_conv_" in path and path.startswith("params/head/")]:
        variables[path.replace("kernel", "bias")] = np.arange(naming.CHANNELS, dtype=np.float32) + len(path)
    state = to_state_dict(variables, adelaidet_names())
    state[STEM] = turned(state[STEM])
    state = {name: x[None] if name.endswith(".scale") else x for name, x in state.items()}
    write_pth(tmp_path / "FCOS_R_50_1x.pth", state)
    imported = load(read_weights(tmp_path / "FCOS_R_50_1x.pth").tensors, "detectron2", "fcos", DENSE, variables)
    assert_variables(imported, variables)


def caffe2_names():
    names = {"backbone/conv1": "conv1", "backbone/bn1": "res_conv1_bn"}
    for layer, blocks in enumerate(naming.BLOCKS, start=1):
        for block in range(blocks):
            ours, theirs = f"backbone/layer{layer}_{block}", f"res{layer + 1}_{block}_branch"
            for index, letter in enumerate("abc", start=1):
                names[f"{ours}/conv{index}"] = f"{theirs}2{letter}"
                names[f"{ours}/bn{index}"] = f"{theirs}2{letter}_bn"
            names[f"{ours}/downsample_conv"] = f"{theirs}1"
            names[f"{ours}/downsample_bn"] = f"{theirs}1_bn"
    return names


CAFFE2 = {"weight": "w", "bias": "b", "running_mean": "rm", "running_var": "riv"}


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("blobs", [False, True])
def test_a_backbone_by_the_names_of_caffe2(tmp_path, statistics, blobs):
    variables = random_variables("retinanet", DENSE)
    backbone = {path: x for path, x in variables.items() if "/backbone/" in path}
    norms = [path for path in backbone if path.startswith("batch_stats")]
    if not statistics:
        backbone |= {path: np.zeros_like(backbone[path]) for path in norms if path.endswith("mean")}
        backbone |= {path: np.ones_like(backbone[path]) - np.float32(1e-5) for path in norms if path.endswith("var")}
    state = {}
    for name, array in to_state_dict(backbone, caffe2_names()).items():
        layer, leaf = name.rsplit(".", 1)
        if statistics or not leaf.startswith("running"):
            state[f"{layer}_{'s' if layer.endswith('_bn') and leaf == 'weight' else CAFFE2[leaf]}"] = array
    assert {"conv1_w", "res_conv1_bn_s", "res_conv1_bn_b", "res2_0_branch2a_w", "res3_0_branch1_bn_b"} <= state.keys()
    state["conv1_w"] = turned(state["conv1_w"])
    state |= {"fc1000_w": np.zeros((10, 20)), "fc1000_b": np.zeros(10), "conv1_b": np.zeros(8)}
    state["conv1_w_momentum"] = state["conv1_w"]
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps({"blobs": state} if blobs else state, 2))
    imported = load(read_weights(path).tensors, "detectron2", "retinanet", DENSE, variables)
    assert_variables(imported, backbone)
    assert dict(imported.report.skipped).keys() == {"fc1000_w", "fc1000_b", "conv1_b", "conv1_w_momentum"}
    words = f"{len(norms) // 2} batch norms, whose scales contain their statistics, took those of the identity"
    assert (words in imported.report.changes) is not statistics


def test_torchvisions_backbone_by_the_names_of_detectron2(tmp_path):
    variables = random_variables("retinanet", DENSE)
    backbone = {path: x for path, x in variables.items() if "/backbone/" in path}
    state = to_state_dict(backbone, naming.detectron2_names("retinanet", DENSE))
    state = {name.removeprefix("backbone.bottom_up."): array for name, array in state.items()}
    assert {"stem.conv1.weight", "stem.conv1.norm.bias", "res2.0.shortcut.norm.running_mean"} <= state.keys()
    state |= {"stem.fc.weight": np.zeros((10, 20)), "stem.fc.bias": np.zeros(10)}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({"model": state, "matching_heuristics": True}, 2))
    imported = load(read_weights(tmp_path / "R-50.pkl").tensors, "detectron2_rgb", "retinanet", DENSE, variables)
    assert_variables(imported, backbone)
    assert dict(imported.report.skipped).keys() == {"stem.fc.weight", "stem.fc.bias"}
    assert imported.model["pixel_std"] == (58.395, 57.12, 57.375)
    assert imported.model["backbone"]["style"] == "pytorch"


OTHERS = {
    "teacher.backbone.conv1.weight": np.ones(3, np.float32),
    "distill_losses.loss_mgd_fpn_0.x": np.ones(3, np.float32),
}
PREFIXES = {
    "data-parallel": ("module.", {}, "module. was taken off 136 names"),
    "torch.compile": ("_orig_mod.", {}, "_orig_mod. was taken off 136 names"),
    "both": ("module._orig_mod.", {}, "module._orig_mod. was taken off 136 names"),
    "Lightning": ("model.", {"criterion.weight": np.ones(2, np.float32)}, "model. was taken off 136 names"),
    "MGD": ("student.", OTHERS, "student. was taken off 136 names"),
    "MMRazor": ("architecture.", {}, "architecture. was taken off 136 names"),
    "averaged": ("module.", {"n_averaged": np.array(7.0, np.float32)}, "module. was taken off 136 names"),
}


@pytest.mark.parametrize("case", PREFIXES)
def test_the_prefix_of_a_wrapper_is_taken_off_and_that_is_said(tmp_path, retinanet, case):
    prefix, others, words = PREFIXES[case]
    state, variables = retinanet
    path = tmp_path / "last.ckpt"
    write_pth(path, {f"{prefix}{name}": x for name, x in state.items()} | others)
    imported = load(read_weights(path).tensors, "mmdet", "retinanet", DENSE, variables)
    assert_variables(imported, variables)
    assert "; ".join(imported.report.changes) == words
    assert {name for name, why in imported.report.skipped if "without the prefix" in why} == others.keys()


def test_a_prefix_that_makes_no_name_match_stays(retinanet):
    state, variables = retinanet
    for prefix in ("module.teacher.", "teacher.", "net."):
        other = {f"{prefix}{name}": x for name, x in state.items()}
        with pytest.raises(UserError, match=rf"0 of 136 tensors have a place in it; without one: {prefix}backbone"):
            load(other, "mmdet", "retinanet", DENSE, variables)


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_the_backbone_of_a_classifier_of_mmpretrain(tmp_path, prefix):
    variables = random_variables("retinanet", DENSE)
    backbone = {path: x for path, x in variables.items() if "/backbone/" in path}
    state = to_state_dict(backbone, resnet_names("backbone."))
    state |= {"head.fc.weight": np.zeros((10, 20), np.float32), "head.fc.bias": np.zeros(10, np.float32)}
    path = tmp_path / "resnet50_8xb32_in1k_20210831-ea4938fc.pth"
    write_pth(path, {prefix + name: x for name, x in state.items()})
    imported = load(read_weights(path).tensors, "mmdet", "retinanet", DENSE, variables)
    assert_variables(imported, backbone)
    assert dict(imported.report.skipped).keys() == {"head.fc.weight", "head.fc.bias"}
    assert set(imported.report.untouched) == variables.keys() - backbone.keys()
    assert "head" not in imported.model or "convention" not in imported.model["head"]


def test_weights_in_several_files(tmp_path, retinanet):
    state, variables = retinanet
    places = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(state)}
    for shard in set(places.values()):
        save_file({name: x for name, x in state.items() if places[name] == shard}, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    tensors = read_weights(tmp_path / "model.safetensors.index.json").tensors
    assert_variables(load(tensors, "mmdet", "retinanet", DENSE, variables), variables)


def test_the_averaged_weights_of_torchvisions_checkpoints_can_be_chosen(tmp_path, retinanet):
    _, variables = retinanet
    names = naming.torchvision_names("retinanet", DENSE)
    averaged = to_state_dict(variables, names)
    both = {f"module.{name}": x for name, x in averaged.items()}
    content = {"model": {name: x + 1 for name, x in averaged.items()}, "model_ema": both | {"n_averaged": np.array(3)}}
    path = tmp_path / "model_25.pth"
    path.write_bytes(pickle.dumps(content))
    file = read_weights(path, "model_ema")
    assert_variables(load(file.tensors, "torchvision", "retinanet", DENSE, variables), variables)


def renamed(state, old, new):
    return {name.replace(old, new): x for name, x in state.items()}


def deeper(state):
    """With one block more in the first layer."""
    return state | {name.replace("layer1.0", "layer1.1"): x for name, x in state.items() if "layer1.0" in name}


MISFITS = {
    "another depth": (
        lambda state: deeper(state),
        "mmdet",
        r"their backbone is a ResNet of \(2, 2, 1, 1\) blocks and the model's a ResNet of \(1, 2, 1, 1\) blocks; \d+",
    ),
    "another detector": (
        lambda state: to_state_dict(random_variables("fcos", DENSE), naming.mmdet_names("fcos", DENSE)),
        "mmdet",
        "do not fit the model: they are of a fcos and the model is a retinanet; ",
    ),
    "another source": (lambda state: state, "detectron2", "do not fit the model: their names are those of mmdet; 0 of"),
    "other classes": (
        lambda state: (
            state
            | {
                f"bbox_head.retina_cls.{leaf}": np.zeros((720, *state[f"bbox_head.retina_cls.{leaf}"].shape[1:]))
                for leaf in ("weight", "bias")
            }
        ),
        "mmdet",
        r"have other shapes than the model: they tell 80 classes apart and the model 3; bbox_head\.retina_cls\.bias",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_misfit_begins_with_its_cause(retinanet, case):
    change, source, words = MISFITS[case]
    state, variables = retinanet
    with pytest.raises(UserError, match=words) as raised:
        load(change(state), source, "retinanet", DENSE, variables)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("blocks", "parts", "groups", "name"),
    [
        ((2, 2, 2, 2), 2, 1, "ResNet-18"),
        ((3, 4, 6, 3), 2, 1, "ResNet-34"),
        ((3, 4, 6, 3), 3, 1, "ResNet-50"),
        ((3, 4, 23, 3), 3, 1, "ResNet-101"),
        ((3, 4, 23, 3), 3, 64, "ResNeXt-101 64x4d"),
        ((3, 4, 23, 3), 3, 32, "ResNeXt-101 32x4d"),
        ((1, 1, 1, 1), 2, 1, "ResNet of (1, 1, 1, 1) blocks"),
    ],
)
def test_a_backbone_is_called_by_its_name(blocks, parts, groups, name):
    width = 4 * groups if groups > 1 else 64
    kernels = {
        f"backbone/layer{layer}_{block}/conv{part}": (width, width // groups if part == 2 else width)
        for layer, count in enumerate(blocks, start=1)
        for block in range(count)
        for part in range(1, parts + 1)
    }
    assert misfit._called(kernels) == name
    assert misfit._called({}) == ""
