"""PyTorch state dicts to our variables: by the table of their source, strictly, and without a framework.

The file is long because a strict import has three parts that need each other: names, classes and layouts.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from kdjax.errors import DataError, UserError
from kdjax.weights.coco import COCO_IDS, COCO_NAMES
from kdjax.weights.load import Tree
from kdjax.weights.misfit import why_misfit
from kdjax.weights.names import backbone_alone, indices, layer_paths, plain_names, rules_for, why_skipped
from kdjax.weights.own_config import Own, as_configured, own_facts
from kdjax.weights.sources import DETECTORS, SOURCES, Rule, Source, merged

NO_CONFIG: Mapping[str, Any] = {}
"""Of a file that has none of its own."""

FLOATS = ("float16", "bfloat16", "float32", "float64")
"""What parameters may be stored as; they become float32."""

_LAST = "backbone/last/"
_IMAGE_CLASSES = "params/head/bias"
_PIXEL_CLASSES = "params/head/classifier/bias"
_DENSE_CLASSES = "params/head/cls_logits/bias"
_DENSE_BOXES = ("params/head/box_deltas/bias", "params/head/box_distances/bias")
_ROI_CLASSES = "params/head/box_0/classes/bias"
_CLASSES = (_DENSE_CLASSES, _ROI_CLASSES, _IMAGE_CLASSES, _PIXEL_CLASSES)
_COCO_PLACES = 91
"""torchvision's detectors have a place for the background and for every category id up to 90."""

_ROI_SIZE = 7
"""Height and width of the RoI features that the first dense layer of a box head takes."""

LEAVES = {
    "weight": ("params/{}/kernel", "params/{}/scale"),
    "bias": ("params/{}/bias",),
    "running_mean": ("batch_stats/{}/mean",),
    "running_var": ("batch_stats/{}/var",),
    "scale": ("params/{}",),
    "moment_transfer": ("params/{}/moment_multiplier",),
}
"""Last part of a tensor's name to the paths that it may have here: a normalisation's weight is our scale."""


class ImportReport(NamedTuple):
    """What became of every tensor of a file and of every array of the model."""

    taken: tuple[tuple[str, str], ...]
    """Names of tensors and the paths that they went to (``"params/backbone/conv1/kernel"``)."""
    skipped: tuple[tuple[str, str], ...]
    """Names of tensors that no model needs, and why."""
    untouched: tuple[str, ...]
    """Paths of the model that a file of a backbone alone has nothing for."""
    changes: tuple[str, ...]
    """What was done besides PyTorch's layout becoming ours, in words."""

    def __str__(self) -> str:
        reasons = [why for _, why in self.skipped]
        lines = [
            f"{len(self.taken)} tensors taken",
            *(f"{reasons.count(why)} skipped: {why}" for why in dict.fromkeys(reasons)),
            *([f"{len(self.untouched)} arrays of the model left as they are"] * bool(self.untouched)),
            *self.changes,
        ]
        return "; ".join(lines)


class Imported(NamedTuple):
    """A model, or the backbone of one, that was trained elsewhere."""

    variables: Tree
    """{"params": ..., "batch_stats": ...}, float32 NumPy arrays; of a backbone's file the backbone alone."""
    report: ImportReport
    model: dict[str, Any]
    """The config of the detector with what the weights expect: pixels, the backbone's style and epsilon, and the head's
    convention."""
    class_names: tuple[str, ...] | None
    """Of COCO's 80 classes, where the file has them; None where it does not say what its classes are."""


class Expected(NamedTuple):
    """A detector's config for the weights of a file."""

    model: dict[str, Any]
    """The config with what the source of the file and its own config decide."""
    changes: tuple[str, ...]
    """What is another value than the config had, or doubtful, in words."""


class Classes(NamedTuple):
    """The classes of a file that counts a background as its first."""

    number: int
    """How many it tells apart, the background included."""
    kept: np.ndarray
    """Indices of ours among them, in our order."""


class Context(NamedTuple):
    """What the layouts depend on besides the array."""

    bgr: bool
    classes: Classes
    anchors: tuple[int, int]
    """Sizes and ratios of the anchors at a location."""


