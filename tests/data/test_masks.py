"""Outlines are filled as by pycocotools; grids say what the pixels say, counted in whole numbers."""

import numpy as np
import pytest
from pycocotools import mask as pycocotools_mask

from kdjax.data.masks import mask_grid, paste, paste_whole, rasterize
from kdjax.losses.segmentation import bilinear

SIZE = 37, 53


def blob(seed: int) -> np.ndarray:
    """A ragged disc, (37, 53) bool."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    noise = np.random.default_rng(seed).normal(0, 3, SIZE)
    return np.hypot(y - 17, x - 29) + noise < 13


def encoded(compressed: bool) -> dict:
    mask = blob(0)
    if compressed:
        return pycocotools_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    changes = np.flatnonzero(np.diff(mask.ravel("F").astype(int))) + 1
    return {"size": list(SIZE), "counts": np.diff([0, *changes, mask.size]).tolist()}


def test_run_lengths_are_decoded():
    compressed = encoded(compressed=True)
    as_text = compressed | {"counts": compressed["counts"].decode()}
    for segmentation in (compressed, as_text, encoded(compressed=False)):
        np.testing.assert_array_equal(rasterize(segmentation, SIZE), blob(0))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Of pycocotools with NumPy 2.
@pytest.mark.parametrize(
    "polygons",
    [
        [[3.2, 4.1, 40.7, 8.3, 22.5, 33.9]],
        [[3, 4, 20, 4, 20, 12, 3, 12], [30.5, 2.5, 50, 20, 31, 30]],
        [[-9.5, -4, 12, -6, 14, 17, -3, 60], [40, 10, 70, 10, 70, 20, 40, 20]],
        [[100, 100, 120, 100, 110, 130]],
    ],
    ids=["one", "two parts", "reaching out", "outside"],
)
def test_polygons_are_filled_as_by_pycocotools(polygons):
    merged = pycocotools_mask.merge(pycocotools_mask.frPyObjects(polygons, *SIZE))
    mask = rasterize(polygons, SIZE)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, pycocotools_mask.decode(merged))


def test_no_polygon_is_no_pixel():
    np.testing.assert_array_equal(rasterize([], SIZE), np.zeros(SIZE, bool))


def test_run_lengths_of_another_image_are_refused():
    with pytest.raises(ValueError, match=r"\(37, 53\), but the image has \(53, 37\)"):
        rasterize(encoded(compressed=True), SIZE[::-1])


def painted(grid: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """The pixels of a grid whose cells are pixels."""
    canvas = np.zeros((SIZE[0] + len(grid), SIZE[1] + len(grid)), bool)
    x, y = frame[:2].astype(int)
    canvas[y : y + len(grid), x : x + len(grid)] = grid
    assert not canvas[SIZE[0] :].any()
    assert not canvas[:, SIZE[1] :].any()
    return canvas[: SIZE[0], : SIZE[1]]


@pytest.mark.parametrize("edge", ["inside", "at the far corner", "one pixel", "all"])
def test_objects_that_fit_keep_their_pixels(edge):
    mask = blob(1)
    if edge == "at the far corner":
        mask = np.pad(mask, ((10, 0), (12, 0)))[: SIZE[0], : SIZE[1]]
    elif edge == "one pixel":
        mask = np.zeros(SIZE, bool)
        mask[36, 0] = True
    elif edge == "all":
        mask = np.ones(SIZE, bool)
    grid, frame = mask_grid(mask, 53)
    rows, columns = mask.any(axis=1), mask.any(axis=0)
    corner = columns.argmax(), rows.argmax()
    np.testing.assert_array_equal(frame, [*corner, corner[0] + 53, corner[1] + 53])
    assert (grid.dtype, frame.dtype) == (bool, np.float32)
    np.testing.assert_array_equal(painted(grid, frame), mask)


@pytest.mark.parametrize("cells", [5, 8, 20, 30])
def test_larger_objects_are_shrunk_by_area(cells):
    mask = blob(2)[:, :40] & (np.mgrid[: SIZE[0], :40][0] < 25)
    grid, frame = mask_grid(mask, cells)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    inner = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = inner.shape
    assert width > height > 20
    np.testing.assert_array_equal(
        frame, [columns[0], rows[0], columns[0] + max(width, cells), rows[0] + max(height, cells)]
    )
    # Every pixel in as many parts as there are cells: then cells hold whole numbers of parts.
    parts = inner.repeat(cells, axis=0).repeat(cells, axis=1).astype(int)
    extents = max(height, cells), max(width, cells)
    parts = np.pad(parts, [(0, extent * cells - n) for extent, n in zip(extents, parts.shape, strict=True)])
    counts = parts.reshape(cells, extents[0], cells, extents[1]).sum(axis=(1, 3))
    np.testing.assert_array_equal(grid, 2 * counts >= extents[0] * extents[1])
    assert 0 < grid.sum() < grid.size


def test_an_empty_mask_has_an_empty_grid():
    grid, frame = mask_grid(np.zeros(SIZE, bool), 8)
    assert not grid.any()
    np.testing.assert_array_equal(frame, [0, 0, 8, 8])


def pasted(mask: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The probability at each pixel's centre by the definition, (H, W)."""
    (height, width), (x1, y1, x2, y2), cells = size, box, len(mask)
    padded = np.pad(mask, 1)  # Zero outside; cell (i, j) of the mask is cell (i + 1, j + 1).
    result = np.zeros(size)
    for row, column in np.ndindex(height, width):
        y = (row + 0.5 - y1) / (y2 - y1) * cells + 0.5
        x = (column + 0.5 - x1) / (x2 - x1) * cells + 0.5
        if 0 <= y <= cells + 1 and 0 <= x <= cells + 1:
            i, j = min(int(y), cells), min(int(x), cells)
            above, below = (padded[k, j] * (1 - x + j) + padded[k, j + 1] * (x - j) for k in (i, i + 1))
            result[row, column] = above * (1 - y + i) + below * (y - i)
    return result


