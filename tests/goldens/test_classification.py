"""Every classifier against what the original computed with the same weights, read by the importer as if downloaded.

The cases are those that :mod:`tests.goldens.cases` finds. A case of a classifier that kdjax does not have is skipped.
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

from kdjax.losses import cross_entropy, mgd_loss
from kdjax.methods.levels import Align
from kdjax.methods.mgd import Generation
from kdjax.models import MODELS, build_model
from kdjax.models.resnet import max_pool
from kdjax.types import Labels, Sampling
from kdjax.weights import import_state_dict
from tests.goldens.cases import Case, assert_close, assert_near, find_cases, load_case, no_cases, quick_of
from tests.goldens.synthetic import synthetic_state_dict

OUTPUT_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3
TRAIN_TOLERANCE = 2e-3
DEEP_GRADIENT_TOLERANCE, DEEP_TRAIN_TOLERANCE = 2e-3, 0.02
"""Of the backbone of ResNet-50, where a ReLU is open in the original's float32 that float64 closes: gradients differ by
1.4e-3, and in training, where the last norms see 12 values a channel, by 1.8 % in norm, one entry of 2048 by 12 % of
the largest."""
SMOOTHING = {"loss/cross_entropy": 0.0, "loss/label_smoothing_0.1": 0.1, "loss/label_smoothing_0.1_mmpretrain": 0.1}

CASES = find_cases("classification")
# One, and what distils another.
QUICK = ("torchvision_resnet18", "mgd_distiller_resnet34_resnet18_0")

# Everything runs once: compiling takes longer than running.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

Names = Mapping[str, str]
"""Of the original's tensors to the paths of ours."""


class Original(NamedTuple):
    """What a case was computed by."""

    source: str
    """A key of ``SOURCES``."""
    model: dict[str, Any]
    """The config of our classifier, without dropout, which the originals left out."""


def original(name: str) -> Original:
    """From the name of a model to how it is read."""
    source = "torchvision" if name.startswith("torchvision") else "mmpretrain"
    if depth := re.search(r"resnet(\d+)", name):
        return Original(source, {"name": "resnet_classifier", "backbone": {"depth": int(depth[1])}})
    version = re.search(r"mobilenet_?(v\d)", name)
    assert version, name
    return Original(source, {"name": f"mobilenet_{version[1]}", "head": {"dropout": 0.0}})


class Read(NamedTuple):
    """A classifier with the weights of a case."""

    module: nn.Module
    variables: dict[str, Any]
    paths: Names


def read(case: Case, origin: Original, state: Mapping[str, np.ndarray], dtype: Dtype = jnp.float32) -> Read:
    images, classes = case.whole("image"), case.meta["num_classes"]
    like = jax.eval_shape(build_model(origin.model, classes).init, jax.random.key(0), images)
    imported = import_state_dict(state, origin.source, model=origin.model, like=like, num_classes=classes)
    assert not imported.report.untouched
    variables = jax.tree.map(lambda x: np.asarray(x, dtype), imported.variables)
    return Read(build_model(imported.model, classes, dtype=dtype), variables, dict(imported.report.taken))


def loss_of(module: nn.Module, images: np.ndarray, labels: np.ndarray, train: bool) -> Any:
    """(params, statistics) to the loss, and what else there is: maps, logits, captured maps, new statistics."""
    size = np.tile(np.array(images.shape[1:3], np.int32), (len(images), 1))
    # Dropout is what sampling is for, and there is none.
    sampling = Sampling(None, jax.random.split(jax.random.key(0), len(images))) if train else None

    def run(params: Any, statistics: Any) -> Any:
        (maps, predictions), seen = module.apply(
            {"params": params, "batch_stats": statistics},
            images,
            size,
            train,
            sampling,
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=lambda module, _: (
                re.fullmatch(r"block_\d+|stem|last|bn1", module.name or "") is not None
            ),
        )
        (loss,) = module.loss(predictions, Labels(labels), size).values()
        return loss, (maps, predictions.main, seen["intermediates"], seen["batch_stats"])

    return run


