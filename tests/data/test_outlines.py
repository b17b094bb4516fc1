"""Compressed run lengths against COCO's own code, which made them."""

import numpy as np
import pytest
from faster_coco_eval.core import mask as coco_mask

from kdjax.data.outlines import PolygonStore, _sound_runs, _uncompressed, usable_outlines


def masks():
    """Noise and rectangles of many sizes: short runs and long ones."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        height, width = rng.integers(1, 400, 2)
        mask = np.zeros((height, width), np.uint8)
        if rng.random() < 0.3:
            mask[:] = rng.random(mask.shape) < rng.random()
        top, left = rng.integers(0, height), rng.integers(0, width)
        mask[top : top + rng.integers(1, 300), left : left + rng.integers(1, 300)] = 1
        yield mask


def run_lengths(mask):
    """Counted by hand: alternating runs of zeros and ones, column after column."""
    flat = mask.T.ravel()
    ends = np.append(np.flatnonzero(np.diff(flat)) + 1, len(flat))
    runs = np.diff(ends, prepend=0)
    return [0, *runs] if flat[0] else list(runs)


def test_run_lengths_are_those_of_the_mask():
    for mask in masks():
        encoded = coco_mask.encode(np.asfortranarray(mask))
        text, size = encoded["counts"].decode(), list(mask.shape)
        assert _uncompressed(text).tolist() == run_lengths(mask)
        assert _sound_runs({"size": size, "counts": text}, size)
        assert not _sound_runs({"size": size[::-1], "counts": text}, size) or size[0] == size[1]


def test_what_passes_is_safe_for_cocos_code():
    """Mutated texts: those that pass decode to a mask that has just these runs, and some of each kind are met."""
    rng = np.random.default_rng(1)
    passed = 0
    for mask in masks():
        size = list(mask.shape)
        text = bytearray(coco_mask.encode(np.asfortranarray(mask))["counts"])
        for _ in range(20):
            mutated = bytearray(text)
            mutated[rng.integers(len(text))] = rng.integers(40, 120)
            counts = bytes(mutated[: rng.integers(1, len(mutated) + 1)] if rng.random() < 0.2 else mutated)
            if _sound_runs({"size": size, "counts": counts.decode()}, size):
                passed += 1
                decoded = coco_mask.decode({"size": size, "counts": counts})
                ones = np.array(_uncompressed(counts.decode()))[1::2].sum()
                assert decoded.shape == mask.shape
                assert decoded.sum() == ones
    assert 0 < passed < 800


def test_without_any_outline_there_are_none():
    boxes, sizes = np.zeros((2, 4)), np.full((2, 2), 10)
    outlines, boxed = usable_outlines([None, "x"], PolygonStore(), boxes, sizes)
    assert outlines is None
    assert boxed.tolist() == [0, 1]
    outlines, boxed = usable_outlines([], PolygonStore(), boxes[:0], sizes[:0])
    assert outlines is None
    assert not len(boxed)


@pytest.mark.parametrize("numbers", [[1, 2, 3, 4, 5, 10**400], ["1", 2, 3, 4, 5, 6]])
def test_a_polygon_that_cannot_be_stored_leaves_the_others_whole(numbers):
    store = PolygonStore()
    entries = [store.take({"segmentation": polygons}) for polygons in ([numbers], [[0.5, 2, 3, 4, 5, 6], [7, 8] * 3])]
    outlines, boxed = usable_outlines(
        [entry["segmentation"] for entry in entries], store, np.array([[1, 2, 3, 4]] * 2), np.full((2, 2), 10)
    )
    assert boxed.tolist() == [0]
    assert outlines.of(0) == [[1, 2, 3, 2, 3, 4, 1, 4]]
    assert outlines.of(1) == [[0.5, 2, 3, 4, 5, 6], [7, 8, 7, 8, 7, 8]]
