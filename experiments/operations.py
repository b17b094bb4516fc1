"""A detector's operations against torchvision's formulas written plainly: ``python -m experiments.operations``.

One image of 800x1344: suppression of 1000 candidates of each of 5 levels, 80 classes; RoIAlign of 1000 RoIs from P2..P5
with 256 channels, and its gradient; assignment of all anchors to 100 objects; the deformable 3x3 convolutions of
ResNeXt-101 32x4d and of RepPoints' head beside plain ones of the same shape; that of the head, on all its levels,
beside its formula with all samples at once; and SOLO's masks, learnt and found, beside those of all cells at once. Both
sides run in turn, in one process, and must have the same result, a deformable convolution beside a plain one where its
offsets are zero. ``--rows=masks`` is the last alone, and so on.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.measure import check_agree, measure
from kdjax.boxes import pairwise_iou
from kdjax.losses.detection import dice_loss
from kdjax.models import build_model
from kdjax.models.anchors import pyramid_anchors
from kdjax.models.assign import assign_by_iou
from kdjax.models.deformable import deformable_conv
from kdjax.models.dense import best_pairs
from kdjax.models.nms import matrix_nms, nms
from kdjax.models.roi_align import roi_align, roi_levels
from kdjax.models.solo import MASK_WEIGHT, SOLO, peaks, sampled
from kdjax.models.solo_head import SOLOPredictions
from kdjax.types import Masks, Targets

HEIGHT, WIDTH, CHANNELS, CLASSES = 800, 1344, 256, 80
CANDIDATES, KEPT, ROIS, BINS, OBJECTS = 5000, 100, 1000, 7, 100
OUTLINED, CELLS = 20, 112
"""Objects of which SOLO learns masks, in ``OBJECTS`` slots, and cells along a side of their grids."""

_ROWS = flags.DEFINE_multi_enum(
    "rows",
    None,
    ["nms", "roi_align", "assign", "deformable", "head", "masks"],
    "Which rows of the table; all by default.",
)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed calls of each.", lower_bound=1)


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 4) float32 in the image; sides from 8 to 600 pixels, equally many in every octave."""
    side, ratio = np.exp(rng.uniform(np.log(8), np.log(600), count)), np.exp(rng.normal(0, 0.4, count))
    sides = np.minimum(np.stack([side * ratio, side / ratio], axis=1), [WIDTH, HEIGHT])
    corner = rng.uniform(0, [WIDTH, HEIGHT] - sides)
    return np.concatenate([corner, corner + sides], axis=1).astype(np.float32)