def check_gradients(
    case: Case,
    prefix: str,
    gradient: Any,
    paths: Names,
    tolerance: float,
    of_backbone: float,
    close: Callable[..., None] = assert_close,
) -> None:
    """All arrays within one tolerance, those of the backbone as they are ``close`` within another."""
    flat = {f"params/{path}": x for path, x in flatten_dict(gradient, sep="/").items()}
    names = [name for name in case.arrays if name.startswith(prefix)]
    assert names
    for name in names:
        path = paths[name.removeprefix(prefix)]
        if path.startswith("params/backbone/"):
            close(flat[path], case.arrays[name], name, of_backbone)
        else:
            assert_close(flat[path], case.arrays[name], name, tolerance)


def check_maps(case: Case, maps: Any, captured: Any) -> None:
    """The maps of the strides, and those of single blocks and of the stem."""
    for index, (level, actual) in enumerate(maps.items()):
        if f"feature_{index}" in case.arrays:
            assert_close(actual, case.arrays[f"feature_{index}"], level, OUTPUT_TOLERANCE)
    inside = {name: x["__call__"][0] for name, x in captured["backbone"].items() if "__call__" in x}
    if "stem" in case.arrays:
        assert_close(max_pool(nn.relu(inside["bn1"])), case.arrays["stem"], "stem", OUTPUT_TOLERANCE)
    for name in (name for name in case.arrays if re.fullmatch(r"block_\d+", name)):
        if name == "block_0":  # Its activation is not part of it.
            actual = (nn.relu6 if "last" in inside else nn.relu)(inside["stem"])
        else:
            actual = maps["c5"] if name == "block_18" else inside[name]
        assert_close(actual, case.arrays[name], name, OUTPUT_TOLERANCE)


def is_deep(module: Any) -> bool:
    """Of a ResNet-50 and beyond."""
    return getattr(module.backbone, "depth", 0) >= 50


def check_network(case: Case, name: str) -> None:
    state = synthetic_state_dict(case.spec, case.meta["weight_seed"])
    images, labels = case.whole("image"), case.whole("label").astype(np.int32)
    module, variables, paths = read(case, original(name), state)
    params, statistics = variables["params"], variables["batch_stats"]
    run = jit(jax.value_and_grad(loss_of(module, images, labels, train=False), has_aux=True))
    (loss, (maps, logits, captured, kept)), gradient = run(params, statistics)
    jax.tree.map(np.testing.assert_array_equal, kept, statistics)
    check_maps(case, maps, captured)
    assert_close(logits, case.arrays["logits"], "logits", OUTPUT_TOLERANCE)
    for key, smoothing in SMOOTHING.items():
        smoothed = float(jnp.mean(cross_entropy(logits, labels, smoothing=smoothing)))
        assert smoothed == pytest.approx(float(case.whole(key)), rel=LOSS_TOLERANCE), key
    assert float(loss) == pytest.approx(float(case.whole("loss/cross_entropy")), rel=LOSS_TOLERANCE)
    deep = is_deep(module)
    tolerance = DEEP_GRADIENT_TOLERANCE if deep else GRADIENT_TOLERANCE
    check_gradients(case, "gradient/", gradient, paths, GRADIENT_TOLERANCE, tolerance)


def check_training(case: Case, name: str) -> None:
    """With the statistics of the batch.

    In float64: where batch norm sees few values, a ReLU that the last bits of another processor close changes gradients
    by several percent.
    """
    state = synthetic_state_dict(case.spec, case.meta["weight_seed"])
    images, labels = case.whole("image").astype(np.float64), case.whole("label").astype(np.int32)
    module, variables, paths = read(case, original(name), state, jnp.float64)
    run = jit(jax.value_and_grad(loss_of(module, images, labels, train=True), has_aux=True))
    (loss, (_, _, _, updated)), gradient = run(variables["params"], variables["batch_stats"])
    assert float(loss) == pytest.approx(float(case.whole("train/loss/cross_entropy")), rel=LOSS_TOLERANCE)
    deep = is_deep(module)
    close, tolerance = (assert_near, DEEP_TRAIN_TOLERANCE) if deep else (assert_close, TRAIN_TOLERANCE)
    check_gradients(case, "train/gradient/", gradient, paths, TRAIN_TOLERANCE, tolerance, close)
    if case.meta["source"] == "MGD repository":  # Its statistics are those after the batch was seen twice.
        _, (_, _, _, updated) = run(variables["params"], updated)[0]
    flat = {f"batch_stats/{path}": x for path, x in flatten_dict(updated, sep="/").items()}
    for key in (key for key in case.arrays if key.startswith("train/updated/")):
        assert_close(flat[paths[key.removeprefix("train/updated/")]], case.arrays[key], key, TRAIN_TOLERANCE)


