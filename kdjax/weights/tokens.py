"""MasKD's receptive tokens as its authors' programs save them: https://github.com/hunto/MasKD."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdjax.errors import UserError

_PLACES = {
    "mask_token": "tokens",
    "prob.0.weight": "kernel_0",
    "prob.0.bias": "bias_0",
    "prob.2.weight": "kernel_1",
    "prob.2.bias": "bias_1",
}
"""Of one map, what the authors call an array, and what it is called here."""

_BY_MAP = re.compile(rf"(?:.*\.)?mask_modules\.(?P<map>\d+)\.(?P<array>{'|'.join(map(re.escape, _PLACES))})")
_OF_LOGITS = re.compile(r"(?:module\.)?mask_token")


def learnt_tokens(tensors: Mapping[str, np.ndarray], maps: Sequence[str], origin: str) -> dict[str, Any]:
    """The tokens in a file, as the part of a method's parameters that learns them.

    Of a detector's checkpoint all but the tokens is left alone. Kernels (O, I, H, W) become (H, W, I, O).

    Args:
        tensors: name to array; a file of detection has ``mask_modules.<number of the map>.mask_token`` (K, C) and,
            where masks are weighted, ``.prob.0`` and ``.prob.2``, one of segmentation a ``mask_token`` (K, classes).
        maps: names of the teacher's maps that tokens are of, fine to coarse.
        origin: what the file is, for messages.

    Returns:
        {"tokens": {map: {"tokens", "kernel_0", ...}}}, or {"tokens": (K, classes)} of segmentation.

    Raises:
        UserError: there are no tokens in it, or of another number of maps.
    """
    if logits := [array for name, array in tensors.items() if _OF_LOGITS.fullmatch(name)]:
        return {"tokens": _ours(logits[0])}
    found: dict[int, dict[str, np.ndarray]] = {}
    for name, array in tensors.items():
        if match := _BY_MAP.fullmatch(name):
            found.setdefault(int(match["map"]), {})[_PLACES[match["array"]]] = _ours(array)
    if not found:
        raise UserError(
            f"{origin} has no receptive tokens: there is neither mask_modules.0.mask_token, as in the authors' files "
            "of detectors, nor mask_token, as in those of segmenters."
        )
    if sorted(found) != list(range(len(maps))):
        raise UserError(
            f"{origin} has the tokens of {len(found)} maps ({', '.join(map(str, sorted(found)))}), but the teacher has "
            f"{len(maps)} ({', '.join(maps)}): name those that they are of in the method's levels."
        )
    return {"tokens": {name: found[number] for number, name in enumerate(maps)}}


def _ours(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32).transpose(2, 3, 1, 0) if array.ndim == 4 else array.astype(np.float32)