def sizes(levels: range) -> dict[str, tuple[int, int]]:
    """Height and width of each level's map."""
    return {f"p{level}": (-(-HEIGHT // 2**level), -(-WIDTH // 2**level)) for level in levels}


def plain_nms(boxes: jax.Array, scores: jax.Array, labels: jax.Array) -> jax.Array:
    """(K,) bool, which are kept: all overlaps first, then box after box; classes are moved apart."""
    moved = boxes + (labels * (jnp.max(boxes) + 1))[:, None]
    order = jnp.argsort(-scores)
    overlaps = pairwise_iou(moved[order], moved[order]) > 0.5

    def decide(i: jax.Array, keep: jax.Array) -> jax.Array:
        return keep & ~(overlaps[i] & keep[i] & (jnp.arange(len(keep)) > i))

    keep = jax.lax.fori_loop(0, len(scores), decide, jnp.ones(len(scores), bool))
    return jnp.zeros_like(keep).at[order].set(keep)


def plain_roi_align(features: dict[str, jax.Array], boxes: jax.Array, levels: jax.Array) -> jax.Array:
    """Every sample of every bin by its four cells, 2 x 2 samples a bin; (R, bins, bins, C)."""
    rows = [x.shape[1] * x.shape[2] for x in features.values()]
    cells = jnp.concatenate([x.reshape(-1, CHANNELS) for x in features.values()])
    start = jnp.cumsum(jnp.array([0, *rows[:-1]]))[levels - 2]
    height, width = (jnp.array([x.shape[axis] for x in features.values()])[levels - 2] for axis in (1, 2))
    scaled = boxes / 2.0 ** levels[:, None]
    samples = 2 * BINS

    def along(low: jax.Array, high: jax.Array, length: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        """Of each sample the two cells next to it and their weights, (R, samples) each."""
        step = jnp.maximum(high - low, 1)[:, None] / samples
        position = low[:, None] + (jnp.arange(samples) + 0.5)[None] * step
        position = jnp.clip(position, 0, length[:, None] - 1)
        cell = jnp.floor(position).astype(jnp.int32)
        share = position - cell
        return [(cell, 1 - share), (jnp.minimum(cell + 1, length[:, None] - 1), share)]

    x1, y1, x2, y2 = scaled.T
    total = jnp.zeros((len(boxes), samples, samples, CHANNELS))
    for row, row_weight in along(y1, y2, height):
        for column, column_weight in along(x1, x2, width):
            index = start[:, None, None] + row[:, :, None] * width[:, None, None] + column[:, None]
            total += cells[index] * (row_weight[:, :, None] * column_weight[:, None])[..., None]
    return total.reshape(len(boxes), BINS, 2, BINS, 2, CHANNELS).mean(axis=(2, 4))


def plain_assign(anchors: jax.Array, boxes: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Matched object, positive and negative of every anchor, from the whole matrix of overlaps."""
    overlaps = pairwise_iou(boxes, anchors)
    matched, best = jnp.argmax(overlaps, axis=0), jnp.max(overlaps, axis=0)
    served = jnp.any(overlaps == jnp.max(overlaps, axis=1, keepdims=True), axis=0)
    positive = (best >= 0.5) | served
    return matched, positive, ~positive & (best < 0.4)


def plain_deformable(x: jax.Array, offsets: jax.Array, kernel: jax.Array) -> jax.Array:
    """The 9 samples of every position by their four cells, then one product: (1, H, W, C) to (1, H, W, F)."""
    _, height, width, channels = x.shape
    rows, columns = jnp.arange(height, dtype=jnp.float32), jnp.arange(width, dtype=jnp.float32)
    taps = jnp.arange(-1, 2, dtype=jnp.float32)
    moves = offsets.reshape(height, width, 3, 3, 2)
    y = rows[:, None, None, None] + taps[None, None, :, None] + moves[..., 0]
    across = columns[None, :, None, None] + taps[None, None, None] + moves[..., 1]
    inside = (y > -1) & (y < height) & (across > -1) & (across < width)
    total = jnp.zeros((height, width, 3, 3, channels))
    for row_of in (jnp.floor(y), jnp.floor(y) + 1):
        for column_of in (jnp.floor(across), jnp.floor(across) + 1):
            exists = inside & (row_of >= 0) & (row_of < height) & (column_of >= 0) & (column_of < width)
            weight = (1 - jnp.abs(y - row_of)) * (1 - jnp.abs(across - column_of))
            cell = (
                jnp.clip(place, 0, size - 1).astype(jnp.int32) for place, size in ((row_of, height), (column_of, width))
            )
            total += x[0][tuple(cell)] * jnp.where(exists, weight, 0)[..., None]
    return jnp.einsum("hwijc,ijcf->hwf", total, kernel)[None]


def all_masks(predictions: SOLOPredictions) -> dict[str, jax.Array]:
    """The masks of all cells of one image, level by level: logits (S * S, h, w)."""
    return {
        level: jnp.einsum("hwc,kc->khw", maps[0], predictions.kernels[level][0])
        + predictions.biases[level][0][:, None, None]
        for level, maps in predictions.features.items()
    }


def plain_mask_loss(detector: SOLO, predictions: SOLOPredictions, targets: Targets, image_size: jax.Array) -> jax.Array:
    """The dice losses of all cells' masks, of which those of positive cells count."""
    assert targets.masks is not None
    total, positive = jnp.zeros(()), jnp.zeros((), int)
    owners = detector.assign(targets, image_size)
    for level, logits in all_masks(predictions).items():
        goals = sampled(Masks(*(x[0] for x in targets.masks)), logits.shape[1:], detector.steps[level] // 2)
        losses = dice_loss(jax.nn.sigmoid(logits), goals[owners[level][0]], jnp.ones((1, *logits.shape[1:]), bool))
        total += jnp.sum(jnp.where(owners[level][0] >= 0, losses, 0))
        positive += jnp.sum(owners[level] >= 0)
    return MASK_WEIGHT * total / positive


def plain_masks(detector: SOLO, predictions: SOLOPredictions) -> tuple[jax.Array, ...]:
    """Scores, labels and mean of the found masks, from the masks of all cells at the finest size."""
    finest = next(iter(predictions.features.values())).shape[1:3]
    masks, scores = [], []
    for level, logits in all_masks(predictions).items():
        found = jax.image.resize(jax.nn.sigmoid(logits), (len(logits), *finest), "bilinear")
        area = jnp.sum(found > 0.5, axis=(1, 2))
        sure = jnp.sum(jnp.where(found > 0.5, found, 0), axis=(1, 2)) / jnp.maximum(area, 1)
        score = peaks(jax.nn.sigmoid(predictions.logits[level][0])).reshape(len(logits), -1)
        sure = jnp.where(area > detector.steps[level], sure, 0)[:, None]
        masks.append(found)
        scores.append(jnp.where(score > detector.score_threshold, score * sure, 0))
    best, cell, label = (x[0] for x in best_pairs(jnp.concatenate(scores)[None], detector.candidates))
    chosen = jnp.concatenate(masks)[cell]
    score = matrix_nms((chosen > 0.5) & (best > 0)[:, None, None], best, label, sigma=detector.sigma)
    score, place = jax.lax.top_k(jnp.where((best > 0) & (score >= detector.kept_score), score, 0), KEPT)
    soft = jnp.where((score > 0)[:, None, None], chosen[place], 0)
    return score, jnp.where(score > 0, label[place], 0), jnp.mean(jnp.round(255 * soft), axis=(1, 2))


def row(
    title: str,
    ours: Callable[..., Any],
    plain: Callable[..., Any],
    arguments: Sequence[Any],
    agreeing: Sequence[Any] | None = None,
) -> str:
    """A row of the table; both must have the same result of ``agreeing``, by default of ``arguments``."""
    own, others = measure([ours, plain], arguments, _ROUNDS.value)
    check_agree([ours, plain], agreeing or arguments)
    return (
        f"| {title} | {own.ms:.0f} | {others.ms:.0f} | {own.cpu_ms:.0f} | {others.cpu_ms:.0f} "
        f"| {own.mib:.0f} | {others.mib:.0f} | {own.compile_s:.1f} | {others.compile_s:.1f} |"
    )


def nms_row() -> str:
    """50 objects, found again and again at places near theirs."""
    rng = np.random.default_rng(0)
    objects = random_boxes(rng, 50)
    which = rng.integers(0, len(objects), CANDIDATES)
    sides = np.tile(objects[:, 2:] - objects[:, :2], 2)[which]
    boxes = (objects[which] + 0.15 * sides * rng.normal(size=sides.shape)).astype(np.float32)
    boxes = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], axis=1)
    scores, labels = rng.random(CANDIDATES).astype(np.float32), rng.integers(0, CLASSES, CANDIDATES).astype(np.int32)

    def ours(boxes: jax.Array, scores: jax.Array, labels: jax.Array) -> jax.Array:
        valid = jnp.ones((1, CANDIDATES), bool)
        index, kept = nms(boxes[None], scores[None], labels[None], valid, iou_threshold=0.5, max_outputs=KEPT)
        return jnp.where(kept[0], index[0], -1)

    def plain(boxes: jax.Array, scores: jax.Array, labels: jax.Array) -> jax.Array:
        return jax.lax.top_k(jnp.where(plain_nms(boxes, scores, labels), scores, -1), KEPT)[1]

    return row(f"NMS, {CANDIDATES} candidates, {CLASSES} classes", ours, plain, (boxes, scores, labels))


def stride_of(level: str) -> int:
    """The levels here are called by their strides: "p3" is 8."""
    return 2 ** int(level[1:])


def roi_align_rows() -> list[str]:
    """Forward, and forward with backward."""
    rng = np.random.default_rng(1)
    features = {
        level: rng.standard_normal((1, *size, CHANNELS), np.float32) for level, size in sizes(range(2, 6)).items()
    }
    boxes = jnp.asarray(random_boxes(rng, ROIS))
    levels = roi_levels(boxes, 2, 5, nudge_side=False)
    upstream = rng.standard_normal((ROIS, BINS, BINS, CHANNELS), np.float32)

    def ours(features: dict[str, jax.Array], *_: Any) -> jax.Array:
        maps = {stride_of(level): x for level, x in features.items()}
        return roi_align(maps, boxes[None], levels[None], output_size=BINS, sampling_ratio=2, aligned=False)[0]

    def plain(features: dict[str, jax.Array], *_: Any) -> jax.Array:
        return plain_roi_align(features, boxes, levels)

    def gradient(function: Callable[..., jax.Array]) -> Callable[..., Any]:
        return lambda features, upstream: jax.vjp(function, features)[1](upstream)[0]

    return [
        row(f"RoIAlign, {ROIS} RoIs", ours, plain, (features,)),
        row("RoIAlign, its gradient", gradient(ours), gradient(plain), (features, upstream)),
    ]


def assign_row() -> str:
    """All anchors of RetinaNet."""
    maps = sizes(range(3, 8))
    strides = {level: stride_of(level) for level in maps}
    anchors = jnp.concatenate(
        list(pyramid_anchors(maps, strides, scale=4.0, octaves=3, ratios=(0.5, 1.0, 2.0)).values())
    )
    boxes = random_boxes(np.random.default_rng(2), OBJECTS)

    def ours(anchors: jax.Array, boxes: jax.Array) -> tuple[jax.Array, ...]:
        valid, inside = jnp.ones(OBJECTS, bool), jnp.ones(len(anchors), bool)
        return tuple(assign_by_iou(anchors, boxes, valid, inside, claim=False))

    return row(f"IoU assignment, {len(anchors)} anchors, {OBJECTS} objects", ours, plain_assign, (anchors, boxes))


def deformable_row(title: str, level: str, channels: int, groups: int, *, backward: bool = False) -> str:
    """Samples lie two cells or so from where a plain convolution has them."""
    rng = np.random.default_rng(3)
    height, width = sizes(range(3, 6))[level]
    x = rng.standard_normal((1, height, width, channels), np.float32)
    offsets = 2 * rng.standard_normal((1, height, width, 18), np.float32)
    kernel = rng.standard_normal((3, 3, channels // groups, channels), np.float32)

    def ours(x: jax.Array, offsets: jax.Array, kernel: jax.Array) -> jax.Array:
        return deformable_conv(x, offsets, kernel, groups=groups)

    def plain(x: jax.Array, offsets: jax.Array, kernel: jax.Array) -> jax.Array:
        del offsets
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=layout, feature_group_count=groups
        )

    def gradient(function: Callable[..., jax.Array]) -> Callable[..., Any]:
        """By x and the kernel; the plain one has none by the offsets."""
        return lambda x, offsets, kernel: jax.vjp(lambda x, kernel: function(x, offsets, kernel), x, kernel)[1](x)

    own, others = (gradient(ours), gradient(plain)) if backward else (ours, plain)
    return row(title, own, others, (x, offsets, kernel), agreeing=(x, np.zeros_like(offsets), kernel))


def deformable_rows() -> list[str]:
    """The teacher's forward pass, and the student's both ways."""
    teacher = [
        deformable_row(f"Deformable 3x3 of C{level}, {channels} channels, 32 groups", f"p{level}", channels, 32)
        for level, channels in ((3, 256), (4, 512), (5, 1024))
    ]
    head = f"Deformable 3x3 of P3, {CHANNELS} channels"
    return [
        *teacher,
        deformable_row(head, "p3", CHANNELS, 1),
        deformable_row(f"{head}, its gradient", "p3", CHANNELS, 1, backward=True),
    ]


def head_rows() -> list[str]:
    """Of RepPoints, P3 to P7: forward, and forward with the gradient by maps, offsets and kernel."""
    rng = np.random.default_rng(4)
    maps = sizes(range(3, 8)).values()
    features = [rng.standard_normal((1, *size, CHANNELS), np.float32) for size in maps]
    offsets = [2 * rng.standard_normal((1, *size, 18), np.float32) for size in maps]
    kernel = rng.standard_normal((3, 3, CHANNELS, CHANNELS), np.float32)

    def levels(function: Callable[..., jax.Array]) -> Callable[..., Any]:
        return lambda features, offsets, kernel: [
            function(*level, kernel) for level in zip(features, offsets, strict=True)
        ]

    def gradient(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: jax.vjp(function, *arguments)[1](arguments[0])

    ours, plain = levels(deformable_conv), levels(plain_deformable)
    title, arguments = f"Deformable 3x3 of P3..P7, {CHANNELS} channels", (features, offsets, kernel)
    return [
        row(f"{title}, by its formula", ours, plain, arguments),
        row(f"{title}, with its gradient, by its formula", gradient(ours), gradient(plain), arguments),
    ]


def mask_rows() -> list[str]:
    """Of SOLO: the loss of masks, the same with its gradient by features, kernels and biases, and inference."""
    rng = np.random.default_rng(5)
    detector: Any = build_model({"name": "solo"}, CLASSES)
    steps, cells = detector.steps, dict(zip(detector.steps, detector.grids, strict=True))

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    predictions = SOLOPredictions(
        {level: normal(1, count, count, CLASSES) - 3 for level, count in cells.items()},
        {level: normal(1, 2 * HEIGHT // step, 2 * WIDTH // step, CHANNELS) for level, step in steps.items()},
        {level: 0.1 * normal(1, count**2, CHANNELS) for level, count in cells.items()},
        {level: jnp.zeros((1, count**2)) for level, count in cells.items()},
    )
    boxes, labels = jnp.asarray(random_boxes(rng, OBJECTS))[None], rng.integers(0, CLASSES, (1, OBJECTS))
    across = jnp.linspace(-1, 1, CELLS)
    disc = across[None] ** 2 + across[:, None] ** 2 <= 1
    masks = Masks(jnp.tile(disc[None, None], (1, OBJECTS, 1, 1)), boxes)
    targets = Targets(boxes, jnp.asarray(labels), jnp.arange(OBJECTS)[None] < OUTLINED, masks=masks)
    size = jnp.array([[HEIGHT, WIDTH]])

    def loss(predictions: SOLOPredictions, targets: Targets, size: jax.Array) -> jax.Array:
        return detector.loss(predictions, targets, size)["mask"]

    def plain_loss(predictions: SOLOPredictions, targets: Targets, size: jax.Array) -> jax.Array:
        return plain_mask_loss(detector, predictions, targets, size)

    def found(predictions: SOLOPredictions, size: jax.Array) -> tuple[jax.Array, ...]:
        found = detector.decode(predictions, size)
        return found.scores[0], found.labels[0], jnp.mean(found.whole_masks[0].astype(jnp.float32), axis=(1, 2))

    def plain_found(predictions: SOLOPredictions, size: jax.Array) -> tuple[jax.Array, ...]:
        del size  # That of the arrays.
        return plain_masks(detector, predictions)

    title, learnt = f"SOLO's masks of {sum(s * s for s in cells.values())} cells", (predictions, targets, size)
    return [
        row(f"{title}, the loss of {OUTLINED} objects", loss, plain_loss, learnt),
        row(f"{title}, the loss with its gradient", jax.value_and_grad(loss), jax.value_and_grad(plain_loss), learnt),
        row(f"{title}, found", found, plain_found, (predictions, size)),
    ]


TABLE = {
    "nms": lambda: [nms_row()],
    "roi_align": roi_align_rows,
    "assign": lambda: [assign_row()],
    "deformable": deformable_rows,
    "head": head_rows,
    "masks": mask_rows,
}
"""What makes the rows, by the names that the command line has for them."""


def main(_: Sequence[str]) -> None:
    """Prints the table."""
    device = jax.devices()[0].device_kind
    print(f"One image of {HEIGHT}x{WIDTH}, float32; {device}, jax {jax.__version__}\n")
    print("| operation | ms | plain | CPU ms | plain | temp MiB | plain | compile s | plain |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in _ROWS.value or TABLE:
        for line in TABLE[name]():
            print(line, flush=True)


if __name__ == "__main__":
    app.run(main)