def check_distiller(case: Case, teacher_name: str, student_name: str) -> None:
    """MGD on whole networks: cross-entropy and the loss on the last maps, with channels hidden."""
    state = synthetic_state_dict(case.spec, case.meta["weight_seed"])
    taught = {name.removeprefix("teacher."): x for name, x in state.items() if name.startswith("teacher.")}
    teacher = read(case, original(teacher_name), taught)
    # The importer itself finds the student among the rest.
    student = read(case, original(student_name), state)
    images, labels = case.whole("image"), case.whole("label").astype(np.int32)
    theirs = jit(functools.partial(teacher.module.apply, method="features"))(teacher.variables, images)["c5"]
    assert_close(theirs, case.arrays["teacher_feature"], "teacher", OUTPUT_TOLERANCE)

    own = "distill_losses.loss_mgd."
    convs = {f"conv_{k}": f"{own}generation.{2 * k}" for k in range(2)}
    paths = {f"{name}.{leaf}": f"params/{path}/conv/{ours}" for path, name in convs.items() for leaf, ours in LEAVES}
    learnt = {"generation": {path: {"conv": conv(state, name)} for path, name in convs.items()}}
    if f"{own}align.weight" in state:
        learnt["align"] = {"conv": conv(state, f"{own}align")}
    base = loss_of(student.module, images, labels, train=False)

    def run(params: Any, learnt: Any) -> Any:
        loss, (maps, *_) = base(params, student.variables["batch_stats"])
        ours = Align(theirs.shape[-1]).apply({"params": learnt.get("align", {})}, maps["c5"])
        distilled = case.meta["alpha"] * mgd_loss(
            ours,
            theirs,
            keep=case.whole("keep_mask") > 0,
            generate=functools.partial(Generation().apply, {"params": learnt["generation"]}),
        )
        return loss + distilled, (loss, distilled, maps["c5"])

    (total, (loss, distilled, ours)), gradients = jit(jax.value_and_grad(run, (0, 1), has_aux=True))(
        student.variables["params"], learnt
    )
    assert_close(ours, case.arrays["student_feature"], "student", OUTPUT_TOLERANCE)
    for key, value in {"ori_loss": loss, "loss_mgd": distilled, "total": total}.items():
        assert float(value) == pytest.approx(float(case.whole(f"loss/{key}")), rel=LOSS_TOLERANCE), key
    paths |= {f"{own}align.{leaf}": f"params/align/conv/{ours}" for leaf, ours in LEAVES}
    paths |= {f"student.{name}": path for name, path in student.paths.items()}
    both = gradients[0] | gradients[1]["generation"] | {"align": gradients[1].get("align", {})}
    check_gradients(case, "gradient/", both, paths, GRADIENT_TOLERANCE, GRADIENT_TOLERANCE)


LEAVES = (("weight", "kernel"), ("bias", "bias"))


def conv(state: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {"kernel": state[f"{name}.weight"].transpose(2, 3, 1, 0), "bias": state[f"{name}.bias"]}


def test_there_are_cases() -> None:
    assert CASES, no_cases("classification")


@pytest.mark.parametrize("path", quick_of(QUICK, CASES), ids=lambda path: path.stem)
def test_classifier_is_the_original(path: Path) -> None:
    case = load_case(path)
    if pair := re.fullmatch(r"mgd_distiller_([a-z]+_?v?\d+)_([a-z]+_?v?\d+)_\d+", path.stem):
        check_distiller(case, *pair.groups())
        return
    if original(case.meta["model"]).model["name"] not in MODELS:
        pytest.skip(f"kdjax has no classifier for {case.meta['model']}")
    check_network(case, case.meta["model"])
    with jax.enable_x64(True):
        check_training(case, case.meta["model"])
