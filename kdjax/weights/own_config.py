"""What MMDetection's checkpoints say of their detector: the text of its config, whose values are read and never run.

Such a text is a Python program that assigns dicts, lists, texts and numbers to names. Nothing else is understood: an
assignment of anything more is left out.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from kdjax.errors import DataError, UserError
from kdjax.options import COLOUR, SPREAD
from kdjax.weights.sources import SEGMENTERS, Sections, Source, merged

MOST_CHARACTERS = 2**20
"""Of a text; those of MMDetection have about 2**14."""

_NAMES = ("model", "data_preprocessor", "img_norm_cfg")
"""What is looked for in a config: the model, and its images, which MMPretrain and MMDetection before 3 have beside it.
"""

_DEEPEST = 50
"""Brackets inside of one another."""

_LONGEST_NUMBER = 40
"""Characters of a number."""

_TOKEN = re.compile(
    r"""(?:\s|\#[^\n]*)*(?:(?P<text>'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")"""
    r"""|(?P<number>-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)|(?P<name>[A-Za-z_]\w*)|(?P<mark>[][(){},:=]))"""
)
_END = re.compile(r"[ \t]*(?:\#[^\n]*)?(?:\r?\n|\Z)")
_NAMED = {"None": None, "True": True, "False": False}
_CLOSING = {"(": ")", "[": "]", "{": "}"}


def read_config(text: str) -> dict[str, Any]:
    """The values that a config's text assigns to ``_NAMES``; tuples as lists, what is called or named as None.

    >>> read_config("model = dict(type='FCOS', neck=dict(num_outs=5, strides=(8, 16)))")
    {'model': {'type': 'FCOS', 'neck': {'num_outs': 5, 'strides': [8, 16]}}}
    """
    found: dict[str, Any] = {}
    if len(text) > MOST_CHARACTERS:
        return found
    for name in _NAMES:
        if match := re.search(rf"^{name} *= *", text, re.MULTILINE):
            reader = _Reader(text, match.end())
            try:
                value = reader.value()
            except _NotPlainError:
                continue
            if _END.match(text, reader.place):
                found[name] = value
    return found


class _NotPlainError(Exception):
    """A value is more than dicts, lists, texts and numbers."""


class _Reader:
    """Reads one value after another from a place in a text."""

    def __init__(self, text: str, place: int):
        self.place = place
        self._text, self._depth = text, 0

    def value(self) -> Any:
        """The value that stands here."""
        kind, token = self._take()
        if kind == "text":
            # Escapes stay as they are: no name or number that is looked for has any.
            return token[1:-1]
        if kind == "number" and len(token) <= _LONGEST_NUMBER:
            return float(token) if set(token) & set(".eE") else int(token)
        if token in _NAMED:
            return _NAMED[token]
        if token == "dict":
            self._take("(")
            return self._entries("(")
        if token in ("(", "["):
            return list(self._items(token))
        if token == "{":
            return self._entries("{")
        if kind == "name":
            if self._peek()[1] == "(":
                self._take("(")
                list(self._items("("))
            return None
        raise _NotPlainError

    def _entries(self, bracket: str) -> dict[str, Any]:
        """What follows ``dict(`` or ``{``: entries by name or by text; other keys are left out."""
        entries: dict[str, Any] = {}
        for key in self._items(bracket):
            if isinstance(key, dict):
                entries |= key
            elif isinstance(key, tuple):
                entries[key[0]] = key[1]
            else:
                raise _NotPlainError
        return entries

    def _items(self, bracket: str) -> Iterator[Any]:
        """What stands in brackets, one after another; with a name before it, or another key, a pair of both."""
        self._depth += 1
        if self._depth > _DEEPEST:
            raise _NotPlainError
        while self._peek()[1] != _CLOSING[bracket]:
            before = self.place
            kind, token = self._take()
            if kind == "name" and self._peek()[1] == "=":
                self._take("=")
                yield token, self.value()
            else:
                self.place = before
                item = self.value()
                if bracket == "{":
                    self._take(":")
                    item = str(item), self.value()
                yield item
            if self._peek()[1] == ",":
                self._take(",")
            elif self._peek()[1] != _CLOSING[bracket]:
                raise _NotPlainError
        self._take(_CLOSING[bracket])
        self._depth -= 1

    def _peek(self) -> tuple[str, str]:
        before = self.place
        found = self._take()
        self.place = before
        return found

    def _take(self, wanted: str = "") -> tuple[str, str]:
        """The kind and the text of the next token."""
        match = _TOKEN.match(self._text, self.place)
        if not match or not match.lastgroup or (wanted and match[match.lastgroup] != wanted):
            raise _NotPlainError
        self.place = match.end()
        return match.lastgroup, match[match.lastgroup]


# --- What a config decides, as ours has it.

