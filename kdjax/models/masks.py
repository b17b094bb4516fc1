"""What a mask head learns: the masks of objects, cropped to the RoIs that learn them (He et al., Mask R-CNN, 2017)."""

import jax
import jax.numpy as jnp

from kdjax.models.roi_align import axis_weights
from kdjax.types import Masks


def mask_targets(
    masks: Masks, boxes: jax.Array, matched: jax.Array, limits: jax.Array, *, size: int, aligned: bool, binary: bool
) -> jax.Array:
    """The mask of each RoI's object, pooled to a grid over the RoI as by RoIAlign.

    Exact for objects whose cells are pixels; of larger ones it pools what their grid says.

    Args:
        masks: of M objects in each of N images.
        boxes: (N, R, 4) the RoIs, xyxy in pixels of the padded image.
        matched: (N, R) int32, the object of each RoI.
        limits: (N, 2) int32, height and width of the images that masks are cut of: samples beyond take the value of the
            border. Those are the padded images in MMDetection, the unpadded ones in torchvision.
        size: m, the side of the targets, 28 in Mask R-CNN.
        aligned: whether cells stand for their centres (MMDetection) or for their corners (torchvision).
        binary: whether targets are 0 or 1, 1 from one half (MMDetection), or fractions (torchvision).

    Returns:
        (N, R, m, m) float32 in [0, 1].
    """
    grid = jax.vmap(lambda grid, index: grid[index])(masks.grid, matched).astype(jnp.float32)
    frame = jnp.take_along_axis(masks.frame, matched[..., None], axis=1)
    cells = grid.shape[-1]

    def weights(axis: int) -> jax.Array:
        """(N, R, m, S), along x for axis 0 and y for axis 1."""
        cell = (frame[..., axis + 2] - frame[..., axis]) / cells
        cell = jnp.where(cell > 0, cell, 1)
        first = jnp.round(frame[..., axis] / cell)
        # Where cells are pixels, these are the pixels of the whole image; where not, the nearest multiple of a cell.
        shift = first * cell - frame[..., axis]
        interval = (boxes[..., [axis, axis + 2]] + shift[..., None]) / cell[..., None]
        return axis_weights(
            interval,
            first[..., None] + jnp.arange(cells)[None, None],
            limits[:, 1 - axis][:, None] / cell,
            bins=size,
            sampling_ratio=0,
            aligned=aligned,
        )

    targets = jnp.einsum("nrpi,nrij,nrqj->nrpq", weights(1), grid, weights(0), precision="highest")
    return (targets >= 0.5).astype(jnp.float32) if binary else targets
