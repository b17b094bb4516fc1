"""A detector's operations against torchvision's formulas written plainly: ``python -m experiments.operations``.

One image of 800x1344: suppression of 1000 candidates of each of 5 levels, 80 classes; RoIAlign of 1000 RoIs from P2..P5
with 256 channels, and its gradient; assignment of all anchors to 100 objects; the deformable 3x3 convolutions of
ResNeXt-101 32x4d and of RepPoints' head beside plain ones of the same shape; and that of the head, on all its levels,
beside its formula with all samples at once. Both sides run in turn, in one process, and must have the same result, a
deformable convolution beside a plain one where its offsets are zero. ``--rows=head`` is the last alone, and so on.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.measure import check_agree, measure
from kdjax.boxes import pairwise_iou
from kdjax.models.anchors import pyramid_anchors
from kdjax.models.assign import assign_by_iou
from kdjax.models.deformable import deformable_conv
from kdjax.models.nms import nms
from kdjax.models.roi_align import roi_align, roi_levels

HEIGHT, WIDTH, CHANNELS, CLASSES = 800, 1344, 256, 80
CANDIDATES, KEPT, ROIS, BINS, OBJECTS = 5000, 100, 1000, 7, 100

_ROWS = flags.DEFINE_multi_enum(
    "rows", None, ["nms", "roi_align", "assign", "deformable", "head"], "Which rows of the table; all by default."
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


TABLE = {
    "nms": lambda: [nms_row()],
    "roi_align": roi_align_rows,
    "assign": lambda: [assign_row()],
    "deformable": deformable_rows,
    "head": head_rows,
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