_NO_CLASSES = Classes(0, np.arange(0))


def expected_model(
    model: Mapping[str, Any],
    source: str,
    state: Mapping[str, np.ndarray],
    origin: str = "the file",
    config: Mapping[str, Any] = NO_CONFIG,
) -> Expected:
    """A detector's config with what its weights' source and its own config decide and no tensor shows.

    Args:
        model: the config, as :func:`kdjax.models.build_model` takes it.
        source: a key of ``SOURCES``.
        state: name to array.
        origin: what the state dict is, for messages.
        config: of the file's own, see :func:`kdjax.weights.own_config.read_config`.

    Raises:
        UserError: an unknown source, a detector that it has no table for, or a config of another detector.
    """
    table = table_of(source)
    name = model["name"]
    alone = backbone_alone(plain_names(state, table, name).state, rules_for(table, name))
    if not alone and name not in table.heads:
        raise _no_table(name, source, origin)
    expected = merged(model, table.expects(name, alone=alone))
    own = Own({}, None) if alone else _own(config, name, source, origin)
    decided = [
        f"{path} became {new} instead of {old}, as the file's own config says"
        for path, old, new in _differences(expected, own.model)
    ]
    if own.bgr not in (None, table.bgr):
        order = "blue, green, red" if own.bgr else "red, green, blue"
        decided.append(f"its images are {order}, as the file's own config says, and not as {source} has them")
    known = flatten_dict(own.model, sep=".")
    changes = [
        f"{path} became {new} instead of {old}, as in every {name} of {source}"
        for path, old, new in _differences(model, {} if alone else table.fixed.get(name, {}))
        if path not in known
    ]
    changes += [
        f"{path} is {old} by the config, and {new} in a {name} of {source} unless it was trained otherwise"
        for path, old, new in _differences(model, {} if alone else table.usual.get(name, {}))
        if path not in known
    ]
    return Expected(merged(expected, own.model), (*decided, *changes))


def count_classes(
    state: Mapping[str, np.ndarray], source: str, *, model: Mapping[str, Any], like: Tree, num_classes: int
) -> int | None:
    """How many classes a file tells apart, a background left out; None where it has no outputs of classes.

    Args:
        state: name to array.
        source: a key of ``SOURCES``.
        model: the detector's config.
        like: the variables of that detector with ``num_classes`` classes; shapes suffice.
        num_classes: of ``like``.
    """
    table, wanted = table_of(source), flatten_dict(like, sep="/")
    state, rules, index = (
        plain_names(state, table, model["name"]).state,
        rules_for(table, model["name"]),
        indices(wanted),
    )
    paths = {place[0]: name for name in state if (place := place_of(name, rules, index, wanted))}
    path = next((path for path in _CLASSES if path in paths), None)
    if path is None:
        return None
    if path in (_IMAGE_CLASSES, _PIXEL_CLASSES):
        return state[paths[path]].size
    anchors = 1
    if path == _DENSE_CLASSES:
        boxes = next((paths[path] for path in _DENSE_BOXES if path in paths), None)
        anchors = state[boxes].size // 4 if boxes else wanted[path].shape[0] // num_classes
    count = state[paths[path]].size // max(anchors, 1)
    if table.background and count == _COCO_PLACES:
        return len(COCO_IDS)
    return count if path == _DENSE_CLASSES else count - 1


