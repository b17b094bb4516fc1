"""A detector small enough that its training step compiles in a second, and batches for it."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdjax.methods.boxes import BoxImitation
from kdjax.models.fpn import FPN
from kdjax.models.norm import BatchNorm
from kdjax.models.retinanet import RetinaNet
from kdjax.types import Batch, Features, Masks, Targets, View

CLASSES = 3
SIZE = 64


class TinyBackbone(nn.Module):
    """One strided convolution and batch norm a level, C2 to C5."""

    width: int = 8
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> Features:
        maps, x = {}, nn.avg_pool(images, (2, 2), (2, 2))
        for level in range(2, 6):
            x = nn.Conv(self.width, (3, 3), 2, name=f"conv{level}")(x)
            x = BatchNorm(train, axis_name=self.axis_name, name=f"bn{level}")(x)
            x = maps[f"c{level}"] = nn.relu(x)
        return maps


def detector(*, width: int = 8, channels: int = 8, axis_name: str | None = None) -> RetinaNet:
    return RetinaNet(
        backbone=TinyBackbone(width, axis_name=axis_name),
        neck=FPN(channels, max_level=6),
        num_classes=CLASSES,
        convs=1,
        anchor_scale=2.0,
        axis_name=axis_name,
    )


def batch(images: int = 8, *, seed: int = 0, objects: int = 4, masks: bool = False) -> Batch:
    """Random images of different sizes with 0 to ``objects`` boxes each, which masks fill where there are ``masks``."""
    rng = np.random.default_rng(seed)
    size = rng.integers(SIZE // 2, SIZE + 1, (images, 2)).astype(np.int32)
    pixels = rng.integers(0, 256, (images, SIZE, SIZE, 3), dtype=np.uint8)
    for image, (height, width) in zip(pixels, size, strict=True):
        image[height:] = image[:, width:] = 0
    corner = rng.uniform(0, 0.5, (images, objects, 2))
    far = corner + rng.uniform(0.2, 0.5, (images, objects, 2))
    scale = np.tile(size[:, None, ::-1], 2)
    valid = np.arange(objects) < rng.integers(0, objects + 1, (images, 1))
    boxes = (np.concatenate([corner, far], -1) * scale * valid[..., None]).astype(np.float32)
    full = Masks(np.broadcast_to(valid[..., None, None], (images, objects, 8, 8)), boxes)
    return Batch(
        images=pixels,
        size=size,
        index=np.arange(images, dtype=np.int32),
        targets=Targets(
            boxes=boxes,
            labels=rng.integers(0, CLASSES, (images, objects), dtype=np.int32) * valid,
            valid=valid,
            masks=full if masks else None,
        ),
    )


def pyramid(channels: int, *, images: int = 2, seed: int = 0, dtype: jnp.dtype = jnp.float32) -> Features:
    """Random features P3 to P6 of the images of :func:`batch`."""
    rng = np.random.default_rng(seed)
    shapes = {f"p{level}": (images, SIZE >> level, SIZE >> level, channels) for level in range(3, 7)}
    return {level: jnp.asarray(rng.normal(size=shape), dtype) for level, shape in shapes.items()}


def imitation(ours: Any, theirs: Any, *, strides: Mapping[str, int], size: jax.Array, targets: Targets) -> jax.Array:
    """The term of ``BoxImitation`` of a student's predictions and what a teacher's heads say in their places."""
    student, teacher = View({}, strides, ours), View({}, strides)
    given = {"size": size, "targets": targets, "teacher_heads": lambda predictions: theirs}
    return sum(BoxImitation().apply({}, student, teacher, **given)["box_imitation"].values())
