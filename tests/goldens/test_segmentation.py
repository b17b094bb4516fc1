"""Every segmenter against what the original computed with the same weights, read by the importer as if downloaded.

The cases are those that :mod:`tests.goldens.cases` finds.
"""

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from flax.typing import Dtype

from kdjax.losses.segmentation import resize, segmentation_loss
from kdjax.models import build_model, complete
from kdjax.models.segmentation import DeepLabV3
from kdjax.types import IGNORED, Labels
from kdjax.weights import SOURCES, expected_model, import_state_dict
from tests.goldens.cases import Case, assert_close, find_cases, load_case, no_cases, quick_of
from tests.goldens.synthetic import synthetic_state_dict

OUTPUT_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3
TRAIN_TOLERANCE = 2e-3
PIXELS = 0.999

NETWORK = re.compile(r"(mmseg|maskd|torchvision)_(pspnet|deeplabv3)_\w+")
LOSS = re.compile(r"mmseg_cross_entropy\w*")
CASES = [path for path in find_cases("segmentation") if NETWORK.fullmatch(path.stem)]
LOSSES = [path for path in find_cases("segmentation") if LOSS.fullmatch(path.stem)]
# Both networks, and both backbones.
QUICK = ("mmseg_pspnet_r18", "maskd_deeplabv3_resnet18", "maskd_deeplabv3_mobilenetv2")

SOURCE = {"mmseg": "mmseg", "maskd": "cirkd", "torchvision": "torchvision"}
STEM = {"mmseg": "v1c", "maskd": "v1s", "torchvision": "plain"}
CLASSIFIERS = ("decode_head.conv_seg", "head.block.4", "head.classifier", "classifier.4")
AUXILIARY_CLASSIFIERS = ("auxiliary_head.conv_seg", "auxlayer.block.4", "aux_classifier.4")
AUXILIARY_WEIGHT = 0.4
"""In the loss of mmseg's cases, whose auxiliary term has it too."""

# Everything runs once: compiling takes longer than running.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def original(name: str, spec: Mapping[str, list[int]]) -> dict[str, Any]:
    """The config of the segmenter of a case: what its name and the widths of its classifiers say."""
    family, network, rest = name.split("_", 2)

    def width(classifiers: tuple[str, ...]) -> int:
        return next((spec[f"{x}.weight"][1] for x in classifiers if f"{x}.weight" in spec), 0)

    head = {"channels": width(CLASSIFIERS), "auxiliary_channels": width(AUXILIARY_CLASSIFIERS)}
    head["average_over"] = "all" if family == "mmseg" else "labelled"
    if rest == "mobilenetv2":
        return {"name": f"{network}_mobilenet_v2", "head": head}
    depth = int(re.sub(r"\D", "", rest))
    return {"name": network, "backbone": {"depth": depth, "stem": STEM[family]}, "head": head}


class Read(NamedTuple):
    """A segmenter with the weights of a case."""

    source: str
    module: nn.Module
    variables: dict[str, Any]
    paths: dict[str, str]
    """Of the original's tensors to those of ours."""
    images: np.ndarray
    size: np.ndarray
    labels: np.ndarray


def read(case: Case, name: str, dtype: Dtype = jnp.float32) -> Read:
    """Imports the case's weights, and its images and labels as ours are, to be computed with in ``dtype``."""
    source, classes = SOURCE[name.split("_")[0]], case.meta["num_classes"]
    state = synthetic_state_dict(case.spec, case.meta["weight_seed"])
    # What no shape shows, the importer knows.
    model = expected_model(complete(original(name, case.spec)), source, state).model
    images = case.whole("image")
    like = jax.eval_shape(build_model(model, classes).init, jax.random.key(0), images)
    imported = import_state_dict(state, source, model=model, like=like, num_classes=classes)
    assert imported.model == model
    assert not imported.report.untouched
    if SOURCES[source].bgr:
        images = images[..., ::-1]  # The importer turned the first convolution around.
    labels = np.where(case.whole("label") == case.meta["ignore_label"], IGNORED, case.whole("label"))
    size = np.tile(np.array(images.shape[1:3], np.int32), (len(images), 1))
    module = build_model(imported.model, classes, dtype=dtype)
    variables = jax.tree.map(lambda x: np.asarray(x, dtype), imported.variables)
    paths = dict(imported.report.taken)
    return Read(source, module, variables, paths, images.astype(dtype), size, labels.astype(np.uint8))