def import_state_dict(
    state: Mapping[str, np.ndarray],
    source: str,
    *,
    model: Mapping[str, Any],
    like: Tree,
    num_classes: int,
    origin: str = "the file",
    config: Mapping[str, Any] = NO_CONFIG,
) -> Imported:
    """A state dict of PyTorch to the variables of the detector that is the same.

    Every tensor is used or named as skipped, every array of the model is filled, every shape is checked. A file of a
    backbone alone, with or without a classifier of images, fills the backbone.

    Args:
        state: name to array, in PyTorch's layout, of any of ``FLOATS``; arrays that are skipped may be of any kind.
        source: a key of ``SOURCES``.
        model: the detector's config, as :func:`kdjax.models.build_model` takes it.
        like: the detector's variables {"params": ..., "batch_stats": ...}; shapes suffice.
        num_classes: of the detector. torchvision's 91 places for the category ids of COCO become 80 classes, and its
            background goes, where that leaves so many; its one-stage detectors may also keep all places.
        origin: what the state dict is, for messages.
        config: of the file's own, see :func:`kdjax.weights.own_config.read_config`.

    Raises:
        UserError: an unknown source, a detector it has no table for, a config of another detector, or a tensor that
            does not fit.
        DataError: a tensor that is not finite, or not of floats.
    """
    where, table = f"The {source} weights of {origin}", table_of(source)
    state, changes, left_out = plain_names(state, table, model["name"])
    alone = backbone_alone(state, rules_for(table, model["name"]))
    if not alone and model["name"] not in table.heads:
        raise _no_table(model["name"], source, origin)
    if not alone:
        table = as_configured(table, model["name"], _own(config, model["name"], source, origin))
    rules = table.backbone if alone else rules_for(table, model["name"])
    paths = flatten_dict(like, sep="/")
    wanted = {path: array for path, array in paths.items() if not alone or path.split("/")[1] == "backbone"}

    skipped = {name: why for name in sorted(state) if (why := why_skipped(name, rules))}
    skipped |= _without_last(state, rules, wanted)
    found = None if alone else count_classes(state, source, model=model, like=like, num_classes=num_classes)
    why = why_misfit(state, table, model["name"], wanted, (found, num_classes))
    places = _places([name for name in sorted(state) if name not in skipped], rules, wanted, where, why)
    classes = _NO_CLASSES
    detects = model["name"] in DETECTORS and not alone
    if table.background and detects:
        classes = _classes_in(state, places, wanted, num_classes, where)
    variables = _fill(state, places, wanted, Context(table.bgr, classes, anchors_at(model)), where, why)
    if classes.number > num_classes:
        changes += (f"{classes.number} outputs, the first a background, became {num_classes} classes",)
    if table.bgr:
        changes += ("the first convolution takes red, green, blue instead of blue, green, red",)
    dtypes = {state[name].dtype.name for name, _ in places.values()}
    changes += tuple(f"{dtype} became float32" for dtype in sorted(dtypes - {"float32"}))
    is_coco = detects and num_classes == len(COCO_NAMES) and classes.number in (0, _COCO_PLACES)
    return Imported(
        variables=unflatten_dict(variables, sep="/"),
        report=ImportReport(
            taken=tuple((name, path) for path, (name, _) in sorted(places.items())),
            skipped=(*skipped.items(), *((name, "without the prefix of the others") for name in left_out)),
            untouched=tuple(sorted(paths.keys() - wanted.keys())),
            changes=changes,
        ),
        model=merged(model, table.expects(model["name"], alone=alone)),
        class_names=COCO_NAMES if is_coco else None,
    )


def table_of(source: str) -> Source:
    """The table of a source; UserError where there is none."""
    if source not in SOURCES:
        raise UserError(f"There is no source of weights {source!r}; choose one of {', '.join(SOURCES)}.")
    return SOURCES[source]


def _own(config: Mapping[str, Any], detector: str, source: str, origin: str) -> Own:
    try:
        return own_facts(config, detector)
    except DataError as error:
        raise DataError(f"The {source} weights of {origin} cannot be used: {error}.") from error
    except UserError as error:
        raise UserError(f"The {source} weights of {origin} are of another model: {error}.") from error


def _no_table(detector: str, source: str, origin: str) -> UserError:
    known = ", ".join(SOURCES[source].heads) or "none"
    return UserError(f"The {source} weights of {origin} cannot be those of a {detector}; this source has: {known}.")


