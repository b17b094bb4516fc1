"""SOLO: segmenting objects by locations (Wang et al., ECCV 2020, https://arxiv.org/abs/1912.04488).

A detector without boxes. The image is divided into S x S cells, and the cell in which an object's centre of mass lies
says its class and its mask. What the paper leaves open is MMDetection's: levels, cells, targets, Matrix NMS.
The file is long because all of that is its own: no other detector here is without boxes.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax.errors import UserError
from kdjax.losses.detection import dice_loss
from kdjax.losses.reduce import mean_count
from kdjax.models.anchors import padded, scale_for
from kdjax.models.assign import Assignment
from kdjax.models.dense import best_pairs, focal_sums
from kdjax.models.detector import Detector
from kdjax.models.network import Sections
from kdjax.models.nms import matrix_nms
from kdjax.models.solo_head import SOLOHead, SOLOPredictions, interpolation, regional_resize
from kdjax.options import Rule, number, whole
from kdjax.types import Detections, Features, Masks, Sampling, Targets, Terms

MASK_WEIGHT = 3.0
"""Of the dice loss beside the classification (section 3.3)."""
CENTRE = 0.2
"""Share of an object's width and height, around its centre of mass, whose cells learn it (epsilon, section 3.3)."""
CELLS_OF_AN_OBJECT = 9
"""In a level, at most: those beside the centre's."""
CHUNK = 128
"""Cells whose masks exist at the same time in training, and no more than two for each slot of an object."""
FOUND_CHUNK = 64
"""And of candidates, in inference; those of a level are beside each other."""
HALF = 127
"""Above it the bytes of a mask are an object's."""

_GRIDS = Rule(
    "a tuple of whole numbers of at least 2",
    lambda value: isinstance(value, tuple) and len(value) > 1 and all(type(x) is int and x > 1 for x in value),
)