@pytest.mark.parametrize(
    "box",
    [
        [10.3, 5.2, 41.7, 30.1],
        [12, 8, 19, 15],  # One cell a pixel.
        [20.2, 10.4, 22.9, 14.3],  # Smaller than its mask.
        [0, 0, 53, 37],
        [-20.5, -3, 30, 55],  # Reaching out.
        [30.1, 20.2, 30.4, 20.4],  # Between the centres of pixels.
        [20, 20, 20, 30],
        [60, 40, 70, 50],
    ],
)
def test_pixels_are_pasted_by_the_probability_at_their_centre(box):
    mask = np.random.default_rng(3).random((7, 7)).astype(np.float32)
    mask[2:5, 2:6] = 0.95
    actual = rasterize(paste(mask, np.array(box, np.float32), SIZE), SIZE)
    if box[0] == box[2]:
        assert not actual.any()
        return
    probability = pasted(mask, box, SIZE)
    clear = np.abs(probability - 0.5) > 1e-5
    assert clear.sum() >= clear.size - 2
    np.testing.assert_array_equal(actual[clear], probability[clear] > 0.5)


def test_pasted_run_lengths_are_as_pycocotools_has_them():
    mask = np.full((4, 4), 4, np.float32)  # More than a probability, so that corners count, which lie half outside.
    for box in ([0, 0, 53, 37], [3, 0, 9, 37], [50, 30, 53, 37], [4, 5, 9, 11]):
        encoded = paste(mask, np.array(box, np.float32), SIZE)
        expected = np.zeros(SIZE, np.uint8, order="F")
        expected[box[1] : box[3], box[0] : box[2]] = 1
        assert encoded["counts"].encode() == pycocotools_mask.encode(expected)["counts"]
        assert encoded["size"] == [37, 53]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Of pycocotools with NumPy 2.
@pytest.mark.parametrize("size", [(48, 60), (37, 53), (90, 121)], ids=["as it is", "smaller", "larger"])
def test_masks_over_all_of_an_image_are_enlarged_cut_and_resized(size):
    """In whole arrays, as MMDetection does it; of masks at the border, of many parts, and of none."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:16, :16]
    discs = [np.exp(-((y - a) ** 2 + (x - b) ** 2) / r) for a, b, r in ((5, 6, 9), (0, 15, 30), (8, 3, 4))]
    masks = np.array([*discs, rng.random((16, 16)), np.zeros((16, 16)), np.ones((16, 16))])
    masks, scaled = np.round(255 * masks).astype(np.uint8), (48, 60)
    enlarge = bilinear(16, 64, False)
    for mask, pasted in zip(masks, paste_whole(masks, scaled, size), strict=True):
        enlarged = (enlarge @ mask.astype(np.float32) @ enlarge.T)[: scaled[0], : scaled[1]]
        resized = bilinear(scaled[0], size[0], False) @ enlarged @ bilinear(scaled[1], size[1], False).T
        sure = np.abs(resized - 127.5) > 1e-3
        assert tuple(pasted["size"]) == size
        np.testing.assert_array_equal(pycocotools_mask.decode(pasted).astype(bool)[sure], (resized > 127.5)[sure])
