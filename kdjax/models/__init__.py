"""Models: backbones, necks, heads, and :func:`build_model`, which makes one from a plain nested dict."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from flax.typing import Dtype

from kdjax.errors import UserError
from kdjax.models.atss import ATSS
from kdjax.models.classifier import Classifier, MobileNetV1Classifier, MobileNetV2Classifier
from kdjax.models.fcos import FCOS
from kdjax.models.fpn import FPN
from kdjax.models.gfl import GFL
from kdjax.models.network import Network
from kdjax.models.rcnn import RCNN
from kdjax.models.reppoints import RepPoints
from kdjax.models.resnet import ResNet
from kdjax.models.retinanet import RetinaNet
from kdjax.models.segmentation import DeepLabV3, DeepLabV3MobileNetV2, PSPNet
from kdjax.models.solo import SOLO
from kdjax.options import chosen, declared

__all__ = [
    "ATSS",
    "FCOS",
    "FPN",
    "GFL",
    "MODELS",
    "RCNN",
    "SOLO",
    "RepPoints",
    "ResNet",
    "RetinaNet",
    "build_model",
    "class_outputs",
    "complete",
    "model_class",
    "other_meaning",
    "with_classes",
]

MODELS: dict[str, Callable[..., Network]] = {
    "retinanet": RetinaNet,
    "fcos": FCOS,
    "atss": ATSS,
    "gfl": GFL,
    "reppoints": RepPoints,
    "faster_rcnn": functools.partial(RCNN, stages=1, masks=False),
    "mask_rcnn": functools.partial(RCNN, stages=1, masks=True),
    "cascade_rcnn": functools.partial(RCNN, stages=3, masks=False, train_proposals=2000),
    "cascade_mask_rcnn": functools.partial(RCNN, stages=3, masks=True, train_proposals=2000),
    "solo": SOLO,
    "pspnet": PSPNet,
    "deeplabv3": DeepLabV3,
    "deeplabv3_mobilenet_v2": DeepLabV3MobileNetV2,
    "resnet_classifier": Classifier,
    "mobilenet_v1": MobileNetV1Classifier,
    "mobilenet_v2": MobileNetV2Classifier,
}
"""A name to a model; two-stage detectors are one module whose fields say how often and for what it looks."""

_COMMON = tuple(declared(Network))
"""Options that all models have; they stand beside the sections of a model's parts."""


def model_class(name: str) -> type[Network]:
    """The class of a model, which states its facts.

    >>> model_class("cascade_rcnn").has_proposals
    True

    Args:
        name: a key of ``MODELS`` or ``package.module:Class`` of somebody else's.

    Raises:
        UserError: there is no such model.
    """
    return _class_of(name, chosen(name, MODELS, "model"))