def compute(read: Read, train: bool, differentiate: bool = True) -> tuple[Any, Any]:
    """Terms, features, logits, captured maps and new statistics; and the gradient of the sum of the terms, or None."""

    def total(params: Any) -> Any:
        (maps, logits), seen = read.module.apply(
            {**read.variables, "params": params},
            read.images,
            read.size,
            train,
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=lambda module, _: module.name == "projection",
        )
        terms = read.module.loss(logits, Labels(read.labels), read.size)
        value = terms["seg"] + AUXILIARY_WEIGHT * terms.get("auxiliary", 0)
        return value, (terms, maps, logits, seen.get("intermediates", {}), seen["batch_stats"])

    if not differentiate:
        return jit(total)(read.variables["params"])[1], None
    (_, found), gradient = jit(jax.value_and_grad(total, has_aux=True))(read.variables["params"])
    return found, gradient


def close(case: Case, name: str, actual: Any, tolerance: float = OUTPUT_TOLERANCE) -> None:
    if name in case.arrays:
        assert_close(actual, case.arrays[name], name, tolerance)


def check_losses(case: Case, prefix: str, terms: Mapping[str, Any], tolerance: float) -> None:
    names = {f"{prefix}loss/task": ("seg", 1), f"{prefix}loss/task_auxiliary": ("auxiliary", 1)}
    names |= {f"{prefix}loss/decode/loss_ce": ("seg", 1), f"{prefix}loss/aux/loss_ce": ("auxiliary", AUXILIARY_WEIGHT)}
    found = {name for name in case.arrays if name.startswith(f"{prefix}loss/") and not name.endswith("acc_seg")}
    assert found <= names.keys()
    assert len(found) == len(terms)
    for name in found:
        term, weight = names[name]
        assert weight * float(terms[term]) == pytest.approx(float(case.whole(name)), rel=tolerance), name


def check_gradients(case: Case, read: Read, prefix: str, gradient: Any, close: Callable[..., None]) -> None:
    flat = {f"params/{path}": np.asarray(x) for path, x in flatten_dict(gradient or {}, sep="/").items()}
    for name in (name for name in case.arrays if name.startswith(prefix)):
        path = read.paths[name.removeprefix(prefix)]
        actual = flat[path]
        if read.source == "mmseg" and isinstance(read.module, DeepLabV3) and path.endswith("bottleneck/conv/kernel"):
            actual = np.roll(actual, actual.shape[-1], axis=2)  # Its pooled map comes first.
        close(actual, case.arrays[name], name)


def check_accuracy(case: Case, read: Read, name: str, logits: Any) -> None:
    """Percent of the labelled pixels that are told right."""
    if name in case.arrays:
        pixels = resize(logits, read.labels.shape[1:], align_corners=read.module.align_corners)
        right = (np.argmax(pixels, axis=-1) == read.labels)[read.labels != IGNORED]
        assert 100 * right.mean() == pytest.approx(float(case.whole(name)), abs=0.1), name


def check_pixels(case: Case, read: Read, prefix: str, module: nn.Module) -> None:
    """Logits at the size of the image, and the class of every pixel."""
    run = jit(functools.partial(module.apply, method="pixel_logits"))
    logits = np.moveaxis(np.asarray(run(read.variables, read.images, read.size)), 1, -1)
    close(case, f"{prefix}logits_first", logits[:1])
    share = np.mean(np.argmax(logits, axis=-1) == case.whole(f"{prefix}prediction"))
    assert share >= PIXELS, f"{share:.2%} of the pixels are the original's"


def test_there_are_cases() -> None:
    assert CASES, no_cases("segmentation")
    assert LOSSES, no_cases("segmentation")