class SOLO(Detector):
    """The detector: its head, what it learns from targets, and what it finds.

    Cells divide an image with its padding up to the next multiples of 32, as far as MMDetection pads a single image,
    in training too: there the original pads to the largest image of a device's batch.
    """

    convs: Annotated[int, whole(0), "Convolutions in each tower before the last one."] = 7
    prior: Annotated[
        float, number(0, 1, above=True, below=True), "Probability that every classifier and mask starts with."
    ] = 0.01
    grids: Annotated[
        tuple[int, ...], _GRIDS, "Cells along a side of the image, of each level of the pyramid, fine to coarse."
    ] = (40, 36, 24, 16, 12)
    range_scale: Annotated[
        float,
        number(0, above=True),
        "The finest level learns objects of up to as many pixels, the square root of the box's area; each level above "
        "of a quarter as many to as many times a power of two, and the coarsest all larger ones: 96 in the paper; "
        "small images need less.",
    ] = 96.0
    score_threshold: Annotated[float, number(0, 1), "Classes of a cell scored above it are candidates."] = 0.1
    candidates: Annotated[int, whole(1), "Masks of an image that Matrix NMS compares at most."] = 500
    kept_score: Annotated[float, number(0, 1), "What the score of a detection is at least after Matrix NMS."] = 0.05
    sigma: Annotated[float, number(0), "Of Matrix NMS: how fast overlapping masks lose their scores."] = 2.0

    part_defaults: ClassVar[Sections] = {"neck": {"min_level": 2, "max_level": 6, "extra_from": "pool"}}
    terms: ClassVar[tuple[str, ...]] = ("cls", "mask")
    """Names of the loss terms."""
    decisive: ClassVar[tuple[str, ...]] = ("grids", "range_scale")
    class_axis: ClassVar[Mapping[str, str]] = {"cls_logits": "fastest"}
    tiny: ClassVar[Sections] = {**Detector.tiny, "head": {"convs": 1, "grids": (8, 7, 6, 5, 4), "candidates": 50}}

    def __post_init__(self) -> None:
        if len(self.grids) != len(self.strides):
            raise UserError(
                f"SOLO has a grid for each level of its pyramid, but head.grids has {len(self.grids)} numbers for "
                f"{len(self.strides)} levels ({', '.join(self.strides)})."
            )
        super().__post_init__()

    @property
    def learns_masks(self) -> bool:
        """Its targets must have masks."""
        return True

    @classmethod
    def suited(cls, sizes: Sequence[float]) -> dict[str, Any]:
        """The finest level learns the smaller half of the objects."""
        return {"range_scale": scale_for(sizes, quantile=0.5, stride=4, least=4.0, most=24.0) * 4} if sizes else {}

    @property
    def steps(self) -> dict[str, int]:
        """Pixels from one position of each map that the head sees to the next: 8, 8, 16, 32 and 32."""
        strides = list(self.strides.values())
        return dict(zip(self.strides, (strides[1], *strides[1:-1], strides[-2]), strict=True))

    def setup(self) -> None:
        """Makes the head; the backbone and the neck come from outside."""
        self.head = SOLOHead(self.num_classes, self.grids, convs=self.convs, prior=self.prior, dtype=self.dtype)

    def heads(
        self, features: Features, image_size: jax.Array | None = None, sampling: Sampling | None = None
    ) -> SOLOPredictions:
        """The neck's pyramid to predictions; the finest and the coarsest level are resized to their neighbours."""
        del sampling
        sizes = self.sizes(features)
        levels = list(sizes)
        finest = levels[0]
        if image_size is None:
            whole_image = jnp.array(sizes[finest], jnp.int32) * self.strides[finest]
            image_size = jnp.broadcast_to(whole_image, (features[finest].shape[0], 2))
        own = {level: _extent(image_size, self.strides[level], sizes[level]) for level in levels}
        seen = dict(features)
        for level, neighbour in ((finest, levels[1]), (levels[-1], levels[-2])):
            seen[level] = regional_resize(features[level], own[level], own[neighbour], sizes[neighbour])
            own[level] = own[neighbour]
        return self.head({level: seen[level] for level in levels}, own)

    def heads_at(self, features: Features, predictions: Any, image_size: jax.Array | None = None) -> SOLOPredictions:
        """What the head says where a student predicted something: it predicts everywhere, wherever that was."""
        del predictions
        return self.heads(features, image_size)

    @nn.nowrap
    def assign(self, targets: Targets, image_size: jax.Array) -> dict[str, jax.Array]:
        """The object of each cell of each level, (N, S * S) int32; -1 where there is none.

        A level learns objects of its range, which overlap. An object's cells are those of the middle fifth of its box's
        width and height around its centre of mass, no further than one from the centre's; of several objects the last.
        """
        assert targets.masks is not None
        grid, frame = targets.masks
        size = padded(image_size).astype(jnp.float32)[:, None, ::-1]
        shares = grid.astype(jnp.float32)
        covered = jnp.sum(shares, axis=(2, 3))
        places = jnp.arange(grid.shape[-1]) + 0.5
        # Of pixels, counted from 0: x, then y, as boxes have them.
        cell = (frame[..., 2:] - frame[..., :2]) / grid.shape[-1]
        along = jnp.stack([jnp.sum(shares, axis=axis) @ places for axis in (2, 3)], axis=-1)
        centre = frame[..., :2] + cell * along / jnp.maximum(covered, 1)[..., None] - 0.5
        sides = targets.boxes[..., 2:] - targets.boxes[..., :2]
        reach = 0.5 * CENTRE * sides
        side = jnp.sqrt(jnp.maximum(sides[..., 0], 0) * jnp.maximum(sides[..., 1], 0))
        real = targets.valid & (covered > 0)

        owners = {}
        for order, (level, count) in enumerate(zip(self.strides, self.grids, strict=True)):
            lowest = self.range_scale * 2.0 ** (order - 2) if order else 0.0
            highest = self.range_scale * 2.0**order if order < len(self.grids) - 1 else jnp.inf

            def cell_of(place: jax.Array, count: int = count) -> jax.Array:
                return jnp.clip(jnp.trunc(place / size / (1 / count)), -2, count + 1)

            middle = cell_of(centre)
            first = jnp.maximum(jnp.maximum(cell_of(centre - reach), 0), middle - 1)
            last = jnp.minimum(jnp.minimum(cell_of(centre + reach), count - 1), middle + 1)
            place = jnp.arange(count)[None, None]
            columns, rows = ((first[..., axis, None] <= place) & (place <= last[..., axis, None]) for axis in (0, 1))
            learns = real & (side >= lowest) & (side <= highest)
            covers = learns[..., None, None] & rows[..., :, None] & columns[..., None, :]
            number_of = jnp.arange(covers.shape[1], dtype=jnp.int32)[None, :, None, None]
            owners[level] = jnp.max(jnp.where(covers, number_of, -1), axis=1).reshape(len(covers), -1)
        return owners

    @nn.nowrap
    def loss(self, predictions: SOLOPredictions, targets: Targets, image_size: jax.Array) -> Terms:
        """{"cls": focal loss, "mask": 3 times the dice loss}, float32 scalars (equations 2 to 5).

        ``cls`` is the sum over the cells of all levels by the number of positive cells in the global batch and one,
        ``mask`` the mean over positive cells. The mean over devices of what each returns is the global loss.

        Raises:
            ValueError: targets without masks.
        """
        if targets.masks is None:
            raise ValueError("SOLO learns masks, but its targets have none; train it on data with masks.")
        owners = self.assign(targets, image_size)
        levels = list(owners)
        owner = jnp.concatenate(list(owners.values()), axis=1)
        positive = owner >= 0
        logits = jnp.concatenate(
            [predictions.logits[level].reshape(len(owner), -1, self.num_classes) for level in levels], axis=1
        )
        labels = jnp.take_along_axis(targets.labels, jnp.maximum(owner, 0), axis=1)
        number_of = jnp.sum(positive)
        devices = 1 if self.axis_name is None else jax.lax.psum(1, self.axis_name)
        count = mean_count(number_of + 1 / devices, self.axis_name)
        mask = jnp.zeros(())
        for level in levels:
            mask += self._dice(level, predictions, owners[level], targets.masks, image_size)
        return {
            "cls": jnp.sum(focal_sums(logits, labels, Assignment(owner, positive, ~positive))) / count,
            "mask": MASK_WEIGHT * mask / mean_count(number_of, self.axis_name),
        }

    @nn.nowrap
    def _dice(
        self, level: str, predictions: SOLOPredictions, owner: jax.Array, masks: Masks, image_size: jax.Array
    ) -> jax.Array:
        """The dice losses of a level's positive cells, summed over images and cells.

        Their masks are made ``CHUNK`` at a time, in the backward pass once more, and only as many as there are.
        """
        step = self.steps[level] // 2
        cells, objects = owner.shape[1], masks.grid.shape[1]
        most = min(cells, CELLS_OF_AN_OBJECT * objects)
        chunk = min(CHUNK, most, 2 * objects)

        def of_image(image: Any) -> jax.Array:
            maps, kernels, biases, owner, grid, frame, size = image
            extent = padded(size) // step
            where = jnp.arange(maps.shape[0])[:, None] < extent[0]
            where &= jnp.arange(maps.shape[1])[None] < extent[1]
            goals = sampled(Masks(grid, frame), maps.shape[:2], step)

            def of_some(index: jax.Array) -> jax.Array:
                there = jnp.minimum(index, cells - 1)
                logits = _masks(maps, kernels[there], biases[there])
                goal = goals[jnp.maximum(owner[there], 0)]
                loss = dice_loss(jax.nn.sigmoid(logits), goal, where[None])
                return jnp.sum(jnp.where(index < cells, loss, 0))

            # Inside of the condition the maps would be kept once for every chunk.
            @jax.checkpoint
            def if_any(index: jax.Array) -> jax.Array:
                return jax.lax.cond(index[0] < cells, of_some, lambda _: jnp.zeros(()), index)

            index = jnp.nonzero(owner >= 0, size=-(-most // chunk) * chunk, fill_value=cells)[0]
            return jnp.sum(jax.lax.map(if_any, index.reshape(-1, chunk)))

        images = (
            predictions.features[level],
            predictions.kernels[level],
            predictions.biases[level],
            owner,
            *masks,
            image_size,
        )
        return jnp.sum(jax.lax.map(of_image, images))

    @nn.nowrap
    def decode(self, predictions: SOLOPredictions, image_size: jax.Array) -> Detections:
        """Predictions to the detections of images of height and width ``image_size`` (N, 2).

        A class of a cell is a candidate where its score is a maximum among the three neighbours above and to the left
        of it and itself, and above the threshold, and the cell's mask has more positions than the level's stride. Its
        score is multiplied by the mean of the mask's probabilities above one half. The best candidates go through
        Matrix NMS. Images are worked through one after another, masks of cells row by row, and those of candidates some
        at a time.
        """

        def of_image(image: tuple[SOLOPredictions, jax.Array]) -> Detections:
            return self._found(*image)

        return jax.lax.map(of_image, (predictions, image_size))

    @nn.nowrap
    def probabilities(
        self, predictions: SOLOPredictions, level: str, cells: jax.Array, image_size: jax.Array
    ) -> jax.Array:
        """The masks of K cells of a level in one image: (K, H, W) float32, of the finest features' size; 0 beyond.

        Args:
            predictions: of one image, without the first axis.
            level: of the cells.
            cells: (K,) int, counted row by row.
            image_size: (2,) height and width.
        """
        finest = next(iter(self.steps))
        extents = [padded(image_size)[None] // (self.steps[name] // 2) for name in (level, finest)]
        maps = predictions.features[level]
        size = predictions.features[finest].shape[:2]
        found = jax.nn.sigmoid(_masks(maps, predictions.kernels[level][cells], predictions.biases[level][cells]))
        if maps.shape[:2] != size:
            rows, columns = (
                interpolation(extents[0][:, axis], extents[1][:, axis], maps.shape[axis], size[axis])[0]
                for axis in (0, 1)
            )
            found = jnp.einsum("Hh,khw,Ww->kHW", rows, found, columns, precision="highest")
        where = jnp.arange(size[0])[:, None] < extents[1][0, 0]
        where &= jnp.arange(size[1])[None] < extents[1][0, 1]
        return jnp.where(where[None], found, 0)

    @nn.nowrap
    def _found(self, predictions: SOLOPredictions, image_size: jax.Array) -> Detections:
        """The detections of one image."""
        scores, levels = [], list(self.steps)
        for level, count in zip(levels, self.grids, strict=True):

            def certainty(cells: jax.Array, level: str = level) -> jax.Array:
                """How sure masks are where they are: 0 of masks that are too small."""
                found = self.probabilities(predictions, level, cells, image_size)
                area = jnp.sum(found > 0.5, axis=(1, 2))
                total = jnp.sum(jnp.where(found > 0.5, found, 0), axis=(1, 2))
                return jnp.where(area > self.steps[level], total / jnp.maximum(area, 1), 0)

            sure = jax.lax.map(certainty, jnp.arange(count**2).reshape(count, count)).reshape(-1, 1)
            score = peaks(jax.nn.sigmoid(predictions.logits[level].astype(jnp.float32))).reshape(count**2, -1)
            scores.append(jnp.where(score > self.score_threshold, score * sure, 0))
        best, cell, label = (x[0] for x in best_pairs(jnp.concatenate(scores)[None], self.candidates))

        soft = self._masks_of(predictions, cell, image_size)
        segments = (soft > HALF) & (best > 0)[:, None, None]
        score = matrix_nms(segments, best, label, sigma=self.sigma)
        score = jnp.where((best > 0) & (score >= self.kept_score), score, 0)
        score, chosen = jax.lax.top_k(score, min(self.max_detections, len(score)))
        valid = score > 0
        soft = jnp.where(valid[:, None, None], soft[chosen], 0)
        return Detections(
            boxes=_tight(soft > HALF, self.steps[levels[0]] // 2, image_size),
            scores=score,
            labels=jnp.where(valid, label[chosen], 0),
            valid=valid,
            whole_masks=soft,
        )

    @nn.nowrap
    def _masks_of(self, predictions: SOLOPredictions, cells: jax.Array, image_size: jax.Array) -> jax.Array:
        """255 times the masks (K, H, W) uint8 of K cells, counted through all levels, of the finest features' size.

        They are made ``FOUND_CHUNK`` at a time in the order of the levels, so that most chunks are of one level alone.
        """
        order = jnp.argsort(cells)
        chunk = min(FOUND_CHUNK, len(cells))
        rows = jnp.pad(cells[order], (0, -len(cells) % chunk), mode="edge").reshape(-1, chunk)
        size = predictions.features[next(iter(self.steps))].shape[:2]

        def of_some(cells: jax.Array) -> jax.Array:
            first, masks = 0, jnp.zeros((chunk, *size), jnp.uint8)
            for level, count in zip(self.steps, self.grids, strict=True):
                here = (cells >= first) & (cells < first + count**2)

                def with_level(masks: jax.Array, level: str = level, here: jax.Array = here, first: int = first) -> Any:
                    index = jnp.where(here, cells - first, 0)
                    found = jnp.round(255 * self.probabilities(predictions, level, index, image_size))
                    return jnp.where(here[:, None, None], found.astype(jnp.uint8), masks)

                masks = jax.lax.cond(jnp.any(here), with_level, lambda masks: masks, masks)
                first += count**2
            return masks

        return jax.lax.map(of_some, rows).reshape(-1, *size)[jnp.argsort(order)]


def _extent(image_size: jax.Array, stride: int, size: tuple[int, int]) -> jax.Array:
    """(N, 2) int32: positions of a map that see images of that size (N, 2), padded."""
    return jnp.minimum(-(-padded(image_size) // stride), jnp.array([size], jnp.int32))


def _masks(maps: jax.Array, kernels: jax.Array, biases: jax.Array) -> jax.Array:
    """Logits (K, h, w) float32 of K cells, from maps (h, w, C), kernels (K, C) and biases (K,)."""
    kernels = kernels.astype(maps.dtype)
    # Cells last: in the other order a CPU turns the maps around for every few cells.
    logits = jnp.einsum("hwc,kc->hwk", maps, kernels, preferred_element_type=jnp.float32)
    return jnp.moveaxis(logits, -1, 0) + biases.astype(jnp.float32)[:, None, None]


def peaks(scores: jax.Array) -> jax.Array:
    """Scores (S, S, classes) where none of the neighbours above and to the left is higher, zeros elsewhere."""
    window = jax.lax.reduce_window(scores, -jnp.inf, jax.lax.max, (2, 2, 1), (1, 1, 1), ((1, 0), (1, 0), (0, 0)))
    return jnp.where(window == scores, scores, 0)


def _tight(masks: jax.Array, step: int, image_size: jax.Array) -> jax.Array:
    """The boxes (K, 4) float32 around masks (K, h, w), clipped to the image, in pixels; zeros around nothing."""
    ends = []
    for axis, length in ((1, masks.shape[2]), (2, masks.shape[1])):
        line = jnp.any(masks, axis=axis)
        first, last = jnp.argmax(line, axis=1), length - jnp.argmax(line[:, ::-1], axis=1)
        ends.append(jnp.where(jnp.any(line, axis=1)[None], jnp.stack([first, last]), 0))
    (left, right), (top, bottom) = ends
    found = step * jnp.stack([left, top, right, bottom], axis=-1)
    return jnp.minimum(found, jnp.tile(image_size[::-1], 2)[None]).astype(jnp.float32)


def sampled(masks: Masks, size: tuple[int, ...], step: int) -> jax.Array:
    """The masks of K objects as maps whose positions are ``step`` pixels apart: (K, h, w) bool.

    A position is the object's where it covers at least half of the four pixels at its centre, as OpenCV resizes bytes
    bilinearly by an even number. Exact for objects whose cells are pixels; of larger ones it is what their grid says.

    Args:
        masks: grids (K, S, S) and frames (K, 4).
        size: h and w.
        step: even.
    """
    grid, frame = masks

    def lines(low: jax.Array, high: jax.Array, length: int) -> jax.Array:
        """(K, length, S): how much each cell counts at each position."""
        near = jnp.arange(length) * step + step // 2 - 0.5
        pixels = jnp.stack([near, near + 1])[None]
        cell = (high - low) / grid.shape[-1]
        index = jnp.floor((pixels - low[:, None, None]) / jnp.where(cell > 0, cell, 1)[:, None, None])
        counts = index[..., None] == jnp.arange(grid.shape[-1])[None, None, None]
        return jnp.mean(counts.astype(jnp.float32), axis=1)

    rows, columns = lines(frame[:, 1], frame[:, 3], size[0]), lines(frame[:, 0], frame[:, 2], size[1])
    # Halves and ones, of which also bfloat16 makes exact products.
    shares = jnp.einsum("khi,kij,kwj->khw", rows, grid.astype(jnp.float32), columns)
    return shares >= 0.5
