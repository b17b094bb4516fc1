"""What all detectors share: the way from images to features, and from there to detections."""

from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from kdjax.models.preprocess import IMAGENET_MEAN, IMAGENET_STD, RGB, normalize
from kdjax.options import COLOUR, FLAG, SPREAD, check_fields
from kdjax.types import Detections, Features, Sampling


class Detector(nn.Module):
    """A backbone and a neck. A detector adds its heads, what they learn from targets, and what they find.

    That is ``heads`` and ``decode``, which this class calls, and ``loss``, ``heads_at`` and ``terms``, which the
    distillation step does.

    Attributes:
        backbone: normalised images (N, H, W, 3) to named maps; takes ``train``.
        neck: those maps to a pyramid of features; states their ``strides``.
        num_classes: number of classes, without a background.
        axis_name: mapped axis over which counts are averaged; None outside of one.
        dtype: of the computation; parameters and losses are float32.
    """

    backbone: nn.Module
    neck: nn.Module
    num_classes: int
    pixel_mean: Annotated[RGB, COLOUR, "Of red, green and blue on the scale of 0 to 255."] = IMAGENET_MEAN
    pixel_std: Annotated[RGB, SPREAD, "Likewise."] = IMAGENET_STD
    frozen_norm: Annotated[
        bool,
        FLAG,
        "Whether batch norm uses its running statistics in training too and never updates them.",
    ] = False
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    task: ClassVar[str] = "detection"

    def __post_init__(self) -> None:
        check_fields(self)
        super().__post_init__()

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the image from one position of each level to the next, fine to coarse."""
        return self.neck.strides

    @nn.nowrap
    def ordered(self, maps: Features) -> list[str]:
        """The levels of maps, fine to coarse."""
        return sorted(maps, key=self.strides.__getitem__)

    @nn.nowrap
    def preprocess(self, images: jax.Array, image_size: jax.Array) -> jax.Array:
        """uint8 images (N, H, W, 3) of size ``image_size`` (N, 2) to float32 ones, exact zeros in the padding."""
        return normalize(images, image_size, self.pixel_mean, self.pixel_std)

    def features(self, images: jax.Array, train: bool = False) -> Features:
        """Normalised images (N, H, W, 3) to the neck's pyramid; ``train`` updates the batch norm unless frozen."""
        return self.neck(self.backbone(images, train=train and not self.frozen_norm))

    def __call__(
        self,
        images: jax.Array,
        image_size: jax.Array | None = None,
        train: bool = False,
        sampling: Sampling | None = None,
    ) -> tuple[Features, Any]:
        """Normalised images (N, H, W, 3) to the pyramid and the predictions of ``heads``."""
        features = self.features(images, train)
        return features, self.heads(features, image_size, sampling)

    def predict(self, images: jax.Array, image_size: jax.Array) -> Detections:
        """uint8 images (N, H, W, 3) of size ``image_size`` (N, 2) to detections: everything that inference is."""
        _, predictions = self(self.preprocess(images, image_size), image_size)
        return self.decode(predictions, image_size)

    def detect(self, images: jax.Array, image_size: jax.Array) -> Detections:
        """The name of :meth:`predict` in version 0.1."""
        return self.predict(images, image_size)