def _differences(config: Mapping[str, Any], expected: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Path, value and expected value of what a config says otherwise; it need not say everything."""
    found = []
    for key, value in expected.items():
        if isinstance(value, Mapping):
            inner = _differences(config.get(key, {}), value)
            found += [(f"{key}.{path}", old, new) for path, old, new in inner]
        elif config.get(key, value) != value:
            found.append((key, config[key], value))
    return found


def _places(
    names: list[str], rules: tuple[Rule, ...], wanted: Mapping[str, Any], where: str, why: str
) -> dict[str, tuple[str, Rule]]:
    """Every path of ``wanted`` to the name of its tensor and the rule that says so; ``why`` they may not fit.

    Raises:
        UserError: if a name has no path, or a path no name.
    """
    places: dict[str, tuple[str, Rule]] = {}
    unknown, index = [], indices(wanted)
    for name in names:
        place = place_of(name, rules, index, wanted)
        if place is None or place[0] in places:
            unknown.append(name)
        else:
            places[place[0]] = (name, place[1])
    if unknown or len(places) < len(wanted):
        missing = sorted(wanted.keys() - places.keys())
        raise UserError(
            f"{where} do not fit the model: {why}{len(places)} of {len(names)} tensors have a place in it; "
            f"without one: {_some(unknown)}; arrays of the model without a tensor: {_some(missing)}."
        )
    return places


def _without_last(
    state: Mapping[str, np.ndarray], rules: tuple[Rule, ...], wanted: Mapping[str, Any]
) -> dict[str, str]:
    """The tensors of the last convolution of a MobileNetV2 that is trained to classify, where the model ends before."""
    if any(path.startswith(f"params/{_LAST}") for path in wanted):
        return {}
    index = indices(wanted)
    last = [
        name for name in sorted(state) if any(path.startswith(_LAST) for path, _ in layer_paths(name, rules, index))
    ]
    return dict.fromkeys(last, "the last convolution, which classifiers alone have")


def _fill(
    state: Mapping[str, np.ndarray],
    places: Mapping[str, tuple[str, Rule]],
    wanted: Mapping[str, Any],
    context: Context,
    where: str,
    why: str,
) -> dict[str, np.ndarray]:
    """Every path to its array, arranged as ours is.

    Raises:
        UserError: if an array has another shape than ``wanted``.
        DataError: if it is not of finite floats.
    """
    filled, misfits = {}, []
    for path, (name, rule) in places.items():
        array = _float32(state[name], name, where)
        arranged = LAYOUTS[rule.layout](array, context)
        if arranged.shape != tuple(wanted[path].shape):
            misfits.append(f"{name} {list(array.shape)}, which {path} {list(wanted[path].shape)} cannot take")
        filled[path] = np.asarray(arranged, order="C")  # Keeps a scalar a scalar, as ascontiguousarray does not.
    if misfits:
        raise UserError(f"{where} have other shapes than the model: {why}{_some(misfits)}.")
    return filled


def place_of(
    name: str, rules: tuple[Rule, ...], index: Mapping[str, Callable[[str], Any]], wanted: Mapping[str, Any]
) -> tuple[str, Rule] | None:
    """The path that a tensor goes to and the rule that says so, or None."""
    leaf = name.rpartition(".")[2]
    for layer, rule in layer_paths(name, rules, index):
        for path in LEAVES.get(leaf, ()):
            if path.format(layer) in wanted:
                return path.format(layer), rule
    return None


def anchors_at(model: Mapping[str, Any]) -> tuple[int, int]:
    """Sizes and ratios of a detector's anchors at a location, by its config."""
    head = model.get("head", {})
    return head.get("anchor_octaves", 3), len(head.get("anchor_ratios", (0.5, 1.0, 2.0)))


def _classes_in(
    state: Mapping[str, np.ndarray],
    places: Mapping[str, tuple[str, Rule]],
    wanted: Mapping[str, Any],
    num_classes: int,
    where: str,
) -> Classes:
    """The classes of a file of torchvision's."""
    dense = _DENSE_CLASSES in wanted
    path = _DENSE_CLASSES if dense else _ROI_CLASSES
    count = state[places[path][0]].size
    if dense:
        count //= wanted[path].shape[0] // num_classes
    if (count, num_classes) == (_COCO_PLACES, len(COCO_IDS)):
        return Classes(count, np.array(COCO_IDS))
    if count == num_classes + 1:
        return Classes(count, np.arange(1, count))
    if dense and count == num_classes:
        return Classes(count, np.arange(count))
    raise UserError(f"{where} tell {count} classes apart, the background included; the model has {num_classes}.")


def _float32(array: np.ndarray, name: str, where: str) -> np.ndarray:
    if array.dtype.name not in FLOATS:
        raise DataError(f"{where} have the tensor {name} of {array.dtype.name}; it must be one of {', '.join(FLOATS)}.")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise DataError(f"{where} have NaN or infinity in the tensor {name}.")
    return array


def _some(names: list[str]) -> str:
    return (", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)) or "none"


def _plain(array: np.ndarray, _: Context | None = None) -> np.ndarray:
    """OIHW to HWIO, (out, in) to (in, out); the outputs stand last."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _stem(array: np.ndarray, context: Context) -> np.ndarray:
    return _plain(array)[:, :, ::-1] if context.bgr else _plain(array)


def _flattened(array: np.ndarray, context: Context) -> np.ndarray:
    """A dense layer of features flattened from (C, 7, 7) becomes one of features flattened from (7, 7, C)."""
    if array.ndim < 2 or array.shape[1] % _ROI_SIZE**2:
        return _plain(array)
    outputs = array.shape[0]
    return array.reshape(outputs, -1, _ROI_SIZE, _ROI_SIZE).transpose(2, 3, 1, 0).reshape(-1, outputs)


def _single(array: np.ndarray, context: Context) -> np.ndarray:
    """A list of one number becomes the number."""
    return array.reshape(()) if array.size == 1 else array


def _transposed(array: np.ndarray, context: Context) -> np.ndarray:
    """(in, out, H, W) of ConvTranspose2d to Flax's, whose transposed convolution slides the kernel unflipped."""
    return array.transpose(2, 3, 0, 1)[::-1, ::-1] if array.ndim == 4 else array


def _picked(array: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The outputs of those indices; all of them where there are too few, which the check of shapes will tell."""
    plain = _plain(array)
    return plain[..., index] if index.max() < plain.shape[-1] else plain


def _classes(array: np.ndarray, context: Context) -> np.ndarray:
    """The background goes from first to last."""
    return _picked(array, np.append(context.classes.kept, 0))


def _class_boxes(array: np.ndarray, context: Context) -> np.ndarray:
    """Four numbers for each class; the background's are dropped."""
    return _picked(array, (4 * context.classes.kept[:, None] + np.arange(4)[None]).reshape(-1))


def _class_masks(array: np.ndarray, context: Context) -> np.ndarray:
    """One mask for each class; the background's is dropped."""
    return _picked(array, context.classes.kept)


def _anchor_classes(array: np.ndarray, context: Context) -> np.ndarray:
    """All classes of each anchor at a location, anchor after anchor."""
    anchors = np.arange(array.shape[0] // context.classes.number)
    return _picked(array, (context.classes.number * anchors[:, None] + context.classes.kept[None]).reshape(-1))


def _sizes_first(array: np.ndarray, context: Context) -> np.ndarray:
    """Anchors in order of size and then ratio become anchors in order of ratio and then size."""
    plain = _plain(array)
    sizes, ratios = context.anchors
    if plain.shape[-1] % (sizes * ratios):
        return plain
    parts = plain.reshape(*plain.shape[:-1], sizes, ratios, -1)
    return np.swapaxes(parts, -3, -2).reshape(plain.shape)


def _pool_first(array: np.ndarray, context: Context) -> np.ndarray:
    """Of inputs that are maps side by side, as many channels each as there are outputs, the first goes last."""
    return np.roll(_plain(array), -array.shape[0], axis=2) if array.ndim == 4 else array


LAYOUTS: dict[str, Callable[[np.ndarray, Context], np.ndarray]] = {
    "": _plain,
    "stem": _stem,
    "flattened": _flattened,
    "single": _single,
    "transposed": _transposed,
    "classes": _classes,
    "class_boxes": _class_boxes,
    "class_masks": _class_masks,
    "anchor_classes": _anchor_classes,
    "sizes_first": _sizes_first,
    "pool_first": _pool_first,
}
"""How PyTorch's array becomes ours, by the layout that a rule names."""
