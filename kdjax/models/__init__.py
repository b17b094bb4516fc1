"""Detectors: backbones, necks, heads, and :func:`build_detector`, which makes one from a plain nested dict."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from flax.typing import Dtype

from kdjax.errors import UserError
from kdjax.models.detector import Detector
from kdjax.models.fcos import FCOS
from kdjax.models.fpn import FPN
from kdjax.models.rcnn import RCNN
from kdjax.models.resnet import ResNet
from kdjax.models.retinanet import RetinaNet
from kdjax.options import chosen, declared

__all__ = ["DETECTORS", "FCOS", "FPN", "RCNN", "ResNet", "RetinaNet", "build_detector", "class_outputs", "complete"]

DETECTORS: dict[str, Callable[..., nn.Module]] = {
    "retinanet": RetinaNet,
    "fcos": FCOS,
    "faster_rcnn": functools.partial(RCNN, stages=1, masks=False),
    "mask_rcnn": functools.partial(RCNN, stages=1, masks=True),
    "cascade_rcnn": functools.partial(RCNN, stages=3, masks=False, train_proposals=2000),
    "cascade_mask_rcnn": functools.partial(RCNN, stages=3, masks=True, train_proposals=2000),
}
"""A name to a detector; two-stage ones are one module whose fields say how often and for what it looks."""

_NECKS: dict[str, dict[str, Any]] = {
    name: {"min_level": 2, "max_level": 6, "extra_from": "pool"}
    for name in ("faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn")
}
"""The pyramids of detectors that differ from FPN's defaults."""

_COMMON = tuple(declared(Detector))
"""Options that all detectors have; they stand beside the sections of a detector's parts."""


def _parts(detector: type[nn.Module]) -> dict[str, list[str]]:
    """Names of the options of a detector's parts."""
    head = [name for name in declared(detector) if name not in _COMMON]
    return {"backbone": list(declared(ResNet)), "neck": list(declared(FPN)), "head": head}


def build_detector(
    config: Mapping[str, Any], num_classes: int, *, axis_name: str | None = None, dtype: Dtype = jnp.float32
) -> nn.Module:
    """Makes a detector from a plain nested dict.

    Args:
        config: ``name``, a key of ``DETECTORS`` or ``package.module:Class`` of somebody else's; ``backbone``, fields of
            :class:`ResNet`; ``neck``, fields of :class:`FPN`, by default from P2 to a pooled P6 for two-stage
            detectors; ``head``, fields of the detector; and the fields that all detectors have: ``pixel_mean``,
            ``pixel_std`` and ``frozen_norm``. All but ``name`` may be left out.
        num_classes: number of classes, without a background.
        axis_name: mapped axis of batch-norm statistics and counts; None outside of one.
        dtype: of the computation.

    Raises:
        UserError: an unknown name or field, or a value that the field does not allow.

    Example:
        >>> detector = build_detector({"name": "retinanet", "backbone": {"depth": 18, "width": 0.5}}, num_classes=3)
        >>> detector.backbone.depth
        18
    """
    _check(config, ("name", "backbone", "neck", "head", *_COMMON), "a detector's config")
    name = config.get("name", "")
    detector = chosen(name, DETECTORS, "detector")
    for part in ("backbone", "neck", "head"):
        if not isinstance(config.get(part, {}), Mapping):
            raise UserError(f"The detector's {part} is {config[part]!r}; it must be a section of fields.")
    # A config that was kept as JSON has lists where fields have tuples, and modules must be hashable.
    config = {field: _tuple(value) for field, value in config.items()}
    parts = {
        part: {field: _tuple(value) for field, value in config.get(part, {}).items()}
        for part in ("backbone", "neck", "head")
    }
    module: Any = detector.func if isinstance(detector, functools.partial) else detector
    if not isinstance(module, type) or not issubclass(module, nn.Module):
        raise UserError(f"{name!r} is no detector: it must be a class of Flax modules, see kdjax.models.")
    for part, known in _parts(module).items():
        _check(parts[part], known, f"the detector's {part}")
    return detector(
        backbone=ResNet(**parts["backbone"], axis_name=axis_name, dtype=dtype),
        neck=FPN(**(_NECKS.get(name, {}) | parts["neck"]), dtype=dtype),
        num_classes=num_classes,
        axis_name=axis_name,
        dtype=dtype,
        **parts["head"],
        **{field: config[field] for field in _COMMON if field in config},
    )


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """A detector's config with every field that it leaves out, at its default.

    >>> complete({"name": "faster_rcnn"})["neck"]["extra_from"]
    'pool'
    """
    module = build_detector(config, num_classes=1)
    parts = {"backbone": module.backbone, "neck": module.neck, "head": module}
    filled = {field: getattr(module, field) for field in _COMMON}
    filled |= {part: {x: getattr(parts[part], x) for x in names} for part, names in _parts(type(module)).items()}
    return {"name": config["name"], **filled}


def class_outputs(config: Mapping[str, Any]) -> frozenset[str]:
    """Paths of a detector's arrays that have a place for each class: their shape depends on the number of classes.

    >>> sorted(class_outputs({"name": "retinanet", "backbone": {"depth": 18, "width": 0.125}, "neck": {"channels": 8}}))
    ['params/head/cls_logits/bias', 'params/head/cls_logits/kernel']
    """

    def shapes(num_classes: int) -> dict[str, tuple[int, ...]]:
        module = build_detector(config, num_classes)
        variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
        return {path: array.shape for path, array in flatten_dict(variables, sep="/").items()}

    one, two = shapes(1), shapes(2)
    return frozenset(path for path in one if one[path] != two[path])


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check(given: Mapping[str, Any], known: Any, where: str) -> None:
    for name in given:
        if name not in known:
            raise UserError(f"Unknown field {name!r} in {where}; the fields are {', '.join(known)}.")