@pytest.mark.parametrize("path", quick_of(QUICK, CASES), ids=lambda path: path.stem)
def test_segmenter_is_the_original(path: Path) -> None:
    case = load_case(path)
    made = read(case, path.stem)
    differentiate = any(name.startswith("gradient/") for name in case.arrays)
    (terms, maps, logits, captured, kept), gradient = compute(made, train=False, differentiate=differentiate)
    jax.tree.map(np.testing.assert_array_equal, kept, made.variables["batch_stats"])
    for index, level in enumerate(("c2", "c3", "c4", "c5")):
        close(case, f"feature_{index}", maps[level])
    for name, level, actual in (("decode", "decode", logits.main), ("auxiliary", "auxiliary", logits.auxiliary)):
        close(case, f"{name}/logits", actual)
        close(case, f"{name}/feature", maps.get(level))
    if "aspp" in case.arrays:
        (projected,) = captured["head"]["decoder"]["projection"]["__call__"]
        close(case, "aspp", nn.relu(projected))
    check_losses(case, "", terms, LOSS_TOLERANCE)
    check_accuracy(case, made, "loss/decode/acc_seg", logits.main)
    check_accuracy(case, made, "loss/aux/acc_seg", logits.auxiliary)
    check_gradients(case, made, "gradient/", gradient, functools.partial(assert_close, tolerance=GRADIENT_TOLERANCE))
    check_pixels(case, made, "", made.module)
    if "slide/prediction" in case.arrays:
        window, stride = (tuple(case.whole(f"slide/{x}").tolist()) for x in ("crop_size", "stride"))
        check_pixels(case, made, "slide/", made.module.clone(window=window, window_stride=stride))


def has_training(path: Path) -> bool:
    with np.load(path) as file:
        return any(name.startswith("train/") for name in file.files)


def check_training(case: Case, name: str) -> None:
    made = read(case, name, jnp.float64)
    (terms, _, logits, _, statistics), gradient = compute(made, train=True)
    check_losses(case, "train/", terms, LOSS_TOLERANCE)
    check_accuracy(case, made, "train/loss/decode/acc_seg", logits.main)
    check_accuracy(case, made, "train/loss/aux/acc_seg", logits.auxiliary)
    check_gradients(case, made, "train/gradient/", gradient, functools.partial(assert_close, tolerance=TRAIN_TOLERANCE))
    updated = {f"batch_stats/{path}": x for path, x in flatten_dict(statistics, sep="/").items()}
    names = [name for name in case.arrays if name.startswith("train/updated/")]
    assert names
    for name in names:
        assert_close(
            updated[made.paths[name.removeprefix("train/updated/")]], case.arrays[name], name, OUTPUT_TOLERANCE
        )


@pytest.mark.parametrize(
    "path", quick_of(("mmseg_pspnet_r18",), filter(has_training, CASES)), ids=lambda path: path.stem
)
def test_segmenter_trains_as_the_original(path: Path) -> None:
    """With the statistics of the batch, which become running ones, and nothing dropped.

    In float64: where batch norm sees few values, a ReLU that the last bits of another processor close changes gradients
    by several percent.
    """
    with jax.enable_x64(True):
        check_training(load_case(path), path.stem)


@pytest.mark.parametrize("path", LOSSES, ids=lambda path: path.stem)
@pytest.mark.parametrize("align_corners", [False, True])
def test_resizing_and_the_loss_are_the_originals(path: Path, align_corners: bool) -> None:
    case = load_case(path)
    logits, labels = case.whole("logits"), case.whole("label")
    resized = resize(jnp.asarray(logits), labels.shape[1:], align_corners=align_corners)
    close(case, f"resized_align_corners_{align_corners}", resized, 1e-5)
    right = (np.argmax(resized, axis=-1) == labels)[labels != case.meta["ignore_label"]]
    assert 100 * right.mean() == pytest.approx(float(case.whole(f"accuracy_align_corners_{align_corners}")), abs=1e-3)
    for labelled_only in (False, True):
        how = {"align_corners": align_corners, "labelled_only": labelled_only}
        name = f"align_corners_{align_corners}_avg_non_ignore_{labelled_only}"
        value, gradient = jit(jax.value_and_grad(functools.partial(segmentation_loss, **how)))(logits, classes=labels)
        assert float(value) == pytest.approx(float(case.whole(f"loss_{name}")), rel=1e-5)
        close(case, f"grad_{name}", gradient, 1e-4)