_TO_RGB = ("to_rgb", "bgr_to_rgb")
_BOX_STDS = (1.0, 1.0, 1.0, 1.0)
_ROI_STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
_OUTPUT_STRIDES: dict[Any, int] = {
    ((1.0, 2.0, 1.0, 1.0), (1.0, 1.0, 2.0, 4.0)): 8,
    ((1.0, 2.0, 2.0, 1.0), (1.0, 1.0, 1.0, 2.0)): 16,
}
"""Of a segmenter's backbone, by the strides and the dilations of its layers."""
_MOST_OCTAVES = 100
"""Sizes of anchors at a location."""
_POINTS = {"transform_method": "moment", "num_points": 9, "use_grid_points": False, "center_init": True}
"""How RepPoints makes boxes of points, and where these begin."""
_P6 = {True: "c5", "on_input": "c5", "on_output": "p5", False: "pool"}


class Own(NamedTuple):
    """What a file's own config says of its detector."""

    model: Sections
    """Fields of ours, by section."""
    bgr: bool | None
    """Whether images have blue, green, red; None where it does not say."""


def own_facts(config: Mapping[str, Any], detector: str) -> Own:
    """What MMDetection's config decides about a detector and no tensor shows.

    Args:
        config: see :func:`read_config`.
        detector: of the model that it goes into, a key of ``kdjax.models.MODELS``.

    Raises:
        UserError: it says something that no model here is, though its arrays may fit.
        DataError: it says what no model can be.
    """
    model = _section(config, "model")
    images = (_section(model, "data_preprocessor"), *(_section(config, name) for name in _NAMES[1:]))
    pixels, bgr = _pixels(next(filter(None, images), {}))
    style = _section(model, "backbone").get("style")
    backbone = {"style": style} if isinstance(style, str) else {}
    if detector in SEGMENTERS:
        backbone |= _dilated(_section(model, "backbone"))
    own = {"backbone": backbone, "neck": _neck(_section(model, "neck")), "head": _head(model, detector)}
    return Own(pixels | {section: fields for section, fields in own.items() if fields}, bgr)


def as_configured(table: Source, detector: str, own: Own) -> Source:
    """A source as far as a file's own config does not say otherwise."""
    bgr = table.bgr if own.bgr is None else own.bgr
    return table._replace(bgr=bgr, fixed={detector: merged(table.fixed.get(detector, {}), own.model)})


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = config.get(key)
    return section if isinstance(section, dict) else {}


def _known(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}


def _numbers(values: Any) -> tuple[float, ...] | None:
    """A list of numbers as a tuple; None where it is none."""
    if isinstance(values, list) and values and all(type(x) in (int, float) for x in values):
        return tuple(map(float, values))
    return None


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) else None


def _pixels(section: Mapping[str, Any]) -> tuple[dict[str, Any], bool | None]:
    """Mean and spread of red, green and blue, and whether images have blue first."""
    rgb = next((section[key] for key in _TO_RGB if isinstance(section.get(key), bool)), None)
    fields = {"pixel_mean": _numbers(section.get("mean")), "pixel_std": _numbers(section.get("std"))}
    if rgb is None or any(x is None or len(x) != 3 for x in fields.values()):
        return {}, None
    for key, rule in (("pixel_mean", COLOUR), ("pixel_std", SPREAD)):
        if not rule.holds(fields[key]):
            raise DataError(f"its own config has the {key} {fields[key]}; it must be {rule.words}")
    return {key: x if rgb else x[::-1] for key, x in fields.items() if x}, not rgb


def _neck(section: Mapping[str, Any]) -> dict[str, Any]:
    """What the levels above P5 are made of."""
    if section.get("type") != "FPN":
        return {}
    extra = section.get("add_extra_convs", False)
    if extra is True and section.get("extra_convs_on_inputs") is False:
        extra = "on_output"
    if not isinstance(extra, str | bool) or extra not in _P6:
        raise UserError(f"its own config has the neck's add_extra_convs {extra!r}, which no model here has")
    found = {"extra_from": _P6[extra]}
    return found | ({"extra_relu": section.get("relu_before_extra_convs", False) is True} if extra else {})


def _dilated(section: Mapping[str, Any]) -> dict[str, Any]:
    """How far the positions of a segmenter's C5 are apart."""
    dilations, strides = _numbers(section.get("dilations")), _numbers(section.get("strides"))
    if not dilations or not strides or set(dilations) == {1.0}:
        return {}
    stride = _OUTPUT_STRIDES.get((strides, dilations))
    if stride is None or section.get("contract_dilation") is not True:
        raise UserError(
            f"its own config has a backbone of strides {list(strides)} and dilations {list(dilations)}, contracted: "
            f"{section.get('contract_dilation', False)}, which no model here has"
        )
    return {"output_stride": stride}


