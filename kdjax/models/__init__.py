"""Detectors: backbones, necks, heads, and :func:`build_detector`, which makes one from a plain nested dict."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype

from kdjax.models.fcos import FCOS
from kdjax.models.fpn import FPN
from kdjax.models.resnet import ResNet
from kdjax.models.retinanet import RetinaNet

__all__ = ["DETECTORS", "FCOS", "FPN", "ResNet", "RetinaNet", "build_detector"]

DETECTORS: dict[str, type[nn.Module]] = {"retinanet": RetinaNet, "fcos": FCOS}

_COMMON = ("pixel_mean", "pixel_std", "frozen_norm")
_GIVEN = ("backbone", "neck", "num_classes", "axis_name", "dtype", "parent", "name")


def build_detector(
    config: Mapping[str, Any], num_classes: int, *, axis_name: str | None = None, dtype: Dtype = jnp.float32
) -> nn.Module:
    """Makes a detector from a plain nested dict.

    Args:
        config: ``name``, a key of ``DETECTORS``; ``backbone``, fields of :class:`ResNet`; ``neck``, fields of
            :class:`FPN`; ``head``, fields of the detector; and the fields that all detectors have: ``pixel_mean``,
            ``pixel_std`` and ``frozen_norm``. All but ``name`` may be left out.
        num_classes: number of classes, without a background.
        axis_name: mapped axis of batch-norm statistics and counts; None outside of one.
        dtype: of the computation.

    Raises:
        ValueError: an unknown name or field, or a value that the field does not allow.

    Example:
        >>> detector = build_detector({"name": "retinanet", "backbone": {"depth": 18, "width": 0.5}}, num_classes=3)
        >>> detector.backbone.depth
        18
    """
    _check(config, ("name", "backbone", "neck", "head", *_COMMON), "a detector's config")
    if config.get("name") not in DETECTORS:
        raise ValueError(f"There is no detector {config.get('name')!r}; choose one of {', '.join(DETECTORS)}.")
    detector = DETECTORS[config["name"]]
    # A config that was kept as JSON has lists where fields have tuples, and modules must be hashable.
    config = {name: _tuple(value) for name, value in config.items()}
    parts = {
        part: {name: _tuple(value) for name, value in config.get(part, {}).items()}
        for part in ("backbone", "neck", "head")
    }
    for part, module in (("backbone", ResNet), ("neck", FPN), ("head", detector)):
        fields = [field.name for field in dataclasses.fields(module)]
        _check(parts[part], [name for name in fields if name not in (*_GIVEN, *_COMMON)], f"the detector's {part}")
    return detector(
        backbone=ResNet(**parts["backbone"], axis_name=axis_name, dtype=dtype),
        neck=FPN(**parts["neck"], dtype=dtype),
        num_classes=num_classes,
        axis_name=axis_name,
        dtype=dtype,
        **parts["head"],
        **{name: config[name] for name in _COMMON if name in config},
    )


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check(given: Mapping[str, Any], known: Any, where: str) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"Unknown field {name!r} in {where}; the fields are {', '.join(known)}.")
