"""Why weights do not fit a model, in the words of those who chose both: another depth, another detector, other classes.

The names and shapes of single arrays, which messages list as well, say it less plainly.
"""

import re
from collections.abc import Mapping
from typing import Any

from kdjax.weights.names import State, backbone_alone, indices, layer_paths, rule_for, rules_for, why_skipped
from kdjax.weights.sources import DETECTORS, SOURCES, Source

_DEPTHS: dict[tuple[bool, tuple[int, ...]], int] = {
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}
"""Of ResNets, by whether their blocks are bottlenecks, and how many of them the four layers have."""

Kernels = Mapping[str, tuple[int, int]]
"""Path of a convolution (``"backbone/layer1_0/conv2"``) to its outputs, and the inputs of each."""


def why_misfit(
    state: State, table: Source, detector: str, wanted: Mapping[str, Any], classes: tuple[int | None, int]
) -> str:
    """What a file and a model do not have in common, in words that a list of arrays may follow; "" for nothing known.

    Args:
        state: name to array, with plain names.
        table: the source that they are said to be from.
        detector: of the model, a key of ``kdjax.models.MODELS``.
        wanted: path to shape of what the model takes.
        classes: how many the file tells apart, None where that is not known, and the model.
    """
    names = [name for name in state if not why_skipped(name, rules_for(table, detector))]
    return "".join(
        f"{cause}; "
        for cause in (
            _other_detector(names, state, table, detector),
            _other_backbone(state, table, wanted),
            _other_classes(table.background and detector in DETECTORS, *classes),
        )
        if cause
    )


def _other_detector(names: list[str], state: State, table: Source, detector: str) -> str:
    """That all names are those of another detector, or of another source."""

    def has(other: Source, kind: str) -> bool:
        return all(rule_for(name, rules_for(other, kind)) for name in names)

    if not names or backbone_alone(state, rules_for(table, detector)) or has(table, detector):
        return ""
    kinds = [kind for kind in table.heads if has(table, kind)]
    if kinds:
        return f"they are of a {kinds[0]} and the model is a {detector}"
    sources = [source for source, other in SOURCES.items() if any(has(other, kind) for kind in other.heads)]
    return f"their names are those of {sources[0]}" if sources else ""


def _other_backbone(state: State, table: Source, wanted: Mapping[str, Any]) -> str:
    index = indices(wanted)
    found = {
        path: (array.shape[0], array.shape[1])
        for name, array in state.items()
        if array.ndim == 4 and (path := next((path for path, _ in layer_paths(name, table.backbone, index)), None))
    }
    asked = {
        match[1]: (x.shape[3], x.shape[2])
        for path, x in wanted.items()
        if (match := re.fullmatch(r"params/(backbone/.*)/kernel", path))
    }
    there, here = _called(found), _called(asked)
    return f"their backbone is a {there} and the model's a {here}" if there and here and there != here else ""


def _called(kernels: Kernels) -> str:
    """What a backbone is called.

    >>> _called({"backbone/stem/conv": (32, 3), "backbone/block_1/pointwise/conv": (64, 32)})
    'MobileNetV1'
    >>> _called({"backbone/layer1_0/conv1": (128, 64), "backbone/layer1_0/conv2": (128, 4)})
    'ResNeXt of (1, 0, 0, 0) blocks 32x4d'
    >>> stem = {"backbone/conv1": (32, 3), "backbone/conv3": (64, 32)}
    >>> _called(stem | {"backbone/layer1_0/conv1": (64, 64), "backbone/layer1_0/conv2": (64, 64)})
    'ResNet of (1, 0, 0, 0) blocks v1c'
    """
    layers = {path.split("/")[-2] for path in kernels}
    if "pointwise" in layers:
        return "MobileNetV1"
    if "project" in layers:
        return "MobileNetV2"
    blocks = {match[0] for path in kernels if (match := re.search(r"layer\d_\d+", path))}
    numbers = tuple(sum(block.startswith(f"layer{layer}_") for block in blocks) for layer in range(1, 5))
    if not any(numbers):
        return ""
    bottleneck = any(re.search(r"layer\d_\d+/conv3", path) for path in kernels)
    depth = _DEPTHS.get((bottleneck, numbers))
    name = f"-{depth}" if depth else f" of {numbers} blocks"
    if "backbone/conv3" in kernels:
        # Both have three convolutions of growing widths before the pooling.
        name += {32: " v1c", 64: " v1s"}.get(kernels["backbone/conv1"][0], " with a stem of three convolutions")
    first, second = (kernels.get(f"backbone/layer1_0/conv{part}", (1, 1)) for part in (1, 2))
    groups = first[0] // max(second[1], 1)
    return f"ResNeXt{name} {groups}x{second[1]}d" if groups > 1 else f"ResNet{name}"


def _other_classes(background: bool, found: int | None, wanted: int) -> str:
    """Where there is a background, the check of the classes says it."""
    if background or found in (None, wanted):
        return ""
    return f"they tell {found} classes apart and the model {wanted}"