def build_model(
    config: Mapping[str, Any], num_classes: int, *, axis_name: str | None = None, dtype: Dtype = jnp.float32
) -> Network:
    """Makes a model from a plain nested dict.

    Args:
        config: ``name``, a key of ``MODELS`` or ``package.module:Class`` of somebody else's; a section for each of the
            model's ``parts``, such as ``backbone``, fields of :class:`ResNet`, and ``neck``, fields of :class:`FPN`,
            by default what the model's ``part_defaults`` say; ``head``, fields of the model; and the fields that all
            models have: ``pixel_mean``, ``pixel_std`` and ``frozen_norm``. All but ``name`` may be left out.
        num_classes: number of classes, without a background.
        axis_name: mapped axis of batch-norm statistics and counts; None outside of one.
        dtype: of the computation.

    Raises:
        UserError: an unknown name or field, or a value that the field does not allow.

    Example:
        >>> detector = build_model({"name": "retinanet", "backbone": {"depth": 18, "width": 0.5}}, num_classes=3)
        >>> detector.backbone.depth
        18
    """
    name = config.get("name", "")
    model = chosen(name, MODELS, "model")
    module = _class_of(name, model)
    known = _options(module)
    _check(config, ("name", *known, *_COMMON), "a model's config")
    for section in known:
        if not isinstance(config.get(section, {}), Mapping):
            raise UserError(f"The model's {section} is {config[section]!r}; it must be a section of fields.")
    # A config that was kept as JSON has lists where fields have tuples, and modules must be hashable.
    config = {field: _tuple(value) for field, value in config.items()}
    given = {section: {field: _tuple(value) for field, value in config.get(section, {}).items()} for section in known}
    for section, options in known.items():
        _check(given[section], options, f"the model's {section}")
    shared = {"axis_name": axis_name, "dtype": dtype}

    def part(section: str, kind: type[nn.Module]) -> nn.Module:
        own = {field.name for field in dataclasses.fields(kind)}
        fields = {**module.part_defaults.get(section, {}), **given[section]}
        return kind(**fields, **{field: value for field, value in shared.items() if field in own})

    return model(
        **{section: part(section, kind) for section, kind in module.parts.items()},
        num_classes=num_classes,
        **shared,
        **given["head"],
        **{field: config[field] for field in _COMMON if field in config},
    )


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config with every field that it leaves out, at its default.

    >>> complete({"name": "faster_rcnn"})["neck"]["extra_from"]
    'pool'
    """
    module = build_model(config, num_classes=1)
    filled: dict[str, Any] = {field: getattr(module, field) for field in _COMMON}
    for section, options in _options(type(module)).items():
        part = module if section == "head" else getattr(module, section)
        filled[section] = {option: getattr(part, option) for option in options}
    return {"name": config["name"], **filled}


def other_meaning(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Why arrays of one model's heads would mean something else in another model, in words; empty if they would not.

    >>> other_meaning({"name": "fcos", "head": {"norm_on_box": True}}, {"name": "fcos"})
    'norm_on_box is False there and True here'

    Args:
        ours: config of the model that would take the arrays.
        theirs: config of the model that has them.
    """
    if ours["name"] != theirs["name"]:
        return f"a {theirs['name']} is no {ours['name']}"
    here, there = (complete(config)["head"] for config in (ours, theirs))
    differing = [option for option in model_class(ours["name"]).decisive if here[option] != there[option]]
    return ", ".join(f"{option} is {there[option]!r} there and {here[option]!r} here" for option in differing)


def class_outputs(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Paths of a model's arrays that have places for each class: those of one class, and those of no class.

    >>> class_outputs({"name": "retinanet", "backbone": {"depth": 18, "width": 0.125}, "neck": {"channels": 8}})
    {'params/head/cls_logits/bias': (9, 0), 'params/head/cls_logits/kernel': (9, 0)}
    """

    def shapes(num_classes: int) -> dict[str, tuple[int, ...]]:
        module = build_model(config, num_classes)
        variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
        return {path: array.shape for path, array in flatten_dict(variables, sep="/").items()}

    one, two = shapes(1), shapes(2)
    return {
        path: (two[path][-1] - one[path][-1], 2 * one[path][-1] - two[path][-1])
        for path in sorted(one)
        if one[path] != two[path]
    }


def with_classes(config: Mapping[str, Any], variables: Mapping[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """A model's variables with its classes in another order.

    Args:
        config: of the model.
        variables: {"params": ..., "batch_stats": ...}.
        order: of every class, where it stood before.

    Raises:
        UserError: the model has outputs for classes of which it does not say how they are ordered (``class_axis``).
    """
    axis, arrays, classes = model_class(config["name"]).class_axis, flatten_dict(variables, sep="/"), np.array(order)
    for path, (own, others) in class_outputs(config).items():
        layer = path.split("/")[-2]
        if layer not in axis:
            raise UserError(
                f"The {config['name']} does not say how the outputs of its layer {layer!r} are ordered by class, so "
                "that its classes cannot be put in another order: name it in the class_axis of its class."
            )
        places = np.arange(own * len(classes))
        places = places.reshape(own, -1)[:, classes] if axis[layer] == "fastest" else places.reshape(-1, own)[classes]
        arrays[path] = arrays[path][..., np.append(places, places.size + np.arange(others))]
    return unflatten_dict(arrays, sep="/")


def _class_of(name: str, model: Any) -> type[Network]:
    """The class behind an entry of ``MODELS``, or behind what somebody else named."""
    module = model.func if isinstance(model, functools.partial) else model
    if not isinstance(module, type) or not issubclass(module, Network):
        raise UserError(f"{name!r} is no model: it must be a subclass of kdjax.models.network.Network.")
    return module


def _options(module: Any) -> dict[str, list[str]]:
    """Names of the options in each section of a model's config."""
    own = [name for name in declared(module) if name not in _COMMON]
    return {section: list(declared(part)) for section, part in module.parts.items()} | {"head": own}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check(given: Mapping[str, Any], known: Any, where: str) -> None:
    for name in given:
        if name not in known:
            raise UserError(f"Unknown field {name!r} in {where}; the fields are {', '.join(known)}.")