def _segmenter(section: Mapping[str, Any]) -> dict[str, Any]:
    """How the main head of a segmenter resizes, and how DeepLabV3's convolutions are dilated, the 1x1 one first."""
    aligned, dilations = section.get("align_corners"), section.get("dilations")
    known: dict[str, Any] = {"align_corners": aligned if isinstance(aligned, bool) else None}
    if isinstance(dilations, list) and len(dilations) > 1 and all(type(x) is int and x >= 1 for x in dilations):
        known["dilations"] = tuple(dilations[1:])
    return _known(known)


def _head(model: Mapping[str, Any], detector: str) -> dict[str, Any]:
    """What the outputs of the heads mean."""
    if detector in SEGMENTERS:
        return _segmenter(_section(model, "decode_head"))
    if detector == "solo":
        return _solo(_section(model, "mask_head"))
    dense, rpn, rois = (_section(model, key) for key in ("bbox_head", "rpn_head", "roi_head"))
    if detector == "fcos":
        return _fcos(dense)
    if detector in ("atss", "gfl"):
        return _atss(dense)
    if detector == "reppoints":
        return _reppoints(dense)
    if detector == "retinanet":
        _check_coder(dense, _BOX_STDS)
        return _anchors(_section(dense, "anchor_generator"))
    _check_coder(rpn, _BOX_STDS)
    stages = rois.get("bbox_head")
    for stage, stds in zip(stages if isinstance(stages, list) else [stages], _ROI_STDS, strict=False):
        _check_coder(stage if isinstance(stage, dict) else {}, stds)
    return _anchors(_section(rpn, "anchor_generator"))


def _anchors(section: Mapping[str, Any]) -> dict[str, Any]:
    """Of a RetinaNet, octaves; of a network for proposals, the one size."""
    octaves, scales = section.get("scales_per_octave"), _numbers(section.get("scales"))
    scale = _number(section.get("octave_base_scale"))
    if scales and len(scales) == 1:
        scale = scales[0]
    elif scales:
        raise UserError(f"its own config has the anchors' scales {list(scales)}, which no model here has")
    for field in ("base_sizes", "center_offset"):
        if section.get(field):
            raise UserError(f"its own config has the anchors' {field} {section[field]!r}, which no model here has")
    found = {"anchor_scale": scale, "anchor_ratios": _numbers(section.get("ratios"))}
    return _known(found | {"anchor_octaves": octaves if type(octaves) is int and octaves <= _MOST_OCTAVES else None})


def _fcos(section: Mapping[str, Any]) -> dict[str, Any]:
    if not section:
        return {}
    ranges = section.get("regress_ranges")
    first = _numbers(list(ranges[0])) if isinstance(ranges, list) and ranges and isinstance(ranges[0], list) else None
    return _known(
        {
            "norm_on_box": section.get("norm_on_bbox", False) is True,
            "centerness_on_box": section.get("centerness_on_reg", False) is True,
            # The finest level, of stride 8, learns what reaches as far.
            "range_scale": first[1] / 8 if first and len(first) == 2 else None,
        }
    )


def _atss(section: Mapping[str, Any]) -> dict[str, Any]:
    """One square anchor at each location; GFL has no deltas to code."""
    if section.get("type") == "ATSSHead":
        _check_coder(section, _ROI_STDS[0])
    found = _anchors(_section(section, "anchor_generator"))
    octaves, ratios = found.pop("anchor_octaves", 1), found.pop("anchor_ratios", (1.0,))
    if (octaves, ratios) != (1, (1.0,)):
        raise UserError(
            f"its own config has anchors of {octaves} sizes and the ratios {list(ratios)}, which no model here has"
        )
    return found


def _reppoints(section: Mapping[str, Any]) -> dict[str, Any]:
    for field, value in _POINTS.items():
        if section.get(field, value) != value:
            raise UserError(f"its own config has the head's {field} {section[field]!r}, which no model here has")
    return _known({"point_scale": _number(section.get("point_base_scale"))})


def _solo(section: Mapping[str, Any]) -> dict[str, Any]:
    """How many cells each level has, and how large the objects of the finest one are at most."""
    ranges, grids = section.get("scale_ranges"), _numbers(section.get("num_grids"))
    first = _numbers(list(ranges[0])) if isinstance(ranges, list) and ranges and isinstance(ranges[0], list) else None
    return _known(
        {
            "grids": tuple(map(int, grids)) if grids else None,
            "range_scale": first[1] if first and len(first) == 2 else None,
        }
    )


def _check_coder(section: Mapping[str, Any], stds: tuple[float, ...]) -> None:
    """Refuses boxes that are coded otherwise than here."""
    coder = _section(section, "bbox_coder")
    kind, found = coder.get("type", "DeltaXYWHBBoxCoder"), _numbers(coder.get("target_stds")) or stds
    if kind != "DeltaXYWHBBoxCoder" or found != stds:
        raise UserError(
            f"its own config codes boxes by {kind} with target_stds {list(found)}, which no model here does; here it "
            f"is DeltaXYWHBBoxCoder with {list(stds)}"
        )
