"""Our variables to PyTorch state dicts: the tables of the importer, read backwards.

There is no second table. A name is what a rule's pattern says of a path, and counts only if the importer takes it for
that path; a layout is turned around by asking it where each number of PyTorch's array goes. What comes out is imported
to the bit.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from kdjax.errors import UserError
from kdjax.weights.load import Tree
from kdjax.weights.names import indices, rules_for
from kdjax.weights.programs import contradictions
from kdjax.weights.sources import DETECTORS, Rule, Source
from kdjax.weights.state_dict import LAYOUTS, LEAVES, Classes, Context, anchors_at, place_of, table_of

NEVER = -100.0
"""Logit of a background that a detector with sigmoids has an output for: it is never found."""

_GROUP = re.compile(r"\(\?P<(\w+)>((?:[^()]|\([^()]*\))*)\)")
_CHOICE = re.compile(r"\(([^()|]*)(?:\|[^()|]*)*\)\??")
_FIELD = re.compile(r"\{(\w+)\}")
_TOKENS = (*map(str, range(100)), *"abc")
"""What groups that are counted differently by the two sides may be in a name."""

_COUNTER = "num_batches_tracked"


class Exported(NamedTuple):
    """A model as a program in PyTorch has it."""

    state: dict[str, np.ndarray]
    """Name to array in PyTorch's layout: float32, and int64 the counters of batch norms, which are 0."""
    first_label: int
    """What class 0 is called there."""
    changes: tuple[str, ...]
    """What was done besides our layout becoming PyTorch's, in words."""


def export_state_dict(variables: Tree, source: str, *, model: Mapping[str, Any], num_classes: int) -> Exported:
    """The variables of a model to a state dict with the names and layouts of a source.

    What comes out is what :func:`kdjax.weights.import_state_dict` makes the same variables of, to the bit. Where the
    source counts a background, it comes first, with zeros for what nobody reads.

    Args:
        variables: {"params": ..., "batch_stats": ...}, float32, of a whole model.
        source: a key of ``SOURCES``.
        model: its config with every field, as :func:`kdjax.models.complete` makes it.
        num_classes: of the model, without a background.

    Raises:
        UserError: an unknown source, a model that it has no names for, or one that would be another there: every field
            that says so is named.
    """
    table, name, paths = table_of(source), model["name"], flatten_dict(variables, sep="/")
    if name not in table.heads:
        known = ", ".join(table.heads)
        raise UserError(f"A {name} cannot have the names of {source}, which has these models: {known}.")
    if reasons := contradictions(model, source):
        raise UserError(f"This {name} would be another model in {source}: {'; '.join(reasons)}.")
    names = _names(paths, table, name)
    if nameless := sorted(paths.keys() - names.keys()):
        layers = list(dict.fromkeys(path.split("/", 1)[1].rpartition("/")[0] for path in nameless))
        more = " and others" * (len(layers) > 3)
        raise UserError(f"A {name} of {source} has no layers {', '.join(layers[:3])}{more}.")
    background = table.background and name in DETECTORS
    context = Context(table.bgr, _classes(num_classes, background), anchors_at(model))
    state = {}
    for path in paths:
        tensor, rule = names[path]
        state[tensor] = _arranged(np.asarray(paths[path]), rule.layout, context, NEVER if _bias(path) else 0.0)
        if table.counters and tensor.endswith(".running_var"):
            state[f"{tensor.rpartition('.')[0]}.{_COUNTER}"] = np.zeros((), np.int64)
    changes = [f"class 0 is a background, and the {num_classes} classes are counted from 1"] * background
    changes += ["the first convolution takes blue, green, red instead of red, green, blue"] * table.bgr
    return Exported(state, int(background), tuple(changes))


def _names(paths: Mapping[str, Any], table: Source, model: str) -> dict[str, tuple[str, Rule]]:
    """Every path that a rule leads to, to the name of its tensor and that rule: the first that the importer takes."""
    rules, index = rules_for(table, model), indices(paths)
    within = table.within.get(model, "")
    found: dict[str, tuple[str, Rule]] = {}
    for path in paths:
        candidates = (
            (f"{layer}.{leaf}", rule)
            for leaf, templates in LEAVES.items()
            for template in templates
            if (match := re.fullmatch(template.replace("{}", "(.*)"), path))
            for rule in rules
            if (layer := layer_name(match[1], rule, index, within)) is not None
        )
        for tensor, rule in candidates:
            if place_of(tensor, rules, index, paths) == (path, rule):
                found[path] = tensor, rule
                break
    return found


def layer_name(path: str, rule: Rule, index: Mapping[str, Callable[[str], Any]], within: str = "") -> str | None:
    r"""What a layer is called by a rule; None where the rule does not lead to its path.

    >>> rule = Rule(r"(net\.)?res(?P<more>\d)\.(?P<block>\d+)\.conv", "backbone/layer{more}_{block}/conv")
    >>> layer_name("backbone/layer1_0/conv", rule, indices({}))
    'net.res2.0.conv'

    Args:
        path: of ours, below "params" or "batch_stats".
        rule: of a table.
        index: how its groups count, see :func:`kdjax.weights.names.indices`.
        within: the group of that name.
    """
    match = re.fullmatch(_FIELD.sub(r"(?P<\1>[^/]+)", rule.path), path)
    if not match:
        return None
    tokens: dict[str, str | None] = {"within": within}
    for group, pattern in _GROUP.findall(rule.pattern):
        if group in rule.path:
            tokens[group] = _token(match[group], pattern, index.get(group))
    if None in tokens.values():
        return None
    return _CHOICE.sub(r"\1", _GROUP.sub(r"{\1}", rule.pattern)).replace("\\", "").format(**tokens)


def _token(value: str, pattern: str, count: Callable[[str], Any] | None) -> str | None:
    """What stands in a name for a part of a path; None where nothing does."""
    if count is None:
        return value if re.fullmatch(pattern, value) else None
    return next((x for x in _TOKENS if re.fullmatch(pattern, x) and str(count(x)) == value), None)


def _classes(num_classes: int, background: bool) -> Classes:
    return Classes(num_classes + background, np.arange(background, num_classes + background))


def _bias(path: str) -> bool:
    return path == "params/head/cls_logits/bias"


def _arranged(array: np.ndarray, layout: str, context: Context, other: float) -> np.ndarray:
    """An array of ours as PyTorch has it; what has no place here, the outputs of a background, is ``other``."""
    shape = _shape(array.shape, layout, context)
    places = LAYOUTS[layout](np.arange(math.prod(shape), dtype=np.int32).reshape(shape), context)
    arranged = np.full(math.prod(shape), other, np.float32)
    arranged[places.reshape(-1)] = array.reshape(-1)
    return arranged.reshape(shape)


def _shape(shape: tuple[int, ...], layout: str, context: Context) -> tuple[int, ...]:
    """Of PyTorch's array, from that of ours."""
    if layout == "single":
        return (1,)
    if layout == "transposed" and len(shape) == 4:
        return shape[2], shape[3], shape[0], shape[1]
    if not shape:
        return shape
    own = len(context.classes.kept)
    # Outputs of a class, times as many classes as are not ours. Of "classes" both sides have a background's.
    of_classes = layout in ("class_boxes", "class_masks", "anchor_classes")
    outputs = shape[-1] // own * context.classes.number if of_classes else shape[-1]
    return (outputs, shape[2], *shape[:2]) if len(shape) == 4 else (outputs, *shape[:-1])
